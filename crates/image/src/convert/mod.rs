//! Copying what disks hold into another image: a new one, or one that is there.

mod bitmaps;
mod copy;
mod disk;
mod fill;
mod joined;
mod once;
mod pack;
mod plan;
mod sink;
mod target;
mod twin;
mod unit;
mod zeroes;

use std::fmt;
use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::path::Path;

use qtk_block::{Access, ImageLock, LockMode, Progress, RawFile};

use crate::layer::acquire;
use crate::{ChainLayer, Error, Image, NewImage, redo};

pub(crate) use bitmaps::CopiedBitmaps;
pub(crate) use copy::{Copy, Shape, UNIT};
pub(crate) use disk::Disk;
pub(crate) use fill::{Grain, Packing};
pub use joined::JoinedDisk;
pub(crate) use plan::Zeroes;
pub(crate) use sink::Sink;
use target::into_existing;
pub(crate) use target::{Listener, NewFile, into_new, refuse_source};
pub(crate) use unit::Unit;
pub(crate) use zeroes::Detection;

/// How disks are copied. The default is `qemu-img convert`'s.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Store the clusters compressed; only in qcow2.
    pub compress: bool,
    /// The codec's level; see [`levels`](qtk_qcow2::codec::levels).
    pub level: Option<i32>,
    /// Whether to compress clusters again that could be copied as they are.
    pub recompress: bool,
    /// Store clusters that are alike once, and let them share it; only in new qcow2 images, whose clusters then are for reading:
    /// Cloud Hypervisor writes to a shared cluster in its place, and so to all that share it. Needs up to 200 bytes of memory for
    /// each different cluster.
    pub dedup: bool,
    /// Zeroes that are stored in the source are left out where so many bytes of them follow each other. With 0 the target
    /// stores all bytes of the disk, whatever they are and whether or not the source does.
    pub sparse_size: u64,
    /// What nobody needs of the copied disk, such as the free blocks of a file system: byte ranges in order that do not
    /// overlap. What the sources store there is not read, and zero in the copy.
    pub unused: Vec<Range<u64>>,
    /// Take sectors that cannot be read for zeroes, with a warning each.
    pub salvage: bool,
    /// Whether an existing target is known to read as zeroes, so that zeroes need not be written.
    pub target_is_zero: bool,
    /// Copy data that is stored plain without a look at it, so that zeroes in it stay data. From the first data on that is
    /// compressed, all is looked at. Only into a new target that is neither compressed nor to store equal clusters once.
    pub offload: bool,
    /// Most bytes to write in a second.
    pub rate_limit: Option<NonZeroU64>,
    /// Which persistent dirty bitmaps of the source the target gets.
    pub bitmaps: BitmapCopy,
    /// Threads that read and compress; as many as there are processors if not given. The result does not depend on it.
    pub threads: Option<usize>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            compress: false,
            level: None,
            recompress: false,
            dedup: false,
            sparse_size: 4096,
            unused: Vec::new(),
            salvage: false,
            target_is_zero: false,
            offload: false,
            rate_limit: None,
            bitmaps: BitmapCopy::None,
            threads: None,
        }
    }
}

/// Which persistent dirty bitmaps of the source's topmost file are copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BitmapCopy {
    /// None.
    #[default]
    None,
    /// All; one that is not consistent is an error.
    All,
    /// Those that are consistent, with a warning for each of the others.
    Consistent,
}

/// Where the copy goes.
#[derive(Debug)]
pub enum Target<'a> {
    /// A new image, which appears when it is complete; what was there is replaced. Where it has a base, what the topmost
    /// files of the sources do not store is left to that. Its size is that of the sources.
    New {
        /// Its name.
        path: &'a Path,
        /// What it is to be.
        image: &'a NewImage,
    },
    /// An image that is there, opened for writing and at least as large as the sources. It changes in one transaction.
    Existing {
        /// The image.
        image: Image,
        /// Whether what the topmost files of the sources do not store is left to what the image lies on.
        overlay: bool,
    },
}

/// Something a user should hear about, though the copy goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConvertWarning {
    /// A sector could not be read, and is zero in the copy.
    Unreadable {
        /// Where it begins, in bytes of the disk.
        offset: u64,
        /// Why.
        source: Error,
    },
    /// How the source stores a sector could not be found out.
    NoStatus {
        /// Where it begins, in bytes of the disk.
        offset: u64,
        /// Why.
        source: Error,
    },
    /// A bitmap was not copied because it misses changes.
    BrokenBitmap {
        /// Its name.
        name: String,
    },
    /// Said while the target was made.
    Create(crate::Warning),
}

impl fmt::Display for ConvertWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { offset, source } => {
                write!(f, "the sector at offset {offset} cannot be read and is zero in the copy: {source}")
            }
            Self::NoStatus { offset, source } => {
                write!(f, "it cannot be told how the sector at offset {offset} is stored: {source}")
            }
            Self::BrokenBitmap { name } => write!(f, "bitmap {name} misses changes and is left out"),
            Self::Create(warning) => warning.fmt(f),
        }
    }
}

/// What [`convert`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvertReport {
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Size of a new file in bytes; 0 where the target was there.
    pub file_size: u64,
    /// Clusters compressed anew.
    pub compressed: u64,
    /// Compressed clusters copied as they were.
    pub copied: u64,
    /// Bytes stored plain.
    pub plain_bytes: u64,
    /// How many of them have their blocks on the host's disk in common with a source, where the file system can do that.
    pub reflinked: u64,
    /// Clusters that share what is stored for another one that is alike.
    pub shared: u64,
    /// Bytes that they would have taken.
    pub saved: u64,
    /// Bytes of data that were taken for zeroes because nobody needs them.
    pub left_out: u64,
}

/// Copies the disks of `sources`, one after the other, into `target`.
///
/// Meanwhile nobody may write any file of the sources, unless they were opened to be shared. `warn` is called in the order of
/// the disk; progress is in bytes of it.
pub fn convert(
    sources: &[Image],
    target: Target<'_>,
    options: &ConvertOptions,
    warn: &mut dyn FnMut(ConvertWarning),
    progress: &dyn Progress,
) -> Result<ConvertReport, Error> {
    let _held = hold_still(sources)?;
    let bitmaps = CopiedBitmaps::of(sources, options.bitmaps, warn)?;
    let listener = Listener { warn, progress };
    match target {
        Target::New { path, image } => {
            let source = (Disk::new(sources, image.base.is_some()), sources, &bitmaps);
            into_new(source, (path, image), options, listener)
        }
        Target::Existing { image, overlay } => {
            into_existing((Disk::new(sources, overlay), &bitmaps), (image, overlay), options, listener)
        }
    }
}

/// Locks that keep the sources as they are.
pub(crate) fn hold_still(sources: &[Image]) -> Result<Vec<Option<ImageLock>>, Error> {
    sources.iter().flat_map(Image::layers).map(ChainLayer::hold_still).collect()
}

/// Locks a file that is to be overwritten or replaced.
pub(crate) fn lock_for_writing(path: &Path, file: &File) -> Result<Option<ImageLock>, Error> {
    match acquire(path, file, LockMode::Write) {
        // Where there are no locks, nobody holds one.
        Err(Error::Io { .. }) => Ok(None),
        result => result.map(Some),
    }
}

/// Refuses a target that somebody uses, or that a log beside it would change. The lock is to be held until the target is
/// replaced.
pub(crate) fn refuse_used(output: &Path) -> Result<Option<ImageLock>, Error> {
    let lock = match RawFile::open(output, Access::ReadOnly) {
        Ok(existing) => lock_for_writing(output, existing.file())?,
        // Whatever is no file is refused where the output is made.
        Err(_) => None,
    };
    redo::clear_place(output)?;
    Ok(lock)
}
