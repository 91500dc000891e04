//! What a new file system is to hold, gathered from folders and archives before anything is written.
//!
//! Everything is put together in a [`Manifest`] first: names, attributes, and where content is to be read. So later sources can
//! replace or, as layers of a container image do, remove what earlier ones had; and the space that all of it needs is known
//! before there is a file system. Writing goes through it in the order of names, so that equal sources make equal file systems.

mod archive;
mod content;
mod folder;
mod header;
mod manifest;
mod space;
mod sparse;
mod write;

pub use archive::ArchiveOptions;
pub use folder::FolderOptions;
pub use manifest::Manifest;
pub use space::Needs;
pub use write::{Populated, WriteOptions};

use std::path::PathBuf;

/// Why a manifest could not be gathered or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PopulateError {
    /// A file of the host failed.
    #[error("cannot {action} {}", .path.display())]
    Host {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An archive is damaged, or is none.
    #[error("{}, at byte {offset}: {problem}", .path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong there.
        problem: String,
    },
    /// A name cannot be made.
    #[error("{}: {problem}", String::from_utf8_lossy(.name))]
    Name {
        /// The name, in the source's words.
        name: Vec<u8>,
        /// What is in the way.
        problem: &'static str,
    },
    /// The file system refused.
    #[error("cannot make {}", String::from_utf8_lossy(.name))]
    FileSystem {
        /// The path in the new file system.
        name: Vec<u8>,
        /// What it said.
        source: qtk_ext4::Error,
    },
}

/// The result of gathering or writing.
pub type Result<T, E = PopulateError> = std::result::Result<T, E>;

fn host(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> PopulateError {
    move |source| PopulateError::Host { action, path: path.to_owned(), source }
}
