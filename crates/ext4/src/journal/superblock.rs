//! The journal's superblock (kernel documentation, "Journal (jbd2)", "Super Block").

use zerocopy::big_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::checksum::crc32c;
use crate::error::{Error, Place, Result};

pub(super) const MAGIC: u32 = 0xc03b_3998;
const SUPERBLOCK_V1: u32 = 3;
const SUPERBLOCK_V2: u32 = 4;
const CHECKSUM_TYPE_CRC32C: u8 = 4;
const DEFAULT_FAST_COMMIT_BLOCKS: u32 = 256;

const COMPAT_CHECKSUM: u32 = 1;
const INCOMPAT_64BIT: u32 = 2;
const INCOMPAT_ASYNC_COMMIT: u32 = 4;
const INCOMPAT_CSUM_V2: u32 = 8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
/// Those above and revoke records (1).
const INCOMPAT_KNOWN: u32 = 0x3f;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSuperblock {
    magic: U32,
    block_type: U32,
    header_sequence: U32,
    block_size: U32,
    blocks: U32,
    first: U32,
    sequence: U32,
    start: U32,
    errno: U32,
    compat: U32,
    incompat: U32,
    ro_compat: U32,
    uuid: [u8; 16],
    users: U32,
    dynamic_superblock: U32,
    max_transaction: U32,
    max_transaction_data: U32,
    checksum_type: u8,
    padding: [u8; 3],
    fast_commit_blocks: U32,
    head: U32,
    reserved: [U32; 40],
    checksum: U32,
    user_ids: [u8; 768],
}

pub(crate) const LEN: usize = 1024;
const _: () = assert!(size_of::<RawSuperblock>() == LEN);

/// How a journal's blocks are checksummed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksums {
    None,
    /// One sum over a whole transaction, in its commit block.
    Commit,
    /// One in every block and 16 bits for every logged block.
    V2,
    /// One in every block and 32 bits for every logged block.
    V3,
}

/// A checked journal superblock.
#[derive(Clone, Debug)]
pub(super) struct JournalSuperblock {
    raw: RawSuperblock,
    v2: bool,
}

/// The superblock of an empty journal without features, of `blocks` blocks.
pub(crate) fn fresh(block_size: u32, blocks: u32, uuid: [u8; 16]) -> [u8; LEN] {
    let mut raw = RawSuperblock::new_zeroed();
    raw.magic = MAGIC.into();
    raw.block_type = SUPERBLOCK_V2.into();
    raw.block_size = block_size.into();
    raw.blocks = blocks.into();
    raw.first = 1.into();
    raw.sequence = 1.into();
    raw.uuid = uuid;
    raw.users = 1.into();
    let mut bytes = [0; LEN];
    bytes.copy_from_slice(raw.as_bytes());
    bytes
}

impl JournalSuperblock {
    /// Checks the first 1024 bytes of a journal of `blocks` blocks of `block_size` bytes.
    pub(super) fn parse(bytes: &[u8], block_size: u32, blocks: u64) -> Result<Self> {
        let corrupt = |problem| Error::corrupt(Place::Journal(0), problem);
        let (raw, _) = RawSuperblock::read_from_prefix(bytes).map_err(|_| corrupt("the journal is too short"))?;
        let block_type = raw.block_type.get();
        if raw.magic.get() != MAGIC || ![SUPERBLOCK_V1, SUPERBLOCK_V2].contains(&block_type) {
            return Err(corrupt("the journal has no superblock"));
        }
        let superblock = Self { raw, v2: block_type == SUPERBLOCK_V2 };
        superblock.check_features()?;
        if superblock.is_checksummed() {
            if raw.checksum_type != CHECKSUM_TYPE_CRC32C {
                return Err(Error::unsupported(format!("journal checksum type {}", raw.checksum_type)));
            }
            if superblock.checksum() != raw.checksum.get() {
                return Err(corrupt("the checksum of the journal's superblock is wrong"));
            }
        }
        if raw.block_size.get() != block_size || u64::from(raw.blocks.get()) > blocks {
            return Err(corrupt("the journal's block size or length differs from its inode's"));
        }
        if raw.first.get() == 0 || raw.first.get() >= superblock.log_end() {
            return Err(corrupt("the journal has no room for a log"));
        }
        if raw.start.get() != 0 && !(raw.first.get()..superblock.log_end()).contains(&raw.start.get()) {
            return Err(corrupt("the journal's log starts outside the journal"));
        }
        Ok(superblock)
    }

    fn check_features(&self) -> Result<()> {
        let unknown = self.incompat() & !INCOMPAT_KNOWN;
        if unknown != 0 {
            return Err(Error::unsupported(format!("the set of journal features incompat 0x{unknown:x}")));
        }
        if self.v2 && self.raw.ro_compat.get() != 0 {
            let bits = self.raw.ro_compat.get();
            return Err(Error::unsupported(format!("the set of journal features ro_compat 0x{bits:x}")));
        }
        if self.incompat() & INCOMPAT_CSUM_V2 != 0 && self.incompat() & INCOMPAT_CSUM_V3 != 0 {
            return Err(Error::corrupt(Place::Journal(0), "the journal claims two versions of checksums"));
        }
        Ok(())
    }

    fn incompat(&self) -> u32 {
        if self.v2 { self.raw.incompat.get() } else { 0 }
    }

    pub(super) fn checksums(&self) -> Checksums {
        if self.incompat() & INCOMPAT_CSUM_V3 != 0 {
            Checksums::V3
        } else if self.incompat() & INCOMPAT_CSUM_V2 != 0 {
            Checksums::V2
        } else if self.sums_transactions() {
            Checksums::Commit
        } else {
            Checksums::None
        }
    }

    /// Whether every block of the journal has a checksum.
    pub(super) fn is_checksummed(&self) -> bool {
        matches!(self.checksums(), Checksums::V2 | Checksums::V3)
    }

    /// What the checksums of all blocks start with.
    pub(super) fn checksum_seed(&self) -> u32 {
        crc32c(!0, &self.raw.uuid)
    }

    fn checksum(&self) -> u32 {
        let mut raw = self.raw;
        raw.checksum = U32::ZERO;
        crc32c(!0, raw.as_bytes())
    }

    pub(super) fn has_64bit(&self) -> bool {
        self.incompat() & INCOMPAT_64BIT != 0
    }

    /// Whether commit blocks are written without waiting for the rest of their transaction.
    pub(super) fn has_async_commit(&self) -> bool {
        self.incompat() & INCOMPAT_ASYNC_COMMIT != 0
    }

    /// How many file systems use the journal; zero where it does not say.
    pub(super) fn users(&self) -> u32 {
        if self.v2 { self.raw.users.get() } else { 0 }
    }

    /// Whether commit blocks are said to hold a sum over their transaction.
    pub(super) fn sums_transactions(&self) -> bool {
        self.v2 && self.raw.compat.get() & COMPAT_CHECKSUM != 0
    }

    /// First block of the log.
    pub(super) fn first(&self) -> u32 {
        self.raw.first.get()
    }

    /// One past the last block of the log.
    pub(super) fn log_end(&self) -> u32 {
        self.raw.blocks.get().saturating_sub(self.fast_commit_blocks())
    }

    /// Blocks behind the log for fast commits.
    pub(super) fn fast_commit_blocks(&self) -> u32 {
        match self.raw.fast_commit_blocks.get() {
            _ if self.incompat() & INCOMPAT_FAST_COMMIT == 0 => 0,
            0 => DEFAULT_FAST_COMMIT_BLOCKS,
            blocks => blocks,
        }
    }

    /// Where the oldest transaction starts, if the log is not empty.
    pub(super) fn start(&self) -> Option<u32> {
        Some(self.raw.start.get()).filter(|&start| start != 0)
    }

    /// The oldest transaction's number.
    pub(super) fn sequence(&self) -> u32 {
        self.raw.sequence.get()
    }

    /// Whether the kernel gave up on the journal after an error.
    pub(super) fn is_aborted(&self) -> bool {
        self.raw.errno.get() != 0
    }

    /// The superblock's bytes for an empty log whose next transaction is number `sequence`.
    pub(super) fn emptied(mut self, sequence: u32) -> [u8; LEN] {
        self.raw.start = U32::ZERO;
        self.raw.sequence = sequence.into();
        if self.is_checksummed() {
            self.raw.checksum = self.checksum().into();
        }
        let mut bytes = [0; LEN];
        bytes.copy_from_slice(self.raw.as_bytes());
        bytes
    }
}
