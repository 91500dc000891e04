//! Extent trees, written: a map becomes the smallest tree that holds it.

use zerocopy::{FromZeros, IntoBytes};

use crate::BlockNr;
use crate::checksum::{self, Seed};
use crate::extent::{ENTRY_LEN, MAGIC, MAX_UNWRITTEN, MAX_WRITTEN, RawExtent, RawHeader, RawIndex};
use crate::inode::MAP_LEN;
use crate::map::{FileMap, Run};

const ROOT_ENTRIES: usize = MAP_LEN / ENTRY_LEN - 1;

type Entry = [u8; ENTRY_LEN];

fn entries_per_block(block_len: usize) -> usize {
    block_len / ENTRY_LEN - 1
}

/// How many blocks the tree takes besides its root in the inode.
pub(crate) fn blocks_needed(map: &FileMap, block_len: usize) -> usize {
    let mut nodes = map.runs().iter().map(|run| usize::try_from(pieces(run)).unwrap_or(usize::MAX)).sum::<usize>();
    let mut total = 0;
    while nodes > ROOT_ENTRIES {
        nodes = nodes.div_ceil(entries_per_block(block_len));
        total += nodes;
    }
    total
}

fn max_len(run: &Run) -> u64 {
    if run.unwritten { MAX_UNWRITTEN } else { MAX_WRITTEN }.into()
}

/// How many extents a run takes.
fn pieces(run: &Run) -> u64 {
    run.len.div_ceil(max_len(run))
}

/// Lower halves of numbers that were checked when their runs were made.
#[expect(clippy::cast_possible_truncation, reason = "the halves of a block number are taken apart")]
fn halves(block: BlockNr) -> (u32, u16) {
    (block.0 as u32, (block.0 >> 32) as u16)
}

/// A file's block number; maps reach no further than 2^32.
fn key(logical: u64) -> u32 {
    u32::try_from(logical).unwrap_or(u32::MAX)
}

fn extents(run: &Run) -> impl Iterator<Item = (u32, Entry)> {
    (0..pieces(run)).map(move |piece| {
        let skipped = piece * max_len(run);
        let len = u16::try_from((run.len - skipped).min(max_len(run))).unwrap_or(u16::MAX);
        let (start_lo, start_hi) = halves(run.start.plus(skipped));
        let logical = key(run.logical + skipped);
        // The flag of unwritten extents is the top bit, which a written one of the greatest length has as well.
        let len = if run.unwritten { len | 0x8000 } else { len };
        let extent = RawExtent {
            logical: logical.into(),
            len: len.into(),
            start_hi: start_hi.into(),
            start_lo: start_lo.into(),
        };
        (logical, zerocopy::transmute!(extent))
    })
}

fn index(logical: u32, child: BlockNr) -> Entry {
    let (child_lo, child_hi) = halves(child);
    let mut index = RawIndex::new_zeroed();
    index.logical = logical.into();
    index.child_lo = child_lo.into();
    index.child_hi = child_hi.into();
    zerocopy::transmute!(index)
}

fn count(number: usize) -> zerocopy::little_endian::U16 {
    u16::try_from(number).unwrap_or(u16::MAX).into()
}

fn node(entries: &[(u32, Entry)], max: usize, depth: u16, bytes: &mut [u8]) {
    let header = RawHeader {
        magic: MAGIC.into(),
        entries: count(entries.len()),
        max: count(max),
        depth: depth.into(),
        generation: 0.into(),
    };
    let parts = std::iter::once(header.as_bytes()).chain(entries.iter().map(|(_, entry)| entry.as_slice()));
    for (place, part) in bytes.chunks_exact_mut(ENTRY_LEN).zip(parts) {
        place.copy_from_slice(part);
    }
}

/// A tree: its root for the inode and the content of its blocks.
pub(crate) struct Tree {
    pub(crate) root: [u8; MAP_LEN],
    pub(crate) blocks: Vec<(BlockNr, Vec<u8>)>,
}

/// Lays the map out in its own node blocks, of which it must have as many as [`blocks_needed`] says.
pub(crate) fn encode(map: &FileMap, block_len: usize, seed: Option<Seed>) -> Tree {
    let mut level: Vec<(u32, Entry)> = map.runs().iter().flat_map(extents).collect();
    let mut free = map.nodes.iter().copied();
    let mut blocks = Vec::with_capacity(map.nodes.len());
    let mut depth = 0;
    while level.len() > ROOT_ENTRIES {
        let max = entries_per_block(block_len);
        level = level
            .chunks(max)
            .zip(&mut free)
            .map(|(entries, place)| {
                let mut bytes = vec![0; block_len];
                node(entries, max, depth, &mut bytes);
                if let Some(seed) = seed {
                    let (front, tail) = bytes.split_at_mut(ENTRY_LEN * (1 + max));
                    tail[..4].copy_from_slice(&checksum::extent_block(seed, front).to_le_bytes());
                }
                blocks.push((place, bytes));
                let first = entries.first().map_or(0, |&(logical, _)| logical);
                (first, index(first, place))
            })
            .collect();
        depth += 1;
    }
    let mut root = [0; MAP_LEN];
    node(&level, ROOT_ENTRIES, depth, &mut root);
    Tree { root, blocks }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(runs: &[(u64, u64, bool)]) -> FileMap {
        let mut map = FileMap::default();
        for &(logical, len, unwritten) in runs {
            map.push(Run { logical, len, start: BlockNr(10 * logical + 7), unwritten });
        }
        map
    }

    #[test]
    fn long_runs_take_several_extents() {
        assert_eq!(blocks_needed(&map(&[(0, 4 << 15, false)]), 4096), 0);
        assert_eq!(blocks_needed(&map(&[(0, (4 << 15) + 1, false)]), 4096), 1);
        assert_eq!(blocks_needed(&map(&[(0, 4 << 15, true)]), 4096), 1);
        let extents: Vec<_> = extents(&map(&[(5, (1 << 15) + 9, false)]).runs()[0]).map(|(key, _)| key).collect();
        assert_eq!(extents, [5, 5 + (1 << 15)]);
    }

    #[test]
    fn trees_are_no_deeper_than_they_must_be() {
        let scattered = |count: u64| map(&(0..count).map(|at| (2 * at, 1, false)).collect::<Vec<_>>());
        // 84 entries fit in a block of 1 KiB.
        for (count, blocks) in [(4, 0), (5, 1), (84, 1), (85, 2), (336, 4), (337, 6), (4 * 84 * 84, 4 * 85)] {
            let mut map = scattered(count);
            assert_eq!(blocks_needed(&map, 1024), blocks, "{count}");
            map.nodes = (0..blocks as u64).map(BlockNr).collect();
            assert_eq!(encode(&map, 1024, None).blocks.len(), blocks);
        }
    }
}
