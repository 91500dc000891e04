//! The journal's inode and superblock.

use super::Check;
use crate::error::Result;
use crate::features::{compat, incompat};
use crate::journal::Journal;
use crate::{FindingKind, Place};

/// The fewest blocks of a journal.
const SMALLEST: u64 = 1024;

pub(super) fn check(check: &Check<'_>) -> Result<()> {
    if !check.has_compat(compat::HAS_JOURNAL) {
        if check.has_incompat(incompat::RECOVER) {
            check.findings.superblock("needs_recovery is on, but there is no journal");
        }
        if check.fs.superblock.raw().journal_ino.get() != 0 {
            check.findings.superblock("a journal is named, but has_journal is off");
        }
        return Ok(());
    }
    let journal = Journal::open(check.fs)?;
    let damage = |text: &'static str| check.findings.damage(FindingKind::Journal, Place::Journal(0), text);
    if journal.blocks() < SMALLEST {
        damage("the journal is too short");
    }
    if !journal.is_whole() {
        damage("the journal has a hole");
    }
    // After a replay in memory the log on disk is still there.
    if !journal.is_empty() && !check.has_incompat(incompat::RECOVER) {
        damage("the journal holds changes, but the superblock does not say that they are to be replayed");
    }
    Ok(())
}
