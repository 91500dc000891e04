//! The hash tree of one directory: that it leads to every block once, and every block has the hashes it should.

use super::Check;
use super::finding::Findings;
use super::state::DirState;
use crate::checksum::Seed;
use crate::dir::{HashFunction, Leaf, Node, Root};
use crate::features::incompat;
use crate::inode::{FLAG_CASEFOLD, FLAG_ENCRYPT};
use crate::superblock::HashParameters;

/// What a block of the directory turned out to be.
enum Block {
    Missing,
    /// Slots: the smallest hash below each, and its block.
    Node(Vec<(u32, u32)>),
    /// The smallest and largest hash of its entries, if it has any that can be computed.
    Leaf(Option<(u32, u32)>),
}

/// Collects the blocks of a directory as they are read, and then walks the tree.
pub(super) struct IndexCheck<'a> {
    dir: &'a DirState,
    hash: HashParameters,
    /// From the root; none if that is damaged or its hashes cannot be computed.
    function: Option<HashFunction>,
    levels: u8,
    max_levels: u8,
    blocks: Vec<Block>,
    damaged: bool,
}

impl<'a> IndexCheck<'a> {
    pub(super) fn new(check: &Check<'_>, dir: &'a DirState) -> Self {
        let max_levels = if check.has_incompat(incompat::LARGE_DIR) { 3 } else { 2 };
        let hash = check.fs.superblock.hash_parameters();
        Self { dir, hash, function: None, levels: 0, max_levels, blocks: Vec::new(), damaged: false }
    }

    fn put(&mut self, number: u32, block: Block) {
        let at = number as usize;
        while self.blocks.len() <= at {
            self.blocks.push(Block::Missing);
        }
        self.blocks[at] = block;
    }

    /// Takes a block if it is one of the tree's. Without checksums, an empty block of records looks nearly the same.
    pub(super) fn add_node(&mut self, number: u32, bytes: &[u8], seed: Option<Seed>, findings: &Findings) -> bool {
        if number == 0 {
            match Root::parse(bytes.to_vec(), seed) {
                Ok(root) if root.levels < self.max_levels => {
                    self.levels = root.levels;
                    self.function = Some(root.function);
                    let slots = self.slots(&root.node, findings, number);
                    self.put(0, Block::Node(slots));
                }
                Ok(_) => self.bad(findings, 0, "the index has too many levels"),
                Err(damage) => self.bad(findings, 0, damage),
            }
            return true;
        }
        if !Node::has_limit_of_node(bytes, seed.is_some()) {
            return false;
        }
        match Node::parse(bytes.to_vec(), seed) {
            Ok(node) => {
                let slots = self.slots(&node, findings, number);
                self.put(number, Block::Node(slots));
            }
            Err(damage) => self.bad(findings, number, damage),
        }
        true
    }

    fn bad(&mut self, findings: &Findings, number: u32, text: &'static str) {
        self.damaged = true;
        findings.index(self.dir.ino, number, text);
    }

    fn slots(&mut self, node: &Node, findings: &Findings, number: u32) -> Vec<(u32, u32)> {
        let count = node.children().len();
        let slots: Vec<(u32, u32)> = (0..count)
            .map(|at| {
                let hash = if at == 0 { 0 } else { node.hash(at).unwrap_or_default() };
                (hash, node.child(at).unwrap_or_default())
            })
            .collect();
        if slots.get(1..).unwrap_or_default().windows(2).any(|pair| pair[1].0 < pair[0].0) {
            self.bad(findings, number, "the hashes of the index are out of order");
        }
        slots
    }

    pub(super) fn add_leaf(&mut self, number: u32, leaf: &Leaf) {
        let range = leaf.in_use().filter_map(|record| self.hash_of(record.entry.name)).fold(None, |range, hash| {
            let (low, high) = range.unwrap_or((hash, hash));
            Some((hash.min(low), hash.max(high)))
        });
        self.put(number, Block::Leaf(range));
    }

    /// The hash of a name, where it can be computed: folding needs tables for all but ASCII, and names both folded and
    /// encrypted are hashed with a key.
    fn hash_of(&self, name: &[u8]) -> Option<u32> {
        let function = self.function?;
        if !self.dir.has(FLAG_CASEFOLD) {
            return Some(self.hash.hash(function, name));
        }
        let can_fold = name.is_ascii() && !self.dir.has(FLAG_ENCRYPT);
        can_fold.then(|| self.hash.hash(function, &name.to_ascii_lowercase()))
    }

    /// Walks the tree once all blocks are there.
    pub(super) fn finish(mut self, findings: &Findings) {
        if self.damaged {
            return;
        }
        let mut seen = vec![false; self.blocks.len().max(1)];
        seen[0] = true;
        self.walk(findings, 0, self.levels, (0, u32::MAX), &mut seen);
        if let Some(missed) = seen.iter().position(|seen| !seen)
            && !self.damaged
        {
            self.bad(findings, u32::try_from(missed).unwrap_or(u32::MAX), "the index does not lead to this block");
        }
    }

    /// Walks the node in block `number`, which has `levels` levels of nodes below it and hashes within `range`.
    fn walk(&mut self, findings: &Findings, number: u32, levels: u8, range: (u32, u32), seen: &mut [bool]) {
        let Some(Block::Node(slots)) =
            self.blocks.get_mut(number as usize).map(|block| std::mem::replace(block, Block::Missing))
        else {
            return self.bad(findings, number, "the index leads to a block that is not part of it");
        };
        for (at, &(hash, child)) in slots.iter().enumerate() {
            let low = if at == 0 { range.0 } else { hash };
            let high = slots.get(at + 1).map_or(range.1, |&(next, _)| next);
            match seen.get_mut(child as usize) {
                None => return self.bad(findings, number, "the index leads past the directory's end"),
                Some(true) => return self.bad(findings, child, "the index leads to this block twice"),
                Some(seen) => *seen = true,
            }
            if low < range.0 || high > range.1 {
                return self.bad(findings, number, "a node of the index has hashes that belong elsewhere");
            }
            if levels > 0 {
                self.walk(findings, child, levels - 1, (low, high), seen);
                continue;
            }
            match self.blocks.get(child as usize) {
                Some(&Block::Leaf(Some((first, last)))) if first < low & !1 || last > high => {
                    self.bad(findings, child, "the block has entries whose hashes belong elsewhere");
                }
                Some(Block::Leaf(_)) => {}
                _ => self.bad(findings, child, "the index leads to a block without entries"),
            }
        }
    }
}
