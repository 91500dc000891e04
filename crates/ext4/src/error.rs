use std::fmt;
use std::io;

use crate::{BlockNr, GroupNr, Ino};

/// The result of an operation on a file system.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where in a file system damage was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Place {
    /// The primary superblock.
    Superblock,
    /// A group's descriptor.
    Group(GroupNr),
    /// An inode, its block map or its extended attributes.
    Inode(Ino),
    /// A directory, at a block counted from the directory's start.
    Directory(Ino, u32),
    /// A metadata block.
    Block(BlockNr),
    /// The journal, at a block counted from the journal's start.
    Journal(u32),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock => f.write_str("superblock"),
            Self::Group(group) => write!(f, "block group {group}"),
            Self::Inode(ino) => write!(f, "inode {ino}"),
            Self::Directory(ino, block) => write!(f, "directory inode {ino}, block {block}"),
            Self::Block(block) => write!(f, "block {block}"),
            Self::Journal(block) => write!(f, "journal block {block}"),
        }
    }
}

/// Why an operation on a file system failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device failed.
    #[error("cannot {operation} the file system's device at offset {offset}")]
    Io {
        /// `read`, `write`, `discard` or `flush`.
        operation: &'static str,
        /// Byte offset on the device.
        offset: u64,
        /// What the device said.
        source: io::Error,
    },
    /// The file system is damaged.
    #[error("{place}: {problem}; repair the file system with e2fsck")]
    Corrupt {
        /// Where.
        place: Place,
        /// What is wrong there.
        problem: &'static str,
    },
    /// The file system uses something that is not handled, or not for writing.
    #[error("{feature} is not supported{}", if *.writing { " for writing" } else { "" })]
    Unsupported {
        /// What it is, by the name that mke2fs and the kernel give it.
        feature: String,
        /// Whether reading works nevertheless.
        writing: bool,
    },
    /// A directory has no entry of that name.
    #[error("no entry {:?} in directory inode {parent}", String::from_utf8_lossy(.name))]
    NotFound {
        /// The directory.
        parent: Ino,
        /// The name looked for.
        name: Vec<u8>,
    },
    /// A directory has an entry of that name already.
    #[error("directory inode {parent} has an entry {:?} already", String::from_utf8_lossy(.name))]
    Exists {
        /// The directory.
        parent: Ino,
        /// The name.
        name: Vec<u8>,
    },
    /// The inode is not in use.
    #[error("inode {0} is not in use")]
    NoSuchInode(Ino),
    /// A directory was needed.
    #[error("inode {0} is not a directory")]
    NotADirectory(Ino),
    /// Anything but a directory was needed.
    #[error("inode {0} is a directory")]
    IsADirectory(Ino),
    /// A regular file was needed.
    #[error("inode {0} is not a regular file")]
    NotAFile(Ino),
    /// A symbolic link was needed.
    #[error("inode {0} is not a symbolic link")]
    NotASymlink(Ino),
    /// The directory to remove or replace has entries.
    #[error("directory inode {0} is not empty")]
    NotEmpty(Ino),
    /// An inode has no extended attribute of that name.
    #[error("inode {ino} has no extended attribute {:?}", String::from_utf8_lossy(.name))]
    NoSuchAttribute {
        /// The inode.
        ino: Ino,
        /// The attribute's full name.
        name: Vec<u8>,
    },
    /// Nothing is left of a resource of the file system.
    #[error("the file system has no {0} left; make it larger or remove files")]
    NoSpace(&'static str),
    /// A name is empty, longer than 255 bytes, or holds a slash or a zero byte; or a link's target is too long.
    #[error("{:?} is not a valid name or link target here", String::from_utf8_lossy(.0))]
    InvalidName(Vec<u8>),
    /// A name of more than 255 bytes, or a link target that does not fit in a block.
    #[error("name or link target of {0} bytes is too long")]
    NameTooLong(usize),
    /// An inode cannot have more links.
    #[error("inode {0} has too many links")]
    TooManyLinks(Ino),
    /// A file would grow past what its block map can hold.
    #[error("inode {0} would grow past the largest file size")]
    FileTooLarge(Ino),
    /// The operation is not possible for this inode, whatever its content: see the text.
    #[error("inode {ino}: {reason}")]
    NotPermitted {
        /// The inode.
        ino: Ino,
        /// Why.
        reason: &'static str,
    },
}

impl Error {
    pub(crate) fn corrupt(place: Place, problem: &'static str) -> Self {
        Self::Corrupt { place, problem }
    }

    pub(crate) fn unsupported(feature: impl Into<String>) -> Self {
        Self::Unsupported { feature: feature.into(), writing: false }
    }

    pub(crate) fn unsupported_for_writing(feature: impl Into<String>) -> Self {
        Self::Unsupported { feature: feature.into(), writing: true }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Io { source, .. } => source.kind(),
            Error::Corrupt { .. } => io::ErrorKind::InvalidData,
            Error::Unsupported { .. } => io::ErrorKind::Unsupported,
            Error::NotFound { .. } | Error::NoSuchInode(_) | Error::NoSuchAttribute { .. } => io::ErrorKind::NotFound,
            Error::Exists { .. } => io::ErrorKind::AlreadyExists,
            Error::NotADirectory(_) => io::ErrorKind::NotADirectory,
            Error::IsADirectory(_) => io::ErrorKind::IsADirectory,
            Error::NotEmpty(_) => io::ErrorKind::DirectoryNotEmpty,
            Error::NoSpace(_) => io::ErrorKind::StorageFull,
            Error::TooManyLinks(_) => io::ErrorKind::TooManyLinks,
            Error::FileTooLarge(_) => io::ErrorKind::FileTooLarge,
            Error::NotPermitted { .. } => io::ErrorKind::PermissionDenied,
            Error::NotAFile(_) | Error::NotASymlink(_) | Error::InvalidName(_) | Error::NameTooLong(_) => {
                io::ErrorKind::InvalidInput
            }
        };
        Self::new(kind, error)
    }
}
