//! The locks that QEMU takes on image files, so that a tool and a running VM keep out of each other's way.
//!
//! QEMU describes an opener by what it does (its permissions) and by what it lets others do meanwhile. It holds a shared
//! lock on byte `100 + p` for every permission `p` it uses and on byte `200 + p` for every one it denies to others, and then
//! looks whether anybody holds the opposite byte. Open-file-description locks make this work between threads as well.

use std::fs::File;
use std::io;

use crate::sys::{self, ByteLock};

const USED_BASE: u64 = 100;
const DENIED_BASE: u64 = 200;

/// QEMU's block permissions; the discriminant is the lock byte's distance from its base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permission {
    ConsistentRead = 0,
    Write = 1,
    Resize = 3,
}

impl Permission {
    fn used_byte(self) -> u64 {
        USED_BASE + self as u64
    }

    fn denied_byte(self) -> u64 {
        DENIED_BASE + self as u64
    }

    /// The permission's name in QEMU's messages, which users search for.
    fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::Resize => "resize",
        }
    }
}

/// What an opener does with an image, and so which locks it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Reads an image whose metadata must not change meanwhile (any qcow2 file): nobody may write.
    Read,
    /// Reads raw data and lets others write, as `qemu-img` does with raw images.
    ReadShared,
    /// Writes and resizes: nobody else may write, nor read expecting that nobody writes.
    Write,
}

impl LockMode {
    fn used(self) -> &'static [Permission] {
        match self {
            Self::Read | Self::ReadShared => &[Permission::ConsistentRead],
            Self::Write => &[Permission::ConsistentRead, Permission::Write, Permission::Resize],
        }
    }

    fn denied(self) -> &'static [Permission] {
        match self {
            Self::Read | Self::Write => &[Permission::Write, Permission::Resize],
            Self::ReadShared => &[],
        }
    }
}

/// Why an image could not be locked.
#[derive(Debug)]
#[non_exhaustive]
pub enum LockError {
    /// Somebody else uses the image in a way that forbids ours.
    Busy {
        /// The permission in conflict, as QEMU names it: `write`, `resize`, `consistent read`.
        permission: &'static str,
        /// Whether it is one that we would deny and they use, which QEMU calls shared; else we would use what they deny.
        shared: bool,
    },
    /// The host's file system could not tell.
    Io(io::Error),
}

impl std::fmt::Display for LockError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Busy { permission, .. } => write!(f, "another process holds the image (\"{permission}\" lock)"),
            Self::Io(_) => f.write_str("cannot lock the image file"),
        }
    }
}

impl std::error::Error for LockError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Busy { .. } => None,
            Self::Io(source) => Some(source),
        }
    }
}

impl From<io::Error> for LockError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// QEMU's locks on an open image file, held until dropped.
#[derive(Debug)]
pub struct ImageLock {
    file: File,
    bytes: Vec<u64>,
}

impl ImageLock {
    /// Locks `file` without waiting. The lock shares the file's open description: close no duplicate expecting it gone.
    pub fn acquire(file: &File, mode: LockMode) -> Result<Self, LockError> {
        let mut lock = Self { file: file.try_clone()?, bytes: Vec::new() };
        for &permission in mode.used() {
            lock.hold(permission.used_byte(), permission, false)?;
        }
        for &permission in mode.denied() {
            lock.hold(permission.denied_byte(), permission, true)?;
        }
        for &permission in mode.used() {
            lock.check(permission.denied_byte(), permission, false)?;
        }
        for &permission in mode.denied() {
            lock.check(permission.used_byte(), permission, true)?;
        }
        Ok(lock)
    }

    fn hold(&mut self, byte: u64, permission: Permission, shared: bool) -> Result<(), LockError> {
        match sys::ofd_set_lock(&self.file, ByteLock::Shared, byte) {
            Ok(()) => {
                self.bytes.push(byte);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(LockError::Busy { permission: permission.name(), shared })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn check(&self, byte: u64, permission: Permission, shared: bool) -> Result<(), LockError> {
        if sys::ofd_is_locked_elsewhere(&self.file, byte)? {
            return Err(LockError::Busy { permission: permission.name(), shared });
        }
        Ok(())
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        for &byte in &self.bytes {
            // Closing the file releases what this could not.
            let _ = sys::ofd_set_lock(&self.file, ByteLock::Release, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opens() -> (tempfile::NamedTempFile, File, File) {
        let named = tempfile::NamedTempFile::new().unwrap();
        let first = named.reopen().unwrap();
        let second = named.reopen().unwrap();
        (named, first, second)
    }

    #[test]
    fn readers_share_and_writers_do_not() {
        let (_named, first, second) = opens();
        let read = ImageLock::acquire(&first, LockMode::Read).unwrap();
        ImageLock::acquire(&second, LockMode::Read).unwrap();
        assert!(matches!(
            ImageLock::acquire(&second, LockMode::Write),
            Err(LockError::Busy { permission: "write", shared: false })
        ));
        drop(read);
        let _write = ImageLock::acquire(&first, LockMode::Write).unwrap();
        assert!(matches!(ImageLock::acquire(&second, LockMode::Write), Err(LockError::Busy { .. })));
        assert!(matches!(ImageLock::acquire(&second, LockMode::Read), Err(LockError::Busy { .. })));
        ImageLock::acquire(&second, LockMode::ReadShared).unwrap();
    }

    #[test]
    fn a_failed_attempt_leaves_nothing_locked() {
        let (_named, first, second) = opens();
        let write = ImageLock::acquire(&first, LockMode::Write).unwrap();
        ImageLock::acquire(&second, LockMode::Write).unwrap_err();
        drop(write);
        ImageLock::acquire(&first, LockMode::Write).unwrap();
    }
}
