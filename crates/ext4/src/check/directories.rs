//! Every directory: its blocks, their entries, and what the entries say of inodes.

use std::num::NonZeroUsize;

use super::ahead::ReadAhead;
use super::index::IndexCheck;
use super::state::{DirState, DirStates, Entries, InodeStates, Role};
use super::{Claims, parallel};
use crate::checksum::Seed;
use crate::dir::{Leaf, Record};
use crate::error::Result;
use crate::features::{compat, incompat};
use crate::inode::{FLAG_CASEFOLD, FLAG_ENCRYPT, FLAG_INDEX};
use crate::metadata::FileType;
use crate::{FindingKind, Ino, Place};

const ROOT: u32 = 2;
/// Directories that a thread takes at once.
const SHARE: usize = 64;
/// The shortest name that encryption makes.
const SHORTEST_ENCRYPTED: usize = 16;
/// Where a record's name starts.
const NAME: usize = 8;
/// The number of the parent, in front of the entries of an inline directory.
const PARENT_LEN: usize = 4;

/// What looking at directories takes.
pub(super) struct Directories<'a> {
    pub(super) claims: &'a Claims<'a>,
    pub(super) states: &'a InodeStates,
    pub(super) dirs: &'a DirStates,
}

impl Directories<'_> {
    /// Looks at all of them, in the order in which they lie on the device.
    pub(super) fn check(&self, threads: NonZeroUsize) -> Result<()> {
        let mut order: Vec<usize> = (0..self.dirs.0.len()).collect();
        order.sort_by_key(|&at| match &self.dirs.0[at].entries {
            Entries::Blocks(runs) => runs.first().map_or(0, |run| run.start.0),
            Entries::Inline(_) => 0,
        });
        let shares: Vec<&[usize]> = order.chunks(SHARE).collect();
        parallel::map(threads, shares.len(), ReadAhead::default, |ahead, share| {
            let dirs = || shares[share].iter().map(|&at| &self.dirs.0[at]);
            ahead.expect(dirs());
            dirs().try_for_each(|dir| DirCheck { pass: self, dir }.check(ahead))
        })
        .map(drop)
    }
}

/// The check of one directory.
pub(super) struct DirCheck<'a> {
    pass: &'a Directories<'a>,
    dir: &'a DirState,
}

impl DirCheck<'_> {
    fn bad(&self, block: u32, text: impl Into<std::borrow::Cow<'static, str>>) {
        self.pass.claims.findings.directory(self.dir.ino, block, text);
    }

    fn check(&self, ahead: &mut ReadAhead) -> Result<()> {
        match &self.dir.entries {
            Entries::Inline(areas) => self.inline(areas),
            Entries::Blocks(_) => self.blocks(ahead)?,
        }
        Ok(())
    }

    fn seed(&self) -> Option<Seed> {
        self.pass.claims.check.fs.checksum_seed().map(|seed| seed.of_inode(self.dir.ino, self.dir.generation))
    }

    fn blocks(&self, ahead: &mut ReadAhead) -> Result<()> {
        let Entries::Blocks(runs) = &self.dir.entries else { return Ok(()) };
        let fs = self.pass.claims.check.fs;
        let block_len = fs.geometry().block_len();
        let indexed = self.dir.has(FLAG_INDEX) && self.pass.claims.check.has_compat(compat::DIR_INDEX);
        let mut index = indexed.then(|| IndexCheck::new(self.pass.claims.check, self.dir));
        let mut next = 0;
        for run in runs {
            if run.logical > next {
                self.bad(u32::try_from(next).unwrap_or(u32::MAX), "the directory has a hole");
            }
            next = run.end();
            let mut done = 0;
            while done < run.len {
                let piece = ahead.read(fs, run.start.plus(done), run.len - done)?;
                for bytes in piece.chunks_exact(block_len) {
                    self.block(u32::try_from(run.logical + done).unwrap_or(u32::MAX), bytes, index.as_mut());
                    done += 1;
                }
            }
        }
        if let Some(index) = index {
            index.finish(self.pass.claims.findings);
        }
        Ok(())
    }

    fn parse(&self, bytes: &[u8], seed: Option<Seed>) -> Result<Leaf, &'static str> {
        let parser = if self.dir.has(FLAG_ENCRYPT) { Leaf::parse_encrypted } else { Leaf::parse };
        parser(bytes.to_vec(), seed)
    }

    fn block(&self, number: u32, bytes: &[u8], index: Option<&mut IndexCheck<'_>>) {
        let mut seed = self.seed();
        let mut index = index;
        if let Some(index) = &mut index
            && index.add_node(number, bytes, seed, self.pass.claims.findings)
        {
            if number != 0 {
                return;
            }
            // The root's records end where the index begins, and its checksum is the index's.
            seed = None;
        }
        match self.parse(bytes, seed) {
            Ok(leaf) => {
                if let Some(index) = index.filter(|_| number != 0) {
                    index.add_leaf(number, &leaf);
                }
                self.records(number, &leaf);
            }
            Err(damage) => self.bad(number, damage),
        }
    }

    fn inline(&self, [first, second]: &[Vec<u8>; 2]) {
        let parent = first.first_chunk().map_or(0, |&parent| u32::from_le_bytes(parent));
        self.dir.set_dot_dot(parent);
        self.count(self.dir.ino.get());
        self.count(parent);
        for (number, area) in [(0, first.get(PARENT_LEN..).unwrap_or_default()), (1, second.as_slice())] {
            if area.is_empty() {
                continue;
            }
            match self.parse(area, None) {
                Ok(leaf) => self.names(number, &leaf, 0),
                Err(damage) => self.bad(number, damage),
            }
        }
    }

    fn records(&self, number: u32, leaf: &Leaf) {
        if number != 0 {
            return self.names(number, leaf, 0);
        }
        let mut records = leaf.records();
        match (records.next(), records.next()) {
            (Some(dot), Some(dot_dot)) => {
                self.dot(&dot, leaf.bytes());
                self.dot_dot(&dot_dot, leaf.bytes());
            }
            _ => self.bad(0, "the entries . and .. are missing"),
        }
        self.names(0, leaf, 2);
    }

    fn dot(&self, record: &Record<'_>, bytes: &[u8]) {
        let entry = record.entry;
        if entry.ino != self.dir.ino.get() || entry.name != b"." || bytes.get(record.offset + NAME + 1) != Some(&0) {
            return self.bad(0, "the entry . is missing or damaged");
        }
        self.count(entry.ino);
        self.entry_type(0, record);
    }

    fn dot_dot(&self, record: &Record<'_>, bytes: &[u8]) {
        let entry = record.entry;
        if entry.ino == 0 || entry.name != b".." || bytes.get(record.offset + NAME + 2) != Some(&0) {
            return self.bad(0, "the entry .. is missing or damaged");
        }
        self.dir.set_dot_dot(entry.ino);
        self.count(entry.ino);
        self.entry_type(0, record);
    }

    fn count(&self, ino: u32) {
        if let Some(state) = self.pass.states.get(ino) {
            state.add_name();
        }
    }

    /// Looks at the records of a block behind the first `skip`.
    fn names(&self, number: u32, leaf: &Leaf, skip: usize) {
        let mut names = Vec::new();
        for record in leaf.records().skip(skip).filter(|record| record.entry.ino != 0) {
            self.name(number, &record);
            names.push(record.entry.name);
        }
        if !self.dir.has(FLAG_CASEFOLD) {
            names.sort_unstable();
            for pair in names.windows(2).filter(|pair| pair[0] == pair[1]) {
                self.bad(number, format!("the name {} is there twice", shown(pair[0])));
            }
        }
    }

    fn name(&self, number: u32, record: &Record<'_>) {
        let entry = record.entry;
        let geometry = self.pass.claims.check.fs.geometry();
        let bad = |problem: &str| self.bad(number, format!("the entry {} {problem}", shown(entry.name)));
        if entry.is_dot() {
            return bad("is not where it belongs");
        }
        if entry.ino > geometry.inodes || entry.ino < geometry.first_ino {
            return bad(if entry.ino == ROOT { "leads to the root" } else { "leads to an inode that cannot be" });
        }
        let Some(child) = Ino::new(entry.ino) else { return };
        let state = match self.pass.states.get(entry.ino) {
            Some(state) if !matches!(state.role, Role::Unused | Role::Orphan(_)) => state,
            _ => return bad("leads to an inode that is not in use"),
        };
        state.add_name();
        match state.role {
            Role::Value => return bad("leads to the value of an attribute"),
            Role::Broken => bad("leads to a damaged inode"),
            _ => {}
        }
        self.entry_type(number, record);
        self.encryption(number, record, state.encrypted, state.role);
        if state.role == Role::File(FileType::Directory)
            && let Some(dir) = self.pass.dirs.get(child)
            && !dir.set_parent(self.dir.ino)
        {
            let text = "more than one directory has an entry for it";
            self.pass.claims.findings.damage(FindingKind::Connection, Place::Inode(child), text);
        }
    }

    fn entry_type(&self, number: u32, record: &Record<'_>) {
        let stored = record.entry.file_type;
        let expected = match self.pass.states.get(record.entry.ino).map(|state| state.role) {
            Some(Role::File(file_type)) if self.pass.claims.check.has_incompat(incompat::FILETYPE) => {
                file_type.entry_code()
            }
            _ if !self.pass.claims.check.has_incompat(incompat::FILETYPE) => 0,
            _ => return,
        };
        // Zero says that nobody knows, which readers live with.
        if stored != expected && stored != 0 {
            self.bad(number, format!("the entry {} has the wrong type", shown(record.entry.name)));
        }
    }

    fn encryption(&self, number: u32, record: &Record<'_>, child_encrypted: bool, role: Role) {
        if !self.dir.has(FLAG_ENCRYPT) {
            return;
        }
        let name = record.entry.name;
        if name.len() < SHORTEST_ENCRYPTED {
            self.bad(number, format!("the encrypted name {} is too short", shown(name)));
        }
        let needs = matches!(role, Role::File(FileType::Regular | FileType::Directory | FileType::Symlink));
        if needs && !child_encrypted {
            self.bad(number, format!("the entry {} of an encrypted directory is not encrypted", shown(name)));
        }
    }
}

/// A name for people: what is not printable, escaped.
pub(super) fn shown(name: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(name))
}
