//! The bitmaps of a group: stored ones, checked, and those that follow from the layout.

use std::sync::Arc;

use crate::error::{Error, Place, Result};
use crate::features::ro_compat;
use crate::group::GroupDescriptor;
use crate::{BlockNr, Ext4, GroupNr, bitmap, checksum};

/// The two kinds of bitmap that a group has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum BitmapKind {
    Blocks,
    Inodes,
}

impl BitmapKind {
    pub(crate) fn place(self, descriptor: &GroupDescriptor) -> BlockNr {
        match self {
            Self::Blocks => descriptor.block_bitmap(),
            Self::Inodes => descriptor.inode_bitmap(),
        }
    }
}

impl Ext4 {
    /// Whether groups may have flags that say their bitmaps were never written.
    pub(crate) fn has_group_flags(&self) -> bool {
        self.superblock.features().has_ro_compat(ro_compat::GDT_CSUM | ro_compat::METADATA_CSUM)
    }

    /// Bytes of a bitmap that its checksum covers.
    pub(crate) fn checksummed_len(&self, kind: BitmapKind) -> usize {
        let geometry = self.geometry();
        let bits = match kind {
            BitmapKind::Blocks => geometry.clusters_per_group(),
            BitmapKind::Inodes => geometry.inodes_per_group,
        };
        (bits as usize / 8).min(geometry.block_len())
    }

    /// A group's stored bitmap, which must be what its checksum says.
    pub(crate) fn bitmap(&self, group: GroupNr, descriptor: &GroupDescriptor, kind: BitmapKind) -> Result<Arc<[u8]>> {
        let block = self.block(kind.place(descriptor))?;
        let stored = match kind {
            BitmapKind::Blocks => descriptor.block_bitmap_checksum(),
            BitmapKind::Inodes => descriptor.inode_bitmap_checksum(),
        };
        let mask = if descriptor.is_wide() { u32::MAX } else { 0xffff };
        let sum = |seed| checksum::bitmap(seed, &block[..self.checksummed_len(kind)]) & mask;
        if self.checksum_seed().is_some_and(|seed| sum(seed) != stored) {
            return Err(Error::corrupt(Place::Group(group), "the checksum of a bitmap is wrong"));
        }
        Ok(block)
    }

    /// The bitmaps and the inode table of a group, as blocks.
    pub(crate) fn structures(&self, descriptor: &GroupDescriptor) -> [std::ops::Range<u64>; 3] {
        [
            (descriptor.block_bitmap().0, 1),
            (descriptor.inode_bitmap().0, 1),
            (descriptor.inode_table().0, self.inode_table_len()),
        ]
        .map(|(start, len)| start..start + len)
    }

    /// The block bitmap of a group that has none yet, by the layout.
    pub(crate) fn implied_block_bitmap(&self, group: GroupNr) -> Result<Vec<u8>> {
        let bytes = self.fixed_block_bitmap(group)?;
        if bitmap::count_clear(&bytes, 0..self.geometry().clusters_in(group)) != self.group(group)?.free_blocks() {
            return Err(Error::corrupt(Place::Group(group), "its number of free blocks does not fit its layout"));
        }
        Ok(bytes)
    }

    /// Refuses a stored bitmap that contradicts its group's counter, or that gives away what lies at fixed places.
    pub(crate) fn check_bitmap(
        &self,
        group: GroupNr,
        descriptor: &GroupDescriptor,
        kind: BitmapKind,
        stored: &[u8],
    ) -> Result<()> {
        let geometry = self.geometry();
        let (bits, free, fixed) = match kind {
            BitmapKind::Blocks => {
                (geometry.clusters_in(group), descriptor.free_blocks(), self.fixed_block_bitmap(group)?)
            }
            BitmapKind::Inodes => {
                let mut reserved = vec![0; stored.len()];
                let count = geometry.first_ino.saturating_sub(group.0.saturating_mul(geometry.inodes_per_group) + 1);
                bitmap::fill(&mut reserved, 0..count.min(geometry.inodes_per_group), true);
                (geometry.inodes_per_group, descriptor.free_inodes(), reserved)
            }
        };
        if bitmap::count_clear(stored, 0..bits) != free {
            return Err(Error::corrupt(Place::Group(group), "its counters do not fit its bitmaps"));
        }
        if fixed.iter().zip(stored).any(|(fixed, stored)| fixed & !stored != 0) {
            return Err(Error::corrupt(
                Place::Group(group),
                "its bitmaps mark parts of the file system itself as free",
            ));
        }
        Ok(())
    }

    /// What of a group lies at fixed places, and the padding behind its last block.
    fn fixed_block_bitmap(&self, group: GroupNr) -> Result<Vec<u8>> {
        let geometry = self.geometry();
        let clusters = geometry.clusters_in(group);
        let mut bytes = vec![0; geometry.block_len()];
        bitmap::fill(&mut bytes, geometry.bits_of(group, &self.superblock.front(group)), true);
        // Bitmaps and tables of a flexible group lie in any of its groups.
        let flex = group.0 - group.0 % geometry.groups_per_flex;
        let flex_end = flex.saturating_add(geometry.groups_per_flex).min(geometry.groups);
        for member in (flex..flex_end).map(GroupNr) {
            for blocks in self.structures(&self.group(member)?) {
                bitmap::fill(&mut bytes, geometry.bits_of(group, &blocks), true);
            }
        }
        bitmap::fill(&mut bytes, clusters..geometry.block_size * 8, true);
        Ok(bytes)
    }
}
