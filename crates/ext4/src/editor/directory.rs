//! Directories' blocks, changed.

use super::Editor;
use crate::BlockNr;
use crate::dir::{DirBlocks, DirBlocksMut, Directory};
use crate::error::Result;
use crate::inode::{FLAG_INDEX, Inode};

/// The blocks of a directory's inode, which grows with them; whoever lends it stores it.
#[derive(Debug)]
pub(crate) struct EditedBlocks<'a> {
    editor: &'a mut Editor,
    inode: &'a mut Inode,
}

impl DirBlocks for EditedBlocks<'_> {
    fn count(&self) -> u32 {
        self.editor.fs.dir_block_count(self.inode)
    }

    fn read(&self, block: u32) -> Result<Vec<u8>> {
        let place = self.editor.fs.dir_block_place(self.inode, block)?;
        Ok(self.editor.fs.block(place)?.to_vec())
    }
}

impl DirBlocksMut for EditedBlocks<'_> {
    fn write(&mut self, block: u32, bytes: Vec<u8>) -> Result<()> {
        let place = self.editor.fs.dir_block_place(self.inode, block)?;
        self.editor.fs.cache.put(place, bytes);
        Ok(())
    }

    fn append(&mut self, bytes: Vec<u8>) -> Result<u32> {
        let block = self.count();
        let place = self.editor.append_block(self.inode)?;
        self.editor.fs.cache.put(place, bytes);
        Ok(block)
    }
}

impl Editor {
    /// A directory to change. Whether it has an index afterwards, and its size, go into `inode` by the caller.
    pub(crate) fn edit_directory<'a>(&'a mut self, inode: &'a mut Inode) -> Directory<EditedBlocks<'a>> {
        let format = self.fs.dir_format(inode);
        let indexed = inode.has(FLAG_INDEX);
        Directory::new(EditedBlocks { editor: self, inode }, format, indexed)
    }

    /// Adds a block at the end of a directory. The caller stores the inode and writes the block.
    pub(crate) fn append_block(&mut self, inode: &mut Inode) -> Result<BlockNr> {
        let block_size = u64::from(self.fs.block_size());
        let logical = inode.size() / block_size;
        let mut open = self.open_map(inode)?;
        let taken = self.fill_hole(inode.ino(), &mut open.map, logical, 1)?;
        if let Err(error) = self.store_map(inode, open) {
            self.free_all(taken)?;
            return Err(error);
        }
        inode.set_size((logical + 1) * block_size);
        self.fs.dir_block_place(inode, u32::try_from(logical).unwrap_or(u32::MAX))
    }
}
