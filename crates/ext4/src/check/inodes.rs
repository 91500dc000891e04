//! Every inode: its fields, its blocks, what it is for.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use qtk_block::ExtentKind;

use super::map::{MapFacts, MapWalk};
use super::state::{DirState, DirStates, Entries, InodeState, InodeStates, Role};
use super::{Check, Claims, attributes, parallel, resize, symlinks};
use crate::error::Result;
use crate::features::{compat, incompat, ro_compat};
use crate::group::INODE_UNINIT;
use crate::inode::{
    FLAG_APPEND, FLAG_CASEFOLD, FLAG_EA_INODE, FLAG_ENCRYPT, FLAG_EXTENTS, FLAG_HUGE_FILE, FLAG_IMMUTABLE, FLAG_INDEX,
    FLAG_INLINE_DATA, FLAG_VERITY, Inode,
};
use crate::metadata::FileType;
use crate::{FindingKind, GroupNr, Ino, Place};

pub(super) const BAD_BLOCKS: u32 = 1;
const ROOT: u32 = 2;
pub(super) const BOOT_LOADER: u32 = 5;
pub(super) const RESIZE: u32 = 7;
pub(super) const JOURNAL: u32 = 8;

/// Bytes of an inode table to read at once.
const PIECE: usize = 1 << 20;

/// Where an inode's fields end that every version of the format has, and some of those fields.
const MODE: std::ops::Range<usize> = 0..2;
const LINKS: std::ops::Range<usize> = 26..28;

struct GroupScan {
    states: Box<[InodeState]>,
    dirs: Vec<DirState>,
}

/// Looks at all inodes of all groups.
pub(super) fn scan(claims: &Claims<'_>, threads: NonZeroUsize) -> Result<(InodeStates, DirStates)> {
    let groups = parallel::map(threads, claims.groups.len(), Vec::new, |buffer, group| {
        scan_group(claims, GroupNr(u32::try_from(group).unwrap_or(u32::MAX)), buffer)
    })?;
    let mut states = Vec::with_capacity(groups.len());
    let mut dirs = Vec::new();
    for group in groups {
        states.push(group.states);
        dirs.extend(group.dirs);
    }
    Ok((InodeStates::new(claims.check.fs, states), DirStates(dirs)))
}

/// How many inodes of a group's table may ever have been used.
pub(super) fn table_len(check: &Check<'_>, descriptor: &crate::group::GroupDescriptor) -> u32 {
    let inodes = check.fs.geometry().inodes_per_group;
    if !check.has_group_flags() {
        inodes
    } else if descriptor.has(INODE_UNINIT) {
        0
    } else {
        inodes.saturating_sub(descriptor.itable_unused())
    }
}

fn scan_group(claims: &Claims<'_>, group: GroupNr, buffer: &mut Vec<u8>) -> Result<GroupScan> {
    let geometry = claims.check.fs.geometry();
    let descriptor = &claims.groups[group.0 as usize];
    let len = table_len(claims.check, descriptor);
    let inode_len = usize::from(geometry.inode_size);
    let mut states: Box<[InodeState]> = (0..len).map(|_| InodeState::default()).collect();
    let mut dirs = Vec::new();
    let first = group.0 * geometry.inodes_per_group + 1;
    let start = geometry.offset(descriptor.inode_table());
    let end = start + u64::from(len) * u64::from(geometry.inode_size);
    let mut at = start;
    while at < end {
        let extent = claims.check.fs.extent(at..end.min(at + PIECE as u64))?;
        // A run of zeroes ends anywhere; inodes are looked at whole.
        let whole = (extent.range.end - at) / inode_len as u64 * inode_len as u64;
        if extent.kind != ExtentKind::Data && whole > 0 {
            at += whole;
            continue;
        }
        let piece = end.min(at + PIECE as u64) - at;
        buffer.resize(usize::try_from(piece).unwrap_or(PIECE), 0);
        claims.check.fs.read_device(buffer, at)?;
        let index = u32::try_from((at - start) / inode_len as u64).unwrap_or(u32::MAX);
        for (number, bytes) in (first + index..).zip(buffer.chunks_exact(inode_len)) {
            // Nearly all inodes of a table are not in use.
            let is_free = bytes[MODE] == [0; 2] && bytes[LINKS] == [0; 2] && number > claims.first_ordinary;
            let is_free = is_free && qtk_block::is_zero(bytes);
            if let Some(ino) = Ino::new(number).filter(|_| !is_free) {
                let mut scan = Scan { claims, ino, dirs: &mut dirs };
                states[(number - first) as usize] = scan.inode(bytes)?;
            }
        }
        at += piece;
    }
    Ok(GroupScan { states, dirs })
}

struct Scan<'a, 'b> {
    claims: &'a Claims<'b>,
    ino: Ino,
    dirs: &'a mut Vec<DirState>,
}

impl Scan<'_, '_> {
    fn bad(&self, text: &'static str) {
        self.claims.findings.inode(self.ino, text);
    }

    fn odd(&self, text: &'static str) {
        self.claims.findings.note(FindingKind::Inode, Place::Inode(self.ino), text);
    }

    fn check(&self) -> &Check<'_> {
        self.claims.check
    }

    fn inode(&mut self, bytes: &[u8]) -> Result<InodeState> {
        let number = self.ino.get();
        let inode = match Inode::parse(self.ino, bytes) {
            Ok(inode) => inode,
            Err(_) if bytes[LINKS] == [0; 2] => return Ok(InodeState::default()),
            Err(_) => {
                self.bad("the size of its extra fields is impossible");
                return Ok(InodeState::new(Role::Broken));
            }
        };
        let is_reserved = number < self.check().fs.geometry().first_ino && number != ROOT;
        self.checksum(&inode, bytes);
        if inode.links() == 0 && !is_reserved {
            return self.unused(&inode);
        }
        if is_reserved && inode.has(FLAG_CASEFOLD) && !inode.is(FileType::Directory) {
            self.bad("it is casefolded, but is no directory");
        }
        if inode.links() == 0 && inode.mode() == 0 && number != BAD_BLOCKS {
            return Ok(InodeState::default());
        }
        if is_reserved { self.reserved(&inode) } else { self.in_use(&inode) }
    }

    fn checksum(&self, inode: &Inode, bytes: &[u8]) {
        let all_zero = qtk_block::is_zero(bytes);
        if let Some(seed) = self.check().fs.checksum_seed()
            && !all_zero
            && inode.verify(seed).is_err()
        {
            self.bad("its checksum is wrong");
        }
    }

    fn unused(&mut self, inode: &Inode) -> Result<InodeState> {
        if let (true, Ok(file_type)) = (self.claims.orphans.contains(&self.ino), inode.file_type()) {
            // Its blocks are its own until the next mount frees them, but nothing leads to it.
            let dirs = self.dirs.len();
            self.blocks(inode, Some(file_type))?;
            self.dirs.truncate(dirs);
            return Ok(InodeState::new(Role::Orphan(file_type)));
        }
        if inode.dtime() == 0 && inode.mode() != 0 {
            self.bad("it has no links, but was never deleted");
        } else if inode.dtime() != 0 && inode.dtime() < self.check().fs.geometry().inodes && self.claims.times_are_real
        {
            self.bad("it is part of a damaged list of orphans");
        }
        Ok(InodeState::default())
    }

    /// An inode with a purpose of its own, or none.
    fn reserved(&mut self, inode: &Inode) -> Result<InodeState> {
        let check = self.check();
        let regular = inode.is(FileType::Regular);
        let raw = check.fs.superblock.raw();
        match self.ino.get() {
            BAD_BLOCKS => return resize::bad_blocks(self.claims, inode).map(|()| InodeState::default()),
            RESIZE => {
                if !check.has_compat(compat::RESIZE_INODE) {
                    self.odd("it is in use, though resize_inode is off");
                }
                resize::check(self.claims, inode)?;
                return Ok(Self::state(inode, Role::File(FileType::Regular)));
            }
            JOURNAL if check.has_compat(compat::HAS_JOURNAL) && raw.journal_ino.get() == JOURNAL => {
                if !regular {
                    self.bad("the journal is not a regular file");
                }
            }
            JOURNAL if inode.links() != 0 && check.fs.superblock.journal().is_none() => {
                self.odd("it looks like a journal, but the file system has none");
            }
            number if check.quota_inodes().any(|ino| ino == number) => {
                if !regular {
                    self.bad("a quota file is not a regular file");
                }
            }
            BOOT_LOADER if !inode.is(FileType::Directory) => {}
            _ if inode.mode() == 0 => {}
            _ => self.bad("it is reserved, but in use"),
        }
        self.blocks(inode, inode.file_type().ok())?;
        Ok(Self::state(inode, inode.file_type().map_or(Role::Unused, Role::File)))
    }

    fn state(inode: &Inode, role: Role) -> InodeState {
        InodeState::in_use(role, inode.links(), inode.has(FLAG_ENCRYPT))
    }

    fn in_use(&mut self, inode: &Inode) -> Result<InodeState> {
        if inode.dtime() != 0 && !self.claims.orphans.contains(&self.ino) {
            self.bad("it is in use, but marked as deleted");
        }
        let Ok(file_type) = inode.file_type() else {
            self.bad("its type is unknown");
            self.blocks(inode, None)?;
            return Ok(Self::state(inode, Role::Broken));
        };
        if self.ino == Ino::ROOT && file_type != FileType::Directory {
            self.bad("the root is not a directory");
        }
        self.fields(inode);
        self.flags(inode, file_type);
        self.blocks(inode, Some(file_type))?;
        let is_value = inode.has(FLAG_EA_INODE) && self.check().has_incompat(incompat::EA_INODE);
        let role = if is_value { Role::Value } else { Role::File(file_type) };
        Ok(Self::state(inode, role))
    }

    fn fields(&self, inode: &Inode) {
        let check = self.check();
        if inode.fragment() != 0 {
            self.bad("its fragment address is not zero");
        }
        if !check.has_incompat(incompat::SIXTY_FOUR_BIT) && inode.xattr_block().is_some_and(|block| block.0 >> 32 != 0)
        {
            self.bad("the upper half of its attribute block is not zero");
        }
        if !check.has_ro_compat(ro_compat::HUGE_FILE) && inode.blocks_hi() != 0 {
            self.bad("the upper half of its block count is not zero");
        }
        let wide =
            inode.is(FileType::Regular) || inode.is(FileType::Directory) && check.has_incompat(incompat::LARGE_DIR);
        if !wide && inode.size_hi() != 0 {
            self.bad("the upper half of its size is not zero");
        }
    }

    fn flags(&self, inode: &Inode, file_type: FileType) {
        let check = self.check();
        let is_dir = file_type == FileType::Directory;
        let has_content = matches!(file_type, FileType::Regular | FileType::Directory | FileType::Symlink);
        let needs = [
            (FLAG_EXTENTS, check.has_incompat(incompat::EXTENTS), "it has extents, but extent is off"),
            (FLAG_INLINE_DATA, check.has_incompat(incompat::INLINE_DATA), "it has inline data, but inline_data is off"),
            (FLAG_INDEX, check.has_compat(compat::DIR_INDEX), "it has a directory index, but dir_index is off"),
            (FLAG_ENCRYPT, check.has_incompat(incompat::ENCRYPT), "it is encrypted, but encrypt is off"),
            (FLAG_VERITY, check.has_ro_compat(ro_compat::VERITY), "it has verity data, but verity is off"),
            (FLAG_CASEFOLD, check.has_incompat(incompat::CASEFOLD), "it is casefolded, but casefold is off"),
            (FLAG_INDEX, is_dir, "it has a directory index, but is no directory"),
            (FLAG_CASEFOLD, is_dir, "it is casefolded, but is no directory"),
            (FLAG_VERITY, file_type == FileType::Regular, "it has verity data, but is no regular file"),
            (FLAG_EXTENTS | FLAG_INLINE_DATA, has_content, "it has a block map, but is a device, pipe or socket"),
            (FLAG_IMMUTABLE | FLAG_APPEND, has_content, "it is immutable, but is a device, pipe or socket"),
        ];
        for (flag, is_fine, problem) in needs {
            if inode.has(flag) && !is_fine {
                self.bad(problem);
            }
        }
        if inode.has(FLAG_EXTENTS) && inode.has(FLAG_INLINE_DATA) {
            self.bad("it has both extents and inline data");
        }
        if !has_content && inode.full_size() != 0 {
            self.bad("a device, pipe or socket has a size");
        }
    }

    /// The inode's blocks, attributes and sizes.
    fn blocks(&mut self, inode: &Inode, file_type: Option<FileType>) -> Result<()> {
        let attributes = attributes::check(self.claims, inode)?;
        let inline = inode.has(FLAG_INLINE_DATA);
        let is_dir = file_type == Some(FileType::Directory);
        let mapped = match file_type {
            Some(FileType::Regular | FileType::Directory) => !inline,
            Some(FileType::Symlink) => !inline && !symlinks::is_fast(inode),
            _ => false,
        };
        let facts = if mapped { MapWalk::run(self.claims, inode, is_dir)? } else { MapFacts::default() };
        match file_type {
            Some(FileType::Directory) => self.directory(inode, &facts, attributes.inline_tail),
            Some(FileType::Regular) => self.regular(inode, &facts, attributes.inline_tail.as_deref()),
            Some(FileType::Symlink) => {
                symlinks::check(self.claims, inode, attributes.inline_tail.as_deref())?;
            }
            _ => {}
        }
        if !facts.damaged {
            self.block_count(inode, facts.clusters + attributes.clusters);
        }
        Ok(())
    }

    fn block_count(&self, inode: &Inode, clusters: u64) {
        let geometry = self.check().fs.geometry();
        let huge_file = self.check().has_ro_compat(ro_compat::HUGE_FILE);
        let bytes = clusters * u64::from(geometry.blocks_per_cluster) * u64::from(geometry.block_size);
        let unit = if huge_file && inode.has(FLAG_HUGE_FILE) { geometry.block_size } else { 512 };
        if inode.stored_blocks(huge_file) != bytes / u64::from(unit) {
            self.claims.findings.inode(
                self.ino,
                format!(
                    "its number of blocks is {}, but should be {}",
                    inode.stored_blocks(huge_file),
                    bytes / u64::from(unit)
                ),
            );
        }
    }

    fn regular(&self, inode: &Inode, facts: &MapFacts, inline_tail: Option<&[u8]>) {
        let geometry = self.check().fs.geometry();
        let size = inode.full_size();
        if inode.has(FLAG_INLINE_DATA) {
            let room = inode.map().len() + inline_tail.map_or(0, <[u8]>::len);
            if size > room as u64 {
                self.odd("its size is larger than its inline data");
            }
            return;
        }
        let block_size = u64::from(geometry.block_size);
        let past_end = facts.last_written.is_some_and(|last| size < last * block_size);
        let is_cut_short = self.claims.orphans.contains(&self.ino);
        if past_end && !inode.has(FLAG_VERITY) && !facts.damaged && !is_cut_short {
            self.bad("it has blocks past its size");
        }
        let limit = if inode.has(FLAG_EXTENTS) {
            (1 << 32) * block_size - 1
        } else {
            crate::block_map::end(geometry.block_len()) * block_size
        };
        if size > limit {
            self.bad("its size is larger than its block map can hold");
        }
        if size >= 1 << 31 {
            self.claims.saw_large_file();
        }
    }

    fn directory(&mut self, inode: &Inode, facts: &MapFacts, inline_tail: Option<Vec<u8>>) {
        let block_size = u64::from(self.check().fs.geometry().block_size);
        let size = if self.check().has_incompat(incompat::LARGE_DIR) { inode.full_size() } else { inode.size() };
        let entries = if inode.has(FLAG_INLINE_DATA) {
            let areas = [inode.map().to_vec(), inline_tail.unwrap_or_default()];
            if size != (areas[0].len() + areas[1].len()) as u64 {
                self.bad("its size differs from that of its inline data");
            }
            Entries::Inline(areas)
        } else {
            let blocks = facts.last.map_or(0, |last| last + 1);
            if blocks == 0 && !facts.damaged {
                self.bad("it is a directory without blocks");
            } else if size != blocks * block_size && !facts.damaged {
                self.bad("the size of the directory does not fit its blocks");
            }
            if facts.has_unwritten {
                self.bad("a block of the directory is marked as unwritten");
            }
            Entries::Blocks(facts.runs.clone())
        };
        self.dirs.push(DirState::new(self.ino, entries, inode.flags(), inode.generation()));
    }
}

/// Inodes that the superblock or the orphan file names as orphans.
pub(super) type Orphans = BTreeSet<Ino>;
