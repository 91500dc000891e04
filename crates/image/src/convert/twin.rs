//! Bytes that lie in a source's file just as the target is to have them, and need not pass through memory.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use qtk_block::{BlockWrite, HostStorage, RawFile, Sharing};
use qtk_qcow2::{HostOffset, ImageWriter};

use super::unit::Unit;

/// Where bytes of [`Unit::plain`] lie in a file.
#[derive(Clone, Debug)]
pub(crate) struct Twin {
    /// Positions in [`Unit::plain`].
    pub(crate) bytes: Range<usize>,
    pub(crate) file: Arc<RawFile>,
    /// Where they begin in the file.
    pub(crate) at: u64,
    /// Whether they were read. If not, they are nowhere but in the file.
    pub(crate) read: bool,
}

/// The part of a target that a piece goes to.
pub(super) trait Place {
    /// The file, to be filled in `range` by the caller.
    fn file(&mut self, range: Range<u64>) -> io::Result<&dyn HostStorage>;
    /// Writes to the file.
    fn write(&mut self, bytes: &[u8], at: u64) -> io::Result<()>;
}

impl Place for Arc<dyn HostStorage> {
    fn file(&mut self, _: Range<u64>) -> io::Result<&dyn HostStorage> {
        Ok(&**self)
    }

    fn write(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_at(bytes, at)
    }
}

impl Place for ImageWriter {
    fn file(&mut self, range: Range<u64>) -> io::Result<&dyn HostStorage> {
        Ok(self.storage_for(range)?)
    }

    fn write(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        Ok(self.put(HostOffset(at), bytes)?)
    }
}

/// Stores pieces, by sharing blocks with the sources where that can be.
#[derive(Debug, Default)]
pub(super) struct Storer {
    /// Files that share nothing with the target.
    apart: Vec<Arc<RawFile>>,
    /// Bytes that have their place in common with a source.
    pub(super) shared: u64,
}

impl Storer {
    /// What is shared begins and ends at a multiple of this.
    const BLOCK: u64 = 4 << 10;
    /// Writing less than this takes no longer than sharing it.
    const WORTH: u64 = 64 << 10;

    /// Brings a part of a unit to `at` in a file of the target.
    pub(super) fn store(&mut self, place: &mut dyn Place, unit: &Unit, bytes: Range<usize>, at: u64) -> io::Result<()> {
        let offset = |position: usize| at + (position - bytes.start) as u64;
        let mut done = bytes.start;
        for twin in unit.twins.iter().filter(|twin| twin.bytes.start < bytes.end && bytes.start < twin.bytes.end) {
            let both = twin.bytes.start.max(bytes.start)..twin.bytes.end.min(bytes.end);
            let from = twin.at + (both.start - twin.bytes.start) as u64;
            let part = match twin.read {
                true => self.shareable(twin, both, from, offset),
                false => both,
            };
            if part.is_empty() {
                continue;
            }
            if done < part.start {
                place.write(&unit.plain[done..part.start], offset(done))?;
            }
            let from = twin.at + (part.start - twin.bytes.start) as u64;
            let range = offset(part.start)..offset(part.end);
            let file = place.file(range.clone())?;
            done = part.start;
            if self.share(twin, file, from, range.clone())? {
                done = part.end;
            } else if !twin.read {
                copy(twin, file, from, range)?;
                done = part.end;
            }
        }
        if done < bytes.end {
            place.write(&unit.plain[done..bytes.end], offset(done))?;
        }
        Ok(())
    }

    /// The whole blocks of a part of a twin, if they are enough.
    fn shareable(&self, twin: &Twin, both: Range<usize>, from: u64, offset: impl Fn(usize) -> u64) -> Range<usize> {
        let (start, end) = (offset(both.start), offset(both.end));
        let whole = start.next_multiple_of(Self::BLOCK)..end / Self::BLOCK * Self::BLOCK;
        let aligned = from % Self::BLOCK == start % Self::BLOCK;
        let known_apart = || self.apart.iter().any(|file| Arc::ptr_eq(file, &twin.file));
        if !aligned || whole.end < whole.start + Self::WORTH || known_apart() {
            return both.start..both.start;
        }
        let position = |at: u64| both.start + usize::try_from(at - start).unwrap_or(usize::MAX);
        position(whole.start)..position(whole.end)
    }

    fn share(&mut self, twin: &Twin, file: &dyn HostStorage, from: u64, range: Range<u64>) -> io::Result<bool> {
        let len = range.end - range.start;
        let sharing = match file.as_raw_file() {
            Some(target) => target.share(&twin.file, from, range)?,
            None => Sharing::Impossible,
        };
        match sharing {
            Sharing::Done => self.shared += len,
            Sharing::Unaligned => {}
            Sharing::Impossible => self.apart.push(twin.file.clone()),
        }
        Ok(sharing == Sharing::Done)
    }
}

/// Copies what was not read.
fn copy(twin: &Twin, file: &dyn HostStorage, from: u64, range: Range<u64>) -> io::Result<()> {
    match file.as_raw_file() {
        Some(target) => target.copy_from(&twin.file, from, range),
        None => Err(io::ErrorKind::Unsupported.into()),
    }
}
