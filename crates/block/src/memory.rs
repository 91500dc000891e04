use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::{BlockRead, BlockWrite, Extent, ExtentKind, HostStorage, checked_range};

const CHUNK_LEN: usize = 4096;
const CHUNK: u64 = CHUNK_LEN as u64;

type Chunk = Box<[u8; CHUNK_LEN]>;

#[derive(Debug, Default)]
struct Content {
    size: u64,
    chunks: BTreeMap<u64, Chunk>,
}

/// A sparse device in memory; as [`HostStorage`] it grows when written past its end.
#[derive(Debug, Default)]
pub struct MemoryDisk {
    content: RwLock<Content>,
}

impl MemoryDisk {
    /// A device of `size` zero bytes. Memory is used only for what is written.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { content: RwLock::new(Content { size, chunks: BTreeMap::new() }) }
    }

    fn read(&self) -> RwLockReadGuard<'_, Content> {
        self.content.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Content> {
        self.content.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Splits a byte range at chunk borders: (chunk index, range within the chunk, range within the whole).
fn pieces(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let origin = range.start;
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let index = at / CHUNK;
        let end = range.end.min((index + 1) * CHUNK);
        let piece = (index, small(at % CHUNK)..small(end - index * CHUNK), small(at - origin)..small(end - origin));
        at = end;
        Some(piece)
    })
}

#[expect(clippy::cast_possible_truncation, reason = "offsets within a chunk or within a buffer in memory")]
fn small(value: u64) -> usize {
    value as usize
}

impl BlockRead for MemoryDisk {
    fn size(&self) -> u64 {
        self.read().size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.read();
        for (index, inner, outer) in pieces(checked_range(offset, buf.len(), content.size)?) {
            match content.chunks.get(&index) {
                Some(chunk) => buf[outer].copy_from_slice(&chunk[inner]),
                None => buf[outer].fill(0),
            }
        }
        Ok(())
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        let content = self.read();
        let first = range.start / CHUNK;
        let stored = content.chunks.contains_key(&first);
        let run_end = if stored {
            let mut next = first;
            while next * CHUNK < range.end && content.chunks.contains_key(&next) {
                next += 1;
            }
            next * CHUNK
        } else {
            content.chunks.range(first..).next().map_or(range.end, |(index, _)| index * CHUNK)
        };
        let kind = if stored { ExtentKind::Data } else { ExtentKind::Zero };
        Ok(Extent { range: range.start..run_end.min(range.end), kind })
    }
}

impl BlockWrite for MemoryDisk {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut content = self.write();
        let range = checked_range(offset, buf.len(), u64::MAX)?;
        content.size = content.size.max(range.end);
        for (index, inner, outer) in pieces(range) {
            let chunk = content.chunks.entry(index).or_insert_with(|| Box::new([0; CHUNK_LEN]));
            chunk[inner].copy_from_slice(&buf[outer]);
        }
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let mut content = self.write();
        let end = range.end.min(content.size);
        if range.start >= end {
            return Ok(());
        }
        // The range may be far longer than what is stored.
        let stored: Vec<u64> =
            content.chunks.range(range.start / CHUNK..=(end - 1) / CHUNK).map(|(&index, _)| index).collect();
        for index in stored {
            let start = index * CHUNK;
            let inner = small(range.start.saturating_sub(start))..small((end - start).min(CHUNK));
            if inner.len() == CHUNK_LEN {
                content.chunks.remove(&index);
            } else if let Some(chunk) = content.chunks.get_mut(&index) {
                chunk[inner].fill(0);
            }
        }
        Ok(())
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.zero(range)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

impl HostStorage for MemoryDisk {
    fn set_size(&self, size: u64) -> io::Result<()> {
        let old = self.size();
        if size < old {
            self.zero(size..old)?;
        }
        self.write().size = size;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_is_written_and_frees_what_is_zeroed() {
        let disk = MemoryDisk::new(10_000);
        disk.write_at(b"abc", 4095).unwrap();
        let mut buf = [9; 5];
        disk.read_at(&mut buf, 4094).unwrap();
        assert_eq!(&buf, b"\0abc\0");
        assert_eq!(disk.extent(0..10_000).unwrap(), Extent { range: 0..8192, kind: ExtentKind::Data });
        assert_eq!(disk.extent(8192..10_000).unwrap(), Extent { range: 8192..10_000, kind: ExtentKind::Zero });
        disk.zero(0..8192).unwrap();
        assert_eq!(disk.extent(1..10_000).unwrap(), Extent { range: 1..10_000, kind: ExtentKind::Zero });
        assert!(disk.read_at(&mut buf, 9_999).is_err());
        disk.set_size(1 << 60).unwrap();
        disk.set_size(10_000).unwrap();
        disk.write_at(b"x", 20_000).unwrap();
        disk.set_size(4).unwrap();
        disk.set_size(20_001).unwrap();
        disk.read_at(&mut buf[..1], 20_000).unwrap();
        assert_eq!(buf[0], 0);
    }
}
