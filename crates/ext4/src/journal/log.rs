//! The three passes over a journal's log: where it ends, what it revokes, what it holds.

use std::collections::{BTreeMap, HashMap};

use super::Journal;
use super::block::{self, CommitSum, Format, Kind, Tag};
use crate::BlockNr;
use crate::error::{Error, Place, Result};

/// Whether transaction `a` comes before `b`; the numbers wrap.
fn is_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b).cast_signed() < 0
}

/// For each revoked block the last transaction that did so.
pub(super) type Revoked = HashMap<BlockNr, u32>;

/// A copy of a block in the log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Logged {
    /// Where, counted from the journal's start.
    pub(super) at: u32,
    pub(super) sequence: u32,
    pub(super) tag: Tag,
}

/// The log of a journal from its oldest transaction on.
pub(super) struct Log<'a> {
    journal: &'a Journal<'a>,
    format: Format,
    start: u32,
}

/// A block of the log that is not a logged block, and the blocks that belong to it.
struct Record {
    kind: Kind,
    /// Where, counted from the journal's start.
    at: u32,
    bytes: Vec<u8>,
    /// A descriptor's logged blocks, and where they are.
    logged: Vec<(u32, Tag)>,
}

/// Walks the records of the log, transaction by transaction.
struct Walk<'a> {
    log: &'a Log<'a>,
    at: u32,
    sequence: u32,
    /// Blocks of the log that were not yet passed: a log that goes round in circles ends.
    left: u32,
}

impl<'a> Log<'a> {
    pub(super) fn new(journal: &'a Journal<'a>, start: u32) -> Self {
        Self { journal, format: journal.format(), start }
    }

    fn walk(&self) -> Walk<'_> {
        let superblock = &self.journal.superblock;
        let left = superblock.log_end() - superblock.first();
        Walk { log: self, at: self.start, sequence: superblock.sequence(), left }
    }

    /// The number of the first transaction that is not wholly in the log.
    pub(super) fn find_end(&self) -> Result<u32> {
        let mut walk = self.walk();
        let mut sum = CommitSum::START;
        let mut damaged = None;
        let mut last_commit = 0;
        while let Some(record) = walk.next()? {
            match record.kind {
                Kind::Descriptor if self.format.sums_transactions() => sum = self.sum(sum, &record)?,
                Kind::Descriptor | Kind::Revoke => {
                    if !self.format.has_valid_tail(&record.bytes) {
                        damaged = Some(record.at);
                    }
                }
                Kind::Commit => {
                    let time = block::commit_time(&record.bytes);
                    let valid = self.format.is_valid_commit(&record.bytes, sum);
                    if valid && damaged.is_none() {
                        last_commit = time;
                        sum = CommitSum::START;
                        walk.sequence = walk.sequence.wrapping_add(1);
                        continue;
                    }
                    // What an earlier use of the journal left behind ends the log, and so does an asynchronous commit that
                    // a crash cut short; anything else is damage.
                    let torn = damaged.is_none() && self.journal.superblock.has_async_commit();
                    return if time < last_commit || torn {
                        Ok(walk.sequence)
                    } else {
                        Err(bad_checksum(damaged.unwrap_or(record.at)))
                    };
                }
                Kind::Other => break,
            }
        }
        Ok(walk.sequence)
    }

    fn sum(&self, sum: CommitSum, record: &Record) -> Result<CommitSum> {
        let mut content = vec![0; record.bytes.len()];
        record.logged.iter().try_fold(sum.with(&record.bytes), |sum, &(at, _)| {
            self.journal.read(at, &mut content)?;
            Ok(sum.with(&content))
        })
    }

    /// Calls `visit` with the records of all transactions before `end`.
    fn for_each(&self, end: u32, mut visit: impl FnMut(u32, Record) -> Result<()>) -> Result<()> {
        let mut walk = self.walk();
        while is_before(walk.sequence, end) {
            let Some(record) = walk.next()? else {
                return Err(Error::corrupt(Place::Journal(walk.at), "the journal's log changed while it was read"));
            };
            match record.kind {
                Kind::Commit => walk.sequence = walk.sequence.wrapping_add(1),
                _ => visit(walk.sequence, record)?,
            }
        }
        Ok(())
    }

    /// What the transactions before `end` revoke.
    pub(super) fn revoked(&self, end: u32) -> Result<Revoked> {
        let mut revoked = Revoked::new();
        self.for_each(end, |sequence, record| {
            if record.kind == Kind::Revoke {
                let too_long = || Error::corrupt(Place::Journal(record.at), "a revoke block is longer than a block");
                for block in self.format.revoked(&record.bytes).ok_or_else(too_long)? {
                    // Transactions come in order, so the last one stays.
                    revoked.insert(block, sequence);
                }
            }
            Ok(())
        })?;
        Ok(revoked)
    }

    /// The newest copy of every block that the transactions before `end` hold and that was not revoked since.
    pub(super) fn logged(&self, end: u32, revoked: &Revoked) -> Result<BTreeMap<BlockNr, Logged>> {
        let mut newest = BTreeMap::new();
        self.for_each(end, |sequence, record| {
            for (at, tag) in record.logged {
                if revoked.get(&tag.block).is_none_or(|&revoked| is_before(revoked, sequence)) {
                    newest.insert(tag.block, Logged { at, sequence, tag });
                }
            }
            Ok(())
        })?;
        Ok(newest)
    }
}

fn bad_checksum(at: u32) -> Error {
    Error::corrupt(Place::Journal(at), "the checksum of a journal block is wrong")
}

impl Walk<'_> {
    /// The next record of the current transaction, or `None` where the log ends.
    fn next(&mut self) -> Result<Option<Record>> {
        let journal = self.log.journal;
        let at = self.at;
        let mut bytes = vec![0; journal.fs.geometry().block_len()];
        if !self.advance() {
            return Ok(None);
        }
        journal.read(at, &mut bytes)?;
        let Some((kind, sequence)) = block::header(&bytes) else { return Ok(None) };
        if sequence != self.sequence {
            return Ok(None);
        }
        let tags = if kind == Kind::Descriptor { self.log.format.tags(&bytes) } else { Vec::new() };
        let mut logged = Vec::with_capacity(tags.len());
        for tag in tags {
            logged.push((self.at, tag));
            if !self.advance() {
                return Ok(None);
            }
        }
        Ok(Some(Record { kind, at, bytes, logged }))
    }

    /// Goes on by one block; false if that was the whole log.
    fn advance(&mut self) -> bool {
        let superblock = &self.log.journal.superblock;
        self.at += 1;
        if self.at >= superblock.log_end() {
            self.at = superblock.first();
        }
        self.left = match self.left.checked_sub(1) {
            Some(left) => left,
            None => return false,
        };
        true
    }
}
