//! Ways through a directory's hash tree, and its growth.

use super::entry::{Entry, Leaf};
use super::hash::HashFunction;
use super::index::{Node, Root, Slot};
use super::{DirBlocks, DirBlocksMut, Directory};
use crate::error::{Error, Result};

/// A node on the way, and the slot that the way takes.
#[derive(Debug)]
struct Step {
    block: u32,
    node: Node,
    at: usize,
}

/// The way from the root to the leaf where a name belongs.
#[derive(Debug)]
pub(super) struct Walk {
    function: HashFunction,
    hash: u32,
    steps: Vec<Step>,
}

impl Walk {
    pub(super) fn start<B: DirBlocks>(dir: &Directory<B>, name: &[u8]) -> Result<Self> {
        let Root { node, function, levels } = dir.root()?;
        let hash = dir.format.hash.hash(function, name);
        let at = node.position(hash);
        let mut walk = Self { function, hash, steps: vec![Step { block: 0, node, at }] };
        for _ in 0..levels {
            let block = walk.leaf();
            let node = dir.node(block)?;
            let at = node.position(hash);
            walk.steps.push(Step { block, node, at });
        }
        Ok(walk)
    }

    /// The block that the way leads to. Block 0, which is never a leaf, stands for none.
    pub(super) fn leaf(&self) -> u32 {
        self.steps.last().and_then(|step| step.node.child(step.at)).unwrap_or_default()
    }

    /// Moves on to the next leaf if that has names of the same hash: equal hashes may fill more than one leaf.
    pub(super) fn next_of_same_hash<B: DirBlocks>(&mut self, dir: &Directory<B>) -> Result<bool> {
        let Some(turn) = self.steps.iter().rposition(|step| step.at + 1 < step.node.children().len()) else {
            return Ok(false);
        };
        let step = &mut self.steps[turn];
        step.at += 1;
        if step.node.hash(step.at).is_none_or(|hash| hash & !1 != self.hash) {
            return Ok(false);
        }
        for level in turn + 1..self.steps.len() {
            let above = &self.steps[level - 1];
            let block = above.node.child(above.at).unwrap_or_default();
            self.steps[level] = Step { block, node: dir.node(block)?, at: 0 };
        }
        Ok(true)
    }

    /// Whether the leaf can be split without making room in the index first.
    pub(super) fn has_room(&self) -> bool {
        self.steps.last().is_some_and(|step| !step.node.is_full())
    }
}

impl<B: DirBlocksMut> Directory<B> {
    /// Turns the only block of a linear directory into the root of an index over one leaf.
    pub(super) fn build_index(&mut self) -> Result<()> {
        let old = self.leaf(0)?;
        let mut entries = old.in_use().map(|record| record.entry);
        let (Some(Entry { name: b".", .. }), Some(Entry { name: b"..", ino: parent, .. })) =
            (entries.next(), entries.next())
        else {
            return Err(self.format.damage(0, "the directory does not begin with . and .."));
        };
        let leaf = self.append_leaf(entries)?;
        let root = Root::create(self.format.index_dots(parent)?, self.format.hash, leaf, self.format.seed.is_some());
        self.write_node(0, root)?;
        self.indexed = true;
        Ok(())
    }

    /// Moves the upper half of a leaf, by hash, to a new leaf. The node above must have room.
    pub(super) fn split_leaf(&mut self, walk: Walk, leaf: &Leaf) -> Result<()> {
        let hash = |entry: &Entry<'_>| self.format.hash.hash(walk.function, entry.name);
        let mut entries: Vec<_> = leaf.in_use().map(|record| (hash(&record.entry), record.entry)).collect();
        entries.sort_by_key(|&(hash, _)| hash);
        let (low, high) = entries.split_at(middle(&entries));
        let (Some((below, _)), Some((boundary, _))) = (low.last(), high.first()) else {
            return Err(self.format.damage(walk.leaf(), "a block with one entry has no room for another"));
        };
        let continued = u32::from(below == boundary);
        let new = self.append_leaf(high.iter().map(|&(_, entry)| entry))?;
        let low = self.format.leaf(low.iter().map(|&(_, entry)| entry), walk.leaf())?;
        self.write_leaf(walk.leaf(), low)?;
        self.add_child(walk.steps, Slot::new(boundary | continued, new))
    }

    /// Makes room in the full node at the walk's end: splits the highest full node whose parent is not full, or, if
    /// all are full, puts a level below the root.
    pub(super) fn make_room(&mut self, walk: Walk) -> Result<()> {
        let mut steps = walk.steps;
        let checksummed = self.format.seed.is_some();
        let block_size = self.format.block_size;
        match steps.iter().rposition(|step| !step.node.is_full()) {
            Some(parent) => {
                steps.truncate(parent + 2);
                let Some(Step { block, mut node, .. }) = steps.pop() else { return Ok(()) };
                let children = node.children().to_vec();
                let (low, high) = children.split_at(children.len() / 2);
                let boundary = node.hash(low.len()).unwrap_or_default();
                let new = self.append_node(Node::new(block_size, checksummed, high))?;
                node.set_children(low);
                self.write_node(block, node)?;
                self.add_child(steps, Slot::new(boundary, new))
            }
            None if steps.len() >= self.format.max_depth() => Err(Error::NoSpace("room in the directory's index")),
            None => {
                let mut root = self.root()?;
                let new = self.append_node(Node::new(block_size, checksummed, root.node.children()))?;
                root.node.set_children(&[Slot::new(0, new)]);
                root.node.set_levels(root.levels + 1);
                self.write_node(0, root.node)
            }
        }
    }

    /// Adds a child behind the one that the last step takes.
    fn add_child(&mut self, mut steps: Vec<Step>, slot: Slot) -> Result<()> {
        let Some(Step { block, mut node, at }) = steps.pop() else { return Ok(()) };
        node.insert(at + 1, slot);
        self.write_node(block, node)
    }
}

/// How many of the entries, sorted by hash, make up the lower half of their bytes. At least one.
fn middle(entries: &[(u32, Entry<'_>)]) -> usize {
    let total: usize = entries.iter().map(|(_, entry)| entry.space()).sum();
    let mut sum = 0;
    let fits = |(_, entry): &&(u32, Entry<'_>)| {
        sum += entry.space();
        sum <= total / 2
    };
    entries.iter().take_while(fits).count().max(1).min(entries.len())
}
