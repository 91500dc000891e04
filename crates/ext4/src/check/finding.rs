//! What a check reports, and the collector that keeps a bounded part of it.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use crate::{BlockNr, GroupNr, Ino, Place};

/// Which part of a file system a [`Finding`] is about. Reports are sorted by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FindingKind {
    /// A field of the superblock, or its checksum.
    Superblock,
    /// A group descriptor.
    Group,
    /// The journal's inode, superblock or log.
    Journal,
    /// An inode's own fields.
    Inode,
    /// An extent tree or block map.
    BlockMap,
    /// Blocks that are claimed more than once.
    SharedBlock,
    /// Extended attributes.
    Attribute,
    /// A block of a directory, or an entry in it.
    Directory,
    /// A directory's hash tree.
    Index,
    /// A directory or file that cannot be reached, or not where it says.
    Connection,
    /// An inode's number of links.
    Links,
    /// The list of orphans, or the orphan file.
    Orphan,
    /// A bitmap of blocks or inodes.
    Bitmap,
    /// A counter of free blocks, free inodes or directories.
    Count,
    /// Usage that a quota file keeps.
    Quota,
}

impl FindingKind {
    /// A word for machines.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Superblock => "superblock",
            Self::Group => "group",
            Self::Journal => "journal",
            Self::Inode => "inode",
            Self::BlockMap => "block-map",
            Self::SharedBlock => "shared-block",
            Self::Attribute => "attribute",
            Self::Directory => "directory",
            Self::Index => "index",
            Self::Connection => "connection",
            Self::Links => "links",
            Self::Orphan => "orphan",
            Self::Bitmap => "bitmap",
            Self::Count => "count",
            Self::Quota => "quota",
        }
    }
}

/// One thing that a check found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Finding {
    /// What it is about.
    pub kind: FindingKind,
    /// Where.
    pub place: Place,
    /// What is wrong there.
    pub text: Cow<'static, str>,
    /// Whether it is worth knowing only: every mount puts it right, and the file system counts as clean.
    pub harmless: bool,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.text)
    }
}

/// Collects findings from any thread. Of too many, the first in order are kept, so that a report does not depend on timing.
#[derive(Debug)]
pub(super) struct Findings {
    limit: usize,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) first: BTreeSet<Finding>,
    pub(super) damages: u64,
    pub(super) notes: u64,
}

impl Findings {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, found: Mutex::default() }
    }

    /// Something is damaged.
    pub(super) fn damage(&self, kind: FindingKind, place: Place, text: impl Into<Cow<'static, str>>) {
        self.add(Finding { kind, place, text: text.into(), harmless: false });
    }

    /// Something is odd, but nothing is lost by it.
    pub(super) fn note(&self, kind: FindingKind, place: Place, text: impl Into<Cow<'static, str>>) {
        self.add(Finding { kind, place, text: text.into(), harmless: true });
    }

    fn add(&self, finding: Finding) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if finding.harmless {
            found.notes += 1;
        } else {
            found.damages += 1;
        }
        found.first.insert(finding);
        if found.first.len() > self.limit {
            found.first.pop_last();
        }
    }

    /// Takes over everything that another collector has.
    pub(super) fn absorb(&self, other: Self) {
        let other = other.into_found();
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.damages += other.damages;
        found.notes += other.notes;
        found.first.extend(other.first);
        while found.first.len() > self.limit {
            found.first.pop_last();
        }
    }

    pub(super) fn into_found(self) -> Found {
        self.found.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn superblock(&self, text: impl Into<Cow<'static, str>>) {
        self.damage(FindingKind::Superblock, Place::Superblock, text);
    }

    pub(super) fn superblock_note(&self, text: impl Into<Cow<'static, str>>) {
        self.note(FindingKind::Superblock, Place::Superblock, text);
    }

    pub(super) fn group(&self, group: GroupNr, text: impl Into<Cow<'static, str>>) {
        self.damage(FindingKind::Group, Place::Group(group), text);
    }

    pub(super) fn inode(&self, ino: Ino, text: impl Into<Cow<'static, str>>) {
        self.damage(FindingKind::Inode, Place::Inode(ino), text);
    }

    pub(super) fn map(&self, ino: Ino, text: impl Into<Cow<'static, str>>) {
        self.damage(FindingKind::BlockMap, Place::Inode(ino), text);
    }

    pub(super) fn attribute(&self, ino: Ino, text: impl Into<Cow<'static, str>>) {
        self.damage(FindingKind::Attribute, Place::Inode(ino), text);
    }

    pub(super) fn directory(&self, ino: Ino, block: u32, text: impl Into<Cow<'static, str>>) {
        self.damage(FindingKind::Directory, Place::Directory(ino, block), text);
    }

    pub(super) fn index(&self, ino: Ino, block: u32, text: impl Into<Cow<'static, str>>) {
        self.damage(FindingKind::Index, Place::Directory(ino, block), text);
    }

    pub(super) fn block(&self, kind: FindingKind, block: BlockNr, text: impl Into<Cow<'static, str>>) {
        self.damage(kind, Place::Block(block), text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_first_in_order_and_counts_all() {
        let findings = Findings::new(3);
        for number in [9, 3, 7, 1, 5] {
            findings.inode(Ino::new(number).unwrap(), "bad");
        }
        findings.note(FindingKind::Superblock, Place::Superblock, "odd");
        let found = findings.into_found();
        assert_eq!((found.damages, found.notes), (5, 1));
        let lines: Vec<_> = found.first.iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["superblock: odd", "inode 1: bad", "inode 3: bad"]);
    }
}
