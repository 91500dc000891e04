//! Block devices as disk-image tools need them.
//!
//! Everything that holds bytes at offsets is a [`BlockRead`]; what can be changed is a [`BlockWrite`]; a file that an image
//! lives in, and that can grow, is a [`HostStorage`]. All three are positioned, take `&self`, are object-safe and
//! synchronous, so any number of threads can share one device without a cursor.
//!
//! The crate also holds what every image needs of its host: sparse files ([`RawFile`]), output that appears whole or not at
//! all ([`OutputFile`]), and the locks that QEMU takes on images ([`ImageLock`]).

mod file;
mod lock;
mod memory;
mod output;
mod overlay;
mod progress;
mod recorder;
mod sys;
mod transfer;
mod window;
mod zero;

use std::io;
use std::ops::Range;

pub use file::{Access, RawFile};
pub use lock::{ImageLock, LockError, LockMode};
pub use memory::MemoryDisk;
pub use output::{Durability, OutputFile};
pub use overlay::Overlay;
pub use progress::{NoProgress, Progress, take_progress_request, watch_progress_requests};
pub use recorder::{WriteEvent, WriteRecorder};
pub use transfer::Sharing;
pub use window::Window;
pub use zero::is_zero;

/// What an [`Extent`] of a device holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that must be read.
    Data,
    /// Reads as zeroes, and hides whatever lies beneath.
    Zero,
    /// Nothing stored here: reads through to the backing device, or as zeroes where there is none.
    Unallocated,
}

/// A run of bytes of one kind. Never empty; neighbours may share a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Byte range on the device.
    pub range: Range<u64>,
    /// What the range holds.
    pub kind: ExtentKind,
}

/// A device of fixed size, readable at any offset.
pub trait BlockRead: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`. A range past [`size`](Self::size) is an `UnexpectedEof` error.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// The run that starts at `range.start`, cut off at `range.end`. `range` must not be empty and must lie on the device.
    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        Ok(Extent { range, kind: ExtentKind::Data })
    }
}

/// A device whose content can be changed.
pub trait BlockWrite: BlockRead {
    /// Writes all of `buf` at `offset`. A range past the end is an `UnexpectedEof` error, except on a [`HostStorage`], which grows.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the range read as zeroes, and frees its space where the device can.
    fn zero(&self, range: Range<u64>) -> io::Result<()>;

    /// Says that nobody needs the range's content any more; what it reads as afterwards is unspecified.
    fn discard(&self, range: Range<u64>) -> io::Result<()>;

    /// Returns when every completed write is on stable storage.
    fn flush(&self) -> io::Result<()>;
}

/// How much of a disk gets its place on the host before it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// None of it.
    #[default]
    Off,
    /// All of it has an address, but takes no space yet. For a raw file the same as `Off`.
    Metadata,
    /// All of it takes space, which is not written.
    Falloc,
    /// All of it is written, as zeroes.
    Full,
}

/// The file an image lives in: writes past the end grow it.
pub trait HostStorage: BlockWrite {
    /// Cuts the storage off at `size` bytes or extends it with zeroes.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Takes the space that the range needs and extends the storage to the range's end. What it reads as stays the same.
    fn reserve(&self, range: Range<u64>) -> io::Result<()> {
        if range.end > self.size() { self.set_size(range.end) } else { Ok(()) }
    }

    /// The host file, where the storage is all of one, for what only files can do (`copy_file_range`, reflinks).
    fn as_raw_file(&self) -> Option<&RawFile> {
        None
    }
}

macro_rules! forward_to_pointee {
    ($($pointer:ty),*) => {$(
        impl<T: BlockRead + ?Sized> BlockRead for $pointer {
            fn size(&self) -> u64 {
                (**self).size()
            }
            fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
                (**self).read_at(buf, offset)
            }
            fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
                (**self).extent(range)
            }
        }
        impl<T: BlockWrite + ?Sized> BlockWrite for $pointer {
            fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
                (**self).write_at(buf, offset)
            }
            fn zero(&self, range: Range<u64>) -> io::Result<()> {
                (**self).zero(range)
            }
            fn discard(&self, range: Range<u64>) -> io::Result<()> {
                (**self).discard(range)
            }
            fn flush(&self) -> io::Result<()> {
                (**self).flush()
            }
        }
    )*};
}

forward_to_pointee!(std::sync::Arc<T>, Box<T>, &T);

/// Fills `buf` from `offset` as if `device` went on with zeroes past its end.
pub fn read_padded(device: &(impl BlockRead + ?Sized), buf: &mut [u8], offset: u64) -> io::Result<()> {
    let stored = usize::try_from(device.size().saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
    let (head, tail) = buf.split_at_mut(stored);
    tail.fill(0);
    if head.is_empty() { Ok(()) } else { device.read_at(head, offset) }
}

/// `offset..offset + len`, if it lies within `size` bytes.
fn checked_range(offset: u64, len: usize, size: u64) -> io::Result<Range<u64>> {
    u64::try_from(len)
        .ok()
        .and_then(|len| offset.checked_add(len))
        .filter(|&end| end <= size)
        .map(|end| offset..end)
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{len} bytes at offset {offset} reach past the end of a device of {size} bytes"),
            )
        })
}
