use std::io;
use std::ops::RangeInclusive;

use crate::amend::AmendRefusal;
use crate::bitmap::BitmapRefusal;
use crate::snapshot::SnapshotRefusal;
use crate::types::{GuestOffset, HostOffset};

/// Why an image could not be read, written or made. Every variant names the image it is about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host could not read or write the image file.
    #[error("{image}: cannot {action} {len} bytes at file offset {offset:#x}")]
    Io {
        /// Name of the image file.
        image: String,
        /// What was tried.
        action: Action,
        /// Where in the file, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The image's backing could not be read.
    #[error("{image}: cannot read {len} bytes at guest offset {offset} from the backing image")]
    Backing {
        /// Name of the image file that lies on the backing.
        image: String,
        /// Where in the guest's disk.
        offset: GuestOffset,
        /// How many bytes.
        len: u64,
        /// What the backing said.
        source: io::Error,
    },
    /// The image breaks the qcow2 specification.
    #[error("{image} is corrupt: {what}; restore it from a copy, or repair it with `qemu-img check -r all`")]
    Corrupt {
        /// Name of the image file.
        image: String,
        /// The damage and its place.
        what: Corruption,
    },
    /// The image is valid but uses something that this crate does not handle.
    #[error("{image}: {feature} is not supported; convert the image with `qemu-img convert -O qcow2` first")]
    Unsupported {
        /// Name of the image file.
        image: String,
        /// The feature, by the name the image or the specification gives it.
        feature: String,
    },
    /// The image can be read but must not be written as it is.
    #[error("{image} cannot be written: {obstacle}")]
    NotWritable {
        /// Name of the image file.
        image: String,
        /// What is in the way, and what to do about it.
        obstacle: WriteObstacle,
    },
    /// Guest data was asked for, but it lies in a data file that was not opened.
    #[error("{image}: its data lies in an external data file, which was not opened with it")]
    DataFileMissing {
        /// Name of the image file.
        image: String,
    },
    /// A range that does not lie on the guest's disk, or is empty where it must not be.
    #[error("{image}: bytes {start}..{end} do not lie on a disk of {size} bytes")]
    OutOfRange {
        /// Name of the image file.
        image: String,
        /// First byte.
        start: u64,
        /// Byte after the last.
        end: u64,
        /// Size of the guest's disk in bytes.
        size: u64,
    },
    /// A new image with options that the format does not allow.
    #[error("{image} cannot be created: {option} must lie in {allowed:?}, and not be {value}")]
    InvalidOption {
        /// Name of the image file.
        image: String,
        /// The option.
        option: &'static str,
        /// Its value.
        value: u64,
        /// The values it can have.
        allowed: RangeInclusive<u64>,
    },
    /// What was asked of a persistent bitmap cannot be done.
    #[error("{image}: bitmap {bitmap:?}: {refusal}")]
    Bitmap {
        /// Name of the image file.
        image: String,
        /// Name of the bitmap.
        bitmap: String,
        /// Why not.
        refusal: BitmapRefusal,
    },
    /// What was asked of an internal snapshot cannot be done.
    #[error("{image}: snapshot {snapshot:?}: {refusal}")]
    Snapshot {
        /// Name of the image file.
        image: String,
        /// Name or identifier of the snapshot, as it was given.
        snapshot: String,
        /// Why not.
        refusal: SnapshotRefusal,
    },
    /// A new image with options that do not go together.
    #[error("{image} cannot be created: {problem}")]
    ImpossibleOptions {
        /// Name of the image file.
        image: String,
        /// What is wrong.
        problem: OptionProblem,
    },
    /// The image cannot be amended as asked.
    #[error("{image} cannot be amended: {refusal}")]
    Amend {
        /// Name of the image file.
        image: String,
        /// Why not.
        refusal: AmendRefusal,
    },
    /// Somebody else wrote the header while a transaction was open.
    #[error("{image} was changed by another program while it was being edited; lock images before editing them")]
    ChangedMeanwhile {
        /// Name of the image file.
        image: String,
    },
    /// The transaction was committed or has failed in its commit; no more can be done with it.
    #[error("{image}: the transaction is over; open the image again to go on")]
    TransactionOver {
        /// Name of the image file.
        image: String,
    },
}

/// What was tried on the host file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Waiting for stable storage.
    Sync,
    /// Changing the file's length.
    Resize,
    /// Taking the space for later writes.
    Reserve,
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Resize => "resize to",
            Self::Reserve => "reserve",
        })
    }
}

/// A structure of the image, named where damage is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// The header in cluster 0.
    Header,
    /// The header extension with this magic number.
    Extension(u32),
    /// The name of the backing file.
    BackingName,
    /// The active L1 table.
    L1Table,
    /// One entry of the active L1 table.
    L1Entry(u64),
    /// The L2 table of an L1 entry.
    L2Table(u64),
    /// The L2 entry that maps a guest offset.
    L2Entry(GuestOffset),
    /// The compressed data of the cluster at a guest offset.
    CompressedData(GuestOffset),
    /// The refcount table.
    RefcountTable,
    /// A refcount block, by its index in the refcount table.
    RefcountBlock(u64),
    /// The snapshot table.
    SnapshotTable,
    /// An entry of the snapshot table.
    Snapshot(u64),
    /// The L1 table of a snapshot.
    SnapshotL1Table(u64),
    /// The bitmap directory.
    BitmapDirectory,
    /// An entry of the bitmap directory, or its table.
    Bitmap(u64),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Header => f.write_str("the header"),
            Self::Extension(magic) => write!(f, "header extension {magic:#010x}"),
            Self::BackingName => f.write_str("the backing file's name"),
            Self::L1Table => f.write_str("the L1 table"),
            Self::L1Entry(index) => write!(f, "L1 entry {index}"),
            Self::L2Table(index) => write!(f, "the L2 table of L1 entry {index}"),
            Self::L2Entry(guest) => write!(f, "the L2 entry of guest offset {guest}"),
            Self::CompressedData(guest) => write!(f, "the compressed cluster at guest offset {guest}"),
            Self::RefcountTable => f.write_str("the refcount table"),
            Self::RefcountBlock(index) => write!(f, "refcount block {index}"),
            Self::SnapshotTable => f.write_str("the snapshot table"),
            Self::Snapshot(index) => write!(f, "snapshot {index}"),
            Self::SnapshotL1Table(index) => write!(f, "the L1 table of snapshot {index}"),
            Self::BitmapDirectory => f.write_str("the bitmap directory"),
            Self::Bitmap(index) => write!(f, "bitmap {index}"),
        }
    }
}

/// How an image breaks the specification.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Corruption {
    /// The magic number is missing.
    #[error("it does not begin as a qcow2 image")]
    NotQcow2,
    /// The file ends inside a structure, or an offset points past its end.
    #[error("{place} lies at {offset}, {len} bytes long, past the file's end at {file_size:#x}")]
    PastEnd {
        /// The structure.
        place: Place,
        /// Where it should begin.
        offset: HostOffset,
        /// How long it should be, in bytes.
        len: u64,
        /// Size of the file in bytes.
        file_size: u64,
    },
    /// An offset that must be a multiple of the cluster size is not.
    #[error("{place} points to {offset}, which is not the start of a cluster")]
    Misaligned {
        /// The structure that holds the offset.
        place: Place,
        /// The offset.
        offset: HostOffset,
    },
    /// A number outside the range that the format allows.
    #[error("{field} of {place} is {value}, outside {allowed:?}")]
    OutOfBounds {
        /// The structure.
        place: Place,
        /// The field, as the specification names it.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The values it can have.
        allowed: RangeInclusive<u64>,
    },
    /// A field that must be a multiple of eight, or text that is not UTF-8, or the like.
    #[error("{place} is malformed: {problem}")]
    Malformed {
        /// The structure.
        place: Place,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The entry of a bitmap in the directory says what it must not.
    #[error("bitmap {name:?} is malformed: {problem}")]
    Bitmap {
        /// The bitmap's name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Two structures claim the same cluster.
    #[error("{first} and {second} overlap at {offset}")]
    Overlap {
        /// One of the two.
        first: Place,
        /// The other.
        second: Place,
        /// The cluster that both claim.
        offset: HostOffset,
    },
    /// A cluster is in use although its refcount says otherwise.
    #[error("{place} uses the cluster at {offset}, whose refcount is too low")]
    RefcountTooLow {
        /// The user of the cluster.
        place: Place,
        /// The cluster.
        offset: HostOffset,
    },
    /// Compressed data that does not decode to a cluster.
    #[error("{place} does not decode: {problem}")]
    Undecodable {
        /// The cluster.
        place: Place,
        /// What the codec said.
        problem: String,
    },
}

/// Why a new image cannot have its options.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionProblem {
    /// Subclusters in version 2.
    #[error("version 2 has no subclusters; use version 3")]
    ExtendedL2InVersion2,
    /// Subclusters smaller than 512 bytes.
    #[error("clusters with subclusters have at least 16 KiB")]
    ExtendedL2ClusterSize,
    /// Preallocated clusters would hide the backing file.
    #[error("preallocated clusters hide the backing file; use subclusters")]
    PreallocationOnBacking,
    /// Lazy refcounts in version 2.
    #[error("version 2 has no lazy refcounts; use version 3")]
    LazyRefcountsInVersion2,
    /// A refcount width that is not a power of two up to 64.
    #[error("the refcount width must be a power of two up to 64 bits")]
    RefcountWidth,
    /// Another width than 16 bits in version 2.
    #[error("version 2 has refcounts of 16 bits; use version 3")]
    RefcountWidthInVersion2,
    /// A raw data file without a name for it.
    #[error("there is no data file that could be raw")]
    RawWithoutDataFile,
    /// A raw data file on a backing file.
    #[error("an image with a raw data file cannot lie on a backing file")]
    RawDataFileOnBacking,
    /// A data file in version 2.
    #[error("version 2 has no external data files; use version 3")]
    DataFileInVersion2,
    /// Another codec than deflate in version 2.
    #[error("version 2 compresses with zlib only; use version 3")]
    CompressionInVersion2,
    /// More than the largest L1 table maps, or than the largest refcount table counts.
    #[error("the size is too large; use larger clusters")]
    SizeTooLarge,
    /// A backing name that is empty or longer than 1023 bytes, or a format longer than 15.
    #[error("the backing name must have 1 to 1023 bytes, and its format 1 to 15")]
    BackingName,
    /// Names that leave no room for the header in the first cluster.
    #[error("the header with its names does not fit in a cluster; use shorter names or larger clusters")]
    HeaderTooLarge,
}

/// Why an image that can be read must not be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteObstacle {
    /// Incompatible bit 0: its refcounts may be stale.
    #[error("it was not closed cleanly and its refcounts may be stale; repair it with `qemu-img check -r all`")]
    Dirty,
    /// Incompatible bit 1: some writer found it damaged.
    #[error("it is marked as corrupt; repair it with `qemu-img check -r all`")]
    MarkedCorrupt,
    /// The header names a backing file, but none was given; or the other way round.
    #[error("its header and its opener disagree on whether it has a backing image; open it with its backing chain")]
    BackingMismatch,
    /// The header's extensions and names do not fit in its cluster.
    #[error("its header would not fit in a cluster; give it larger clusters, or shorter names")]
    HeaderFull,
    /// The header's cluster has no room for the old and the new names beside each other.
    #[error("its cluster size leaves no room to replace the header safely; convert it to larger clusters")]
    HeaderOutOfReach,
    /// A cluster would have more users than a refcount of the image's width can count.
    #[error("a refcount would not fit in its width; convert it with wider refcounts")]
    RefcountOverflow,
    /// Its disk cannot change its size: snapshots of version 2 do not say how large it was.
    #[error("it is of version 2 and has snapshots, so its disk cannot be resized; amend it with compat=1.1 first")]
    SnapshotsInVersion2,
    /// The refcount table would outgrow the format's limits.
    #[error("it would outgrow its refcount table; flatten it into a new image")]
    RefcountTableFull,
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Io { source, .. } | Error::Backing { source, .. } => source.kind(),
            Error::Corrupt { .. } => io::ErrorKind::InvalidData,
            Error::Unsupported { .. } => io::ErrorKind::Unsupported,
            Error::NotWritable { .. } => io::ErrorKind::ReadOnlyFilesystem,
            Error::OutOfRange { .. } => io::ErrorKind::UnexpectedEof,
            Error::ChangedMeanwhile { .. } => io::ErrorKind::ResourceBusy,
            Error::Amend { .. }
            | Error::Bitmap { .. }
            | Error::Snapshot { .. }
            | Error::InvalidOption { .. }
            | Error::ImpossibleOptions { .. }
            | Error::DataFileMissing { .. }
            | Error::TransactionOver { .. } => io::ErrorKind::InvalidInput,
        };
        Self::new(kind, error)
    }
}
