use std::io;
use std::path::{Path, PathBuf};

use qtk_disk::{GuestPath, PathProblem};

/// The result of an operation on a guest.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation on a guest failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The guest's path does not allow it.
    #[error("cannot {action} {path} in the guest: {problem}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The path inside the guest.
        path: GuestPath,
        /// What is in the way.
        problem: PathProblem,
    },
    /// The guest's file system failed or refused.
    #[error("cannot {action} {path} in the guest")]
    Guest {
        /// What was tried.
        action: &'static str,
        /// The path inside the guest.
        path: GuestPath,
        /// What the file system says.
        source: qtk_disk::Error,
    },
    /// A file on the host failed.
    #[error("cannot {action} {}", .path.display())]
    Host {
        /// What was tried.
        action: &'static str,
        /// The path on the host.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file on the host is of a kind that cannot be used.
    #[error("{}: {problem}", .path.display())]
    Source {
        /// The path on the host.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The guest has no such user or group.
    #[error("the guest has no {kind} {name:?}")]
    Unknown {
        /// "user" or "group".
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// Not `USER`, `USER:GROUP`, `USER:` or `:GROUP`.
    #[error("{0:?} is not an owner: write USER, USER:GROUP, USER: or :GROUP, with names or numbers")]
    BadOwner(String),
    /// Not a file mode.
    #[error("{0:?} is not a mode: write an octal number up to 7777, or changes such as u+x,go-w")]
    BadMode(String),
    /// A directory tree that refers to itself or is nested without end.
    #[error("{path} in the guest: {problem}; repair the file system with e2fsck")]
    BadTree {
        /// The directory.
        path: GuestPath,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl Error {
    /// Whether the disk's content is at fault, rather than the request or the host.
    #[must_use]
    pub fn is_corrupt(&self) -> bool {
        match self {
            Self::Guest { source, .. } => source.is_corrupt(),
            Self::BadTree { .. } => true,
            _ => false,
        }
    }

    pub(crate) fn refused(action: &'static str, path: &GuestPath, problem: PathProblem) -> Self {
        Self::Refused { action, path: path.clone(), problem }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Host { source, .. } => source.kind(),
            Error::Refused { problem: PathProblem::NotFound, .. } => io::ErrorKind::NotFound,
            Error::BadTree { .. } => io::ErrorKind::InvalidData,
            Error::Guest { source, .. } if source.is_corrupt() => io::ErrorKind::InvalidData,
            Error::Guest { .. } | Error::Refused { .. } => io::ErrorKind::Other,
            _ => io::ErrorKind::InvalidInput,
        };
        Self::new(kind, error)
    }
}

/// Says what was tried, and where, when a tree refuses.
pub(crate) trait InGuest<T> {
    fn in_guest(self, action: &'static str, path: &GuestPath) -> Result<T>;
}

impl<T> InGuest<T> for Result<T, qtk_disk::Error> {
    fn in_guest(self, action: &'static str, path: &GuestPath) -> Result<T> {
        self.map_err(|error| match error {
            // A path that was followed from the root tells more than the one that was asked for.
            qtk_disk::Error::Path { path: followed, problem } => {
                let path = if followed.as_bytes().starts_with(b"/") { followed } else { path.clone() };
                Error::Refused { action, path, problem }
            }
            source => Error::Guest { action, path: path.clone(), source },
        })
    }
}

/// Says what was tried, and where, when the host refuses.
pub(crate) trait OnHost<T> {
    fn on_host(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> OnHost<T> for Result<T, E> {
    fn on_host(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Host { action, path: path.to_owned(), source: source.into() })
    }
}
