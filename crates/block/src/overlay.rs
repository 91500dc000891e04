use std::io;
use std::ops::Range;
use std::sync::{PoisonError, RwLock};

use std::collections::BTreeMap;

use crate::{BlockRead, BlockWrite, Extent, ExtentKind, checked_range};

const CHUNK: usize = 4096;

/// Writes held in memory over a device that stays untouched.
///
/// What a reader needs to look at a file system whose journal must be replayed first, without the right to write.
pub struct Overlay<D> {
    base: D,
    chunks: RwLock<BTreeMap<u64, Box<[u8]>>>,
}

impl<D: BlockRead> Overlay<D> {
    /// An overlay on `base` that holds nothing yet.
    pub fn new(base: D) -> Self {
        Self { base, chunks: RwLock::default() }
    }

    fn chunk_of_base(&self, index: u64) -> io::Result<Box<[u8]>> {
        let start = index * CHUNK as u64;
        let len = usize::try_from((self.base.size() - start).min(CHUNK as u64)).map_err(io::Error::other)?;
        let mut chunk = vec![0; len].into_boxed_slice();
        self.base.read_at(&mut chunk, start)?;
        Ok(chunk)
    }

    /// Calls `edit` with the memory copy of each chunk that `range` touches, and the part of it that lies in `range`.
    fn edit(&self, range: Range<u64>, mut edit: impl FnMut(&mut [u8], u64)) -> io::Result<()> {
        let mut chunks = self.chunks.write().unwrap_or_else(PoisonError::into_inner);
        let mut at = range.start;
        while at < range.end {
            let index = at / CHUNK as u64;
            let start = index * CHUNK as u64;
            let chunk = match chunks.entry(index) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(entry) => entry.insert(self.chunk_of_base(index)?),
            };
            let from = usize::try_from(at - start).map_err(io::Error::other)?;
            let to = usize::try_from(range.end - start).unwrap_or(CHUNK).min(chunk.len());
            edit(&mut chunk[from..to], at - range.start);
            at = start + to as u64;
        }
        Ok(())
    }
}

impl<D> std::fmt::Debug for Overlay<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay").finish_non_exhaustive()
    }
}

impl<D: BlockRead> BlockRead for Overlay<D> {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = checked_range(offset, buf.len(), self.size())?;
        self.base.read_at(buf, offset)?;
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        for (index, chunk) in chunks.range(range.start / CHUNK as u64..range.end.div_ceil(CHUNK as u64)) {
            let start = index * CHUNK as u64;
            let from = range.start.max(start);
            let to = range.end.min(start + chunk.len() as u64);
            let within = |at: u64, origin: u64| usize::try_from(at - origin).map_err(io::Error::other);
            buf[within(from, offset)?..within(to, offset)?]
                .copy_from_slice(&chunk[within(from, start)?..within(to, start)?]);
        }
        Ok(())
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        let first = range.start / CHUNK as u64;
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        match chunks.range(first..).next() {
            Some((&index, chunk)) if index == first => {
                let end = (index * CHUNK as u64 + chunk.len() as u64).min(range.end);
                Ok(Extent { range: range.start..end, kind: ExtentKind::Data })
            }
            Some((&index, _)) => self.base.extent(range.start..range.end.min(index * CHUNK as u64)),
            None => self.base.extent(range),
        }
    }
}

impl<D: BlockRead> BlockWrite for Overlay<D> {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = checked_range(offset, buf.len(), self.size())?;
        self.edit(range, |part, at| {
            // The range was checked against a buffer in memory, so `at` fits.
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            part.copy_from_slice(&buf[at..at + part.len()]);
        })
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.edit(range.start..range.end.min(self.size()), |part, _| part.fill(0))
    }

    fn discard(&self, _range: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryDisk;

    #[test]
    fn hides_the_base_only_where_written() {
        let base = MemoryDisk::new(10_000);
        base.write_at(&[1; 10_000], 0).unwrap();
        let overlay = Overlay::new(&base as &dyn BlockRead);
        overlay.write_at(&[2; 5000], 4000).unwrap();
        overlay.zero(9000..10_000).unwrap();
        let mut all = vec![0; 10_000];
        overlay.read_at(&mut all, 0).unwrap();
        assert!(all[..4000].iter().all(|&b| b == 1));
        assert!(all[4000..9000].iter().all(|&b| b == 2));
        assert!(all[9000..].iter().all(|&b| b == 0));
        let mut original = vec![0; 10_000];
        base.read_at(&mut original, 0).unwrap();
        assert!(original.iter().all(|&b| b == 1));
    }
}
