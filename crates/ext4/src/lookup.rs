//! Directories of the file system: their blocks, their entries, names looked up.

use crate::dir::{DirBlocks, DirFormat, Directory, Entry};
use crate::error::{Error, Place, Result};
use crate::features::{compat, incompat};
use crate::file::refuse_encrypted;
use crate::inode::{FLAG_CASEFOLD, FLAG_INDEX, FLAG_INLINE_DATA, Inode};
use crate::map::Target;
use crate::metadata::FileType;
use crate::{BlockNr, Ext4, Ino};

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirEntry {
    /// Any bytes but a slash and zero.
    pub name: Vec<u8>,
    /// The inode that the name stands for.
    pub ino: Ino,
    /// What the inode is, where the directory says so.
    pub file_type: Option<FileType>,
}

/// The blocks of a directory's inode.
#[derive(Debug)]
pub(crate) struct InodeBlocks<'a> {
    fs: &'a Ext4,
    inode: &'a Inode,
}

/// The entries of a directory kept within its inode: two areas, each filled by its records as a block is.
#[derive(Debug)]
struct InlineAreas([Vec<u8>; 2]);

impl DirBlocks for InlineAreas {
    fn count(&self) -> u32 {
        if self.0[1].is_empty() { 1 } else { 2 }
    }

    fn read(&self, block: u32) -> Result<Vec<u8>> {
        Ok(self.0[usize::from(block != 0)].clone())
    }
}

impl DirBlocks for InodeBlocks<'_> {
    fn count(&self) -> u32 {
        self.fs.dir_block_count(self.inode)
    }

    fn read(&self, block: u32) -> Result<Vec<u8>> {
        let place = self.fs.dir_block_place(self.inode, block)?;
        Ok(self.fs.block(place)?.to_vec())
    }
}

impl Ext4 {
    /// The inode that a name in a directory stands for, if there is such an entry.
    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Option<Ino>> {
        let inode = self.directory_inode(dir)?;
        refuse_encrypted(&inode)?;
        let found = match self.inline_directory(&inode)? {
            Some(directory) => directory.lookup(name)?,
            None => self.directory(&inode).lookup(name)?,
        };
        let Some(found) = found else { return Ok(None) };
        self.entry_ino(dir, found.ino).map(Some)
    }

    /// All entries of a directory but `.` and `..`, in the order in which they are stored.
    pub fn read_dir(&self, dir: Ino) -> Result<Vec<DirEntry>> {
        let inode = self.directory_inode(dir)?;
        refuse_encrypted(&inode)?;
        let mut entries = Vec::new();
        let mut damaged = Ok(());
        let visit = |entry: &Entry<'_>| match self.entry_ino(dir, entry.ino) {
            Ok(ino) => entries.push(DirEntry {
                name: entry.name.to_vec(),
                ino,
                file_type: FileType::of_entry_code(entry.file_type),
            }),
            Err(error) => damaged = Err(error),
        };
        match self.inline_directory(&inode)? {
            Some(directory) => directory.for_each(visit)?,
            None => self.directory(&inode).for_each(visit)?,
        }
        damaged.map(|()| entries)
    }

    fn entry_ino(&self, dir: Ino, number: u32) -> Result<Ino> {
        Ino::new(number)
            .filter(|ino| ino.get() <= self.geometry().inodes)
            .ok_or_else(|| Error::corrupt(Place::Inode(dir), "a directory entry names an inode that cannot exist"))
    }

    pub(crate) fn directory_inode(&self, dir: Ino) -> Result<Inode> {
        let inode = self.inode_in_use(dir)?;
        if !inode.is(FileType::Directory) {
            return Err(Error::NotADirectory(dir));
        }
        // Extents that share blocks could make a small file system's directory endless.
        if u64::from(self.dir_block_count(&inode)) > self.geometry().blocks {
            return Err(Error::corrupt(Place::Inode(dir), "the directory is larger than the file system"));
        }
        Ok(inode)
    }

    /// A directory kept within its inode: the number of its parent, then entries without `.` and `..`.
    fn inline_directory(&self, inode: &Inode) -> Result<Option<Directory<InlineAreas>>> {
        const PARENT_LEN: usize = 4;
        if !inode.has(FLAG_INLINE_DATA) {
            return Ok(None);
        }
        let areas = InlineAreas([inode.map()[PARENT_LEN..].to_vec(), self.inline_tail(inode)?]);
        let format = DirFormat { seed: None, ..self.dir_format(inode) };
        Ok(Some(Directory::new(areas, format, false)))
    }

    pub(crate) fn directory<'a>(&'a self, inode: &'a Inode) -> Directory<InodeBlocks<'a>> {
        let blocks = InodeBlocks { fs: self, inode };
        let directory = Directory::new(blocks, self.dir_format(inode), inode.has(FLAG_INDEX));
        if inode.has(FLAG_CASEFOLD) { directory.unhashed() } else { directory }
    }

    pub(crate) fn dir_format(&self, inode: &Inode) -> DirFormat {
        let features = self.superblock.features();
        DirFormat {
            ino: inode.ino(),
            block_size: self.geometry().block_len(),
            seed: self.checksum_seed().map(|seed| inode.seed(seed)),
            file_types: features.has_incompat(incompat::FILETYPE),
            may_index: features.has_compat(compat::DIR_INDEX),
            large: features.has_incompat(incompat::LARGE_DIR),
            hash: self.superblock.hash_parameters(),
        }
    }

    pub(crate) fn dir_block_count(&self, inode: &Inode) -> u32 {
        u32::try_from(inode.size() / u64::from(self.geometry().block_size)).unwrap_or(u32::MAX)
    }

    /// Where a directory's block lies.
    pub(crate) fn dir_block_place(&self, inode: &Inode, block: u32) -> Result<BlockNr> {
        match self.segment(inode, block.into())?.target {
            Target::Data(place) => Ok(place),
            Target::Hole | Target::Unwritten => {
                Err(Error::corrupt(Place::Directory(inode.ino(), block), "the directory has a hole"))
            }
        }
    }
}
