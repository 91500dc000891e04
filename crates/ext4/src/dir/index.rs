//! A block of a directory's hash tree (kernel documentation, "Hash Tree Directories").

use std::ops::Range;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Damage;
use super::hash::HashFunction;
use crate::checksum::Seed;
use crate::superblock::HashParameters;

/// What the root says of the whole tree, between the records of `.` and `..` and its first slot.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RootInfo {
    reserved: U32,
    hash_function: u8,
    length: u8,
    levels: u8,
    flags: u8,
}

const INFO: usize = 24;
const INFO_LEN: usize = size_of::<RootInfo>();

/// Where the slots start in the root, and behind the unused record that hides any other node.
const ROOT_SLOTS: usize = INFO + INFO_LEN;
const NODE_SLOTS: usize = 8;

/// One child: the smallest hash below it, and its block. The first slot has the node's limit and count in place of a hash.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct Slot {
    hash: U32,
    block: U32,
}

impl Slot {
    pub(crate) fn new(hash: u32, block: u32) -> Self {
        Self { hash: U32::new(hash), block: U32::new(block) }
    }
}

const SLOT: usize = size_of::<Slot>();

/// Behind the last possible slot: four reserved bytes and the checksum.
const TAIL: usize = 8;
const CHECKSUM_LEN: usize = 4;

/// The bits of a slot that number a block; the others are reserved.
const BLOCK_MASK: u32 = 0x0fff_ffff;

/// An inner node of the tree, its limit and count checked.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    bytes: Vec<u8>,
    start: usize,
    limit: usize,
    count: usize,
}

/// The tree's root, which lies in the directory's first block.
#[derive(Clone, Debug)]
pub(crate) struct Root {
    pub(crate) node: Node,
    pub(crate) function: HashFunction,
    /// The levels of nodes below the root.
    pub(crate) levels: u8,
}

fn limit(block_size: usize, start: usize, checksummed: bool) -> usize {
    block_size.saturating_sub(start + if checksummed { TAIL } else { 0 }) / SLOT
}

impl Root {
    /// Checks the first block of an indexed directory.
    pub(crate) fn parse(bytes: Vec<u8>, seed: Option<Seed>) -> Result<Self, Damage> {
        let info = bytes.get(INFO..).and_then(|rest| RootInfo::ref_from_prefix(rest).ok());
        let (info, _) = info.ok_or("the block is too small")?;
        if usize::from(info.length) != INFO_LEN || info.reserved.get() != 0 || info.flags & 1 != 0 {
            return Err("the header of the directory's index is wrong");
        }
        let function = HashFunction::from_disk(info.hash_function).ok_or("the index has an unknown hash function")?;
        let levels = info.levels;
        Ok(Self { node: Node::check(bytes, ROOT_SLOTS, seed)?, function, levels })
    }

    /// The root of a new index over one leaf, made of a block with nothing but `.` and `..`.
    pub(crate) fn create(dots: Vec<u8>, hash: HashParameters, leaf: u32, checksummed: bool) -> Node {
        let mut node = Node::with_slots(dots, ROOT_SLOTS, checksummed, &[Slot::new(0, leaf)]);
        let length = INFO_LEN.to_le_bytes()[0];
        let hash_function = hash.for_new_index().to_disk();
        let info = RootInfo { reserved: U32::ZERO, hash_function, length, levels: 0, flags: 0 };
        node.bytes[INFO..ROOT_SLOTS].copy_from_slice(info.as_bytes());
        node
    }
}

impl Node {
    /// Checks an index block below the root.
    pub(crate) fn parse(bytes: Vec<u8>, seed: Option<Seed>) -> Result<Self, Damage> {
        if !Self::is_hidden(&bytes) {
            return Err("the directory's index leads to a block that is not part of it");
        }
        Self::check(bytes, NODE_SLOTS, seed)
    }

    /// Whether a block begins as an index block does: with one unused, nameless record as long as the block.
    /// On a file system without checksums an empty block of records looks the same.
    pub(crate) fn is_hidden(bytes: &[u8]) -> bool {
        bytes.get(..NODE_SLOTS) == Some(&hiding_record(bytes.len()))
    }

    /// Whether a block begins as an index block does and has room for as many slots as one: blocks of records do not.
    pub(crate) fn has_limit_of_node(bytes: &[u8], checksummed: bool) -> bool {
        let stored =
            bytes.get(NODE_SLOTS..).and_then(|rest| rest.first_chunk()).map(|&limit| u16::from_le_bytes(limit));
        Self::is_hidden(bytes) && stored.map(usize::from) == Some(limit(bytes.len(), NODE_SLOTS, checksummed))
    }

    fn check(bytes: Vec<u8>, start: usize, seed: Option<Seed>) -> Result<Self, Damage> {
        let limit = limit(bytes.len(), start, seed.is_some());
        let mut node = Self { bytes, start, limit, count: 0 };
        let head = node.slots().first().ok_or("the block is too small")?.hash.get();
        node.count = usize::try_from(head >> 16).unwrap_or(usize::MAX);
        if usize::try_from(head & 0xffff) != Ok(limit) || node.count == 0 || node.count > limit {
            return Err("the limit or the count of an index block is wrong");
        }
        match seed {
            Some(seed) if node.bytes.get(node.checksum_place()) != Some(&node.checksum(seed)) => {
                Err("the checksum of an index block is wrong")
            }
            _ => Ok(node),
        }
    }

    /// A node below the root.
    pub(crate) fn new(block_size: usize, checksummed: bool, slots: &[Slot]) -> Self {
        let mut bytes = vec![0; block_size];
        bytes[..NODE_SLOTS].copy_from_slice(&hiding_record(block_size));
        Self::with_slots(bytes, NODE_SLOTS, checksummed, slots)
    }

    fn with_slots(bytes: Vec<u8>, start: usize, checksummed: bool, slots: &[Slot]) -> Self {
        let limit = limit(bytes.len(), start, checksummed);
        let mut node = Self { bytes, start, limit, count: 0 };
        node.set_children(slots);
        node
    }

    /// Every slot, unused ones too.
    fn slots(&self) -> &[Slot] {
        let bytes = self.bytes.get(self.start..self.start + self.limit * SLOT).unwrap_or_default();
        <[Slot]>::ref_from_bytes(bytes).unwrap_or_default()
    }

    /// The slots in use. The first one's hash means nothing.
    pub(crate) fn children(&self) -> &[Slot] {
        self.slots().get(..self.count).unwrap_or_default()
    }

    /// Replaces the slots in use.
    pub(crate) fn set_children(&mut self, slots: &[Slot]) {
        let area = &mut self.bytes[self.start..self.start + self.limit * SLOT];
        area.fill(0);
        area[..size_of_val(slots)].copy_from_slice(slots.as_bytes());
        self.count = slots.len();
    }

    pub(crate) fn is_full(&self) -> bool {
        self.count >= self.limit
    }

    /// The slot below which a name of this hash is, if anywhere.
    pub(crate) fn position(&self, hash: u32) -> usize {
        let rest = self.children().get(1..).unwrap_or_default();
        rest.partition_point(|slot| slot.hash.get() <= hash)
    }

    /// The block of the child at `at`.
    pub(crate) fn child(&self, at: usize) -> Option<u32> {
        self.children().get(at).map(|slot| slot.block.get() & BLOCK_MASK)
    }

    /// The smallest hash below the child at `at`; its lowest bit says that the child before ends with the same hash.
    pub(crate) fn hash(&self, at: usize) -> Option<u32> {
        self.children().get(at).map(|slot| slot.hash.get())
    }

    /// Adds a child at `at`, which must not be the first place. The node must not be full.
    pub(crate) fn insert(&mut self, at: usize, slot: Slot) {
        let mut slots = self.children().to_vec();
        slots.insert(at, slot);
        self.set_children(&slots);
    }

    /// Points the record at `offset` in front of the root's header to another inode.
    pub(crate) fn replace_dot(&mut self, offset: usize, ino: u32) {
        if let Some(field) = self.bytes.get_mut(..INFO).and_then(|dots| dots.get_mut(offset..offset + 4)) {
            field.copy_from_slice(&ino.to_le_bytes());
        }
    }

    /// Says in the root that the tree has this many levels of nodes below it.
    pub(crate) fn set_levels(&mut self, levels: u8) {
        if let Some((info, _)) = self.bytes.get_mut(INFO..).and_then(|rest| RootInfo::mut_from_prefix(rest).ok()) {
            info.levels = levels;
        }
    }

    /// The block's bytes, checksummed if `seed` says so.
    pub(crate) fn seal(mut self, seed: Option<Seed>) -> Vec<u8> {
        let word = |number: usize| u16::try_from(number).unwrap_or(u16::MAX).to_le_bytes();
        let head = [word(self.limit), word(self.count)].concat();
        self.bytes[self.start..self.start + head.len()].copy_from_slice(&head);
        if let Some(seed) = seed {
            let (place, checksum) = (self.checksum_place(), self.checksum(seed));
            self.bytes[place].copy_from_slice(&checksum);
        }
        self.bytes
    }

    /// Where the checksum lies.
    fn checksum_place(&self) -> Range<usize> {
        self.bytes.len() - CHECKSUM_LEN..self.bytes.len()
    }

    /// Covers the slots in use, and the tail with zeroes for the checksum. The kernel leaves anything in the reserved bytes.
    fn checksum(&self, seed: Seed) -> [u8; CHECKSUM_LEN] {
        let end = self.bytes.len();
        let used = self.bytes.get(..self.start + self.count * SLOT).unwrap_or_default();
        let reserved = self.bytes.get(end - TAIL..end - CHECKSUM_LEN).unwrap_or_default();
        seed.with(used).with(reserved).with(&[0; CHECKSUM_LEN]).value().to_le_bytes()
    }
}

fn hiding_record(block_size: usize) -> [u8; NODE_SLOTS] {
    let space = super::entry::encode_space(block_size).to_le_bytes();
    [0, 0, 0, 0, space[0], space[1], 0, 0]
}
