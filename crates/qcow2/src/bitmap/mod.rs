//! Persistent dirty bitmaps: which parts of the disk were written since some point in time.

mod contents;
mod directory;
mod edit;
mod pending;
mod read;

use crate::types::HostOffset;

pub use contents::BitmapContents;
pub(crate) use directory::BitmapDirectory;
pub use edit::NewBitmap;
pub(crate) use pending::PendingBitmaps;
pub(crate) use read::{read_contents, refused};

/// A persistent dirty bitmap, as its entry in the bitmap directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// Whether it does not reflect all writes: somebody stopped while using it, or did not know it.
    pub in_use: bool,
    /// Whether it is enabled: writes are recorded in it as soon as the image is opened.
    pub auto: bool,
    /// Where its table begins.
    pub table: HostOffset,
    /// Entries of its table.
    pub table_size: u32,
}

/// Why what was asked of a bitmap cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapRefusal {
    /// The image has no bitmap of that name.
    #[error("there is no such bitmap")]
    NotFound,
    /// The image has a bitmap of that name already.
    #[error("it exists already")]
    Exists,
    /// A bitmap must have a name.
    #[error("its name is empty")]
    EmptyName,
    /// QEMU takes no longer names.
    #[error("its name is longer than {max} bytes")]
    NameTooLong {
        /// Length of the longest name in bytes.
        max: usize,
    },
    /// A granularity that QEMU does not take.
    #[error("its granularity must be a power of two from 512 bytes to 2 GiB, not {0}")]
    Granularity(u64),
    /// Version 2 has no bitmaps.
    #[error("images of version 2 cannot have bitmaps; amend the image with compat=1.1 first")]
    Version2,
    /// Its bits would take more space than QEMU reads.
    #[error("it would take too much space; give it a larger granularity")]
    TooLarge,
    /// A disk without bytes has no bits.
    #[error("the disk is empty")]
    EmptyDisk,
    /// The image has as many bitmaps as QEMU reads.
    #[error("the image has too many bitmaps")]
    TooMany,
    /// Somebody stopped while using it, so that it may miss writes.
    #[error("it is inconsistent, as somebody stopped while using it; it can only be removed")]
    Inconsistent,
    /// Bitmaps of disks that differ in size cannot be merged.
    #[error("it describes a disk of {destination} bytes, the other one a disk of {source_size}")]
    DifferentSizes {
        /// Size in bytes of the disk of the bitmap to change.
        destination: u64,
        /// Size in bytes of the disk of the bitmap to merge.
        source_size: u64,
    },
}
