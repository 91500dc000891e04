//! Directories: blocks of records, and the hash tree that indexes them.
//!
//! The code here sees a directory as numbered blocks behind [`DirBlocks`]; where they lie on the device, and what a change
//! means for the directory's inode, is its callers' business.

mod edit;
mod entry;
mod hash;
mod htree;
mod index;

use crate::Ino;
use crate::checksum::Seed;
use crate::error::{Error, Place, Result};
use crate::superblock::HashParameters;

pub(crate) use entry::{Entry, Leaf, Record};
pub(crate) use hash::HashFunction;
use htree::Walk;
pub(crate) use index::{Node, Root};

/// The longest name, in bytes.
pub(crate) const MAX_NAME: usize = 255;

/// The code of a directory in a record.
const DIRECTORY: u8 = 2;

/// What is wrong with a block.
type Damage = &'static str;

/// The blocks of a directory, counted from its start.
pub(crate) trait DirBlocks {
    /// How many there are.
    fn count(&self) -> u32;

    /// The whole of one block.
    fn read(&self, block: u32) -> Result<Vec<u8>>;
}

/// The blocks of a directory that can be changed.
pub(crate) trait DirBlocksMut: DirBlocks {
    /// Replaces a block.
    fn write(&mut self, block: u32, bytes: Vec<u8>) -> Result<()>;

    /// Adds a block at the end and gives its number. Nothing has changed if there is no space for it.
    fn append(&mut self, bytes: Vec<u8>) -> Result<u32>;
}

/// What a directory's blocks depend on besides their bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DirFormat {
    /// The directory's own inode.
    pub(crate) ino: Ino,
    /// In bytes.
    pub(crate) block_size: usize,
    /// The inode's checksum seed, where the file system has checksums (`metadata_csum`).
    pub(crate) seed: Option<Seed>,
    /// Whether records keep the type of their inode (`filetype`).
    pub(crate) file_types: bool,
    /// Whether directories may be indexed (`dir_index`).
    pub(crate) may_index: bool,
    /// Whether an index may have three levels of nodes instead of two (`large_dir`).
    pub(crate) large: bool,
    /// How names are hashed on this file system.
    pub(crate) hash: HashParameters,
}

impl DirFormat {
    /// The only block of a new directory.
    pub(crate) fn first_block(&self, parent: Ino) -> Result<Vec<u8>> {
        self.block(self.dots(parent.get()))
    }

    /// The only block of a new directory with one entry.
    pub(crate) fn first_block_with(&self, parent: Ino, name: &[u8], ino: Ino, type_code: u8) -> Result<Vec<u8>> {
        let entry = Entry { ino: ino.get(), file_type: self.file_type(type_code), name };
        self.block(self.dots(parent.get()).into_iter().chain([entry]))
    }

    /// A block without entries.
    pub(crate) fn empty_block(&self) -> Result<Vec<u8>> {
        self.block([])
    }

    fn block<'a>(&self, entries: impl IntoIterator<Item = Entry<'a>>) -> Result<Vec<u8>> {
        Ok(self.leaf(entries, 0)?.seal(self.seed))
    }

    /// What the root of an index begins with: `.` and `..`, whose record hides the rest.
    fn index_dots(&self, parent: u32) -> Result<Vec<u8>> {
        let leaf = Leaf::build(self.block_size, false, self.dots(parent));
        leaf.map(|leaf| leaf.seal(None)).ok_or_else(|| self.damage(0, "the block is too small"))
    }

    fn dots(&self, parent: u32) -> [Entry<'static>; 2] {
        let file_type = self.file_type(DIRECTORY);
        [(self.ino.get(), &b"."[..]), (parent, b"..")].map(|(ino, name)| Entry { ino, file_type, name })
    }

    fn leaf<'a>(&self, records: impl IntoIterator<Item = Entry<'a>>, block: u32) -> Result<Leaf> {
        Leaf::build(self.block_size, self.seed.is_some(), records)
            .ok_or_else(|| self.damage(block, "the entries of a block do not fit in a block"))
    }

    /// The code to keep in a record.
    fn file_type(&self, code: u8) -> u8 {
        if self.file_types { code } else { 0 }
    }

    /// How many levels of nodes an index may have.
    fn max_depth(&self) -> usize {
        if self.large { 3 } else { 2 }
    }

    fn damage(&self, block: u32, damage: Damage) -> Error {
        Error::corrupt(Place::Directory(self.ino, block), damage)
    }
}

/// An entry and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    block: u32,
    offset: usize,
    /// The entry's inode number, as yet unchecked.
    pub(crate) ino: u32,
}

impl Found {
    fn at(block: u32, record: &Record<'_>) -> Self {
        Self { block, offset: record.offset, ino: record.entry.ino }
    }
}

/// A directory, indexed or not.
#[derive(Debug)]
pub(crate) struct Directory<B> {
    blocks: B,
    format: DirFormat,
    indexed: bool,
    /// Whether the index leads to names: it does not where names are hashed in ways that this crate does not know.
    hashed: bool,
}

impl<B: DirBlocks> Directory<B> {
    /// `indexed` is the inode's flag; it means nothing on a file system without `dir_index`.
    pub(crate) fn new(blocks: B, format: DirFormat, indexed: bool) -> Self {
        Self { blocks, format, indexed: indexed && format.may_index, hashed: true }
    }

    /// The same, but its index is passed over when names are looked up.
    pub(crate) fn unhashed(self) -> Self {
        Self { hashed: false, ..self }
    }

    /// Whether the directory has an index now: what the inode's flag must say after a change.
    pub(crate) fn is_indexed(&self) -> bool {
        self.indexed
    }

    /// The entry of that name; `.` and `..` are names here.
    pub(crate) fn lookup(&self, name: &[u8]) -> Result<Option<Found>> {
        if !self.indexed || !self.hashed || matches!(name, b"." | b"..") {
            return self.scan(|record| record.entry.name == name);
        }
        let mut walk = Walk::start(self, name)?;
        loop {
            let block = walk.leaf();
            if let Some(record) = self.leaf(block)?.find(name) {
                return Ok(Some(Found::at(block, &record)));
            }
            if !walk.next_of_same_hash(self)? {
                return Ok(None);
            }
        }
    }

    /// Calls `visit` with each entry but `.` and `..`, in the order of the blocks.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(&Entry<'_>)) -> Result<()> {
        self.scan(|record| {
            if !record.entry.is_dot() {
                visit(&record.entry);
            }
            false
        })?;
        Ok(())
    }

    /// Whether there is nothing but `.` and `..`.
    pub(crate) fn is_empty(&self) -> Result<bool> {
        Ok(self.scan(|record| !record.entry.is_dot())?.is_none())
    }

    /// The first entry that `wanted` accepts, in the order of the blocks.
    fn scan(&self, mut wanted: impl FnMut(&Record<'_>) -> bool) -> Result<Option<Found>> {
        for block in 0..self.blocks.count() {
            let Some(leaf) = self.any_block(block)? else { continue };
            if let Some(record) = leaf.in_use().find(|record| wanted(record)) {
                return Ok(Some(Found::at(block, &record)));
            }
        }
        Ok(None)
    }

    /// A block as records: the root of an index has `.` and `..`, other blocks of an index have none.
    fn any_block(&self, block: u32) -> Result<Option<Leaf>> {
        if !self.indexed {
            return self.leaf(block).map(Some);
        }
        if block == 0 {
            return self.dots().map(Some);
        }
        let bytes = self.read(block)?;
        if Node::is_hidden(&bytes) {
            // Without checksums an empty block of records looks the same, and then there is nothing to verify.
            if self.format.seed.is_some() {
                self.parse(block, bytes, Node::parse)?;
            }
            return Ok(None);
        }
        self.parse(block, bytes, Leaf::parse).map(Some)
    }

    fn read(&self, block: u32) -> Result<Vec<u8>> {
        if block < self.blocks.count() {
            self.blocks.read(block)
        } else {
            Err(self.format.damage(block, "the directory's index leads past the directory's end"))
        }
    }

    fn parse<T>(
        &self,
        block: u32,
        bytes: Vec<u8>,
        parser: fn(Vec<u8>, Option<Seed>) -> Result<T, Damage>,
    ) -> Result<T> {
        parser(bytes, self.format.seed).map_err(|damage| self.format.damage(block, damage))
    }

    fn leaf(&self, block: u32) -> Result<Leaf> {
        self.parse(block, self.read(block)?, Leaf::parse)
    }

    fn node(&self, block: u32) -> Result<Node> {
        self.parse(block, self.read(block)?, Node::parse)
    }

    fn root(&self) -> Result<Root> {
        let root = self.parse(0, self.read(0)?, Root::parse)?;
        if usize::from(root.levels) >= self.format.max_depth() {
            return Err(self.format.damage(0, "the directory's index has too many levels"));
        }
        Ok(root)
    }

    /// The records of `.` and `..` in the root of an index.
    fn dots(&self) -> Result<Leaf> {
        if self.hashed {
            self.root()?;
        }
        Leaf::parse(self.read(0)?, None).map_err(|damage| self.format.damage(0, damage))
    }
}

#[cfg(test)]
mod tests;
