//! Block group descriptors.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::BlockNr;

/// The group's inode table and bitmap were never written.
pub(crate) const INODE_UNINIT: u16 = 1;
/// The group's block bitmap was never written; it follows from the layout.
pub(crate) const BLOCK_UNINIT: u16 = 2;
/// What the inode table holds behind the inodes in use reads as zeroes.
pub(crate) const INODE_ZEROED: u16 = 4;

const LEN: usize = 64;
pub(crate) const CHECKSUM_OFFSET: usize = std::mem::offset_of!(RawGroup, checksum);

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawGroup {
    block_bitmap_lo: U32,
    inode_bitmap_lo: U32,
    inode_table_lo: U32,
    free_blocks_lo: U16,
    free_inodes_lo: U16,
    used_dirs_lo: U16,
    flags: U16,
    exclude_bitmap_lo: U32,
    block_bitmap_csum_lo: U16,
    inode_bitmap_csum_lo: U16,
    itable_unused_lo: U16,
    checksum: U16,
    block_bitmap_hi: U32,
    inode_bitmap_hi: U32,
    inode_table_hi: U32,
    free_blocks_hi: U16,
    free_inodes_hi: U16,
    used_dirs_hi: U16,
    itable_unused_hi: U16,
    exclude_bitmap_hi: U32,
    block_bitmap_csum_hi: U16,
    inode_bitmap_csum_hi: U16,
    reserved: U32,
}

const _: () = assert!(size_of::<RawGroup>() == LEN);

/// A group descriptor. The upper halves of its fields are zero where descriptors have 32 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupDescriptor {
    raw: RawGroup,
    wide: bool,
}

fn join(low: U16, high: U16) -> u32 {
    u32::from(low.get()) | u32::from(high.get()) << 16
}

fn split(value: u32, low: &mut U16, high: &mut U16) {
    let [a, b, c, d] = value.to_le_bytes();
    *low = u16::from_le_bytes([a, b]).into();
    *high = u16::from_le_bytes([c, d]).into();
}

fn halves(block: BlockNr) -> (U32, U32) {
    let [a, b, c, d, high @ ..] = block.0.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]).into(), u32::from_le_bytes(high).into())
}

macro_rules! counters {
    ($($(#[$doc:meta])* $get:ident, $set:ident: $low:ident, $high:ident;)*) => {$(
        $(#[$doc])*
        pub(crate) fn $get(&self) -> u32 {
            join(self.raw.$low, self.raw.$high)
        }
        pub(crate) fn $set(&mut self, value: u32) {
            split(value, &mut self.raw.$low, &mut self.raw.$high);
        }
    )*};
}

impl GroupDescriptor {
    /// Takes a descriptor of 32, 64 or more bytes, of which at most 64 are looked at.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let mut raw = RawGroup::new_zeroed();
        let len = bytes.len().min(LEN);
        raw.as_mut_bytes()[..len].copy_from_slice(&bytes[..len]);
        Self { raw, wide: bytes.len() >= LEN }
    }

    /// The descriptor of a group whose bitmaps and inode table lie here.
    pub(crate) fn new(
        len: u16,
        block_bitmap: BlockNr,
        inode_bitmap: BlockNr,
        inode_table: BlockNr,
        flags: u16,
    ) -> Self {
        let mut raw = RawGroup::new_zeroed();
        (raw.block_bitmap_lo, raw.block_bitmap_hi) = halves(block_bitmap);
        (raw.inode_bitmap_lo, raw.inode_bitmap_hi) = halves(inode_bitmap);
        (raw.inode_table_lo, raw.inode_table_hi) = halves(inode_table);
        raw.flags = flags.into();
        Self { raw, wide: usize::from(len) >= LEN }
    }

    /// Puts the descriptor back where it was parsed from.
    pub(crate) fn store(&self, bytes: &mut [u8]) {
        let len = bytes.len().min(LEN);
        bytes[..len].copy_from_slice(&self.raw.as_bytes()[..len]);
    }

    counters! {
        free_blocks, set_free_blocks: free_blocks_lo, free_blocks_hi;
        free_inodes, set_free_inodes: free_inodes_lo, free_inodes_hi;
        used_dirs, set_used_dirs: used_dirs_lo, used_dirs_hi;
        /// Inodes at the end of the table that were never used.
        itable_unused, set_itable_unused: itable_unused_lo, itable_unused_hi;
        block_bitmap_checksum, set_block_bitmap_checksum: block_bitmap_csum_lo, block_bitmap_csum_hi;
        inode_bitmap_checksum, set_inode_bitmap_checksum: inode_bitmap_csum_lo, inode_bitmap_csum_hi;
    }

    pub(crate) fn block_bitmap(&self) -> BlockNr {
        BlockNr(u64::from(self.raw.block_bitmap_lo.get()) | u64::from(self.raw.block_bitmap_hi.get()) << 32)
    }

    pub(crate) fn inode_bitmap(&self) -> BlockNr {
        BlockNr(u64::from(self.raw.inode_bitmap_lo.get()) | u64::from(self.raw.inode_bitmap_hi.get()) << 32)
    }

    pub(crate) fn inode_table(&self) -> BlockNr {
        BlockNr(u64::from(self.raw.inode_table_lo.get()) | u64::from(self.raw.inode_table_hi.get()) << 32)
    }

    pub(crate) fn has(&self, flag: u16) -> bool {
        self.raw.flags.get() & flag != 0
    }

    pub(crate) fn clear(&mut self, flag: u16) {
        self.raw.flags = (self.raw.flags.get() & !flag).into();
    }

    pub(crate) fn checksum(&self) -> u16 {
        self.raw.checksum.get()
    }

    pub(crate) fn set_checksum(&mut self, checksum: u16) {
        self.raw.checksum = checksum.into();
    }

    /// Whether bitmap checksums have all their 32 bits.
    pub(crate) fn is_wide(&self) -> bool {
        self.wide
    }
}
