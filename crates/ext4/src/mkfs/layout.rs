//! Where the metadata of each group goes: as libext2fs places it, so that the result is the same.

use std::ops::Range;

use super::geometry::Plan;
use super::space::Space;
use super::{MkfsError, Result};
use crate::features::{compat, incompat, ro_compat};
use crate::superblock::Superblock;
use crate::{BlockNr, GroupNr};

/// A group's metadata.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GroupLayout {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    /// Whether blocks are taken that do not follow from the group's own layout, so that its bitmap must be written.
    pub(super) is_open: bool,
}

/// All groups, and the blocks taken so far.
#[derive(Debug)]
pub(super) struct Layout<'a> {
    pub(super) plan: &'a Plan,
    superblock: &'a Superblock,
    pub(super) space: Space,
    pub(super) groups: Vec<GroupLayout>,
}

impl<'a> Layout<'a> {
    /// Takes the blocks of superblocks, descriptors, bitmaps and inode tables.
    pub(super) fn new(plan: &'a Plan, superblock: &'a Superblock, stride: u64) -> Result<Self> {
        let space = Space::new(plan.first_data_block..plan.blocks);
        let groups = vec![GroupLayout::default(); plan.groups as usize];
        let mut layout = Self { plan, superblock, space, groups };
        for group in 0..plan.groups {
            let front = layout.front(group);
            if !front.is_empty() {
                layout.space.take(front);
            }
        }
        for group in 0..plan.groups {
            if plan.features.has_incompat(incompat::FLEX_BG) {
                layout.place_in_flex_group(group)?;
            } else {
                layout.place_in_own_group(group, stride)?;
            }
        }
        if let Some(first) = layout.groups.first_mut() {
            first.is_open = true;
        }
        // A short group's bitmap ends in padding.
        if let Some(last) = layout.groups.last_mut() {
            last.is_open = true;
        }
        Ok(layout)
    }

    pub(super) fn group_blocks(&self, group: u32) -> Range<u64> {
        self.superblock.geometry().group_blocks(GroupNr(group))
    }

    /// The copy of the superblock at a group's front, what follows of descriptors, and room for more of these.
    pub(super) fn front(&self, group: u32) -> Range<u64> {
        let start = self.group_blocks(group).start;
        let has_superblock = self.superblock.has_superblock(GroupNr(group));
        if self.plan.features.has_incompat(incompat::META_BG) {
            let end = self.own_descriptors(group).map_or(start + u64::from(has_superblock), |block| block.0 + 1);
            return start..end;
        }
        let len = if has_superblock { 1 + self.plan.desc_blocks + self.plan.reserved_gdt_blocks } else { 0 };
        start..start + len
    }

    /// With `meta_bg`: the block of descriptors in the first, second or last group of those that it describes.
    pub(super) fn own_descriptors(&self, group: u32) -> Option<BlockNr> {
        let per_block = self.superblock.geometry().descriptors_per_block();
        let holds = [0, 1, per_block - 1].contains(&(group % per_block));
        let start = BlockNr(self.group_blocks(group).start);
        holds.then(|| start.plus(self.superblock.has_superblock(GroupNr(group)).into()))
    }

    fn place_in_own_group(&mut self, group: u32, stride: u64) -> Result<()> {
        let own = self.group_blocks(group);
        let table_len = self.plan.inode_table_len();
        let start = if stride == 0 {
            own.start
        } else {
            // Bitmaps that lie at the same place of every group would all be on one disk of a RAID.
            let behind_table = self.space.find(own.clone(), 1).unwrap_or(own.start) + table_len;
            let behind_table = behind_table + stride * u64::from(group) % own.end.saturating_sub(behind_table).max(1);
            if behind_table >= own.end - 1 { own.start } else { behind_table }
        };
        let block_bitmap = self.take_first(start..own.end, 1)?;
        let inode_bitmap = self.take_first(start..own.end, 1)?;
        let inode_table = self.take_first(own, table_len)?;
        self.groups[group as usize] = GroupLayout { block_bitmap, inode_bitmap, inode_table, is_open: false };
        Ok(())
    }

    fn take_first(&mut self, starts: Range<u64>, len: u64) -> Result<u64> {
        let start = self.space.find(starts, len).ok_or(MkfsError::TooSmall)?;
        self.space.take(start..start + len);
        Ok(start)
    }

    /// Bitmaps and tables of the groups of a flexible group follow each other: all block bitmaps, all inode bitmaps, all tables.
    fn place_in_flex_group(&mut self, group: u32) -> Result<()> {
        let size = self.plan.groups_per_flex;
        let left = size - group % size;
        // The last group is laid out as if more were to come.
        let left = if group + 1 == self.plan.groups { left } else { left.min(self.plan.groups - group) };
        let before = if group.is_multiple_of(size) { None } else { self.groups.get(group as usize - 1).copied() };
        let table_len = self.plan.inode_table_len();
        let goal = before.map(|before| before.block_bitmap + 1);
        let block_bitmap = self.take_packed(group, goal, left, 1)?;
        let goal = before.map_or(block_bitmap + u64::from(left), |before| before.inode_bitmap + 1);
        let inode_bitmap = self.take_packed(group, Some(goal), left, 1)?;
        let goal = before.map_or(inode_bitmap + u64::from(left), |before| before.inode_table + table_len);
        let inode_table = self.take_packed(group, Some(goal), left, table_len)?;
        self.groups[group as usize] =
            GroupLayout { is_open: self.groups[group as usize].is_open, block_bitmap, inode_bitmap, inode_table };
        Ok(())
    }

    /// Takes `len` blocks at or a little behind `goal`, past the backup of a superblock say; or else where all `left` such
    /// pieces fit in the flexible group; or else where one does.
    fn take_packed(&mut self, group: u32, goal: Option<u64>, left: u32, len: u64) -> Result<u64> {
        let all = (u64::from(left) * len).min(u64::from(self.plan.blocks_per_group) / 4);
        let size = self.plan.groups_per_flex;
        let first = group - group % size;
        let last = first.saturating_add(size - 1).min(self.plan.groups - 1);
        let end = self.group_blocks(last).end;
        let flex = self.group_blocks(first).start..end;
        let near = goal.and_then(|goal| self.space.find(goal..goal.saturating_add(all), len));
        let found = near
            .or_else(|| self.space.find(flex.clone(), all))
            .or_else(|| self.space.find(flex, len))
            .or_else(|| self.space.find(0..end, len));
        let start = found.ok_or(MkfsError::TooSmall)?;
        self.take(start..start + len);
        Ok(start)
    }

    /// Takes blocks for something that does not follow from a group's layout.
    pub(super) fn take(&mut self, blocks: Range<u64>) {
        let geometry = self.superblock.geometry();
        let from = geometry.group_of_block(BlockNr(blocks.start)).0;
        let to = geometry.group_of_block(BlockNr(blocks.end - 1)).0;
        for group in self.groups.get_mut(from as usize..=to as usize).unwrap_or_default() {
            group.is_open = true;
        }
        self.space.take(blocks);
    }

    /// Takes the first free run at or behind `goal`, of up to `most` blocks.
    pub(super) fn allocate(&mut self, goal: u64, most: u64) -> Result<Range<u64>> {
        let run = self.space.first_free(goal, most).ok_or(MkfsError::TooSmall)?;
        self.take(run.clone());
        Ok(run)
    }

    /// A group's free blocks.
    pub(super) fn free_blocks(&self, group: u32) -> u64 {
        let own = self.group_blocks(group);
        let taken: u64 = self.space.taken_in(own.clone()).map(|run| run.end - run.start).sum();
        own.end - own.start - taken
    }

    pub(super) fn all_free_blocks(&self) -> u64 {
        let blocks = self.plan.first_data_block..self.plan.blocks;
        let taken: u64 = self.space.taken_in(blocks.clone()).map(|run| run.end - run.start).sum();
        blocks.end - blocks.start - taken
    }

    /// Blocks that the layout itself takes, as the kernel counts them: without those of files.
    pub(super) fn overhead(&self) -> u64 {
        let own = u64::from(self.plan.groups) * (2 + self.plan.inode_table_len());
        let fronts: u64 =
            (0..self.plan.groups).map(|group| self.front(group)).map(|front| front.end - front.start).sum();
        self.plan.first_data_block + own + fronts
    }

    pub(super) fn has_superblock(&self, group: u32) -> bool {
        self.superblock.has_superblock(GroupNr(group))
    }

    /// Where the journal goes: the middle of the file system, in the group with the most room there.
    pub(super) fn journal_goal(&self) -> u64 {
        let plan = self.plan;
        let middle = BlockNr((plan.blocks - plan.first_data_block) / 2);
        let mut group = self.superblock.geometry().group_of_block(middle).0;
        let last = plan.groups - 1;
        let end = (group + 1).min(last);
        let flex = plan.groups_per_flex;
        if plan.features.has_incompat(incompat::FLEX_BG) && flex > 1 && group > flex {
            group -= group % flex;
            group = (group..=last).find(|&group| self.free_blocks(group) > 0).unwrap_or(0);
        } else {
            group = group.saturating_sub(1);
        }
        let end = end.max(group);
        // The first of those with the most.
        let best = (group..=end).rev().max_by_key(|&group| self.free_blocks(group)).unwrap_or(group);
        self.group_blocks(best).start
    }

    /// Whether descriptors have flags that say what was never written.
    pub(super) fn has_group_flags(&self) -> bool {
        self.plan.features.has_ro_compat(ro_compat::GDT_CSUM | ro_compat::METADATA_CSUM)
    }

    pub(super) fn has_journal(&self) -> bool {
        self.plan.features.has_compat(compat::HAS_JOURNAL)
    }
}
