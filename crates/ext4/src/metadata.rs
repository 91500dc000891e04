use crate::Ino;

/// A point in time, in seconds and nanoseconds since 1970.
///
/// An inode holds seconds from -2^31 up to 2^34 - 2^31 (the year 2446), one of 128 bytes only whole seconds up to 2^31 (2038);
/// what lies outside is moved to the nearest end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds since the start of 1970, UTC.
    pub seconds: i64,
    /// Nanoseconds past that second, below 1,000,000,000.
    pub nanos: u32,
}

const MAX_NANOS: u32 = 999_999_999;

impl Timestamp {
    /// From the 32-bit field and the one that extends it by two bits and nanoseconds.
    pub(crate) fn decode(seconds: u32, extra: Option<u32>) -> Self {
        let seconds = i64::from(seconds.cast_signed());
        let extra = extra.unwrap_or(0);
        // There is room for more nanoseconds than a second has.
        Self { seconds: seconds + (i64::from(extra & 3) << 32), nanos: (extra >> 2).min(MAX_NANOS) }
    }

    pub(crate) fn clamped_to_32_bits(self) -> Self {
        Self { seconds: self.seconds.clamp(i32::MIN.into(), i32::MAX.into()), ..self }
    }

    /// The 32-bit field and the one that extends it.
    pub(crate) fn encode(self) -> (u32, u32) {
        const MIN: i64 = i32::MIN as i64;
        let above_min = self.seconds.clamp(MIN, (1 << 34) + MIN - 1) - MIN;
        // Both the epoch and the field count from the smallest signed value.
        let epoch = u32::try_from(above_min >> 32).unwrap_or(3);
        let field = u32::try_from(above_min & 0xffff_ffff).unwrap_or(0).wrapping_add(1 << 31);
        (field, epoch | self.nanos.min(MAX_NANOS) << 2)
    }
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FileType {
    /// A file with content.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
}

impl FileType {
    pub(crate) fn of_mode(mode: u16) -> Option<Self> {
        Some(match mode >> 12 {
            0o1 => Self::Fifo,
            0o2 => Self::CharDevice,
            0o4 => Self::Directory,
            0o6 => Self::BlockDevice,
            0o10 => Self::Regular,
            0o12 => Self::Symlink,
            0o14 => Self::Socket,
            _ => return None,
        })
    }

    /// From the code that directory entries use.
    pub(crate) fn of_entry_code(code: u8) -> Option<Self> {
        const TYPES: [FileType; 7] = [
            FileType::Regular,
            FileType::Directory,
            FileType::CharDevice,
            FileType::BlockDevice,
            FileType::Fifo,
            FileType::Socket,
            FileType::Symlink,
        ];
        TYPES.get(usize::from(code).checked_sub(1)?).copied()
    }

    /// The code that directory entries use.
    pub(crate) fn entry_code(self) -> u8 {
        match self {
            Self::Regular => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink => 7,
        }
    }

    /// The type's bits of an inode's mode.
    pub(crate) fn mode(self) -> u16 {
        match self {
            Self::Fifo => 0o01_0000,
            Self::CharDevice => 0o02_0000,
            Self::Directory => 0o04_0000,
            Self::BlockDevice => 0o06_0000,
            Self::Regular => 0o10_0000,
            Self::Symlink => 0o12_0000,
            Self::Socket => 0o14_0000,
        }
    }
}

/// What an inode says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metadata {
    /// The inode's number.
    pub ino: Ino,
    /// What it is.
    pub file_type: FileType,
    /// Permission bits with set-uid, set-gid and sticky: `0o7777`.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names; 1 for a directory with more subdirectories than the field can count.
    pub links: u32,
    /// Size in bytes; of a symbolic link, its target's length.
    pub size: u64,
    /// Bytes of all blocks in use, those for block maps and attributes included.
    pub allocated: u64,
    /// Time of the last read.
    pub atime: Timestamp,
    /// Time of the last change of content.
    pub mtime: Timestamp,
    /// Time of the last change of the inode.
    pub ctime: Timestamp,
    /// When the inode was made, where inodes are large enough to say so.
    pub crtime: Option<Timestamp>,
    /// Major and minor number of a device, zero for all else.
    pub rdev: (u32, u32),
    /// The inode's flags, as `lsattr` shows them (`EXT4_*_FL`).
    pub flags: u32,
}

#[cfg(test)]
mod tests {
    use super::Timestamp;

    #[test]
    fn times_survive_a_round_trip_and_are_clamped() {
        const MIN: i64 = i32::MIN as i64;
        for seconds in [MIN, -1, 0, 1, i64::from(i32::MAX), 1 << 31, 1 << 32, (1 << 34) + MIN - 1] {
            let time = Timestamp { seconds, nanos: 999_999_999 };
            let (field, extra) = time.encode();
            assert_eq!(Timestamp::decode(field, Some(extra)), time);
        }
        let (field, extra) = Timestamp { seconds: i64::MAX, nanos: 0 }.encode();
        assert_eq!(Timestamp::decode(field, Some(extra)).seconds, (1 << 34) + MIN - 1);
        assert_eq!(Timestamp::decode(0, Some(u32::MAX)).nanos, 999_999_999);
    }
}
