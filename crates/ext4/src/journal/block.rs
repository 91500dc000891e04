//! The blocks of a journal's log: what they announce, what they revoke, what they commit.

use zerocopy::FromBytes;
use zerocopy::big_endian::{U32, U64};

use super::superblock::{Checksums, JournalSuperblock, MAGIC};
use crate::BlockNr;
use crate::checksum::crc32c;

const HEADER_LEN: usize = 12;
const TAIL_LEN: usize = 4;
const UUID_LEN: usize = 16;
const REVOKE_HEADER_LEN: usize = HEADER_LEN + 4;
const COMMIT_CHECKSUM: std::ops::Range<usize> = 16..20;
const COMMIT_SECONDS: usize = 48;

const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;

/// What a block of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Says where the logged blocks that follow it belong.
    Descriptor,
    /// Ends a transaction.
    Commit,
    /// Lists blocks that older transactions must not bring back.
    Revoke,
    Other,
}

/// The kind of a log block and the number of its transaction, or `None` for anything else.
pub(super) fn header(block: &[u8]) -> Option<(Kind, u32)> {
    let ([magic, kind, sequence], _) = <[U32; 3]>::read_from_prefix(block).ok()?;
    let kind = match kind.get() {
        1 => Kind::Descriptor,
        2 => Kind::Commit,
        5 => Kind::Revoke,
        _ => Kind::Other,
    };
    (magic.get() == MAGIC).then_some((kind, sequence.get()))
}

/// A logged block: the one that follows in the log belongs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) block: BlockNr,
    /// The block began with the journal's magic number, which was replaced by zeroes.
    pub(super) escaped: bool,
    checksum: u32,
}

/// How a journal writes its blocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Format {
    checksums: Checksums,
    seed: u32,
    wide: bool,
}

impl Format {
    pub(super) fn of(superblock: &JournalSuperblock) -> Self {
        Self { checksums: superblock.checksums(), seed: superblock.checksum_seed(), wide: superblock.has_64bit() }
    }

    fn tail_len(self) -> usize {
        match self.checksums {
            Checksums::V2 | Checksums::V3 => TAIL_LEN,
            Checksums::None | Checksums::Commit => 0,
        }
    }

    fn tag_len(self) -> usize {
        match (self.checksums, self.wide) {
            (Checksums::V3, _) => 16,
            (Checksums::V2, true) => 14,
            (Checksums::V2, false) => 10,
            (Checksums::None | Checksums::Commit, true) => 12,
            (Checksums::None | Checksums::Commit, false) => 8,
        }
    }

    /// The logged blocks that a descriptor block announces.
    pub(super) fn tags(self, block: &[u8]) -> Vec<Tag> {
        let end = block.len().saturating_sub(self.tail_len());
        let mut tags = Vec::new();
        let mut at = HEADER_LEN;
        while let Some((tag, flags)) = block.get(at..end).and_then(|rest| self.tag(rest)) {
            tags.push(tag);
            at += self.tag_len() + if flags & TAG_SAME_UUID == 0 { UUID_LEN } else { 0 };
            if flags & TAG_LAST != 0 {
                break;
            }
        }
        tags
    }

    fn tag(self, bytes: &[u8]) -> Option<(Tag, u32)> {
        let bytes = bytes.get(..self.tag_len())?;
        let word = |at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let (flags, checksum) = match self.checksums {
            Checksums::V3 => (word(4)?, word(12)?),
            _ => (word(4)? & 0xffff, word(4)? >> 16),
        };
        let high = if self.wide { word(8)? } else { 0 };
        let block = BlockNr(u64::from(word(0)?) | u64::from(high) << 32);
        Some((Tag { block, escaped: flags & TAG_ESCAPED != 0, checksum }, flags))
    }

    /// Whether a logged block, as it lies in the log, is the one that was announced.
    pub(super) fn is_intact(self, tag: &Tag, sequence: u32, content: &[u8]) -> bool {
        let checksum = crc32c(crc32c(self.seed, &sequence.to_be_bytes()), content);
        match self.checksums {
            Checksums::V3 => tag.checksum == checksum,
            Checksums::V2 => tag.checksum == checksum & 0xffff,
            Checksums::None | Checksums::Commit => true,
        }
    }

    /// Whether the checksum at the end of a descriptor or revoke block is right.
    pub(super) fn has_valid_tail(self, block: &[u8]) -> bool {
        if self.tail_len() == 0 {
            return true;
        }
        let Some((front, tail)) = block.split_last_chunk::<TAIL_LEN>() else { return false };
        crc32c(crc32c(self.seed, front), &[0; TAIL_LEN]) == u32::from_be_bytes(*tail)
    }

    /// The blocks that a revoke block lists, or `None` if it claims more than fit.
    pub(super) fn revoked(self, block: &[u8]) -> Option<Vec<BlockNr>> {
        let (count, _) = U32::read_from_prefix(block.get(HEADER_LEN..)?).ok()?;
        let count = usize::try_from(count.get()).ok()?;
        if count > block.len() - self.tail_len() {
            return None;
        }
        let records = block.get(REVOKE_HEADER_LEN..count)?;
        Some(if self.wide {
            let wide = |record: &[u8; 8]| BlockNr(u64::from_be_bytes(*record));
            records.as_chunks().0.iter().map(wide).collect()
        } else {
            let narrow = |record: &[u8; 4]| BlockNr(u32::from_be_bytes(*record).into());
            records.as_chunks().0.iter().map(narrow).collect()
        })
    }

    /// Whether a commit block is what was written; `transaction` is the sum over the blocks of its transaction.
    pub(super) fn is_valid_commit(self, block: &[u8], transaction: CommitSum) -> bool {
        const CRC32: u8 = 1;
        let Some(stored) = block.get(COMMIT_CHECKSUM).and_then(|bytes| bytes.first_chunk()) else { return false };
        let stored = u32::from_be_bytes(*stored);
        match self.checksums {
            Checksums::None => true,
            Checksums::Commit => {
                let kind = block.get(HEADER_LEN..HEADER_LEN + 2);
                // A commit block without a sum comes from a kernel that was not told to write one.
                kind == Some(&[CRC32, 4]) && stored == transaction.0 || kind == Some(&[0, 0]) && stored == 0
            }
            Checksums::V2 | Checksums::V3 => {
                let front = crc32c(self.seed, &block[..COMMIT_CHECKSUM.start]);
                crc32c(crc32c(front, &[0; 4]), &block[COMMIT_CHECKSUM.end..]) == stored
            }
        }
    }

    /// Whether commit blocks hold a sum over all blocks of their transaction.
    pub(super) fn sums_transactions(self) -> bool {
        self.checksums == Checksums::Commit
    }
}

/// When a transaction was committed, in seconds since 1970.
pub(super) fn commit_time(block: &[u8]) -> u64 {
    block.get(COMMIT_SECONDS..).and_then(|bytes| U64::read_from_prefix(bytes).ok()).map_or(0, |(time, _)| time.get())
}

/// The sum over a transaction's descriptors and logged blocks: CRC-32 with the most significant bit first.
#[derive(Clone, Copy, Debug)]
pub(super) struct CommitSum(u32);

impl CommitSum {
    pub(super) const START: Self = Self(!0);

    pub(super) fn with(self, bytes: &[u8]) -> Self {
        Self(bytes.iter().fold(self.0, |crc, &byte| {
            (0..8).fold(
                crc ^ u32::from(byte) << 24,
                |crc, _| {
                    if crc >> 31 == 0 { crc << 1 } else { crc << 1 ^ 0x04c1_1db7 }
                },
            )
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::CommitSum;

    #[test]
    fn commit_sums_are_crc32_mpeg2() {
        assert_eq!(CommitSum::START.with(b"123456789").0, 0x0376_e6e7);
    }
}
