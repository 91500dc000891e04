//! What of the device a file system does not use.

use std::ops::Range;

use crate::error::{Error, Place, Result};
use crate::group::BLOCK_UNINIT;
use crate::group_bitmap::BitmapKind;
use crate::journal::Journal;
use crate::{Ext4, GroupNr, Ino, bitmap};

/// More groups than file systems of 64 TiB have, in which every group takes some memory here.
const MAX_GROUPS: u32 = 1 << 19;

impl Ext4 {
    /// Calls `each` with the byte ranges of the device that the file system does not use, in order; neighbours may touch. What
    /// inodes hold that a crash left without a name counts as used, and so does whatever the bitmaps do not call free.
    ///
    /// # Errors
    /// Everything that casts doubt on the bitmaps is one. What `each` was called with before must then not be used.
    pub fn for_each_free(&self, mut each: impl FnMut(Range<u64>)) -> Result<()> {
        self.check_free_space()?;
        let fixed = self.fixed_blocks()?;
        let block_size = u64::from(self.block_size());
        for group in (0..self.geometry().groups).map(GroupNr) {
            for blocks in self.free_in(group)? {
                let next = fixed.partition_point(|fixed| fixed.end <= blocks.start);
                if fixed.get(next).is_some_and(|fixed| fixed.start < blocks.end) {
                    return Err(Error::corrupt(Place::Group(group), "its bitmap calls metadata free"));
                }
                each(blocks.start * block_size..blocks.end * block_size);
            }
        }
        Ok(())
    }

    /// Refuses a file system whose bitmaps may not tell what is free.
    fn check_free_space(&self) -> Result<()> {
        let corrupt = |problem| Err(Error::corrupt(Place::Superblock, problem));
        self.superblock.features().check_free_space()?;
        if self.superblock.has_errors() {
            return corrupt("the file system is marked as damaged");
        }
        if !self.superblock.was_unmounted() {
            return corrupt("the file system was not unmounted, and its journal does not make up for that");
        }
        if self.geometry().groups > MAX_GROUPS {
            return Err(Error::unsupported(format!("a file system of {} block groups", self.geometry().groups)));
        }
        if self.superblock.journal().is_some() {
            let journal = Journal::open(self)?;
            if journal.is_aborted() {
                return Err(Error::corrupt(Place::Journal(0), "the journal was given up after an error"));
            }
            if !journal.is_empty() && !self.needs_recovery() {
                return Err(Error::corrupt(Place::Journal(0), "it holds changes that the superblock says nothing of"));
            }
        }
        // A file system that something else has overwritten does not have its root any more.
        self.read_dir(Ino::ROOT).map(drop)
    }

    /// The blocks that hold superblocks, descriptors, bitmaps and inode tables, in order.
    fn fixed_blocks(&self) -> Result<Vec<Range<u64>>> {
        let mut fixed = Vec::new();
        for group in (0..self.geometry().groups).map(GroupNr) {
            fixed.push(self.superblock.copies(group));
            fixed.extend(self.structures(&self.group(group)?));
        }
        fixed.retain(|range| !range.is_empty());
        fixed.sort_by_key(|range| range.start);
        if fixed.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return Err(Error::corrupt(Place::Superblock, "metadata of block groups overlaps"));
        }
        Ok(fixed)
    }

    /// The free blocks of a group.
    fn free_in(&self, group: GroupNr) -> Result<Vec<Range<u64>>> {
        let geometry = self.geometry();
        let descriptor = self.group(group)?;
        let bits = 0..geometry.clusters_in(group);
        let bytes = if self.has_group_flags() && descriptor.has(BLOCK_UNINIT) {
            self.implied_block_bitmap(group)?.into()
        } else {
            self.bitmap(group, &descriptor, BitmapKind::Blocks)?
        };
        if bitmap::count_clear(&bytes, bits.clone()) != descriptor.free_blocks() {
            return Err(Error::corrupt(Place::Group(group), "its bitmap has not the free blocks that are counted"));
        }
        Ok(bitmap::runs(&bytes, bits).map(|run| geometry.blocks_of(group, &run)).collect())
    }
}
