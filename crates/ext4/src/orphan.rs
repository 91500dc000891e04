//! Inodes that a crash left without names or half truncated: the list that starts in the superblock, and the orphan file
//! (kernel documentation, "Orphan file").

use std::collections::BTreeSet;

use crate::checksum::{self, Seed};
use crate::error::{Error, Place, Result};
use crate::inode::Inode;
use crate::map::Target;
use crate::metadata::FileType;
use crate::{BlockNr, Editor, Ino};

const TAIL_MAGIC: [u8; 4] = 0x0b10_ca04_u32.to_le_bytes();
const TAIL_LEN: usize = 8;
const ENTRY_LEN: usize = 4;

/// A block of the orphan file without entries, by that file's checksum seed.
pub(crate) fn empty_block(place: BlockNr, block_len: usize, seed: Option<Seed>) -> Vec<u8> {
    let mut block = vec![0; block_len];
    let (entries, tail) = block.split_at_mut(block_len - TAIL_LEN);
    tail[..4].copy_from_slice(&TAIL_MAGIC);
    let sum = seed.map_or(0, |seed| checksum::orphan_block(seed, place, entries));
    tail[4..].copy_from_slice(&sum.to_le_bytes());
    block
}

/// A block of the orphan file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OrphanBlock<'a> {
    entries: &'a [u8],
}

impl<'a> OrphanBlock<'a> {
    /// Checks a block that lies at `place`; `seed` is the file's.
    pub(crate) fn parse(bytes: &'a [u8], place: BlockNr, seed: Option<Seed>) -> Result<Self, &'static str> {
        let (entries, tail) = bytes.split_at(bytes.len() - TAIL_LEN);
        if tail[..4] != TAIL_MAGIC {
            return Err("a block of the orphan file has no tail");
        }
        if seed.is_some_and(|seed| checksum::orphan_block(seed, place, entries).to_le_bytes() != tail[4..]) {
            return Err("the checksum of a block of the orphan file is wrong");
        }
        Ok(Self { entries })
    }

    /// The inodes that it names.
    pub(crate) fn orphans(self) -> impl Iterator<Item = Ino> {
        self.entries.as_chunks::<ENTRY_LEN>().0.iter().filter_map(|&entry| Ino::new(u32::from_le_bytes(entry)))
    }
}

impl Editor {
    /// Frees or truncates all of them.
    pub(crate) fn process_orphans(&mut self) -> Result<()> {
        self.process_orphan_list()?;
        self.process_orphan_file()
    }

    fn process_orphan_list(&mut self) -> Result<()> {
        let Some(first) = self.fs().superblock.last_orphan() else { return Ok(()) };
        let mut seen = BTreeSet::new();
        let mut next = Some(first);
        while let Some(ino) = next {
            if !seen.insert(ino) {
                return Err(Error::corrupt(Place::Inode(ino), "the list of orphan inodes goes round in circles"));
            }
            let inode = self.fs().inode(ino)?;
            next = Ino::new(inode.dtime());
            self.process_orphan(inode)?;
        }
        self.modify_superblock(|superblock| superblock.clear_last_orphan());
        Ok(())
    }

    fn process_orphan_file(&mut self) -> Result<()> {
        let Some(ino) = self.fs().superblock.present_orphan_file() else { return Ok(()) };
        let file = self.fs().inode(ino)?;
        for logical in 0..file.size() / u64::from(self.fs().block_size()) {
            match self.fs().segment(&file, logical)?.target {
                Target::Data(place) => self.process_orphan_block(&file, place)?,
                Target::Hole | Target::Unwritten => {
                    return Err(Error::corrupt(Place::Inode(ino), "the orphan file has a hole"));
                }
            }
        }
        self.modify_superblock(|superblock| superblock.clear_orphan_present());
        Ok(())
    }

    fn process_orphan_block(&mut self, file: &Inode, place: BlockNr) -> Result<()> {
        let bytes = self.fs().block(place)?;
        let seed = self.fs().checksum_seed().map(|seed| file.seed(seed));
        let block =
            OrphanBlock::parse(&bytes, place, seed).map_err(|problem| Error::corrupt(Place::Block(place), problem))?;
        let orphans: Vec<Ino> = block.orphans().collect();
        if orphans.is_empty() {
            return Ok(());
        }
        for ino in orphans {
            let inode = self.fs().inode(ino)?;
            self.process_orphan(inode)?;
        }
        self.put_metadata(place, empty_block(place, bytes.len(), seed));
        Ok(())
    }

    fn process_orphan(&mut self, mut inode: Inode) -> Result<()> {
        if inode.ino().get() < self.fs().geometry().first_ino || inode.mode() == 0 {
            return Err(Error::corrupt(
                Place::Inode(inode.ino()),
                "the inode cannot be an orphan, but is marked as one",
            ));
        }
        if inode.links() == 0 {
            return self.free_inode(&mut inode);
        }
        inode.set_dtime(0);
        if inode.is(FileType::Regular) {
            let size = inode.size();
            self.set_content_size(&mut inode, size)?;
        }
        self.put_inode(&mut inode)
    }
}
