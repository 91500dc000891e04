//! Blocks of directories, read in long pieces: most directories have one block, next to others'.

use std::ops::Range;

use super::state::{DirState, Entries};
use crate::BlockNr;
use crate::error::Result;
use crate::fs::Ext4;

/// Bytes to read at once.
const PIECE: u64 = 256 << 10;
/// Blocks that nobody asked for are read too, if so few lie between two that somebody will.
const GAP: u64 = 4;

/// What was read last, and what will be asked for.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    /// Ranges of blocks, in order.
    plan: Vec<Range<u64>>,
    start: u64,
    bytes: Vec<u8>,
}

impl ReadAhead {
    /// Says that the blocks of these directories will be asked for.
    pub(super) fn expect<'a>(&mut self, dirs: impl Iterator<Item = &'a DirState>) {
        let mut all: Vec<Range<u64>> = dirs
            .filter_map(|dir| match &dir.entries {
                Entries::Blocks(runs) => Some(runs),
                Entries::Inline(_) => None,
            })
            .flatten()
            .map(|run| run.start.0..run.start.0 + run.len)
            .collect();
        all.sort_unstable_by_key(|range| range.start);
        self.plan.clear();
        for range in all {
            match self.plan.last_mut() {
                Some(last) if range.start <= last.end + GAP => last.end = last.end.max(range.end),
                _ => self.plan.push(range),
            }
        }
    }

    /// The bytes of blocks from `start` on: of `len` of them, or as many as are read at once.
    pub(super) fn read(&mut self, fs: &Ext4, start: BlockNr, len: u64) -> Result<&[u8]> {
        let block_size = u64::from(fs.geometry().block_size);
        let held = self.bytes.len() as u64 / block_size;
        if !(self.start..self.start + held).contains(&start.0) {
            let expected = self.plan.partition_point(|range| range.end <= start.0);
            let end = self.plan.get(expected).map_or(start.0 + len, |range| range.end.max(start.0 + len));
            let count = (end - start.0).min(PIECE.div_ceil(block_size));
            self.bytes.resize(usize::try_from(count * block_size).unwrap_or(0), 0);
            self.start = start.0;
            let read = fs.read_device(&mut self.bytes, fs.geometry().offset(start));
            if let Err(error) = read {
                self.bytes.clear();
                return Err(error);
            }
        }
        let from = usize::try_from((start.0 - self.start) * block_size).unwrap_or(0);
        let rest = &self.bytes[from..];
        let wanted = usize::try_from(len.saturating_mul(block_size)).unwrap_or(usize::MAX);
        Ok(&rest[..rest.len().min(wanted)])
    }
}
