//! Changes to a directory's entries.

use super::entry::{Entry, Leaf};
use super::htree::Walk;
use super::index::Node;
use super::{DirBlocksMut, Directory, Found};
use crate::Ino;
use crate::error::Result;

impl<B: DirBlocksMut> Directory<B> {
    /// Adds an entry. The name must be valid and, by a [`lookup`](Self::lookup), not in the directory yet.
    pub(crate) fn insert(&mut self, name: &[u8], ino: Ino, type_code: u8) -> Result<()> {
        let entry = Entry { ino: ino.get(), file_type: self.format.file_type(type_code), name };
        if !self.indexed {
            if self.insert_in_a_gap(entry)? {
                return Ok(());
            }
            if self.blocks.count() != 1 || !self.format.may_index {
                return self.append_leaf([entry]).map(drop);
            }
            self.build_index()?;
        }
        loop {
            let walk = Walk::start(self, name)?;
            let mut leaf = self.leaf(walk.leaf())?;
            if leaf.insert(entry) {
                return self.write_leaf(walk.leaf(), leaf);
            }
            if walk.has_room() {
                self.split_leaf(walk, &leaf)?;
            } else {
                self.make_room(walk)?;
            }
        }
    }

    /// Removes an entry that [`lookup`](Self::lookup) found.
    pub(crate) fn remove(&mut self, found: Found) -> Result<()> {
        let mut leaf = self.leaf(found.block)?;
        leaf.remove(found.offset);
        self.write_leaf(found.block, leaf)
    }

    /// Points an entry that [`lookup`](Self::lookup) found to another inode.
    pub(crate) fn replace(&mut self, found: Found, ino: Ino, type_code: u8) -> Result<()> {
        let file_type = self.format.file_type(type_code);
        if self.indexed && found.block == 0 {
            let mut node = self.root()?.node;
            node.replace_dot(found.offset, ino.get());
            return self.write_node(0, node);
        }
        let mut leaf = self.leaf(found.block)?;
        leaf.replace(found.offset, ino.get(), file_type);
        self.write_leaf(found.block, leaf)
    }

    fn insert_in_a_gap(&mut self, entry: Entry<'_>) -> Result<bool> {
        for block in 0..self.blocks.count() {
            let mut leaf = self.leaf(block)?;
            if leaf.insert(entry) {
                self.write_leaf(block, leaf)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn append_leaf<'a>(&mut self, entries: impl IntoIterator<Item = Entry<'a>>) -> Result<u32> {
        let leaf = self.format.leaf(entries, self.blocks.count())?;
        self.blocks.append(leaf.seal(self.format.seed))
    }

    pub(super) fn write_leaf(&mut self, block: u32, leaf: Leaf) -> Result<()> {
        self.blocks.write(block, leaf.seal(self.format.seed))
    }

    pub(super) fn append_node(&mut self, node: Node) -> Result<u32> {
        self.blocks.append(node.seal(self.format.seed))
    }

    pub(super) fn write_node(&mut self, block: u32, node: Node) -> Result<()> {
        self.blocks.write(block, node.seal(self.format.seed))
    }
}
