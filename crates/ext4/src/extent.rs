//! Extent trees, read (kernel documentation, "Extent Tree").

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum;
use crate::error::{Error, Place, Result};
use crate::inode::Inode;
use crate::map::{FileMap, Run, Segment, Target};
use crate::{BlockNr, Ext4, Ino};

pub(crate) const MAGIC: u16 = 0xf30a;
/// Lengths above this one mark an extent that is allocated but unwritten, and are too large by it.
pub(crate) const MAX_WRITTEN: u32 = 0x8000;
pub(crate) const MAX_UNWRITTEN: u32 = MAX_WRITTEN - 1;
/// The deepest tree that can be needed.
const MAX_DEPTH: u16 = 5;
pub(crate) const ENTRY_LEN: usize = 12;
/// One past the last block of a file that a tree can map.
pub(crate) const END: u64 = u32::MAX as u64;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) magic: U16,
    pub(crate) entries: U16,
    pub(crate) max: U16,
    pub(crate) depth: U16,
    pub(crate) generation: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawIndex {
    pub(crate) logical: U32,
    pub(crate) child_lo: U32,
    pub(crate) child_hi: U16,
    pub(crate) unused: U16,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawExtent {
    pub(crate) logical: U32,
    pub(crate) len: U16,
    pub(crate) start_hi: U16,
    pub(crate) start_lo: U32,
}

impl RawIndex {
    pub(crate) fn child(&self) -> BlockNr {
        BlockNr(u64::from(self.child_lo.get()) | u64::from(self.child_hi.get()) << 32)
    }
}

impl RawExtent {
    pub(crate) fn run(&self) -> Run {
        let len = u32::from(self.len.get());
        let (len, unwritten) = if len > MAX_WRITTEN { (len - MAX_WRITTEN, true) } else { (len, false) };
        Run {
            logical: self.logical.get().into(),
            len: len.into(),
            start: BlockNr(u64::from(self.start_lo.get()) | u64::from(self.start_hi.get()) << 32),
            unwritten,
        }
    }
}

pub(crate) enum Entries<'a> {
    Leaf(&'a [RawExtent]),
    Index(&'a [RawIndex]),
}

/// A node taken apart.
pub(crate) struct Node<'a> {
    pub(crate) depth: u16,
    pub(crate) entries: Entries<'a>,
    /// Where the checksum follows the room for entries.
    pub(crate) tail: usize,
}

impl<'a> Node<'a> {
    /// `depth` is what the parent says; the root, which has none, may be empty.
    pub(crate) fn parse(bytes: &'a [u8], ino: Ino, depth: Option<u16>) -> Result<Self> {
        let corrupt = |problem| Error::corrupt(Place::Inode(ino), problem);
        let impossible = || corrupt("an extent tree node has an impossible header");
        let (header, rest) = RawHeader::ref_from_prefix(bytes).map_err(|_| impossible())?;
        let count = usize::from(header.entries.get());
        let max = usize::from(header.max.get());
        if header.magic.get() != MAGIC || count > max || max > rest.len() / ENTRY_LEN {
            return Err(impossible());
        }
        let found = header.depth.get();
        if found > MAX_DEPTH || depth.is_some_and(|depth| depth != found || count == 0) {
            return Err(corrupt("an extent tree node is empty or at the wrong depth"));
        }
        let entries = if found == 0 {
            Entries::Leaf(<[RawExtent]>::ref_from_prefix_with_elems(rest, count).map_err(|_| impossible())?.0)
        } else {
            Entries::Index(<[RawIndex]>::ref_from_prefix_with_elems(rest, count).map_err(|_| impossible())?.0)
        };
        Ok(Self { depth: found, entries, tail: ENTRY_LEN * (1 + max) })
    }

    pub(crate) fn first_key(&self) -> Option<u32> {
        match self.entries {
            Entries::Leaf(extents) => extents.first().map(|extent| extent.logical.get()),
            Entries::Index(children) => children.first().map(|child| child.logical.get()),
        }
    }
}

/// Reads the node that an index entry points at and checks that it starts where the entry says.
fn with_child<T>(
    fs: &Ext4,
    inode: &Inode,
    entry: &RawIndex,
    depth: u16,
    visit: impl FnOnce(&Node<'_>) -> Result<T>,
) -> Result<T> {
    let corrupt = |problem| Error::corrupt(Place::Inode(inode.ino()), problem);
    if !fs.geometry().contains(entry.child(), 1) {
        return Err(corrupt("an extent tree node lies outside the file system"));
    }
    let bytes = fs.block(entry.child())?;
    let node = Node::parse(&bytes, inode.ino(), Some(depth - 1))?;
    if let Some(seed) = fs.checksum_seed() {
        let stored = bytes.get(node.tail..).and_then(|tail| tail.first_chunk()).map(|&tail| u32::from_le_bytes(tail));
        if stored != Some(checksum::extent_block(inode.seed(seed), &bytes[..node.tail])) {
            return Err(Error::corrupt(Place::Block(entry.child()), "the checksum of an extent tree node is wrong"));
        }
    }
    if node.first_key().is_none_or(|key| key < entry.logical.get()) {
        return Err(corrupt("an extent tree node starts before its parent's entry for it"));
    }
    visit(&node)
}

/// What block `logical` of the file is, and how many blocks after it are the same.
pub(crate) fn find(fs: &Ext4, inode: &Inode, logical: u64) -> Result<Segment> {
    find_in(fs, inode, &Node::parse(inode.map(), inode.ino(), None)?, logical, END)
}

fn find_in(fs: &Ext4, inode: &Inode, node: &Node<'_>, logical: u64, limit: u64) -> Result<Segment> {
    let hole_until = |end: u64| Segment { logical, len: end.saturating_sub(logical).max(1), target: Target::Hole };
    match node.entries {
        Entries::Leaf(extents) => {
            let after = extents.partition_point(|extent| u64::from(extent.logical.get()) <= logical);
            let before = after.checked_sub(1).and_then(|at| extents.get(at)).map(RawExtent::run);
            match before.and_then(|run| run.segment_at(logical)) {
                Some(segment) => {
                    check_run(fs, inode, &segment)?;
                    Ok(segment)
                }
                None => Ok(hole_until(extents.get(after).map_or(limit, |extent| extent.logical.get().into()))),
            }
        }
        Entries::Index(children) => {
            let after = children.partition_point(|child| u64::from(child.logical.get()) <= logical);
            let limit = children.get(after).map_or(limit, |child| child.logical.get().into());
            match after.checked_sub(1).and_then(|at| children.get(at)) {
                Some(child) => {
                    with_child(fs, inode, child, node.depth, |node| find_in(fs, inode, node, logical, limit))
                }
                None => Ok(hole_until(limit)),
            }
        }
    }
}

fn check_run(fs: &Ext4, inode: &Inode, segment: &Segment) -> Result<()> {
    match segment.target {
        Target::Data(start) if !fs.geometry().contains(start, segment.len) => {
            Err(Error::corrupt(Place::Inode(inode.ino()), "an extent lies outside the file system"))
        }
        _ => Ok(()),
    }
}

/// The whole tree.
pub(crate) fn load(fs: &Ext4, inode: &Inode) -> Result<FileMap> {
    let mut map = FileMap::default();
    load_node(fs, inode, &Node::parse(inode.map(), inode.ino(), None)?, END, &mut map)?;
    Ok(map)
}

/// Adds a node's extents to `map`. They must follow those already there and end before `limit`, so that no node counts twice.
fn load_node(fs: &Ext4, inode: &Inode, node: &Node<'_>, limit: u64, map: &mut FileMap) -> Result<()> {
    let corrupt = |problem| Error::corrupt(Place::Inode(inode.ino()), problem);
    match node.entries {
        Entries::Leaf(extents) => {
            for run in extents.iter().map(RawExtent::run) {
                if run.len == 0 || run.logical < map.end() || run.end() > limit {
                    return Err(corrupt("extents are empty, overlap or are out of order"));
                }
                if !fs.geometry().contains(run.start, run.len) {
                    return Err(corrupt("an extent lies outside the file system"));
                }
                map.push(run);
            }
        }
        Entries::Index(children) => {
            for (at, child) in children.iter().enumerate() {
                let limit = children.get(at + 1).map_or(limit, |next| next.logical.get().into());
                map.nodes.push(child.child());
                with_child(fs, inode, child, node.depth, |node| load_node(fs, inode, node, limit, map))?;
            }
        }
    }
    Ok(())
}
