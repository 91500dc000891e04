//! Block maps of ext2 and ext3: direct and indirect pointers (kernel documentation, "Direct/Indirect Block Addressing").

use crate::error::{Error, Place, Result};
use crate::extent_edit::Tree;
use crate::inode::{Inode, MAP_LEN};
use crate::map::{FileMap, Run, Segment, Target};
use crate::{BlockNr, Ext4};

/// Pointers to data in the inode; behind them come one single, one double and one triple indirect pointer.
const DIRECT_LEN: usize = 12;
const DIRECT: u64 = DIRECT_LEN as u64;
const LEVELS: u32 = 3;
const POINTER_LEN: usize = 4;

fn pointer(bytes: &[u8], at: u64) -> u32 {
    let at = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(POINTER_LEN);
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |&bytes| u32::from_le_bytes(bytes))
}

fn pointers_per_block(fs: &Ext4) -> u64 {
    u64::from(fs.geometry().block_size) / POINTER_LEN as u64
}

/// One past the last block of a file that the pointers can reach.
pub(crate) fn end(block_len: usize) -> u64 {
    let per_block = (block_len / POINTER_LEN) as u64;
    DIRECT + (1..=LEVELS).map(|level| per_block.pow(level)).sum::<u64>()
}

/// A place in the tree of pointers: an array of them, each of which maps `span` blocks of the file from `first` on.
pub(crate) struct Array<'a> {
    pub(crate) bytes: &'a [u8],
    pub(crate) first: u64,
    len: u64,
    pub(crate) span: u64,
}

impl Array<'_> {
    fn end(&self) -> u64 {
        self.first + self.len * self.span
    }
}

fn check(fs: &Ext4, inode: &Inode, pointer: u32) -> Result<BlockNr> {
    let block = BlockNr(pointer.into());
    if fs.geometry().contains(block, 1) {
        Ok(block)
    } else {
        Err(Error::corrupt(Place::Inode(inode.ino()), "a block pointer lies outside the file system"))
    }
}

/// The arrays that lie in the inode itself: direct pointers, then one pointer of each level.
pub(crate) fn roots<'a>(fs: &Ext4, inode: &'a Inode) -> impl Iterator<Item = Array<'a>> {
    let per_block = pointers_per_block(fs);
    let direct = Array { bytes: &inode.map()[..DIRECT_LEN * POINTER_LEN], first: 0, len: DIRECT, span: 1 };
    let mut first = DIRECT;
    std::iter::once(direct).chain((1..=LEVELS).map(move |level| {
        let at = (DIRECT_LEN + level as usize - 1) * POINTER_LEN;
        let root = Array { bytes: &inode.map()[at..at + POINTER_LEN], first, len: 1, span: per_block.pow(level) };
        first = root.end();
        root
    }))
}

/// What block `logical` of the file is, and how many blocks after it are the same.
pub(crate) fn find(fs: &Ext4, inode: &Inode, logical: u64) -> Result<Segment> {
    match roots(fs, inode).find(|root| logical < root.end()) {
        Some(root) => find_in(fs, inode, &root, logical),
        None => Ok(Segment { logical, len: u64::MAX - logical, target: Target::Hole }),
    }
}

fn find_in(fs: &Ext4, inode: &Inode, array: &Array<'_>, logical: u64) -> Result<Segment> {
    let at = (logical - array.first) / array.span;
    let value = pointer(array.bytes, at);
    let like = |alike: &dyn Fn(u64, u32) -> bool| {
        (at..array.len).take_while(|&other| alike(other - at, pointer(array.bytes, other))).count() as u64
    };
    if value == 0 {
        let end = array.first + (at + like(&|_, other| other == 0)) * array.span;
        return Ok(Segment { logical, len: end - logical, target: Target::Hole });
    }
    let block = check(fs, inode, value)?;
    if array.span == 1 {
        let len = like(&|distance, other| u64::from(other) == u64::from(value) + distance);
        if !fs.geometry().contains(block, len) {
            return Err(Error::corrupt(Place::Inode(inode.ino()), "a block pointer lies outside the file system"));
        }
        return Ok(Segment { logical, len, target: Target::Data(block) });
    }
    let per_block = pointers_per_block(fs);
    let first = array.first + at * array.span;
    let child = Array { bytes: &fs.block(block)?, first, len: per_block, span: array.span / per_block };
    find_in(fs, inode, &child, logical)
}

/// The whole map, indirect blocks included.
pub(crate) fn load(fs: &Ext4, inode: &Inode) -> Result<FileMap> {
    let mut map = FileMap::default();
    // Pointers that all lead to one block would make a small file system look endless.
    let mut budget = fs.geometry().blocks;
    for root in roots(fs, inode) {
        load_array(fs, inode, &root, &mut map, &mut budget)?;
    }
    Ok(map)
}

fn load_array(fs: &Ext4, inode: &Inode, array: &Array<'_>, map: &mut FileMap, budget: &mut u64) -> Result<()> {
    for at in 0..array.len {
        let value = pointer(array.bytes, at);
        if value == 0 {
            continue;
        }
        *budget = budget.checked_sub(1).ok_or_else(|| {
            Error::corrupt(Place::Inode(inode.ino()), "block pointers refer to more blocks than there are")
        })?;
        let start = check(fs, inode, value)?;
        let logical = array.first + at * array.span;
        if array.span == 1 {
            map.push(Run { logical, len: 1, start, unwritten: false });
        } else {
            map.nodes.push(start);
            let per_block = pointers_per_block(fs);
            let child =
                Array { bytes: &fs.block(start)?, first: logical, len: per_block, span: array.span / per_block };
            load_array(fs, inode, &child, map, budget)?;
        }
    }
    Ok(())
}

/// How many blocks with pointers the map takes, or `None` if pointers cannot hold it.
pub(crate) fn blocks_needed(map: &FileMap, block_len: usize) -> Option<usize> {
    let reach = end(block_len);
    let fits = |run: &Run| run.end() <= reach && u32::try_from(run.start.plus(run.len).0).is_ok() && !run.unwritten;
    let count = || lay_out(map, block_len, std::iter::repeat(BlockNr(0))).blocks.len();
    map.runs().iter().all(fits).then(count)
}

/// Lays the map out in its own node blocks, of which it must have as many as [`blocks_needed`] says.
pub(crate) fn encode(map: &FileMap, block_len: usize) -> Tree {
    lay_out(map, block_len, map.nodes.iter().copied())
}

fn lay_out(map: &FileMap, block_len: usize, free: impl Iterator<Item = BlockNr>) -> Tree {
    let per_block = (block_len / POINTER_LEN) as u64;
    let mut layout = Layout { map, block_len, free, blocks: Vec::new() };
    let mut root = [0; MAP_LEN];
    let (direct, indirect) = root.split_at_mut(DIRECT_LEN * POINTER_LEN);
    layout.array(direct, 0, 1);
    let mut first = DIRECT;
    for (level, pointer) in (1..=LEVELS).zip(indirect.chunks_exact_mut(POINTER_LEN)) {
        layout.array(pointer, first, per_block.pow(level));
        first += per_block.pow(level);
    }
    Tree { root, blocks: layout.blocks }
}

struct Layout<'a, I> {
    map: &'a FileMap,
    block_len: usize,
    free: I,
    blocks: Vec<(BlockNr, Vec<u8>)>,
}

impl<I: Iterator<Item = BlockNr>> Layout<'_, I> {
    /// Fills an array of pointers, each of which maps `span` blocks of the file from `first` on.
    fn array(&mut self, pointers: &mut [u8], first: u64, span: u64) {
        let end = first + (pointers.len() / POINTER_LEN) as u64 * span;
        let mut at = first;
        while at < end {
            let segment = self.map.find(at);
            let Target::Data(start) = segment.target else {
                at += segment.len;
                continue;
            };
            let index = (at - first) / span;
            let value = if span == 1 { Some(start) } else { self.child(first + index * span, span) };
            let value = value.and_then(|block| u32::try_from(block.0).ok()).unwrap_or(0);
            let place = usize::try_from(index).unwrap_or(usize::MAX) * POINTER_LEN;
            pointers[place..place + POINTER_LEN].copy_from_slice(&value.to_le_bytes());
            at = first + (index + 1) * span;
        }
    }

    fn child(&mut self, first: u64, span: u64) -> Option<BlockNr> {
        let place = self.free.next()?;
        let mut bytes = vec![0; self.block_len];
        self.array(&mut bytes, first, span / (self.block_len / POINTER_LEN) as u64);
        self.blocks.push((place, bytes));
        Some(place)
    }
}
