//! Inodes: kept as read, with the fields that are understood patched in place.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::checksum::{self, Seed};
use crate::error::{Error, Place, Result};
use crate::metadata::{FileType, Timestamp};
use crate::{BlockNr, Ino};

pub(crate) const FLAG_IMMUTABLE: u32 = 0x10;
pub(crate) const FLAG_APPEND: u32 = 0x20;
pub(crate) const FLAG_ENCRYPT: u32 = 0x800;
pub(crate) const FLAG_INDEX: u32 = 0x1000;
pub(crate) const FLAG_HUGE_FILE: u32 = 0x4_0000;
pub(crate) const FLAG_EXTENTS: u32 = 0x8_0000;
pub(crate) const FLAG_VERITY: u32 = 0x10_0000;
pub(crate) const FLAG_EA_INODE: u32 = 0x20_0000;
pub(crate) const FLAG_INLINE_DATA: u32 = 0x1000_0000;
pub(crate) const FLAG_CASEFOLD: u32 = 0x4000_0000;

/// Bytes of an inode that every version of the format has.
const CORE_LEN: usize = 128;
pub(crate) const MAP_LEN: usize = 60;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawInode {
    mode: U16,
    uid_lo: U16,
    size_lo: U32,
    atime: U32,
    ctime: U32,
    mtime: U32,
    dtime: U32,
    gid_lo: U16,
    links: U16,
    blocks_lo: U32,
    flags: U32,
    version: U32,
    map: [u8; MAP_LEN],
    generation: U32,
    file_acl_lo: U32,
    size_hi: U32,
    fragment: U32,
    blocks_hi: U16,
    file_acl_hi: U16,
    uid_hi: U16,
    gid_hi: U16,
    checksum_lo: U16,
    reserved: U16,
}

const _: () = assert!(size_of::<RawInode>() == CORE_LEN);

/// Fields behind the first 128 bytes, by their offset there. Each exists if `i_extra_isize` reaches past it.
#[derive(Clone, Copy)]
enum LateField {
    CtimeExtra = 0x04,
    MtimeExtra = 0x08,
    AtimeExtra = 0x0c,
    Crtime = 0x10,
    CrtimeExtra = 0x14,
}

const CHECKSUM_HI: std::ops::Range<usize> = 2..4;

/// One of an inode's three times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Time {
    Access,
    Change,
    Modification,
}

/// An inode with its number.
#[derive(Clone, Debug)]
pub(crate) struct Inode {
    ino: Ino,
    core: RawInode,
    /// All bytes behind the core: `i_extra_isize` of fields, then extended attributes.
    rest: Vec<u8>,
}

impl Inode {
    /// Takes the inode's bytes from the inode table.
    pub(crate) fn parse(ino: Ino, bytes: &[u8]) -> Result<Self> {
        let corrupt = |problem| Error::corrupt(Place::Inode(ino), problem);
        let (core, rest) = RawInode::read_from_prefix(bytes).map_err(|_| corrupt("the inode is too short"))?;
        let inode = Self { ino, core, rest: rest.to_vec() };
        let extra = inode.extra_len();
        if extra > inode.rest.len() || !extra.is_multiple_of(4) {
            return Err(corrupt("the size of its extra fields is impossible"));
        }
        Ok(inode)
    }

    /// An inode with nothing set but its type, permissions and one link.
    pub(crate) fn fresh(ino: Ino, inode_size: u16, want_extra: u16, mode: u16) -> Self {
        let mut rest = vec![0; usize::from(inode_size).saturating_sub(CORE_LEN)];
        if let Some(field) = rest.get_mut(..2) {
            field.copy_from_slice(&want_extra.min(inode_size - 128).next_multiple_of(4).to_le_bytes());
        }
        let mut core = RawInode::new_zeroed();
        core.mode = mode.into();
        core.links = 1.into();
        Self { ino, core, rest }
    }

    /// The bytes to store, without a fresh checksum.
    fn to_bytes(&self) -> Vec<u8> {
        [self.core.as_bytes(), &self.rest].concat()
    }

    /// The bytes to store, checksummed by the file system's seed if it has one.
    pub(crate) fn seal(&mut self, seed: Option<Seed>) -> Vec<u8> {
        if let Some(seed) = seed {
            let wide = self.has_wide_checksum();
            let [a, b, c, d] = checksum::inode(self.seed(seed), &self.to_bytes(), wide).to_le_bytes();
            self.core.checksum_lo = u16::from_le_bytes([a, b]).into();
            if wide {
                self.rest[CHECKSUM_HI].copy_from_slice(&[c, d]);
            }
        }
        self.to_bytes()
    }

    pub(crate) fn verify(&self, seed: Seed) -> Result<()> {
        let wide = self.has_wide_checksum();
        let high =
            if wide { u16::from_le_bytes([self.rest[CHECKSUM_HI.start], self.rest[CHECKSUM_HI.start + 1]]) } else { 0 };
        let stored = u32::from(self.core.checksum_lo.get()) | u32::from(high) << 16;
        if checksum::inode(self.seed(seed), &self.to_bytes(), wide) != stored {
            return Err(Error::corrupt(Place::Inode(self.ino), "the checksum is wrong"));
        }
        Ok(())
    }

    fn has_wide_checksum(&self) -> bool {
        self.extra_len() >= CHECKSUM_HI.end
    }

    /// The checksum seed for everything that belongs to the inode.
    pub(crate) fn seed(&self, file_system: Seed) -> Seed {
        file_system.of_inode(self.ino, self.generation())
    }

    pub(crate) fn ino(&self) -> Ino {
        self.ino
    }

    fn extra_len(&self) -> usize {
        match self.rest.first_chunk() {
            Some(&field) => u16::from_le_bytes(field).into(),
            None => 0,
        }
    }

    fn extra(&self, field: LateField) -> Option<u32> {
        let at = field as usize;
        if at + 4 > self.extra_len() {
            return None;
        }
        self.rest.get(at..)?.first_chunk().map(|&bytes| u32::from_le_bytes(bytes))
    }

    fn set_extra(&mut self, field: LateField, value: u32) {
        let at = field as usize;
        if at + 4 <= self.extra_len() {
            self.rest[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// The bytes for extended attributes within the inode: a magic number, then entries. Empty where there are none.
    pub(crate) fn xattr_area(&self) -> &[u8] {
        match self.extra_len() {
            0 => &[],
            len => &self.rest[len..],
        }
    }

    pub(crate) fn xattr_area_mut(&mut self) -> &mut [u8] {
        match self.extra_len() {
            0 => &mut [],
            len => &mut self.rest[len..],
        }
    }

    pub(crate) fn mode(&self) -> u16 {
        self.core.mode.get()
    }

    pub(crate) fn set_permissions(&mut self, permissions: u16) {
        self.core.mode = (self.mode() & !0o7777 | permissions & 0o7777).into();
    }

    pub(crate) fn file_type(&self) -> Result<FileType> {
        FileType::of_mode(self.mode()).ok_or_else(|| Error::corrupt(Place::Inode(self.ino), "the file type is unknown"))
    }

    pub(crate) fn is(&self, file_type: FileType) -> bool {
        FileType::of_mode(self.mode()) == Some(file_type)
    }

    pub(crate) fn links(&self) -> u16 {
        self.core.links.get()
    }

    pub(crate) fn set_links(&mut self, links: u16) {
        self.core.links = links.into();
    }

    pub(crate) fn uid(&self) -> u32 {
        u32::from(self.core.uid_lo.get()) | u32::from(self.core.uid_hi.get()) << 16
    }

    pub(crate) fn set_uid(&mut self, uid: u32) {
        let [a, b, c, d] = uid.to_le_bytes();
        self.core.uid_lo = u16::from_le_bytes([a, b]).into();
        self.core.uid_hi = u16::from_le_bytes([c, d]).into();
    }

    pub(crate) fn gid(&self) -> u32 {
        u32::from(self.core.gid_lo.get()) | u32::from(self.core.gid_hi.get()) << 16
    }

    pub(crate) fn set_gid(&mut self, gid: u32) {
        let [a, b, c, d] = gid.to_le_bytes();
        self.core.gid_lo = u16::from_le_bytes([a, b]).into();
        self.core.gid_hi = u16::from_le_bytes([c, d]).into();
    }

    /// Size in bytes. Only regular files and directories use the upper half.
    pub(crate) fn size(&self) -> u64 {
        let high = if self.is(FileType::Regular) { self.core.size_hi.get() } else { 0 };
        u64::from(self.core.size_lo.get()) | u64::from(high) << 32
    }

    /// Size in bytes with its upper half, whatever the inode is.
    pub(crate) fn full_size(&self) -> u64 {
        u64::from(self.core.size_lo.get()) | u64::from(self.size_hi()) << 32
    }

    pub(crate) fn size_hi(&self) -> u32 {
        self.core.size_hi.get()
    }

    /// How many attributes have their value here, if the inode is one for values: kept in fields that it needs no more.
    pub(crate) fn value_references(&self) -> u64 {
        u64::from(self.core.ctime.get()) << 32 | u64::from(self.core.version.get())
    }

    /// A field that nothing uses any more.
    pub(crate) fn fragment(&self) -> u32 {
        self.core.fragment.get()
    }

    pub(crate) fn blocks_hi(&self) -> u16 {
        self.core.blocks_hi.get()
    }

    /// The count of blocks as it is stored; its unit is told by `FLAG_HUGE_FILE`.
    pub(crate) fn stored_blocks(&self, huge_file: bool) -> u64 {
        let high = if huge_file { self.core.blocks_hi.get() } else { 0 };
        u64::from(self.core.blocks_lo.get()) | u64::from(high) << 32
    }

    pub(crate) fn set_size(&mut self, size: u64) {
        let [a, b, c, d, high @ ..] = size.to_le_bytes();
        self.core.size_lo = u32::from_le_bytes([a, b, c, d]).into();
        self.core.size_hi = u32::from_le_bytes(high).into();
    }

    pub(crate) fn flags(&self) -> u32 {
        self.core.flags.get()
    }

    pub(crate) fn has(&self, flag: u32) -> bool {
        self.flags() & flag != 0
    }

    pub(crate) fn set_flag(&mut self, flag: u32, on: bool) {
        self.core.flags = if on { self.flags() | flag } else { self.flags() & !flag }.into();
    }

    pub(crate) fn generation(&self) -> u32 {
        self.core.generation.get()
    }

    pub(crate) fn set_generation(&mut self, generation: u32) {
        self.core.generation = generation.into();
    }

    /// Time of deletion, or the next inode of the orphan list.
    pub(crate) fn dtime(&self) -> u32 {
        self.core.dtime.get()
    }

    pub(crate) fn set_dtime(&mut self, dtime: u32) {
        self.core.dtime = dtime.into();
    }

    /// Bytes of all blocks that belong to the inode. `huge_file` is the file system's feature.
    pub(crate) fn allocated(&self, huge_file: bool, block_size: u32) -> u64 {
        let count = self.stored_blocks(huge_file);
        let unit = if huge_file && self.has(FLAG_HUGE_FILE) { block_size } else { 512 };
        count * u64::from(unit)
    }

    pub(crate) fn set_allocated(&mut self, bytes: u64, huge_file: bool, block_size: u32) -> Result<()> {
        const LIMIT: u64 = 1 << 48;
        let in_blocks = bytes / 512 >= LIMIT;
        let count = if in_blocks { bytes / u64::from(block_size) } else { bytes / 512 };
        let limit = if huge_file { LIMIT } else { 1 << 32 };
        if count >= limit || in_blocks && !huge_file {
            return Err(Error::FileTooLarge(self.ino));
        }
        let [a, b, c, d, e, f, ..] = count.to_le_bytes();
        self.core.blocks_lo = u32::from_le_bytes([a, b, c, d]).into();
        if huge_file {
            self.core.blocks_hi = u16::from_le_bytes([e, f]).into();
            self.set_flag(FLAG_HUGE_FILE, in_blocks);
        }
        Ok(())
    }

    /// The 60 bytes that hold a block map, a short link's target or a device's number.
    pub(crate) fn map(&self) -> &[u8; MAP_LEN] {
        &self.core.map
    }

    pub(crate) fn map_mut(&mut self) -> &mut [u8; MAP_LEN] {
        &mut self.core.map
    }

    /// The block of extended attributes, if there is one.
    pub(crate) fn xattr_block(&self) -> Option<BlockNr> {
        let block = u64::from(self.core.file_acl_lo.get()) | u64::from(self.core.file_acl_hi.get()) << 32;
        (block != 0).then_some(BlockNr(block))
    }

    pub(crate) fn set_xattr_block(&mut self, block: Option<BlockNr>) {
        let [a, b, c, d, e, f, ..] = block.map_or(0, |block| block.0).to_le_bytes();
        self.core.file_acl_lo = u32::from_le_bytes([a, b, c, d]).into();
        self.core.file_acl_hi = u16::from_le_bytes([e, f]).into();
    }

    pub(crate) fn time(&self, which: Time) -> Timestamp {
        let (seconds, extra) = match which {
            Time::Access => (self.core.atime, LateField::AtimeExtra),
            Time::Change => (self.core.ctime, LateField::CtimeExtra),
            Time::Modification => (self.core.mtime, LateField::MtimeExtra),
        };
        Timestamp::decode(seconds.get(), self.extra(extra))
    }

    pub(crate) fn set_time(&mut self, which: Time, time: Timestamp) {
        let extra = match which {
            Time::Access => LateField::AtimeExtra,
            Time::Change => LateField::CtimeExtra,
            Time::Modification => LateField::MtimeExtra,
        };
        let (low, high) = if self.extra(extra).is_some() { time.encode() } else { time.clamped_to_32_bits().encode() };
        match which {
            Time::Access => self.core.atime = low.into(),
            Time::Change => self.core.ctime = low.into(),
            Time::Modification => self.core.mtime = low.into(),
        }
        self.set_extra(extra, high);
    }

    /// When the inode was made, where it has room to say so.
    pub(crate) fn creation_time(&self) -> Option<Timestamp> {
        let seconds = self.extra(LateField::Crtime)?;
        Some(Timestamp::decode(seconds, self.extra(LateField::CrtimeExtra)))
    }

    pub(crate) fn set_creation_time(&mut self, time: Timestamp) {
        let (low, high) = time.encode();
        self.set_extra(LateField::Crtime, low);
        self.set_extra(LateField::CrtimeExtra, high);
    }

    /// Major and minor number of a device.
    pub(crate) fn device(&self) -> (u32, u32) {
        let [a, b, c, d, e, f, g, h, ..] = *self.map();
        match u32::from_le_bytes([a, b, c, d]) {
            0 => {
                let new = u32::from_le_bytes([e, f, g, h]);
                (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xfff00)
            }
            old => (old >> 8 & 0xff, old & 0xff),
        }
    }

    pub(crate) fn set_device(&mut self, major: u32, minor: u32) {
        let words = if major < 256 && minor < 256 {
            [major << 8 | minor, 0]
        } else {
            [0, minor & 0xff | (major & 0xfff) << 8 | (minor & 0xfff00) << 12]
        };
        self.core.map = [0; MAP_LEN];
        self.core.map[..4].copy_from_slice(&words[0].to_le_bytes());
        self.core.map[4..8].copy_from_slice(&words[1].to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(size: u16) -> Inode {
        Inode::fresh(Ino::ROOT, size, 32, 0o100_644)
    }

    #[test]
    fn times_reach_past_2038_only_with_extra_fields() {
        let time = Timestamp { seconds: 1 << 32, nanos: 123_456_789 };
        let mut large = inode(256);
        large.set_time(Time::Modification, time);
        large.set_creation_time(time);
        assert_eq!(large.time(Time::Modification), time);
        assert_eq!(large.creation_time(), Some(time));
        let mut small = inode(128);
        small.set_time(Time::Modification, Timestamp { seconds: -5, nanos: 7 });
        assert_eq!(small.time(Time::Modification), Timestamp { seconds: -5, nanos: 0 });
        assert_eq!(small.creation_time(), None);
    }

    #[test]
    fn device_numbers_take_both_forms() {
        for device in [(8, 1), (254, 255), (259, 3), (1, 0x12345), (4095, 0xfffff)] {
            let mut node = inode(256);
            node.set_device(device.0, device.1);
            assert_eq!(node.device(), device);
        }
    }

    #[test]
    fn counts_blocks_in_the_unit_that_fits() {
        for bytes in [0, 4096, (1 << 41) - 512, 1 << 41, 1 << 57] {
            let mut file = inode(256);
            file.set_allocated(bytes, true, 4096).unwrap();
            assert_eq!(file.allocated(true, 4096), bytes);
        }
        assert!(inode(256).set_allocated(1 << 41, false, 4096).is_err());
    }

    #[test]
    fn refuses_impossible_extra_fields() {
        let mut bytes = inode(256).to_bytes();
        bytes[128..130].copy_from_slice(&132_u16.to_le_bytes());
        assert!(Inode::parse(Ino::ROOT, &bytes).is_err());
    }

    #[test]
    fn seals_and_verifies() {
        let seed = Seed::stored(7);
        for size in [128, 256, 1024] {
            let bytes = inode(size).seal(Some(seed));
            assert!(Inode::parse(Ino::ROOT, &bytes).unwrap().verify(seed).is_ok());
            let mut damaged = bytes.clone();
            damaged[100] ^= 1;
            assert!(Inode::parse(Ino::ROOT, &damaged).unwrap().verify(seed).is_err());
        }
    }
}
