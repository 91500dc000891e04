//! Changing the block maps of inodes.

use super::Editor;
use super::blocks::BlockRange;
use crate::error::{Error, Result};
use crate::features::incompat;
use crate::inode::{FLAG_EXTENTS, Inode, MAP_LEN};
use crate::map::{FileMap, Run};
use crate::{Ino, block_map, extent_edit};

/// A block map taken out of its inode, to be changed and put back.
pub(super) struct OpenMap {
    pub(super) map: FileMap,
    /// All blocks when it was taken out, those of the map itself included.
    blocks_before: u64,
}

impl OpenMap {
    fn blocks(&self) -> u64 {
        self.map.data_blocks() + self.map.nodes.len() as u64
    }
}

impl Editor {
    /// Whether maps are stored as extent trees, whatever form they had.
    pub(super) fn uses_extents(&self) -> bool {
        self.fs.superblock.features().has_incompat(incompat::EXTENTS)
    }

    /// Gives the inode an empty map of the form that new files have.
    pub(crate) fn clear_map(&self, inode: &mut Inode) {
        *inode.map_mut() = [0; MAP_LEN];
        inode.set_flag(FLAG_EXTENTS, self.uses_extents());
        if self.uses_extents() {
            *inode.map_mut() = extent_edit::encode(&FileMap::default(), self.fs.geometry().block_len(), None).root;
        }
    }

    pub(super) fn open_map(&self, inode: &Inode) -> Result<OpenMap> {
        let mut open = OpenMap { map: FileMap::load(&self.fs, inode)?, blocks_before: 0 };
        open.blocks_before = open.blocks();
        Ok(open)
    }

    /// Puts the map into the inode, as an extent tree where the file system has those. Nothing has changed after an error.
    pub(super) fn store_map(&mut self, inode: &mut Inode, mut open: OpenMap) -> Result<()> {
        let block_len = self.fs.geometry().block_len();
        let needed = if self.uses_extents() {
            extent_edit::blocks_needed(&open.map, block_len)
        } else {
            block_map::blocks_needed(&open.map, block_len).ok_or(Error::FileTooLarge(inode.ino()))?
        };
        let block_size = self.fs.block_size();
        let grown =
            self.fs.allocated(inode).saturating_add((open.map.data_blocks() + needed as u64) * u64::from(block_size));
        let after = grown.saturating_sub(open.blocks_before * u64::from(block_size));
        let huge = self.fs.has_huge_file();
        let mut counted = inode.clone();
        counted.set_allocated(after, huge, block_size)?;
        let have = open.map.nodes.len();
        if needed > have {
            let goal = self.goal_behind(inode.ino(), &open.map, open.map.end());
            for range in self.allocate_all(goal, (needed - have) as u64)? {
                open.map.nodes.extend((0..range.len).map(|at| range.start.plus(at)));
            }
        }
        let surplus = open.map.nodes.split_off(needed);
        *inode = counted;
        let seed = self.fs.checksum_seed().map(|seed| inode.seed(seed));
        let tree = if self.uses_extents() {
            extent_edit::encode(&open.map, block_len, seed)
        } else {
            block_map::encode(&open.map, block_len)
        };
        *inode.map_mut() = tree.root;
        inode.set_flag(FLAG_EXTENTS, self.uses_extents());
        for (place, bytes) in tree.blocks {
            self.fs.cache.put(place, bytes);
        }
        for block in surplus {
            self.free_metadata_block(block)?;
        }
        Ok(())
    }

    /// Where to look for a block that comes at `logical` in the file.
    fn goal_behind(&self, ino: Ino, map: &FileMap, logical: u64) -> crate::BlockNr {
        map.run_before(logical).map_or_else(|| self.goal_for(ino), |run| run.start.plus(run.len))
    }

    /// Allocates blocks for a hole in the map. Gives them back too, so that a failing caller can free them.
    pub(super) fn fill_hole(&mut self, ino: Ino, map: &mut FileMap, logical: u64, len: u64) -> Result<Vec<BlockRange>> {
        let mut taken = self.take_reserved(ino, len);
        let reserved: u64 = taken.iter().map(|range| range.len).sum();
        if reserved < len {
            let goal = taken.last().map_or_else(|| self.goal_behind(ino, map, logical), BlockRange::end);
            match self.allocate_all(goal, len - reserved) {
                Ok(more) => taken.extend(more),
                Err(error) => {
                    self.free_all(taken)?;
                    return Err(error);
                }
            }
        }
        let mut at = logical;
        for range in &taken {
            map.insert(Run { logical: at, len: range.len, start: range.start, unwritten: false });
            at += range.len;
        }
        Ok(taken)
    }

    pub(super) fn free_all(&mut self, ranges: impl IntoIterator<Item = BlockRange>) -> Result<()> {
        ranges.into_iter().try_for_each(|range| self.free_blocks(range))
    }

    /// Frees what is mapped from block `from` of the file on. `is_metadata` for directories, whose blocks the cache holds.
    pub(super) fn cut_map(&mut self, inode: &mut Inode, from: u64, is_metadata: bool) -> Result<()> {
        let mut open = self.open_map(inode)?;
        let removed = open.map.remove(from..u64::MAX);
        self.store_map(inode, open)?;
        for run in removed {
            if is_metadata {
                (0..run.len).for_each(|at| self.fs.cache.forget(run.start.plus(at)));
            }
            self.free_blocks(BlockRange { start: run.start, len: run.len })?;
        }
        Ok(())
    }

    /// Sets blocks aside, in few runs, so that a file about to be written up to `len` blocks has them.
    pub(super) fn reserve_blocks(&mut self, inode: &Inode, len: u64) -> Result<()> {
        self.release_reservation(inode.ino())?;
        let map = FileMap::load(&self.fs, inode)?;
        let mapped: u64 = map.runs().iter().map(|run| run.end().min(len).saturating_sub(run.logical)).sum();
        if len > mapped {
            let goal = self.goal_behind(inode.ino(), &map, map.end());
            let ranges = self.allocate_all(goal, len - mapped)?;
            self.reservations.insert(inode.ino(), ranges);
        }
        Ok(())
    }

    fn take_reserved(&mut self, ino: Ino, len: u64) -> Vec<BlockRange> {
        let Some(ranges) = self.reservations.get_mut(&ino) else { return Vec::new() };
        let mut taken = Vec::new();
        let mut left = len;
        while left > 0
            && let Some(first) = ranges.first_mut()
        {
            let now = left.min(first.len);
            taken.push(BlockRange { start: first.start, len: now });
            *first = BlockRange { start: first.start.plus(now), len: first.len - now };
            left -= now;
            if first.len == 0 {
                ranges.remove(0);
            }
        }
        taken
    }

    /// Frees what is left of the blocks set aside for a file.
    pub(super) fn release_reservation(&mut self, ino: Ino) -> Result<()> {
        let ranges = self.reservations.remove(&ino).unwrap_or_default();
        self.free_all(ranges)
    }

    pub(super) fn release_all_reservations(&mut self) -> Result<()> {
        let reservations = std::mem::take(&mut self.reservations);
        reservations.into_values().try_for_each(|ranges| self.free_all(ranges))
    }
}
