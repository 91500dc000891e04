//! Which blocks of the device hold which blocks of a file, whatever form the file's inode keeps that in.

use std::ops::Range;

use crate::error::Result;
use crate::inode::{FLAG_EXTENTS, Inode};
use crate::{BlockNr, Ext4, block_map, extent};

/// Blocks of a file that lie together on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first one's number in the file.
    pub(crate) logical: u64,
    /// How many there are; not zero.
    pub(crate) len: u64,
    /// The first one's number on the device.
    pub(crate) start: BlockNr,
    /// Allocated, but reads as zeroes.
    pub(crate) unwritten: bool,
}

impl Run {
    /// One past the last block's number in the file.
    pub(crate) fn end(&self) -> u64 {
        self.logical + self.len
    }

    /// The part of the run in a range of the file's blocks, which must overlap it.
    fn part(&self, range: &Range<u64>) -> Self {
        let logical = self.logical.max(range.start);
        let len = self.end().min(range.end).saturating_sub(logical);
        Self { logical, len, start: self.start.plus(logical - self.logical), ..*self }
    }

    /// What follows from block `logical` of the file on, if the run holds it.
    pub(crate) fn segment_at(&self, logical: u64) -> Option<Segment> {
        if !(self.logical..self.end()).contains(&logical) {
            return None;
        }
        let part = self.part(&(logical..self.end()));
        let target = if self.unwritten { Target::Unwritten } else { Target::Data(part.start) };
        Some(Segment { logical, len: part.len, target })
    }

    fn continues_in(&self, next: &Self) -> bool {
        self.end() == next.logical && self.start.plus(self.len) == next.start && self.unwritten == next.unwritten
    }
}

/// What a block of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Nothing; reads as zeroes.
    Hole,
    /// Allocated, but reads as zeroes.
    Unwritten,
    /// These blocks of the device.
    Data(BlockNr),
}

/// Some blocks of a file that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) logical: u64,
    /// Not zero.
    pub(crate) len: u64,
    pub(crate) target: Target,
}

/// All blocks of a file: its runs in order, and the blocks that store this map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileMap {
    runs: Vec<Run>,
    /// Blocks with nodes of the tree, in no particular order.
    pub(crate) nodes: Vec<BlockNr>,
}

impl FileMap {
    pub(crate) fn load(fs: &Ext4, inode: &Inode) -> Result<Self> {
        if inode.has(FLAG_EXTENTS) { extent::load(fs, inode) } else { block_map::load(fs, inode) }
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// One past the last allocated block's number in the file.
    pub(crate) fn end(&self) -> u64 {
        self.runs.last().map_or(0, Run::end)
    }

    /// How many blocks hold or will hold data.
    pub(crate) fn data_blocks(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// Adds a run behind all others.
    pub(crate) fn push(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last) if last.continues_in(&run) => last.len += run.len,
            _ => self.runs.push(run),
        }
    }

    fn first_ending_after(&self, logical: u64) -> usize {
        self.runs.partition_point(|run| run.end() <= logical)
    }

    /// What block `logical` of the file is, and how many blocks after it are the same.
    pub(crate) fn find(&self, logical: u64) -> Segment {
        let next = self.runs.get(self.first_ending_after(logical));
        next.and_then(|run| run.segment_at(logical)).unwrap_or_else(|| Segment {
            logical,
            len: next.map_or(extent::END, |run| run.logical).saturating_sub(logical).max(1),
            target: Target::Hole,
        })
    }

    /// The run that ends at or before block `logical` of the file, to put new blocks behind it.
    pub(crate) fn run_before(&self, logical: u64) -> Option<&Run> {
        self.runs[..self.first_ending_after(logical)].last()
    }

    /// Maps a run where there is a hole.
    pub(crate) fn insert(&mut self, run: Run) {
        let at = self.first_ending_after(run.logical);
        self.runs.insert(at, run);
        self.merge_around(at..at + 1);
    }

    /// Unmaps a range of the file and gives back the runs that were there.
    pub(crate) fn remove(&mut self, range: Range<u64>) -> Vec<Run> {
        self.replace(range, |_| None)
    }

    /// Says that the range has been written.
    pub(crate) fn mark_written(&mut self, range: Range<u64>) {
        self.replace(range, |part| Some(Run { unwritten: false, ..part }));
    }

    /// Replaces the parts of runs within `range`, and gives back what they were.
    fn replace(&mut self, range: Range<u64>, with: impl Fn(Run) -> Option<Run>) -> Vec<Run> {
        let from = self.first_ending_after(range.start);
        let to = self.runs.partition_point(|run| run.logical < range.end).max(from);
        let mut old = Vec::with_capacity(to - from);
        let mut new = Vec::with_capacity(to - from + 2);
        for run in &self.runs[from..to] {
            let part = run.part(&range);
            if run.logical < part.logical {
                new.push(run.part(&(run.logical..part.logical)));
            }
            new.extend(with(part));
            if part.end() < run.end() {
                new.push(run.part(&(part.end()..run.end())));
            }
            old.push(part);
        }
        let len = new.len();
        self.runs.splice(from..to, new);
        self.merge_around(from..from + len);
        old
    }

    /// Joins neighbours that lie together, for the runs at these places and those next to them.
    fn merge_around(&mut self, places: Range<usize>) {
        let from = places.start.saturating_sub(1);
        let to = (places.end + 1).min(self.runs.len());
        let mut merged: Vec<Run> = Vec::with_capacity(to - from);
        for run in &self.runs[from..to] {
            match merged.last_mut() {
                Some(last) if last.continues_in(run) => last.len += run.len,
                _ => merged.push(*run),
            }
        }
        if merged.len() < to - from {
            self.runs.splice(from..to, merged);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(logical: u64, len: u64, start: u64, unwritten: bool) -> Run {
        Run { logical, len, start: BlockNr(start), unwritten }
    }

    #[test]
    fn joins_and_splits() {
        let mut map = FileMap::default();
        map.insert(run(10, 5, 110, false));
        map.insert(run(0, 5, 100, false));
        map.insert(run(5, 5, 105, false));
        assert_eq!(map.runs(), [run(0, 15, 100, false)]);
        assert_eq!(map.remove(3..6), [run(3, 3, 103, false)]);
        assert_eq!(map.runs(), [run(0, 3, 100, false), run(6, 9, 106, false)]);
        map.insert(run(3, 3, 103, true));
        assert_eq!(map.runs().len(), 3);
        assert_eq!(map.find(4), Segment { logical: 4, len: 2, target: Target::Unwritten });
        map.mark_written(4..5);
        assert_eq!(map.runs().len(), 5);
        map.mark_written(0..100);
        assert_eq!(map.runs(), [run(0, 15, 100, false)]);
        assert_eq!(map.remove(2..100), [run(2, 13, 102, false)]);
        assert_eq!(map.find(7).target, Target::Hole);
        assert_eq!(map.run_before(2), Some(&run(0, 2, 100, false)));
    }
}
