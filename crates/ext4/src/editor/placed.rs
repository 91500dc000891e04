//! Content that its owner writes itself: where in the device it goes.

use std::ops::Range;

use super::Editor;
use crate::Ino;
use crate::error::{Error, Result};
use crate::map::FileMap;

/// Where a run of a file's bytes lies on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedRun {
    /// Byte offset in the file.
    pub file_offset: u64,
    /// Byte offset on the device.
    pub device_offset: u64,
    /// Bytes, in whole blocks: past the file's end they must be zero.
    pub len: u64,
}

impl Editor {
    /// Gives an empty regular file its size and blocks for `data`, ranges of bytes in order; all else stays a hole. The caller
    /// writes every byte of the runs that this gives back, zeroes included, and may do so on another thread, before the
    /// [`commit`](Self::commit). Times stay as they are.
    ///
    /// # Errors
    /// [`Error::NoSpace`] if blocks are wanting, and then the file is still empty.
    pub fn place_content(&mut self, ino: Ino, size: u64, data: &[Range<u64>]) -> Result<Vec<PlacedRun>> {
        let mut inode = self.writable_file(ino)?;
        if inode.size() != 0 {
            return Err(Error::NotPermitted { ino, reason: "its content can be placed only while it is empty" });
        }
        self.check_size(ino, size)?;
        let block_size = u64::from(self.fs.block_size());
        let mut open = self.open_map(&inode)?;
        let mut taken = Vec::new();
        let placed = whole_blocks(data, size, block_size).into_iter().try_for_each(|blocks| {
            taken.extend(self.fill_hole(ino, &mut open.map, blocks.start, blocks.end - blocks.start)?);
            Ok(())
        });
        let runs = runs_of(&open.map, block_size);
        if let Err(error) = placed.and_then(|()| self.store_map(&mut inode, open)) {
            self.free_all(taken)?;
            return Err(error);
        }
        self.set_size(&mut inode, size);
        self.put_inode(&mut inode)?;
        Ok(runs)
    }
}

/// The blocks that ranges of bytes below `size` touch, in order and each once.
fn whole_blocks(data: &[Range<u64>], size: u64, block_size: u64) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::with_capacity(data.len());
    for range in data {
        let blocks = range.start / block_size..range.end.min(size).div_ceil(block_size);
        match all.last_mut() {
            Some(last) if blocks.start <= last.end => last.end = last.end.max(blocks.end),
            _ if blocks.start < blocks.end => all.push(blocks),
            _ => {}
        }
    }
    all
}

fn runs_of(map: &FileMap, block_size: u64) -> Vec<PlacedRun> {
    let placed = map.runs().iter().map(|run| PlacedRun {
        file_offset: run.logical * block_size,
        device_offset: run.start.0 * block_size,
        len: run.len * block_size,
    });
    placed.collect()
}
