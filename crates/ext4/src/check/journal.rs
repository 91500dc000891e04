//! The journal's inode and superblock.

use super::Check;
use crate::error::{Error, Result};
use crate::features::{compat, incompat};
use crate::journal::Journal;
use crate::metadata::FileType;
use crate::{FindingKind, Ino, Place};

/// The fewest blocks of a journal.
const SMALLEST: u64 = 1024;

pub(super) fn check(check: &Check<'_>) -> Result<()> {
    let raw = check.fs.superblock.raw();
    if raw.journal_uuid != [0; 16] && raw.journal_ino.get() != 0 {
        check.findings.superblock("a journal on another device is named as well as one here");
    }
    if !check.has_compat(compat::HAS_JOURNAL) {
        if check.has_incompat(incompat::RECOVER) {
            check.findings.superblock("needs_recovery is on, but there is no journal");
        }
        if raw.journal_uuid != [0; 16] && raw.journal_ino.get() == 0 {
            check.findings.superblock("a journal on another device is named, but has_journal is off");
        }
        if let Some(ino) = Ino::new(raw.journal_ino.get()) {
            match check.fs.inode_in_use(ino) {
                Ok(inode) if inode.is(FileType::Regular) => {
                    check.findings.superblock_note("a journal is named, but has_journal is off");
                }
                Err(error @ Error::Io { .. }) => return Err(error),
                _ => check.findings.superblock("an inode is named as the journal that cannot be one"),
            }
        }
        return Ok(());
    }
    let journal = match Journal::open(check.fs) {
        Err(Error::NoSuchInode(_)) => {
            check.findings.superblock("the journal's inode is not in use");
            return Ok(());
        }
        journal => journal?,
    };
    let damage = |text: &'static str| check.findings.damage(FindingKind::Journal, Place::Journal(0), text);
    if journal.blocks() < SMALLEST {
        damage("the journal is too short");
    }
    if !journal.is_whole() {
        damage("the journal has a hole");
    }
    if journal.is_aborted() {
        damage("the journal was given up after an error");
    }
    if journal.has_several_users() {
        damage("the journal claims to be that of several file systems");
    }
    if journal.has_two_kinds_of_checksums() {
        damage("the journal claims two kinds of checksums");
    }
    // After a replay in memory the log on disk is still there.
    if !journal.is_empty() && !check.has_incompat(incompat::RECOVER) {
        let text = "the journal holds changes, but the superblock does not say that they are to be replayed";
        check.findings.note(FindingKind::Journal, Place::Journal(0), text);
    }
    Ok(())
}
