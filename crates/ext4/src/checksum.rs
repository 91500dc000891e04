//! The checksums of metadata structures.

use crate::group::CHECKSUM_OFFSET as GROUP_CHECKSUM_OFFSET;
use crate::{BlockNr, GroupNr, Ino};

/// CRC32C as ext4 and jbd2 use it: `seed` is the value so far, and nothing is inverted at the end.
pub(crate) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// A CRC32C in the making: ext4 starts each structure's checksum with what identifies the structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seed(u32);

impl Seed {
    const START: Self = Self(!0);

    /// A seed kept in the superblock.
    pub(crate) const fn stored(seed: u32) -> Self {
        Self(seed)
    }

    pub(crate) fn of_uuid(uuid: &[u8; 16]) -> Self {
        Self::START.with(uuid)
    }

    /// The seed for everything that belongs to one inode.
    pub(crate) fn of_inode(self, ino: Ino, generation: u32) -> Self {
        self.with(&ino.get().to_le_bytes()).with(&generation.to_le_bytes())
    }

    pub(crate) fn with(self, bytes: &[u8]) -> Self {
        Self(crc32c(self.0, bytes))
    }

    pub(crate) fn value(self) -> u32 {
        self.0
    }
}

/// Of a superblock's bytes up to its checksum.
pub(crate) fn superblock(bytes: &[u8]) -> u32 {
    Seed::START.with(bytes).value()
}

/// Of a group descriptor under `metadata_csum`.
pub(crate) fn group(seed: Seed, group: GroupNr, descriptor: &[u8]) -> u16 {
    let crc = skipping(seed.with(&group.0.to_le_bytes()), descriptor, &[GROUP_CHECKSUM_OFFSET]).value();
    let [a, b, ..] = crc.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// Of a group descriptor under `uninit_bg` alone.
pub(crate) fn group_crc16(uuid: &[u8; 16], group: GroupNr, descriptor: &[u8]) -> u16 {
    let (front, rest) = descriptor.split_at(GROUP_CHECKSUM_OFFSET);
    let rest = rest.get(2..).unwrap_or_default();
    [uuid, group.0.to_le_bytes().as_slice(), front, rest].into_iter().fold(!0, crc16)
}

fn crc16(crc: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(crc, |crc, &byte| {
        (0..8).fold(crc ^ u16::from(byte), |crc, _| if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ 0xa001 })
    })
}

/// Of a block or inode bitmap, cut to the bytes that count.
pub(crate) fn bitmap(seed: Seed, bytes: &[u8]) -> u32 {
    seed.with(bytes).value()
}

const INODE_CHECKSUM_LO: usize = 0x7c;
const INODE_CHECKSUM_HI: usize = 0x82;

/// Of an inode's bytes, by the seed of that inode. `wide` says whether the upper half of the checksum is stored too.
pub(crate) fn inode(seed: Seed, bytes: &[u8], wide: bool) -> u32 {
    if wide {
        skipping(seed, bytes, &[INODE_CHECKSUM_LO, INODE_CHECKSUM_HI]).value()
    } else {
        skipping(seed, bytes, &[INODE_CHECKSUM_LO]).value() & 0xffff
    }
}

/// Runs over `bytes` with two zero bytes in place of those at each of `holes`, in ascending order.
fn skipping(seed: Seed, bytes: &[u8], holes: &[usize]) -> Seed {
    let mut at = 0;
    let mut seed = seed;
    for &hole in holes {
        seed = seed.with(bytes.get(at..hole).unwrap_or_default()).with(&[0; 2]);
        at = hole + 2;
    }
    seed.with(bytes.get(at..).unwrap_or_default())
}

/// Of an extent tree block, up to its tail, by the inode's seed.
pub(crate) fn extent_block(seed: Seed, before_tail: &[u8]) -> u32 {
    seed.with(before_tail).value()
}

/// Of a block of extended attributes, by the file system's seed.
pub(crate) fn xattr_block(seed: Seed, block: BlockNr, bytes: &[u8]) -> u32 {
    const CHECKSUM: std::ops::Range<usize> = 0x10..0x14;
    let seed = seed.with(&block.0.to_le_bytes()).with(bytes.get(..CHECKSUM.start).unwrap_or_default());
    seed.with(&[0; 4]).with(bytes.get(CHECKSUM.end..).unwrap_or_default()).value()
}

/// Of a block of the orphan file, by that file's seed: all entries without the tail.
pub(crate) fn orphan_block(seed: Seed, block: BlockNr, entries: &[u8]) -> u32 {
    seed.with(&block.0.to_le_bytes()).with(entries).value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc16_is_the_arc_polynomial() {
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
    }

    #[test]
    fn crc32c_is_not_inverted_at_the_end() {
        assert_eq!(!Seed::START.with(b"123456789").value(), 0xe306_9283);
    }
}
