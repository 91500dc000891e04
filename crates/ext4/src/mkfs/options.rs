//! What a new file system is to be.

use std::str::FromStr;

use super::{MkfsError, Result};

/// A generation of the file system, by the features that it stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Type {
    /// No journal, block maps.
    Ext2,
    /// A journal, block maps.
    Ext3,
    /// A journal, extents, checksums.
    #[default]
    Ext4,
}

/// Whose defaults a new file system has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// e2fsprogs 1.47.0 of Ubuntu 24.04: with `metadata_csum_seed` and `orphan_file`, for kernels from 5.15 on.
    #[default]
    Ubuntu2404,
    /// e2fsprogs 1.47.2 of Debian 13: the same features.
    Debian13,
    /// e2fsprogs 1.47.0 of Debian 12: without those two features.
    Debian12,
}

/// What the file system will be used for, which decides how many inodes it has and, for the smallest, the block size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Below 3 MiB.
    Floppy,
    /// Below 512 MiB.
    Small,
    /// What lies between small and big.
    Default,
    /// From 4 TiB.
    Big,
    /// From 16 TiB.
    Huge,
    /// Many small files.
    News,
    /// Files of a megabyte.
    LargeFile,
    /// Files of four megabytes.
    LargeFile4,
}

impl Usage {
    /// What the size suggests.
    pub(super) fn of_size(bytes: u64) -> Self {
        match bytes >> 20 {
            0..3 => Self::Floppy,
            3..512 => Self::Small,
            512..0x40_0000 => Self::Default,
            0x40_0000..0x100_0000 => Self::Big,
            _ => Self::Huge,
        }
    }

    pub(super) fn block_size(self) -> u32 {
        if matches!(self, Self::Floppy | Self::Small) { 1024 } else { 4096 }
    }

    pub(super) fn bytes_per_inode(self) -> u64 {
        match self {
            Self::Floppy => 8 << 10,
            Self::Small | Self::News => 4 << 10,
            Self::Default => 16 << 10,
            Self::Big => 32 << 10,
            Self::Huge => 64 << 10,
            Self::LargeFile => 1 << 20,
            Self::LargeFile4 => 4 << 20,
        }
    }
}

impl FromStr for Usage {
    type Err = MkfsError;

    fn from_str(name: &str) -> Result<Self> {
        Ok(match name {
            "floppy" => Self::Floppy,
            "small" => Self::Small,
            "default" => Self::Default,
            "big" => Self::Big,
            "huge" => Self::Huge,
            "news" => Self::News,
            "largefile" => Self::LargeFile,
            "largefile4" => Self::LargeFile4,
            _ => {
                let known = "floppy, small, default, big, huge, news, largefile or largefile4";
                return Err(MkfsError::invalid(&format!("there is no usage type '{name}': use {known}")));
            }
        })
    }
}

/// Blocks that only the superuser may use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reserved {
    /// Of all blocks, up to 50.
    Percent(f64),
    /// This many bytes of them.
    Bytes(u64),
}

/// What the kernel does when it finds the file system damaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ErrorBehaviour {
    /// Go on.
    #[default]
    Continue,
    /// Go on without writing.
    RemountReadOnly,
    /// Stop.
    Panic,
}

/// How to lay out a file system. Everything left at its default is as mke2fs would choose it.
#[derive(Clone, Debug, PartialEq)]
pub struct MkfsOptions {
    /// ext2, ext3 or ext4.
    pub kind: Type,
    /// Whose default features.
    pub profile: Profile,
    /// Changes to the features: names separated by commas, `^` before those to leave out.
    pub features: String,
    /// What it will be used for; by its size where not given.
    pub usage: Option<Usage>,
    /// Bytes in a block: a power of two from 1024 to 65536.
    pub block_size: Option<u32>,
    /// Bytes in an inode: a power of two from 128 to the block size.
    pub inode_size: Option<u16>,
    /// How many inodes, at least.
    pub inodes: Option<u32>,
    /// One inode for so many bytes.
    pub bytes_per_inode: Option<u64>,
    /// Blocks in a group: a multiple of 8.
    pub blocks_per_group: Option<u32>,
    /// Groups whose bitmaps and inode tables lie together: a power of two.
    pub groups_per_flex: Option<u32>,
    /// Blocks for the superuser.
    pub reserved: Reserved,
    /// The volume's name, of up to 16 bytes.
    pub label: Vec<u8>,
    /// Where it was last mounted, of up to 64 bytes.
    pub last_mounted: Vec<u8>,
    /// The file system's identity.
    pub uuid: [u8; 16],
    /// What directory hashes start with; made from the identity where not given.
    pub hash_seed: Option<[u8; 16]>,
    /// The time of everything, in seconds since 1970.
    pub now: i64,
    /// Bytes of the journal.
    pub journal_size: Option<u64>,
    /// Bytes of the orphan file.
    pub orphan_file_size: Option<u64>,
    /// What the kernel does about damage.
    pub errors: ErrorBehaviour,
    /// Owner and group of the root directory.
    pub root_owner: (u32, u32),
    /// Permissions of the root directory.
    pub root_permissions: u16,
    /// Blocks that a RAID writes to one disk before it goes on to the next.
    pub stride: u16,
    /// Blocks in a stripe of a RAID.
    pub stripe_width: u32,
    /// Blocks that the file system can grow to; 1024 times its size where not given.
    pub resize: Option<u64>,
    /// Backups of the superblock with `sparse_super2`, up to 2.
    pub backups: u8,
    /// Leaves inode tables to the kernel to zero, as on a device that was not zeroed. Only with checksums of groups.
    pub lazy_inode_tables: bool,
    /// The device reads as zeroes: nothing has to be zeroed.
    pub device_is_zero: bool,
}

impl Default for MkfsOptions {
    fn default() -> Self {
        Self {
            kind: Type::default(),
            profile: Profile::default(),
            features: String::new(),
            usage: None,
            block_size: None,
            inode_size: None,
            inodes: None,
            bytes_per_inode: None,
            blocks_per_group: None,
            groups_per_flex: None,
            reserved: Reserved::Percent(5.0),
            label: Vec::new(),
            last_mounted: Vec::new(),
            uuid: [0; 16],
            hash_seed: None,
            now: 0,
            journal_size: None,
            orphan_file_size: None,
            errors: ErrorBehaviour::default(),
            root_owner: (0, 0),
            root_permissions: 0o755,
            stride: 0,
            stripe_width: 0,
            resize: None,
            backups: 2,
            lazy_inode_tables: false,
            device_is_zero: false,
        }
    }
}
