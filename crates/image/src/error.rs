use std::io;
use std::path::PathBuf;

use crate::{Format, SpecError};

/// Why something could not be done with an image. Every variant names the image and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host refused or failed.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the host said.
        source: io::Error,
    },
    /// A node's description stands for none that can be opened.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A qcow2 file could not be read or written.
    #[error(transparent)]
    Qcow2(#[from] qtk_qcow2::Error),
    /// The content of an image could not be read.
    #[error("{}: cannot read at guest offset {offset:#x}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// Where on the guest's disk.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// A bitmap was to be copied that misses changes.
    #[error("{}: bitmap {name:?} misses changes; leave out such bitmaps, or remove it", image.display())]
    BrokenBitmap {
        /// The image that has it.
        image: PathBuf,
        /// Its name.
        name: String,
    },
    /// A copy could not be written.
    #[error("{}: cannot write at guest offset {offset:#x}", path.display())]
    Write {
        /// The image.
        path: PathBuf,
        /// Where on the guest's disk.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// How an image stores a part of its disk could not be found out.
    #[error("{}: cannot find out how it stores guest offset {offset:#x}", path.display())]
    Status {
        /// The image.
        path: PathBuf,
        /// Where on the guest's disk.
        offset: u64,
        /// Why.
        source: Box<Error>,
    },
    /// The image lies on nothing.
    #[error("{}: it has no backing file", image.display())]
    NoBacking {
        /// The image.
        image: PathBuf,
    },
    /// The file that an image is to lie on cannot be opened.
    #[error("{}: its new backing file {name:?} cannot be opened", image.display())]
    NewBacking {
        /// The image.
        image: PathBuf,
        /// The new backing file, as it was named.
        name: String,
        /// Why.
        source: Box<Error>,
    },
    /// A backing file whose format is to be guessed by everybody who opens the image.
    #[error("{}: the format of its new backing file {name:?} must be named", image.display())]
    BackingFormatMissing {
        /// The image.
        image: PathBuf,
        /// The new backing file, as it was named.
        name: String,
    },
    /// An image lies on other files than the one that was named.
    #[error("{}: {wanted} is not one of the files that it lies on; see them with `qtk info --chain`", image.display())]
    NotInChain {
        /// The image.
        image: PathBuf,
        /// The file that was named.
        wanted: String,
    },
    /// One of two images that were compared could not be read.
    #[error("{}: cannot compare at guest offset {offset:#x}", path.display())]
    Compare {
        /// The image.
        path: PathBuf,
        /// Where on the guest's disk.
        offset: u64,
        /// Why; names the image.
        source: io::Error,
    },
    /// Another process uses the image in a way that forbids ours.
    #[error(
        "{}: in use by another process, which holds its \"{permission}\" lock; stop the VM or tool that has it open{}",
        path.display(),
        if *shareable { ", or read it all the same with -U" } else { "" }
    )]
    Busy {
        /// The image.
        path: PathBuf,
        /// The permission in conflict, as QEMU names it.
        permission: &'static str,
        /// Whether the other process uses the permission, and we would deny it: QEMU's "shared" lock.
        shared: bool,
        /// Whether opening with [`share`](crate::OpenOptions::share) would work.
        shareable: bool,
    },
    /// The image names a backing file that cannot be opened.
    #[error("{}: its backing file cannot be opened", image.display())]
    Backing {
        /// The image that names the backing file.
        image: PathBuf,
        /// Why.
        source: Box<Error>,
    },
    /// The image names a backing file, and the caller does not follow any, or not that one.
    #[error(
        "{}: its backing file {backing:?} is not followed, as it lies outside of what is allowed; flatten the image first",
        image.display()
    )]
    BackingDenied {
        /// The image that names the backing file.
        image: PathBuf,
        /// The name, as stored.
        backing: String,
    },
    /// The image keeps its data in another file, and the caller does not follow any, or not that one.
    #[error(
        "{}: its data file {data_file:?} is not followed, as it lies outside of what is allowed",
        image.display()
    )]
    DataFileDenied {
        /// The image that names the data file.
        image: PathBuf,
        /// The name, as stored.
        data_file: String,
    },
    /// A chain of backing files comes back to a file it holds already.
    #[error(
        "{}: the chain of backing files comes back to {}; point one of them elsewhere with `qemu-img rebase -u`",
        image.display(),
        again.display()
    )]
    BackingLoop {
        /// The image that names the backing file.
        image: PathBuf,
        /// The file that is in the chain already.
        again: PathBuf,
    },
    /// A new image would replace a file that it is made from.
    #[error("{}: it belongs to the chain of {}; write to another file", path.display(), source_image.display())]
    TargetInChain {
        /// The file that would be replaced.
        path: PathBuf,
        /// What is read.
        source_image: PathBuf,
    },
    /// A chain of more backing files than anybody has.
    #[error("{}: the chain of backing files is longer than {limit}; flatten a part of it first", image.display())]
    ChainTooLong {
        /// The last image that was opened.
        image: PathBuf,
        /// Most layers of a chain.
        limit: usize,
    },
    /// A name that stands for something other than a local file.
    #[error("{name:?} is not a local file ({protocol}: names are not supported); copy or attach the image locally")]
    Protocol {
        /// The name.
        name: String,
        /// What stands before its colon.
        protocol: String,
    },
    /// A format that is neither raw nor qcow2.
    #[error("{}: {format} images are not supported; convert it with `qemu-img convert -O qcow2`", path.display())]
    UnsupportedFormat {
        /// The image.
        path: PathBuf,
        /// The format's name.
        format: String,
    },
    /// A snapshot was asked for in a format that has none.
    #[error("{}: {format} images have no snapshots", path.display())]
    NoSnapshots {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// An image does not have the snapshot that was asked for.
    #[error("{}: it has no such snapshot; list them with `qtk info`", path.display())]
    SnapshotNotFound {
        /// The image.
        path: PathBuf,
    },
    /// What was asked for does not go with the image or the other options.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The image.
        path: PathBuf,
        /// What does not fit, and what would.
        problem: String,
    },
    /// A disk that is too large for its image's clusters.
    #[error("a disk of {size} bytes is too large for clusters of that size; use larger ones")]
    DiskTooLarge {
        /// Size of the disk in bytes.
        size: u64,
    },
    /// Something that only qcow2 images have.
    #[error("{}: not a qcow2 image, and so without snapshots, bitmaps, options and a backing file", path.display())]
    NotQcow2 {
        /// The image.
        path: PathBuf,
    },
    /// A disk of no size, or of more bytes than any disk has.
    #[error("{}: the new size must be positive, and below 2^63 bytes", path.display())]
    SizeNotPositive {
        /// The image.
        path: PathBuf,
    },
    /// A disk that does not end with a whole sector.
    #[error("{}: a disk of {size} bytes is not one of whole sectors; choose a multiple of 512", path.display())]
    UnalignedSize {
        /// The image.
        path: PathBuf,
        /// The size in bytes.
        size: u64,
    },
    /// Space was asked for, though the disk does not grow.
    #[error("{}: space can only be preallocated for a disk that grows", path.display())]
    PreallocatedShrink {
        /// The image.
        path: PathBuf,
    },
    /// A disk would lose what lies at its end, and nobody agreed to that.
    #[error("{}: resizing the disk from {old} to {new} bytes would delete what lies beyond; allow it to shrink", path.display())]
    WouldShrink {
        /// The image.
        path: PathBuf,
        /// Size of the disk in bytes.
        old: u64,
        /// The size asked for, in bytes.
        new: u64,
    },
    /// A way of taking space on the host that the format does not have.
    #[error("{}: preallocation mode {mode} is not supported; choose another", path.display())]
    UnsupportedPreallocation {
        /// The image.
        path: PathBuf,
        /// The mode.
        mode: &'static str,
    },
    /// A raw image was opened without naming its format, and would become another format's file.
    #[error(
        "{}: the change would make this raw image look like {format}; name its format (--image-format raw) if that is meant",
        path.display()
    )]
    WouldChangeFormat {
        /// The image.
        path: PathBuf,
        /// What it would look like.
        format: String,
    },
    /// A raw image was changed by somebody else while a transaction on it was unfinished.
    #[error(
        "{}: changed by another program at offset {offset:#x} before the transaction in {} was finished; remove {} to keep the \
         image as it is, or copy the wanted state out of that file, which is a qcow2 overlay on the image",
        path.display(), log.display(), log.display()
    )]
    ForeignChange {
        /// The raw image.
        path: PathBuf,
        /// Its redo log.
        log: PathBuf,
        /// The first byte in dispute.
        offset: u64,
    },
    /// The copy of a complete log into its raw image was cut short. The change has happened all the same.
    #[error(
        "{}: the change is recorded in {} but could not be copied into the image; make room or repair the disk, then open the \
         image for writing to finish it",
        path.display(), log.display()
    )]
    Unfinished {
        /// The raw image.
        path: PathBuf,
        /// Its redo log.
        log: PathBuf,
        /// What went wrong.
        source: Box<Error>,
    },
    /// A codec refused its options.
    #[error("{}: cannot compress", path.display())]
    Codec {
        /// The image to be written.
        path: PathBuf,
        /// Why.
        source: qtk_qcow2::codec::CodecError,
    },
    /// A worker thread panicked.
    #[error("{}: an internal error ended the work; please report it", path.display())]
    WorkerPanicked {
        /// The image that was being written.
        path: PathBuf,
    },
}

impl Error {
    pub(crate) fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, action, source }
    }

    /// Whether an image was found damaged, rather than absent, in use or unsupported.
    #[must_use]
    pub fn is_corruption(&self) -> bool {
        match self {
            Self::Qcow2(qtk_qcow2::Error::Corrupt { .. }) => true,
            Self::Qcow2(qtk_qcow2::Error::Backing { source, .. }) => source.kind() == io::ErrorKind::InvalidData,
            Self::Backing { source, .. } | Self::Status { source, .. } => source.is_corruption(),
            Self::Io { source, .. }
            | Self::Read { source, .. }
            | Self::Write { source, .. }
            | Self::Compare { source, .. } => source.kind() == io::ErrorKind::InvalidData,
            Self::Unfinished { source, .. } => source.is_corruption(),
            _ => false,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Io { source, .. }
            | Error::Read { source, .. }
            | Error::Write { source, .. }
            | Error::Compare { source, .. } => source.kind(),
            Error::Busy { .. } => io::ErrorKind::ResourceBusy,
            Error::Protocol { .. } | Error::UnsupportedFormat { .. } => io::ErrorKind::Unsupported,
            _ if error.is_corruption() => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}
