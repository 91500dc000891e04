//! Allocating and freeing blocks.

use std::ops::Range;

use super::Editor;
use crate::error::{Error, Place, Result};
use crate::group::BLOCK_UNINIT;
use crate::group_bitmap::BitmapKind;
use crate::{BlockNr, GroupNr, Ino, bitmap};

/// A free run shorter than this, the usual cluster of the image beneath, is not worth a search before new groups are opened.
const CLUSTER: u64 = 64 << 10;

/// Consecutive blocks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockRange {
    pub(crate) start: BlockNr,
    pub(crate) len: u64,
}

impl BlockRange {
    pub(crate) fn end(&self) -> BlockNr {
        self.start.plus(self.len)
    }
}

/// A run of free blocks within a group, by their bits.
struct Candidate {
    group: GroupNr,
    bits: Range<u32>,
}

impl Candidate {
    fn len(&self) -> u64 {
        (self.bits.end - self.bits.start).into()
    }
}

impl Editor {
    /// Where to look for blocks of an inode's that has none yet: in its flexible group, behind what was placed there last.
    pub(crate) fn goal_for(&self, ino: Ino) -> BlockNr {
        let geometry = self.fs.geometry();
        let flex = geometry.group_of_inode(ino).0 / geometry.groups_per_flex;
        let start = GroupNr(flex.saturating_mul(geometry.groups_per_flex));
        self.cursors.get(&flex).copied().unwrap_or_else(|| geometry.first_block_of(start))
    }

    /// Takes up to `want` free blocks that lie together, as near behind `goal` as such a run can be had.
    pub(crate) fn allocate(&mut self, goal: BlockNr, want: u64) -> Result<BlockRange> {
        let good = want.min(CLUSTER.div_ceil(self.fs.block_size().into()));
        let mut best = self.search(goal, want)?;
        if best.as_ref().is_none_or(|found| found.len() < good)
            && let Some(group) = self.open_group(goal)?
        {
            let fresh = self.best_in(group, 0..u32::MAX, want)?;
            if fresh.as_ref().map_or(0, Candidate::len) > best.as_ref().map_or(0, Candidate::len) {
                best = fresh;
            }
        }
        let found = best.ok_or(Error::NoSpace("blocks"))?;
        let taken = BlockRange {
            start: self.fs.geometry().first_block_of(found.group).plus(found.bits.start.into()),
            len: found.len(),
        };
        self.mark(taken, true)?;
        let geometry = self.fs.geometry();
        let flex = geometry.group_of_block(goal).0 / geometry.groups_per_flex;
        self.cursors.insert(flex, taken.end());
        Ok(taken)
    }

    /// All of `want` blocks, in as few runs as can be had.
    pub(crate) fn allocate_all(&mut self, goal: BlockNr, want: u64) -> Result<Vec<BlockRange>> {
        if want > self.fs.free_blocks() {
            return Err(Error::NoSpace("blocks"));
        }
        let mut ranges: Vec<BlockRange> = Vec::new();
        let mut left = want;
        let mut goal = goal;
        while left > 0 {
            match self.allocate(goal, left) {
                Ok(range) => {
                    left -= range.len;
                    goal = range.end();
                    match ranges.last_mut() {
                        Some(last) if last.end() == range.start => last.len += range.len,
                        _ => ranges.push(range),
                    }
                }
                Err(error) => {
                    for range in ranges {
                        self.mark(range, false)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(ranges)
    }

    /// The first run of `want` free blocks behind `goal` in the groups in use, wrapping around, or else the longest run.
    fn search(&mut self, goal: BlockNr, want: u64) -> Result<Option<Candidate>> {
        let geometry = self.fs.geometry();
        let groups = geometry.groups;
        let first = GroupNr(geometry.group_of_block(goal).0.min(groups - 1));
        let offset = u32::try_from(goal.0.saturating_sub(geometry.first_block_of(first).0)).unwrap_or(u32::MAX);
        let mut longest: Option<Candidate> = None;
        // The first group comes twice: behind the goal, and at the end before it.
        for step in 0..=groups {
            let group = GroupNr((first.0 + step) % groups);
            let bits = match step {
                0 => offset..u32::MAX,
                step if step == groups => 0..offset,
                _ => 0..u32::MAX,
            };
            let descriptor = self.fs.group(group)?;
            if descriptor.free_blocks() == 0 || self.fs.has_group_flags() && descriptor.has(BLOCK_UNINIT) {
                continue;
            }
            let Some(found) = self.best_in(group, bits, want)? else { continue };
            if found.len() >= want {
                return Ok(Some(found));
            }
            if longest.as_ref().is_none_or(|longest| longest.len() < found.len()) {
                longest = Some(found);
            }
        }
        Ok(longest)
    }

    fn best_in(&mut self, group: GroupNr, bits: Range<u32>, want: u64) -> Result<Option<Candidate>> {
        let bitmap = self.bitmap(group, BitmapKind::Blocks)?;
        let bits = bits.start..bits.end.min(self.blocks_in(group));
        let want = u32::try_from(want).unwrap_or(u32::MAX);
        Ok(bitmap::best_run(&bitmap, bits, want).map(|bits| Candidate { group, bits }))
    }

    fn blocks_in(&self, group: GroupNr) -> u32 {
        let blocks = self.fs.geometry().group_blocks(group);
        u32::try_from(blocks.end.saturating_sub(blocks.start)).unwrap_or(u32::MAX)
    }

    /// Makes the bitmap of the nearest group that never had one, searching forward from `goal` and then from the front.
    fn open_group(&mut self, goal: BlockNr) -> Result<Option<GroupNr>> {
        if !self.fs.has_group_flags() {
            return Ok(None);
        }
        let geometry = self.fs.geometry();
        let groups = geometry.groups;
        let first = geometry.group_of_block(goal).0.min(groups - 1);
        for group in (first..groups).chain(0..first).map(GroupNr) {
            let descriptor = self.fs.group(group)?;
            if descriptor.has(BLOCK_UNINIT) && descriptor.free_blocks() > 0 {
                self.initialise_block_bitmap(group)?;
                return Ok(Some(group));
            }
        }
        Ok(None)
    }

    /// Writes the bitmap that a group's layout implies.
    fn initialise_block_bitmap(&mut self, group: GroupNr) -> Result<()> {
        let bytes = self.fs.implied_block_bitmap(group)?;
        self.put_bitmap(group, BitmapKind::Blocks, bytes)?;
        self.modify_group(group, |descriptor| descriptor.clear(BLOCK_UNINIT))
    }

    /// Frees blocks that are not in the cache.
    pub(crate) fn free_blocks(&mut self, range: BlockRange) -> Result<()> {
        self.mark(range, false)
    }

    /// Frees a block that was in the cache.
    pub(crate) fn free_metadata_block(&mut self, block: BlockNr) -> Result<()> {
        self.fs.cache.forget(block);
        self.free_blocks(BlockRange { start: block, len: 1 })
    }

    /// Sets the bits of blocks to `used`, and all counters.
    fn mark(&mut self, range: BlockRange, used: bool) -> Result<()> {
        let mut range = range;
        while range.len > 0 {
            let geometry = self.fs.geometry();
            let group = geometry.group_of_block(range.start);
            let blocks = geometry.group_blocks(group);
            if !geometry.contains(range.start, range.len) {
                return Err(Error::corrupt(
                    Place::Block(range.start),
                    "a block outside the file system was to be freed",
                ));
            }
            let here = range.len.min(blocks.end - range.start.0);
            let bit = |distance: u64| u32::try_from(distance).unwrap_or(u32::MAX);
            let from = bit(range.start.0 - blocks.start);
            self.mark_in_group(group, from..from + bit(here), used)?;
            range = BlockRange { start: range.start.plus(here), len: range.len - here };
        }
        Ok(())
    }

    fn mark_in_group(&mut self, group: GroupNr, bits: Range<u32>, used: bool) -> Result<()> {
        let corrupt = |problem| Error::corrupt(Place::Group(group), problem);
        let descriptor = self.fs.group(group)?;
        if self.fs.has_group_flags() && descriptor.has(BLOCK_UNINIT) {
            return Err(corrupt("blocks of it are in use, though it has no bitmap"));
        }
        let bitmap = self.bitmap(group, BitmapKind::Blocks)?;
        if bitmap::find(&bitmap, bits.clone(), used) != bits.end {
            return Err(corrupt("blocks in use are marked as free"));
        }
        let len = bits.end - bits.start;
        let free =
            if used { descriptor.free_blocks().checked_sub(len) } else { descriptor.free_blocks().checked_add(len) };
        let free = free.filter(|&free| free <= self.blocks_in(group));
        let free = free.ok_or_else(|| corrupt("its number of free blocks is wrong"))?;
        self.modify_bitmap(group, BitmapKind::Blocks, |bytes| bitmap::fill(bytes, bits.clone(), used))?;
        if !used {
            self.freed.push((group, bits));
        }
        self.modify_group(group, |descriptor| descriptor.set_free_blocks(free))?;
        let all = self.fs.free_blocks();
        let all = if used { all.saturating_sub(len.into()) } else { all.saturating_add(len.into()) };
        self.modify_superblock(|superblock| superblock.set_free_blocks(all));
        Ok(())
    }

    /// Tells the device of the blocks that were freed and not used again.
    pub(super) fn discard_freed(&mut self) -> Result<()> {
        let block_size = u64::from(self.fs.block_size());
        for (group, bits) in merged(std::mem::take(&mut self.freed)) {
            let start = self.fs.geometry().first_block_of(group).0;
            let bitmap = self.bitmap(group, BitmapKind::Blocks)?;
            for run in bitmap::runs(&bitmap, bits) {
                let bytes = |bit: u32| (start + u64::from(bit)) * block_size;
                let bytes = bytes(run.start)..bytes(run.end);
                if bytes.end - bytes.start >= CLUSTER {
                    let offset = bytes.start;
                    let failed = |source| Error::Io { operation: "discard", offset, source };
                    self.device.discard(bytes).map_err(failed)?;
                }
            }
        }
        Ok(())
    }
}

/// Sorts ranges of bits and joins those that touch or overlap.
fn merged(mut ranges: Vec<(GroupNr, Range<u32>)>) -> Vec<(GroupNr, Range<u32>)> {
    ranges.sort_by_key(|(group, bits)| (*group, bits.start));
    let mut merged: Vec<(GroupNr, Range<u32>)> = Vec::with_capacity(ranges.len());
    for (group, bits) in ranges {
        match merged.last_mut() {
            Some((last_group, last)) if *last_group == group && last.end >= bits.start => {
                last.end = last.end.max(bits.end);
            }
            _ => merged.push((group, bits)),
        }
    }
    merged
}
