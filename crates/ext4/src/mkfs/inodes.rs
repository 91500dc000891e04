//! The inodes that a file system begins with, and the blocks they have.

use super::geometry::FIRST_INO;
use super::journal;
use super::layout::Layout;
use super::superblock::EXTRA_ISIZE;
use super::{MkfsError, MkfsOptions, Result};
use crate::checksum::Seed;
use crate::dir::DirFormat;
use crate::editor::LARGE;
use crate::features::{compat, incompat, ro_compat};
use crate::inode::{FLAG_EXTENTS, Inode, MAP_LEN, Time};
use crate::map::{FileMap, Run};
use crate::metadata::{FileType, Timestamp};
use crate::superblock::Superblock;
use crate::{BlockNr, GroupNr, Ino, block_map, extent_edit, orphan};

const BAD_BLOCKS: Ino = Ino::new(1).unwrap();
const RESIZE: Ino = Ino::new(7).unwrap();
pub(super) const JOURNAL: Ino = Ino::new(8).unwrap();
const LOST_FOUND: Ino = Ino::new(FIRST_INO).unwrap();
pub(super) const ORPHAN_FILE: Ino = Ino::new(FIRST_INO + 1).unwrap();

/// e2fsck has no blocks to allocate when it moves files to `lost+found`, so the directory has some in advance.
const LOST_FOUND_LEN: u64 = 16 << 10;
const POINTER_LEN: u64 = 4;
const DIRECT: u64 = 12;

/// Inodes and blocks to store.
#[derive(Debug)]
pub(super) struct Contents<'a> {
    superblock: &'a Superblock,
    seed: Option<Seed>,
    now: Timestamp,
    pub(super) inodes: Vec<(Ino, Vec<u8>)>,
    pub(super) blocks: Vec<(BlockNr, Vec<u8>)>,
    /// The journal's map and size, as the superblock keeps a copy of them.
    pub(super) journal: Option<([u8; MAP_LEN], u64)>,
    /// Blocks of the journal, without those of its map.
    pub(super) journal_blocks: u64,
    /// Bytes of the largest regular file.
    largest: u64,
}

impl<'a> Contents<'a> {
    /// Makes all of them, taking their blocks from `layout` in the order in which mke2fs does.
    pub(super) fn new(options: &MkfsOptions, layout: &mut Layout<'_>, superblock: &'a Superblock) -> Result<Self> {
        let mut contents = Self {
            superblock,
            seed: superblock.checksum_seed(),
            now: Timestamp { seconds: options.now, nanos: 0 },
            inodes: Vec::new(),
            blocks: Vec::new(),
            journal: None,
            journal_blocks: 0,
            largest: 0,
        };
        contents.root(options, layout)?;
        contents.lost_and_found(layout)?;
        contents.reserved_inodes();
        if layout.plan.features.has_compat(compat::RESIZE_INODE) {
            contents.resize_inode(layout)?;
        } else {
            contents.unused(RESIZE);
        }
        if layout.has_journal() {
            contents.journal(options, layout)?;
        } else {
            contents.unused(JOURNAL);
        }
        if layout.plan.features.has_compat(compat::ORPHAN_FILE) {
            contents.orphan_file(options, layout)?;
        }
        Ok(contents)
    }

    /// Whether some file is so large that the file system must say so.
    pub(super) fn has_large_file(&self) -> bool {
        self.largest > LARGE
    }

    /// The highest inode in use.
    pub(super) fn last_ino(&self) -> u32 {
        self.inodes.iter().map(|(ino, _)| ino.get()).max().unwrap_or(FIRST_INO)
    }

    fn inode(&self, ino: Ino, file_type: FileType, permissions: u16) -> Inode {
        let mut inode =
            Inode::fresh(ino, self.superblock.geometry().inode_size, EXTRA_ISIZE, file_type.mode() | permissions);
        self.stamp(&mut inode);
        inode.set_creation_time(self.now);
        inode
    }

    fn stamp(&self, inode: &mut Inode) {
        for time in [Time::Access, Time::Change, Time::Modification] {
            inode.set_time(time, self.now);
        }
    }

    fn store(&mut self, mut inode: Inode) {
        self.largest = self.largest.max(inode.size());
        let bytes = inode.seal(self.seed);
        self.inodes.push((inode.ino(), bytes));
    }

    fn dir_format(&self, inode: &Inode) -> DirFormat {
        let features = self.superblock.features();
        DirFormat {
            ino: inode.ino(),
            block_size: self.superblock.geometry().block_len(),
            seed: self.seed.map(|seed| inode.seed(seed)),
            file_types: features.has_incompat(incompat::FILETYPE),
            may_index: features.has_compat(compat::DIR_INDEX),
            large: features.has_incompat(incompat::LARGE_DIR),
            hash: self.superblock.hash_parameters(),
        }
    }

    fn root(&mut self, options: &MkfsOptions, layout: &mut Layout<'_>) -> Result<()> {
        let mut inode = self.inode(Ino::ROOT, FileType::Directory, options.root_permissions & 0o7777);
        inode.set_links(3);
        inode.set_uid(options.root_owner.0);
        inode.set_gid(options.root_owner.1);
        let blocks = self.allocate(&mut inode, layout, 0, 1)?;
        let block = self.dir_format(&inode).first_block_with(
            Ino::ROOT,
            b"lost+found",
            LOST_FOUND,
            FileType::Directory.entry_code(),
        )?;
        self.blocks.extend(blocks.into_iter().map(|place| (place, block.clone())));
        self.store(inode);
        Ok(())
    }

    fn lost_and_found(&mut self, layout: &mut Layout<'_>) -> Result<()> {
        let mut inode = self.inode(LOST_FOUND, FileType::Directory, 0o700);
        inode.set_links(2);
        let len = LOST_FOUND_LEN / u64::from(layout.plan.block_size);
        let blocks = self.allocate(&mut inode, layout, 0, len.clamp(2, DIRECT))?;
        let format = self.dir_format(&inode);
        for (index, place) in blocks.into_iter().enumerate() {
            let block = if index == 0 { format.first_block(Ino::ROOT)? } else { format.empty_block()? };
            self.blocks.push((place, block));
        }
        self.store(inode);
        Ok(())
    }

    /// An empty list of bad blocks, which is no file of any type; and the inodes set aside, which only have a checksum.
    fn reserved_inodes(&mut self) {
        for ino in (1..FIRST_INO).filter_map(Ino::new) {
            if ![Ino::ROOT, RESIZE, JOURNAL].contains(&ino) {
                self.unused(ino);
            }
        }
    }

    fn unused(&mut self, ino: Ino) {
        let mut inode = Inode::fresh(ino, self.superblock.geometry().inode_size, 0, 0);
        inode.set_links(0);
        if ino == BAD_BLOCKS {
            self.stamp(&mut inode);
        }
        self.store(inode);
    }

    /// The reserved blocks behind the descriptors, as blocks of pointers to their copies in the groups with backups.
    fn resize_inode(&mut self, layout: &mut Layout<'_>) -> Result<()> {
        let plan = layout.plan;
        let block_size = u64::from(plan.block_size);
        let per_block = block_size / POINTER_LEN;
        let behind_table = plan.desc_blocks + plan.reserved_gdt_blocks + 2 + plan.inode_table_len();
        let root = layout.allocate(behind_table, 1)?.start;
        let backups: Vec<u64> = (1..plan.groups)
            .filter(|&group| self.superblock.has_superblock(GroupNr(group)))
            .map(|group| u64::from(group) * u64::from(plan.blocks_per_group))
            .collect();
        let mut pointers = vec![0; plan.block_size as usize];
        let first = plan.first_data_block + 1 + plan.desc_blocks;
        for reserved in 0..plan.reserved_gdt_blocks {
            let place = first + reserved;
            put_pointer(&mut pointers, (plan.desc_blocks + reserved) % per_block, place)?;
            let mut copies = vec![0; plan.block_size as usize];
            for (index, distance) in (0..).zip(&backups) {
                put_pointer(&mut copies, index, place + distance)?;
            }
            self.blocks.push((BlockNr(place), copies));
        }
        self.blocks.push((BlockNr(root), pointers));
        let mut inode = self.inode(RESIZE, FileType::Regular, 0o600);
        inode.set_size((per_block * per_block + per_block + DIRECT) * block_size);
        let taken = 1 + plan.reserved_gdt_blocks * (1 + backups.len() as u64);
        self.set_allocated(&mut inode, taken)?;
        put_pointer(inode.map_mut(), DIRECT + 1, root)?;
        self.store(inode);
        Ok(())
    }

    fn journal(&mut self, options: &MkfsOptions, layout: &mut Layout<'_>) -> Result<()> {
        let plan = layout.plan;
        let len = journal::blocks(options, plan)?;
        let mut inode = self.inode(JOURNAL, FileType::Regular, 0o600);
        let extents = plan.features.has_incompat(incompat::EXTENTS);
        let goal = if extents { layout.journal_goal() } else { 0 };
        let blocks = self.allocate(&mut inode, layout, goal, len.into())?;
        let block_size = plan.block_size;
        if let Some(&first) = blocks.first() {
            let mut block = vec![0; block_size as usize];
            let superblock = crate::journal::fresh_superblock(block_size, len, options.uuid);
            block[..superblock.len()].copy_from_slice(&superblock);
            self.blocks.push((first, block));
        }
        self.journal = Some((*inode.map(), inode.size()));
        self.journal_blocks = len.into();
        self.store(inode);
        Ok(())
    }

    fn orphan_file(&mut self, options: &MkfsOptions, layout: &mut Layout<'_>) -> Result<()> {
        let len = journal::orphan_file_blocks(options, layout.plan);
        let mut inode = self.inode(ORPHAN_FILE, FileType::Regular, 0o600);
        let blocks = self.allocate(&mut inode, layout, 0, len)?;
        let seed = self.seed.map(|seed| inode.seed(seed));
        let block_len = layout.plan.block_size as usize;
        self.blocks.extend(blocks.into_iter().map(|place| (place, orphan::empty_block(place, block_len, seed))));
        self.store(inode);
        Ok(())
    }

    /// Gives an inode its first `len` blocks, the next free ones behind `goal`, and a map of them. The blocks, in order.
    fn allocate(&mut self, inode: &mut Inode, layout: &mut Layout<'_>, goal: u64, len: u64) -> Result<Vec<BlockNr>> {
        let block_len = layout.plan.block_size as usize;
        let extents = layout.plan.features.has_incompat(incompat::EXTENTS);
        let map = if extents { with_extents(layout, goal, len)? } else { with_pointers(layout, goal, len)? };
        let seed = self.seed.map(|seed| inode.seed(seed));
        let tree =
            if extents { extent_edit::encode(&map, block_len, seed) } else { block_map::encode(&map, block_len) };
        inode.set_flag(FLAG_EXTENTS, extents);
        *inode.map_mut() = tree.root;
        inode.set_size(len * u64::from(layout.plan.block_size));
        self.set_allocated(inode, len + tree.blocks.len() as u64)?;
        self.blocks.extend(tree.blocks);
        Ok(map.runs().iter().flat_map(|run| (0..run.len).map(|at| run.start.plus(at))).collect())
    }

    fn set_allocated(&self, inode: &mut Inode, blocks: u64) -> Result<()> {
        let block_size = self.superblock.geometry().block_size;
        let huge_file = self.superblock.features().has_ro_compat(ro_compat::HUGE_FILE);
        Ok(inode.set_allocated(blocks * u64::from(block_size), huge_file, block_size)?)
    }
}

/// Blocks for an extent tree: data wherever it is free first, then nodes at the block before it or behind.
fn with_extents(layout: &mut Layout<'_>, goal: u64, len: u64) -> Result<FileMap> {
    let mut map = FileMap::default();
    let mut goal = goal;
    while map.end() < len {
        let run = layout.allocate(goal, len - map.end())?;
        map.push(Run { logical: map.end(), len: run.end - run.start, start: BlockNr(run.start), unwritten: false });
        goal = run.end;
    }
    let nodes = extent_edit::blocks_needed(&map, layout.plan.block_size as usize);
    let before = map.runs().first().map_or(0, |run| run.start.0.saturating_sub(1));
    for _ in 0..nodes {
        map.nodes.push(BlockNr(layout.allocate(before, 1)?.start));
    }
    Ok(map)
}

/// Blocks for a tree of pointers, each node right before the data it points to.
fn with_pointers(layout: &mut Layout<'_>, goal: u64, len: u64) -> Result<FileMap> {
    let per_block = u64::from(layout.plan.block_size) / POINTER_LEN;
    let mut map = FileMap::default();
    while map.end() < len {
        for _ in 0..nodes_before(map.end(), per_block) {
            let place = layout.allocate(goal, 1)?.start;
            map.nodes.push(BlockNr(place));
        }
        let until =
            if map.end() < DIRECT { DIRECT } else { DIRECT + (map.end() - DIRECT + 1).next_multiple_of(per_block) };
        let run = layout.allocate(goal, until.min(len) - map.end())?;
        map.push(Run { logical: map.end(), len: run.end - run.start, start: BlockNr(run.start), unwritten: false });
    }
    Ok(map)
}

/// How many nodes of the tree of pointers come into being when block `logical` of the file gets its place.
fn nodes_before(logical: u64, per_block: u64) -> usize {
    let Some(mut at) = logical.checked_sub(DIRECT) else { return 0 };
    let mut span = per_block;
    for level in 1..=3 {
        if at < span {
            // The root of this level starts all nodes beneath it; else those at whose first block this is.
            return (1..=level).filter(|&below| at.is_multiple_of(per_block.pow(below))).count();
        }
        at -= span;
        span *= per_block;
    }
    0
}

fn put_pointer(pointers: &mut [u8], index: u64, block: u64) -> Result<()> {
    let value = u32::try_from(block).map_err(|_| MkfsError::invalid("a block map cannot reach past 2^32 blocks"))?;
    let at = usize::try_from(index * POINTER_LEN).unwrap_or(usize::MAX);
    let place = at.checked_add(4).and_then(|end| pointers.get_mut(at..end));
    let place =
        place.ok_or_else(|| MkfsError::invalid("there are more backups of the superblock than can be resized"))?;
    place.copy_from_slice(&value.to_le_bytes());
    Ok(())
}
