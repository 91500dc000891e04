//! Extent trees and block maps, walked block by block of their nodes and run by run of their data.

use super::Claims;
use crate::checksum;
use crate::error::{Error, Result};
use crate::extent::{self, Entries, Node, RawExtent, RawIndex};
use crate::inode::{FLAG_EXTENTS, Inode};
use crate::map::Run;
use crate::{BlockNr, FindingKind, block_map};

/// What a walk came to know about an inode's blocks.
#[derive(Debug, Default)]
pub(super) struct MapFacts {
    /// Clusters of data and of nodes.
    pub(super) clusters: u64,
    /// The last block of the file that is mapped.
    pub(super) last: Option<u64>,
    /// The last one that does not read as zeroes.
    pub(super) last_written: Option<u64>,
    /// The last one whose run is not marked as unwritten, holes between blocks filled.
    pub(super) has_unwritten: bool,
    /// Whether the walk met damage, so that the numbers mean nothing.
    pub(super) damaged: bool,
    /// All runs, where they were asked for.
    pub(super) runs: Vec<Run>,
}

/// A walk over one inode's map.
pub(super) struct MapWalk<'a, 'b> {
    claims: &'a Claims<'b>,
    inode: &'a Inode,
    keep_runs: bool,
    /// Claims nothing but its double indirect block: the resize inode, whose blocks lie at fixed places.
    is_resize: bool,
    facts: MapFacts,
    /// The last run's last block, on the device and in the file: the next run may go on in the same cluster.
    previous: Option<(u64, u64)>,
}

impl<'a, 'b> MapWalk<'a, 'b> {
    /// Walks the map of `inode`, which has one, and claims its blocks. `keep_runs` says whether the runs are wanted.
    pub(super) fn run(claims: &'a Claims<'b>, inode: &'a Inode, keep_runs: bool) -> Result<MapFacts> {
        let mut walk = Self { claims, inode, keep_runs, is_resize: false, facts: MapFacts::default(), previous: None };
        if inode.has(FLAG_EXTENTS) {
            walk.extents()?
        } else {
            walk.pointers()?
        }
        Ok(walk.facts)
    }

    /// Walks the map of the resize inode.
    pub(super) fn resize(claims: &'a Claims<'b>, inode: &'a Inode) -> Result<MapFacts> {
        let mut walk =
            Self { claims, inode, keep_runs: false, is_resize: true, facts: MapFacts::default(), previous: None };
        walk.pointers()?;
        Ok(walk.facts)
    }

    fn damage(&mut self, text: &'static str) {
        self.facts.damaged = true;
        self.claims.findings.map(self.inode.ino(), text);
    }

    fn shared(&mut self, block: Option<BlockNr>) -> bool {
        let Some(block) = block else { return false };
        self.facts.damaged = true;
        let text = format!("block {block} is claimed by something else too");
        self.claims.findings.damage(FindingKind::SharedBlock, crate::Place::Inode(self.inode.ino()), text);
        true
    }

    /// Claims a block with a node. False if it cannot be descended into.
    fn node(&mut self, block: BlockNr, claim: bool) -> bool {
        if !self.claims.check.fs.geometry().contains(block, 1) {
            self.damage("a node of the block map lies outside the file system");
            return false;
        }
        self.facts.clusters += 1;
        if !claim {
            // Pointers that all lead to one block would make a small file system look endless.
            return self.facts.clusters <= self.claims.check.fs.geometry().blocks;
        }
        let shared = self.claims.blocks.claim(block, 1);
        !self.shared(shared)
    }

    /// Claims blocks with data.
    fn data(&mut self, run: Run) {
        if self.is_resize {
            self.facts.clusters += run.len;
            return;
        }
        let ratio = self.claims.blocks.ratio();
        let (mut start, mut len) = (run.start.0, run.len);
        if ratio > 1 {
            let first = self.claims.check.fs.geometry().first_data_block;
            if (start - first) % ratio != run.logical % ratio {
                self.damage("an extent is not aligned to clusters as the file's blocks are");
            }
            if let Some((block, logical)) = self.previous
                && self.claims.blocks.cluster(block) == self.claims.blocks.cluster(start)
                && logical / ratio == run.logical / ratio
            {
                let skip = (ratio - (start - first) % ratio).min(len);
                start += skip;
                len -= skip;
            }
        }
        if len > 0 {
            self.facts.clusters += self.claims.blocks.cluster(start + len - 1) - self.claims.blocks.cluster(start) + 1;
            let shared = self.claims.blocks.claim(BlockNr(start), len);
            self.shared(shared);
        }
        let last = run.end() - 1;
        self.previous = Some((run.start.0 + run.len - 1, last));
        self.facts.last = Some(last);
        if run.unwritten {
            self.facts.has_unwritten = true;
        } else {
            self.facts.last_written = Some(last);
        }
        if self.keep_runs {
            self.facts.runs.push(run);
        }
    }

    fn extents(&mut self) -> Result<()> {
        let inode = self.inode;
        match Node::parse(inode.map(), inode.ino(), None) {
            Ok(root) => self.extent_node(&root, 0, extent::END + 1).map(drop),
            Err(error) => self.damaged_node(error),
        }
    }

    fn damaged_node(&mut self, error: Error) -> Result<()> {
        let Error::Corrupt { problem, .. } = error else { return Err(error) };
        self.damage(problem);
        Ok(())
    }

    /// Walks a node whose extents must lie from block `from` of the file on and before `limit`. Gives where they end.
    fn extent_node(&mut self, node: &Node<'_>, from: u64, limit: u64) -> Result<u64> {
        match node.entries {
            Entries::Leaf(extents) => Ok(self.leaf(extents, from, limit)),
            Entries::Index(children) => {
                let mut from = from;
                for (at, child) in children.iter().enumerate() {
                    let key = u64::from(child.logical.get());
                    let limit = children.get(at + 1).map_or(limit, |next| next.logical.get().into());
                    if key < from || key >= limit {
                        self.damage("the entries of an extent tree node are out of order");
                        return Ok(limit);
                    }
                    from = self.child(child, node.depth, limit)?.max(key + 1);
                }
                Ok(from)
            }
        }
    }

    fn child(&mut self, entry: &RawIndex, depth: u16, limit: u64) -> Result<u64> {
        let place = entry.child();
        let key = entry.logical.get();
        if !self.node(place, true) {
            return Ok(key.into());
        }
        let mut bytes = vec![0; self.claims.check.fs.geometry().block_len()];
        self.claims.check.fs.read_device(&mut bytes, self.claims.check.fs.geometry().offset(place))?;
        let node = match Node::parse(&bytes, self.inode.ino(), Some(depth - 1)) {
            Ok(node) => node,
            Err(error) => return self.damaged_node(error).map(|()| key.into()),
        };
        if let Some(seed) = self.claims.check.fs.checksum_seed() {
            let stored = bytes.get(node.tail..).and_then(|tail| tail.first_chunk()).map(|&sum| u32::from_le_bytes(sum));
            if stored != Some(checksum::extent_block(self.inode.seed(seed), &bytes[..node.tail])) {
                self.damage("the checksum of an extent tree node is wrong");
            }
        }
        if node.first_key() != Some(key) {
            self.damage("a node of the extent tree does not start where its parent says");
            return Ok(key.into());
        }
        self.extent_node(&node, key.into(), limit)
    }

    fn leaf(&mut self, extents: &[RawExtent], from: u64, limit: u64) -> u64 {
        let mut from = from;
        for run in extents.iter().map(RawExtent::run) {
            if run.len == 0 || run.logical < from || run.end() > limit {
                self.damage("extents are empty, overlap or are out of order");
            } else if !self.claims.check.fs.geometry().contains(run.start, run.len) {
                self.damage("an extent lies outside the file system");
            } else {
                self.data(run);
            }
            from = from.max(run.end());
        }
        from
    }

    fn pointers(&mut self) -> Result<()> {
        let roots: Vec<_> = block_map::roots(self.claims.check.fs, self.inode).collect();
        for root in roots {
            self.pointer_array(root.bytes, root.first, root.span)?;
        }
        Ok(())
    }

    /// Walks pointers, each of which maps `span` blocks of the file from `first` on.
    fn pointer_array(&mut self, bytes: &[u8], first: u64, span: u64) -> Result<()> {
        let geometry = self.claims.check.fs.geometry();
        let mut pending: Option<Run> = None;
        for (at, pointer) in bytes.as_chunks::<4>().0.iter().enumerate() {
            let pointer = u32::from_le_bytes(*pointer);
            if pointer == 0 {
                continue;
            }
            let start = BlockNr(pointer.into());
            let logical = first + at as u64 * span;
            if span > 1 {
                let per_block = geometry.block_len() as u64 / 4;
                if self.node(start, !self.is_resize || span == per_block * per_block) {
                    let mut bytes = vec![0; geometry.block_len()];
                    self.claims.check.fs.read_device(&mut bytes, geometry.offset(start))?;
                    self.pointer_array(&bytes, logical, span / (bytes.len() as u64 / 4))?;
                }
                continue;
            }
            if !geometry.contains(start, 1) {
                self.damage("a block pointer lies outside the file system");
                continue;
            }
            match &mut pending {
                Some(run) if run.end() == logical && run.start.plus(run.len) == start => run.len += 1,
                _ => {
                    if let Some(run) = pending.replace(Run { logical, len: 1, start, unwritten: false }) {
                        self.data(run);
                    }
                }
            }
        }
        if let Some(run) = pending {
            self.data(run);
        }
        Ok(())
    }
}
