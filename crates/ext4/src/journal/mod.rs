//! The journal, played to its end as the kernel and e2fsck do it. Nothing here writes to a journal's log.

mod block;
mod log;
mod superblock;

use std::collections::BTreeMap;

use qtk_block::BlockWrite;

use crate::cache;
use crate::error::{Error, Place, Result};
use crate::map::{FileMap, Target};
use crate::{BlockNr, Ext4};
use block::Format;
use log::Log;
use superblock::JournalSuperblock;
pub(crate) use superblock::fresh as fresh_superblock;

/// What is to be done once everything that was replayed is on the device.
#[derive(Debug)]
pub(crate) struct Replayed {
    /// Where the journal's superblock lies.
    pub(crate) superblock: BlockNr,
    /// The bytes that say the log is empty, for the front of that block.
    pub(crate) emptied: [u8; superblock::LEN],
    /// Whether the kernel had given up on the journal after an error.
    pub(crate) aborted: bool,
}

/// A journal within the file system.
pub(crate) struct Journal<'a> {
    fs: &'a Ext4,
    /// Read before anything is replayed, which may overwrite the journal's inode.
    map: FileMap,
    superblock: JournalSuperblock,
}

impl<'a> Journal<'a> {
    pub(crate) fn open(fs: &'a Ext4) -> Result<Self> {
        let ino = fs.superblock.journal().ok_or_else(|| Error::unsupported("an external journal"))?;
        let inode = fs.inode_in_use(ino)?;
        let map = FileMap::load(fs, &inode)?;
        let blocks = map.end();
        let geometry = fs.geometry();
        let mut bytes = vec![0; geometry.block_len()];
        read(fs, &map, 0, &mut bytes)?;
        let superblock = JournalSuperblock::parse(&bytes, geometry.block_size, blocks)?;
        Ok(Self { fs, map, superblock })
    }

    /// Whether there is nothing to replay.
    pub(crate) fn is_empty(&self) -> bool {
        self.superblock.start().is_none()
    }

    /// Whether the kernel gave up on the journal after an error.
    pub(crate) fn is_aborted(&self) -> bool {
        self.superblock.is_aborted()
    }

    /// Whether it says that file systems share it.
    pub(crate) fn has_several_users(&self) -> bool {
        self.superblock.users() > 1
    }

    /// Whether it claims checksums both of blocks and of whole transactions.
    pub(crate) fn has_two_kinds_of_checksums(&self) -> bool {
        self.superblock.is_checksummed() && self.superblock.sums_transactions()
    }

    /// How many blocks its file has.
    pub(crate) fn blocks(&self) -> u64 {
        self.map.end()
    }

    /// Whether every block of its file is there.
    pub(crate) fn is_whole(&self) -> bool {
        self.map.data_blocks() == self.map.end()
    }

    /// Copies every committed block to its place on `target`, which is the file system's device or lies over it.
    pub(crate) fn replay(self, target: &dyn BlockWrite) -> Result<Replayed> {
        let next = match self.superblock.start() {
            Some(start) => self.replay_log(start, target)?,
            None => self.superblock.sequence(),
        };
        Ok(Replayed {
            superblock: place(&self.map, 0)?,
            aborted: self.superblock.is_aborted(),
            emptied: self.superblock.emptied(next.wrapping_add(1)),
        })
    }

    /// Gives the number of the first transaction that was not committed.
    fn replay_log(&self, start: u32, target: &dyn BlockWrite) -> Result<u32> {
        let log = Log::new(self, start);
        let end = log.find_end()?;
        self.refuse_fast_commits(end)?;
        let revoked = log.revoked(end)?;
        let logged = log.logged(end, &revoked)?;
        self.write_logged(&logged, target)?;
        Ok(end)
    }

    fn write_logged(&self, logged: &BTreeMap<BlockNr, log::Logged>, target: &dyn BlockWrite) -> Result<()> {
        let format = self.format();
        let mut content = vec![0; self.fs.geometry().block_len()];
        for (&block, logged) in logged {
            self.read(logged.at, &mut content)?;
            if !format.is_intact(&logged.tag, logged.sequence, &content) {
                return Err(Error::corrupt(Place::Journal(logged.at), "the checksum of a logged block is wrong"));
            }
            if block.0 >= self.fs.geometry().blocks {
                return Err(Error::corrupt(Place::Journal(logged.at), "a logged block lies outside the file system"));
            }
            if logged.tag.escaped {
                content[..4].copy_from_slice(&superblock::MAGIC.to_be_bytes());
            }
            cache::write(target, &content, self.fs.geometry().offset(block))?;
        }
        Ok(())
    }

    fn refuse_fast_commits(&self, end: u32) -> Result<()> {
        const HEAD_TAG: u16 = 9;
        if self.superblock.fast_commit_blocks() == 0 {
            return Ok(());
        }
        let mut block = vec![0; self.fs.geometry().block_len()];
        self.read(self.superblock.log_end(), &mut block)?;
        // Tag and length, 16 bits each; features; the transaction that the commits belong to. All little-endian.
        let tag = u16::from_le_bytes([block[0], block[1]]);
        let transaction = u32::from_le_bytes([block[8], block[9], block[10], block[11]]);
        if tag == HEAD_TAG && transaction == end {
            return Err(Error::unsupported("a journal with fast commits to replay (fast_commit)"));
        }
        Ok(())
    }

    fn format(&self) -> Format {
        Format::of(&self.superblock)
    }

    /// Reads a block of the journal.
    fn read(&self, at: u32, block: &mut [u8]) -> Result<()> {
        read(self.fs, &self.map, at, block)
    }
}

fn place(map: &FileMap, at: u32) -> Result<BlockNr> {
    match map.find(at.into()).target {
        Target::Data(block) => Ok(block),
        Target::Hole | Target::Unwritten => Err(Error::corrupt(Place::Journal(at), "the journal has a hole")),
    }
}

fn read(fs: &Ext4, map: &FileMap, at: u32, block: &mut [u8]) -> Result<()> {
    fs.read_device(block, fs.geometry().offset(place(map, at)?))
}
