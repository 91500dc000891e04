//! What a check knows of every inode and every directory.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::fs::Ext4;
use crate::map::Run;
use crate::metadata::FileType;
use crate::{GroupNr, Ino};

/// What an inode is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Role {
    #[default]
    Unused,
    /// Of a kind that does not exist.
    Broken,
    /// Waits to be freed at the next mount, without a name.
    Orphan(FileType),
    /// Holds the value of an extended attribute.
    Value,
    File(FileType),
}

/// What is kept of one inode.
#[derive(Debug, Default)]
pub(super) struct InodeState {
    pub(super) role: Role,
    pub(super) links: u16,
    /// Names that lead to it, as far as they were found.
    names: AtomicU32,
    pub(super) encrypted: bool,
}

impl Role {
    /// Whether the group counts it as a directory.
    pub(super) fn is_dir(self) -> bool {
        matches!(self, Self::File(FileType::Directory) | Self::Orphan(FileType::Directory))
    }
}

impl InodeState {
    /// One of which only the role is known.
    pub(super) fn new(role: Role) -> Self {
        Self { role, ..Self::default() }
    }

    /// One that is in use.
    pub(super) fn in_use(role: Role, links: u16, encrypted: bool) -> Self {
        Self { role, links, encrypted, ..Self::default() }
    }

    pub(super) fn add_name(&self) {
        self.names.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn names(&self) -> u32 {
        self.names.load(Ordering::Relaxed)
    }
}

/// The inodes of every group, as far as its table was ever used.
#[derive(Debug)]
pub(super) struct InodeStates {
    per_group: u32,
    groups: Vec<Box<[InodeState]>>,
}

impl InodeStates {
    /// From the groups' states, in order.
    pub(super) fn new(fs: &Ext4, groups: Vec<Box<[InodeState]>>) -> Self {
        Self { per_group: fs.geometry().inodes_per_group, groups }
    }

    /// What is known of an inode; `None` if it was never used.
    pub(super) fn get(&self, ino: u32) -> Option<&InodeState> {
        let index = ino.checked_sub(1)?;
        let group = self.groups.get((index / self.per_group) as usize)?;
        group.get((index % self.per_group) as usize)
    }

    pub(super) fn of_group(&self, group: GroupNr) -> &[InodeState] {
        self.groups.get(group.0 as usize).map_or(&[], |states| states)
    }
}

/// Where a directory keeps its entries.
#[derive(Debug)]
pub(super) enum Entries {
    Blocks(Vec<Run>),
    /// Within the inode: the two areas.
    Inline([Vec<u8>; 2]),
}

/// A directory that pass 1 came across.
#[derive(Debug)]
pub(super) struct DirState {
    pub(super) ino: Ino,
    pub(super) entries: Entries,
    pub(super) flags: u32,
    pub(super) generation: u32,
    /// The directory whose entry leads here, or zero.
    parent: AtomicU32,
    /// What `..` says, or zero.
    dot_dot: AtomicU32,
}

impl DirState {
    pub(super) fn new(ino: Ino, entries: Entries, flags: u32, generation: u32) -> Self {
        Self { ino, entries, flags, generation, parent: AtomicU32::new(0), dot_dot: AtomicU32::new(0) }
    }

    /// Says that an entry of `parent` leads here. False if another entry did before.
    pub(super) fn set_parent(&self, parent: Ino) -> bool {
        self.parent.compare_exchange(0, parent.get(), Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(super) fn parent(&self) -> Option<Ino> {
        Ino::new(self.parent.load(Ordering::Relaxed))
    }

    pub(super) fn set_dot_dot(&self, ino: u32) {
        self.dot_dot.store(ino, Ordering::Relaxed);
    }

    pub(super) fn dot_dot(&self) -> u32 {
        self.dot_dot.load(Ordering::Relaxed)
    }

    pub(super) fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// All directories, by number.
#[derive(Debug)]
pub(super) struct DirStates(pub(super) Vec<DirState>);

impl DirStates {
    pub(super) fn index(&self, ino: Ino) -> Option<usize> {
        self.0.binary_search_by_key(&ino, |dir| dir.ino).ok()
    }

    pub(super) fn get(&self, ino: Ino) -> Option<&DirState> {
        self.0.get(self.index(ino)?)
    }
}
