//! Writing, growing and cutting the content of files.

use std::ops::Range;

use super::Editor;
use crate::cache;
use crate::error::{Error, Result};
use crate::inode::{FLAG_APPEND, FLAG_IMMUTABLE, Inode, Time};
use crate::map::{FileMap, Target};
use crate::metadata::FileType;
use crate::superblock::Superblock;
use crate::{Ino, block_map, extent};

/// Files above this size need the feature `large_file`.
pub(crate) const LARGE: u64 = (1 << 31) - 1;

impl Editor {
    /// Writes to a regular file at a byte offset. The file grows as needed; between its old end and `offset` it reads as zeroes.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if blocks are wanting, and then nothing has been written.
    pub fn write_at(&mut self, ino: Ino, data: &[u8], offset: u64) -> Result<()> {
        let mut inode = self.writable_file(ino)?;
        if data.is_empty() {
            return Ok(());
        }
        let end = offset.checked_add(data.len() as u64).ok_or(Error::FileTooLarge(ino))?;
        self.check_size(ino, end)?;
        self.write_content(&mut inode, data, offset)?;
        self.touch_content(&mut inode)
    }

    /// Sets blocks aside for a file that will be written up to `size` bytes, in as few runs as can be had. What is not
    /// used goes back at the next commit.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if there is not enough for all of it.
    pub fn reserve(&mut self, ino: Ino, size: u64) -> Result<()> {
        let inode = self.writable_file(ino)?;
        self.check_size(ino, size)?;
        self.reserve_blocks(&inode, self.fs.geometry().blocks_for(size))
    }

    /// Sets a regular file's size. What is cut off is freed; what is added reads as zeroes and takes no space.
    pub fn truncate(&mut self, ino: Ino, size: u64) -> Result<()> {
        let mut inode = self.writable_file(ino)?;
        self.check_size(ino, size)?;
        self.set_content_size(&mut inode, size)?;
        self.touch_content(&mut inode)
    }

    fn touch_content(&mut self, inode: &mut Inode) -> Result<()> {
        inode.set_time(Time::Modification, self.now());
        inode.set_time(Time::Change, self.now());
        self.put_inode(inode)
    }

    pub(super) fn writable_file(&self, ino: Ino) -> Result<Inode> {
        let inode = self.fs.regular_file(ino)?;
        if inode.has(FLAG_IMMUTABLE | FLAG_APPEND) {
            let reason = "the file must not be changed (chattr +i or +a)";
            return Err(Error::NotPermitted { ino, reason });
        }
        Ok(inode)
    }

    pub(super) fn check_size(&self, ino: Ino, size: u64) -> Result<()> {
        let geometry = self.fs.geometry();
        let reach = if self.uses_extents() { extent::END } else { block_map::end(geometry.block_len()) };
        if geometry.blocks_for(size) > reach.min(extent::END) { Err(Error::FileTooLarge(ino)) } else { Ok(()) }
    }

    /// Writes content of any inode with blocks, and sets its size. The caller stores the inode.
    pub(crate) fn write_content(&mut self, inode: &mut Inode, data: &[u8], offset: u64) -> Result<()> {
        let block_size = u64::from(self.fs.block_size());
        let end = offset + data.len() as u64;
        let blocks = offset / block_size..end.div_ceil(block_size);
        let mut open = self.open_map(inode)?;
        let fresh = Fresh::find(&open.map, &blocks);
        let mut taken = Vec::new();
        let filled = fresh.holes.iter().try_for_each(|hole| {
            taken.extend(self.fill_hole(inode.ino(), &mut open.map, hole.start, hole.end - hole.start)?);
            Ok(())
        });
        open.map.mark_written(blocks);
        let map = open.map.clone();
        if let Err(error) = filled.and_then(|()| self.store_map(inode, open)) {
            self.free_all(taken)?;
            return Err(error);
        }
        if offset > inode.size() {
            self.zero_tail(&map, inode.size(), offset)?;
        }
        let from = if fresh.first { offset - offset % block_size } else { offset };
        let beyond = fresh.last || end > inode.size();
        let to = if beyond { end.next_multiple_of(block_size) } else { end };
        self.write_padded(&map, data, offset, from..to)?;
        if end > inode.size() {
            self.set_size(inode, end);
        }
        Ok(())
    }

    /// Writes the bytes `range` of a file: `data` at `offset`, zeroes before and after it.
    fn write_padded(&self, map: &FileMap, data: &[u8], offset: u64, range: Range<u64>) -> Result<()> {
        let block_size = u64::from(self.fs.block_size());
        let end = offset + data.len() as u64;
        let mut at = range.start;
        while at < range.end {
            let segment = map.find(at / block_size);
            let Target::Data(start) = segment.target else { return Ok(()) };
            let place = self.fs.geometry().offset(start) + at % block_size;
            let block_end = (at / block_size + 1) * block_size;
            let in_segment = (segment.logical + segment.len) * block_size;
            // A block with zeroes in it is put together; all others go out as they are, in one piece.
            let whole = in_segment.min(end - end % block_size);
            if at >= offset && at < whole {
                cache::write(&*self.device, &data[within(at, offset)..within(whole, offset)], place)?;
                at = whole;
                continue;
            }
            let stop = block_end.min(range.end);
            let mut block = vec![0; within(stop, at)];
            let (from, to) = (at.max(offset), stop.min(end));
            block[within(from, at)..within(to, at)].copy_from_slice(&data[within(from, offset)..within(to, offset)]);
            cache::write(&*self.device, &block, place)?;
            at = stop;
        }
        Ok(())
    }

    /// Zeroes what lies behind byte `size` in its block, up to byte `limit`.
    fn zero_tail(&self, map: &FileMap, size: u64, limit: u64) -> Result<()> {
        let block_size = u64::from(self.fs.block_size());
        let end = size.next_multiple_of(block_size).min(limit);
        match map.find(size / block_size).target {
            Target::Data(start) if size < end => {
                let place = self.fs.geometry().offset(start) + size % block_size;
                cache::write(&*self.device, &vec![0; within(end, size)], place)
            }
            _ => Ok(()),
        }
    }

    /// Sets the size of any inode with blocks, freeing what lies past it. The caller stores the inode.
    pub(crate) fn set_content_size(&mut self, inode: &mut Inode, size: u64) -> Result<()> {
        self.release_reservation(inode.ino())?;
        let is_dir = inode.is(FileType::Directory);
        // Where nothing is cut off, this still brings the map into the form that reaches this far.
        self.cut_map(inode, self.fs.geometry().blocks_for(size), is_dir)?;
        if !is_dir {
            let map = FileMap::load(&self.fs, inode)?;
            self.zero_tail(&map, size.min(inode.size()), u64::MAX)?;
        }
        self.set_size(inode, size);
        Ok(())
    }

    /// Frees all blocks of an inode that has some.
    pub(crate) fn free_content(&mut self, inode: &mut Inode) -> Result<()> {
        let is_dir = inode.is(FileType::Directory);
        self.cut_map(inode, 0, is_dir)?;
        inode.set_size(0);
        Ok(())
    }

    pub(super) fn set_size(&mut self, inode: &mut Inode, size: u64) {
        inode.set_size(size);
        if size > LARGE {
            self.modify_superblock(Superblock::set_large_file);
        }
    }
}

/// The blocks about to be written that hold nothing yet.
struct Fresh {
    holes: Vec<Range<u64>>,
    /// Whether the first and the last block are among them, or were never written.
    first: bool,
    last: bool,
}

impl Fresh {
    fn find(map: &FileMap, blocks: &Range<u64>) -> Self {
        let mut holes = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end {
            let segment = map.find(at);
            let end = (at + segment.len).min(blocks.end);
            if segment.target == Target::Hole {
                holes.push(at..end);
            }
            at = end;
        }
        let is_fresh = |block| !matches!(map.find(block).target, Target::Data(_));
        Self { holes, first: is_fresh(blocks.start), last: is_fresh(blocks.end - 1) }
    }
}

/// The distance of two places in a buffer.
fn within(at: u64, origin: u64) -> usize {
    usize::try_from(at.saturating_sub(origin)).unwrap_or(usize::MAX)
}
