//! Content of regular files and symbolic links, read.

use std::ops::Range;

use crate::error::{Error, Place, Result};
use crate::inode::{FLAG_ENCRYPT, FLAG_EXTENTS, FLAG_INLINE_DATA, Inode, MAP_LEN};
use crate::map::{Segment, Target};
use crate::metadata::FileType;
use crate::{Ext4, Ino, block_map, extent};

impl Ext4 {
    /// Reads from a regular file at a byte offset. Gives the number of bytes read, which is short only at the file's end;
    /// holes read as zeroes.
    pub fn read_at(&self, ino: Ino, buf: &mut [u8], offset: u64) -> Result<usize> {
        let inode = self.regular_file(ino)?;
        self.read_content(&inode, buf, offset)
    }

    /// The next range of bytes at or after `offset` that holds data, or `None` if zeroes follow up to the file's end.
    pub fn data_range(&self, ino: Ino, offset: u64) -> Result<Option<Range<u64>>> {
        let inode = self.regular_file(ino)?;
        let size = inode.size();
        if inode.has(FLAG_INLINE_DATA) {
            return Ok((offset < size).then_some(offset..size));
        }
        let block_size = u64::from(self.geometry().block_size);
        let mut found: Option<Range<u64>> = None;
        let mut at = offset;
        while at < size {
            let segment = self.segment(&inode, at / block_size)?;
            let end = (segment.logical + segment.len).saturating_mul(block_size).min(size);
            match (&mut found, segment.target) {
                (Some(range), Target::Data(_)) => range.end = end,
                (None, Target::Data(_)) => found = Some(at..end),
                (Some(_), _) => break,
                (None, _) => {}
            }
            at = end;
        }
        Ok(found)
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        let inode = self.inode_in_use(ino)?;
        if !inode.is(FileType::Symlink) {
            return Err(Error::NotASymlink(ino));
        }
        refuse_encrypted(&inode)?;
        let size = inode.size();
        if size >= self.geometry().block_size.into() {
            return Err(Error::corrupt(Place::Inode(ino), "a symbolic link is longer than a block"));
        }
        let mut target = vec![0; usize::try_from(size).unwrap_or(0)];
        if self.is_fast_symlink(&inode) {
            let len = target.len().min(MAP_LEN);
            target[..len].copy_from_slice(&inode.map()[..len]);
        } else {
            self.read_content(&inode, &mut target, 0)?;
        }
        Ok(target)
    }

    /// Whether a link's target lies in the inode itself.
    pub(crate) fn is_fast_symlink(&self, inode: &Inode) -> bool {
        inode.size() < MAP_LEN as u64 && !inode.has(FLAG_EXTENTS | FLAG_INLINE_DATA) && {
            let attributes = if inode.xattr_block().is_some() { self.geometry().block_size.into() } else { 0 };
            self.allocated(inode) <= attributes
        }
    }

    pub(crate) fn regular_file(&self, ino: Ino) -> Result<Inode> {
        let inode = self.inode_in_use(ino)?;
        match inode.file_type()? {
            FileType::Regular => {}
            FileType::Directory => return Err(Error::IsADirectory(ino)),
            _ => return Err(Error::NotAFile(ino)),
        }
        refuse_encrypted(&inode)?;
        if self.geometry().blocks_for(inode.size()) > extent::END {
            return Err(Error::corrupt(Place::Inode(ino), "the size is larger than any file's"));
        }
        Ok(inode)
    }

    /// What block `logical` of a file or directory is, and how many blocks after it are the same.
    pub(crate) fn segment(&self, inode: &Inode, logical: u64) -> Result<Segment> {
        if inode.has(FLAG_EXTENTS) { extent::find(self, inode, logical) } else { block_map::find(self, inode, logical) }
    }

    /// Reads the content of anything that has blocks. Only directories may have their blocks in the cache.
    pub(crate) fn read_content(&self, inode: &Inode, buf: &mut [u8], offset: u64) -> Result<usize> {
        let left = inode.size().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let mut buf = &mut buf[..len];
        if inode.has(FLAG_INLINE_DATA) {
            self.read_inline(inode, buf, offset)?;
            return Ok(len);
        }
        let block_size = u64::from(self.geometry().block_size);
        let mut at = offset;
        while !buf.is_empty() {
            let segment = self.segment(inode, at / block_size)?;
            let end = (segment.logical + segment.len).saturating_mul(block_size);
            let piece = usize::try_from(end - at).unwrap_or(usize::MAX).min(buf.len());
            let (now, later) = buf.split_at_mut(piece);
            match segment.target {
                Target::Data(start) => {
                    self.read_device(now, self.geometry().offset(start) + at % block_size)?;
                }
                Target::Hole | Target::Unwritten => now.fill(0),
            }
            at += piece as u64;
            buf = later;
        }
        Ok(len)
    }

    /// Content within the inode: the first 60 bytes in place of the block map, the rest as an attribute.
    fn read_inline(&self, inode: &Inode, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut content = inode.map().to_vec();
        content.extend(self.inline_tail(inode)?);
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let len = buf.len().min(content.len() - from);
        buf[..len].copy_from_slice(&content[from..from + len]);
        buf[len..].fill(0);
        Ok(())
    }
}

/// Refuses an inode whose content, or names if it is a directory, only a key would show.
pub(crate) fn refuse_encrypted(inode: &Inode) -> Result<()> {
    if inode.has(FLAG_ENCRYPT) {
        return Err(Error::unsupported(format!("the encryption of inode {}", inode.ino())));
    }
    Ok(())
}
