use std::fmt;
use std::io;

use crate::{Content, GuestPath, fat};

/// Why a disk, or a path on it, cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device could not be read or written.
    #[error("cannot {action} {place}")]
    Io {
        /// What was tried: "read", "write", "flush".
        action: &'static str,
        /// Where.
        place: Place,
        /// What the device said.
        source: io::Error,
    },
    /// A structure contradicts itself, its checksum or the disk's size.
    #[error("{place} is corrupt: {problem}")]
    Corrupt {
        /// Which structure.
        place: Place,
        /// What is wrong with it, and what can be done.
        problem: &'static str,
    },
    /// Valid as far as can be told, but more than this crate handles.
    #[error("{place}: {feature}")]
    Unsupported {
        /// Which structure.
        place: Place,
        /// What it would take.
        feature: &'static str,
    },
    /// The place holds something that is not a file system this crate can open for the purpose.
    #[error("{place} holds {content}, which qtk cannot edit yet")]
    Foreign {
        /// Where.
        place: Place,
        /// What was found there.
        content: Content,
    },
    /// No file system looks like a guest's root.
    #[error("no root file system found: {}{}", List(.found), choice(.found))]
    NoRoot {
        /// Every place that was looked at.
        found: Vec<(Place, Content)>,
    },
    /// Several file systems look like a guest's root.
    #[error("more than one file system looks like a root: {}; choose a partition by its number", List(.candidates))]
    SeveralRoots {
        /// Those that do.
        candidates: Vec<(Place, Content)>,
    },
    /// There is no ext2, ext3 or ext4 file system where one was needed.
    #[error("no ext file system found: {}", List(.found))]
    NotExt {
        /// Every place that was looked at.
        found: Vec<(Place, Content)>,
    },
    /// A partition was asked for that the disk does not have.
    #[error("the disk has no partition {number}; it has {}", Numbers(.present))]
    NoSuchPartition {
        /// The number asked for.
        number: u32,
        /// The numbers there are.
        present: Vec<u32>,
    },
    /// A path does not lead where it should.
    #[error("{path}: {problem}")]
    Path {
        /// The path inside the guest, as far as it was followed.
        path: GuestPath,
        /// What is wrong there.
        problem: PathProblem,
    },
    /// The mounted file system at `path` could not be opened when the tree was.
    #[error("{path} is not available")]
    Unavailable {
        /// The mount point.
        path: GuestPath,
        /// Why not.
        source: std::sync::Arc<Error>,
    },
    /// An ext4 file system refused.
    #[error("ext4 in {place}")]
    Ext4 {
        /// Where the file system lies.
        place: Place,
        /// Its own account.
        source: qtk_ext4::Error,
    },
    /// A FAT file system refused.
    #[error("FAT in {place}")]
    Fat {
        /// Where the file system lies.
        place: Place,
        /// Its own account.
        source: fat::Error,
    },
}

impl Error {
    /// Whether a path led nowhere.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Path { problem: PathProblem::NotFound, .. })
    }

    /// Whether the disk's content is at fault, rather than the request or the host.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        match self {
            Self::Corrupt { .. } | Self::Fat { source: fat::Error::Corrupt { .. }, .. } => true,
            Self::Ext4 { source, .. } => matches!(source, qtk_ext4::Error::Corrupt { .. }),
            Self::Unavailable { source, .. } => source.is_corrupt(),
            _ => false,
        }
    }

    /// A tree has its inodes from directories alone, so one that is not in use is damage.
    pub(crate) fn ext4(place: Place, source: qtk_ext4::Error) -> Self {
        let source = match source {
            qtk_ext4::Error::NoSuchInode(ino) => qtk_ext4::Error::Corrupt {
                place: qtk_ext4::Place::Inode(ino),
                problem: "a directory names it, but it is not in use",
            },
            source => source,
        };
        Self::Ext4 { place, source }
    }

    pub(crate) fn path(path: impl AsRef<[u8]>, problem: PathProblem) -> Self {
        Self::Path { path: GuestPath::from(path.as_ref()), problem }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Io { source, .. } => source.kind(),
            Error::Corrupt { .. } => io::ErrorKind::InvalidData,
            Error::Path { problem: PathProblem::NotFound, .. } => io::ErrorKind::NotFound,
            Error::Unsupported { .. } | Error::Foreign { .. } => io::ErrorKind::Unsupported,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// A part of the disk, as messages name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Place {
    /// The whole disk, without a partition table.
    Disk,
    /// The boot sector, with the MBR's four primary entries.
    Mbr,
    /// The extended boot record at this byte offset.
    ExtendedBootRecord(u64),
    /// The GUID partition table whose header is at this byte offset.
    Gpt(u64),
    /// The partition of this number.
    Partition(u32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk => write!(f, "the disk"),
            Self::Mbr => write!(f, "the MBR"),
            Self::ExtendedBootRecord(offset) => write!(f, "the extended boot record at byte {offset}"),
            Self::Gpt(offset) => write!(f, "the GPT at byte {offset}"),
            Self::Partition(number) => write!(f, "partition {number}"),
        }
    }
}

/// What is wrong with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PathProblem {
    /// Nothing has this name.
    #[error("no such file or directory")]
    NotFound,
    /// The path goes on below something that is no directory.
    #[error("not a directory")]
    NotADirectory,
    /// A file was wanted.
    #[error("is a directory")]
    IsADirectory,
    /// Something is there already.
    #[error("already exists")]
    Exists,
    /// More than 40 links were followed, most likely in a circle.
    #[error("too many symbolic links (40 at most)")]
    TooManyLinks,
    /// Source and destination lie on different file systems.
    #[error("on another file system")]
    AcrossMounts,
    /// A mounted file system's own directory cannot be removed or renamed.
    #[error("is a mount point")]
    MountPoint,
    /// A name that no directory entry can have.
    #[error("not a valid file name")]
    BadName,
    /// A regular file was wanted.
    #[error("not a regular file")]
    NotAFile,
    /// A directory cannot be moved below itself.
    #[error("lies inside what is to be moved")]
    InsideItself,
    /// Too long to be held in memory.
    #[error("larger than 16 MiB")]
    TooLarge,
    /// The tree was opened for reading.
    #[error("the image is open for reading only")]
    ReadOnly,
    /// The file lies on a FAT file system, which can only be read.
    #[error("lies on a FAT file system, which qtk cannot edit yet")]
    ReadOnlyFat,
}

/// What to do, if there is anything to choose from.
fn choice(found: &[(Place, Content)]) -> &'static str {
    if found.iter().any(|(_, content)| content.is_ext()) {
        "; choose a partition by its number"
    } else {
        "; qtk edits ext4"
    }
}

struct List<'a>(&'a [(Place, Content)]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (place, content)) in self.0.iter().enumerate() {
            write!(f, "{}{place} holds {content}", if index == 0 { "" } else { ", " })?;
        }
        if self.0.is_empty() { write!(f, "the partition table is empty") } else { Ok(()) }
    }
}

struct Numbers<'a>(&'a [u32]);

impl fmt::Display for Numbers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, number) in self.0.iter().enumerate() {
            write!(f, "{}{number}", if index == 0 { "" } else { ", " })?;
        }
        if self.0.is_empty() { write!(f, "none") } else { Ok(()) }
    }
}
