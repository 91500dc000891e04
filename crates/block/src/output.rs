use std::ffi::OsString;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use tempfile::TempPath;

use crate::RawFile;

/// When a new file counts as written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// When it is on stable storage.
    #[default]
    OnDisk,
    /// When the host has it. That is faster, but a power cut may lose it, and what was in its place too.
    InCache,
}

/// A new file that appears at its target whole or not at all.
///
/// Until [`commit`](Self::commit) it has no name, so that even a killed process leaves nothing behind; on file systems
/// without nameless files it has a temporary name beside the target, removed on drop.
#[derive(Debug)]
pub struct OutputFile {
    target: PathBuf,
    temporary: Option<TempPath>,
    raw: Arc<RawFile>,
    durability: Durability,
}

impl OutputFile {
    /// Starts a file that is to become `target`. The target itself is not touched before [`commit`](Self::commit).
    ///
    /// The new file takes an existing target's permissions, else `0o666` less the umask.
    pub fn create(target: &Path, durability: Durability) -> io::Result<Self> {
        // Renaming over a link would replace the link, not the file it points to.
        let target = &target.canonicalize().unwrap_or_else(|_| target.to_owned());
        let existing = match target.metadata() {
            Ok(metadata) if !metadata.is_file() => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "the target exists and is not a regular file"));
            }
            Ok(metadata) => Some(metadata.permissions()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let (file, temporary) = match nameless_file(folder_of(target)) {
            Ok(file) => (file, None),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let (file, temporary) = named_file(target)?;
                (file, Some(temporary))
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(permissions) = existing {
            file.set_permissions(permissions)?;
        }
        let raw = RawFile::from_file(file)?;
        let raw = Arc::new(match durability {
            Durability::OnDisk => raw.with_early_writeback(),
            Durability::InCache => raw,
        });
        Ok(Self { target: target.clone(), temporary, raw, durability })
    }

    /// The file to write to.
    #[must_use]
    pub fn storage(&self) -> &Arc<RawFile> {
        &self.raw
    }

    /// Puts the file in its target's place. Where it is to be on disk, it is fsynced before that and its folder after it.
    pub fn commit(self) -> io::Result<()> {
        let on_disk = self.durability == Durability::OnDisk;
        if on_disk {
            self.raw.file().sync_all()?;
        }
        let named = match self.temporary {
            Some(temporary) => temporary,
            None => give_name(self.raw.file(), &self.target)?,
        };
        named.persist(&self.target).map_err(|error| error.error)?;
        if on_disk {
            File::open(folder_of(&self.target))?.sync_all()?;
        }
        Ok(())
    }
}

fn nameless_file(folder: &Path) -> Result<File, Errno> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::from_raw_mode(0o666)).map(File::from)
}

fn named_file(target: &Path) -> io::Result<(File, TempPath)> {
    let mut builder = tempfile::Builder::new();
    builder.permissions(Permissions::from_mode(0o666));
    let file = builder.prefix(&prefix(target)).suffix(SUFFIX).tempfile_in(folder_of(target))?;
    Ok(file.into_parts())
}

/// Links a nameless file under a temporary name: a link cannot replace the target, the rename that follows can.
fn give_name(file: &File, target: &Path) -> io::Result<TempPath> {
    let descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut builder = tempfile::Builder::new();
    let linked = builder.prefix(&prefix(target)).suffix(SUFFIX).make_in(folder_of(target), |name| {
        Ok(rustix::fs::linkat(CWD, descriptor.as_str(), CWD, name, AtFlags::SYMLINK_FOLLOW)?)
    })?;
    Ok(linked.into_temp_path())
}

const SUFFIX: &str = ".qtk-tmp";

fn prefix(target: &Path) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(target.file_name().unwrap_or_default());
    prefix.push(".");
    prefix
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockWrite;

    #[test]
    fn appears_only_on_commit() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        std::fs::write(&target, "old").unwrap();
        std::fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
        let output = OutputFile::create(&target, Durability::OnDisk).unwrap();
        output.storage().write_at(b"new", 0).unwrap();
        drop(output);
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        for (durability, content) in [(Durability::OnDisk, b"new"), (Durability::InCache, b"hot")] {
            let output = OutputFile::create(&target, durability).unwrap();
            output.storage().write_at(content, 0).unwrap();
            output.commit().unwrap();
            assert_eq!(std::fs::read(&target).unwrap(), content);
            assert_eq!(target.metadata().unwrap().permissions().mode() & 0o777, 0o640);
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_named_file_serves_where_nameless_ones_cannot() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("out");
        let (file, temporary) = named_file(&target).unwrap();
        let raw = Arc::new(RawFile::from_file(file).unwrap());
        let (target_path, durability) = (target.clone(), Durability::OnDisk);
        let output = OutputFile { target: target_path, temporary: Some(temporary), raw, durability };
        output.storage().write_at(b"new", 0).unwrap();
        output.commit().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
