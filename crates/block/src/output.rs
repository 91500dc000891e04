use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use crate::RawFile;

/// A new file that appears at its target whole and on stable storage, or not at all.
///
/// It is written under a temporary name beside the target. [`commit`](Self::commit) syncs it, renames it over the target
/// and syncs the folder; dropping it instead removes it.
#[derive(Debug)]
pub struct OutputFile {
    target: PathBuf,
    temporary: TempPath,
    raw: RawFile,
}

impl OutputFile {
    /// Starts a file that is to become `target`. The target itself is not touched before [`commit`](Self::commit).
    ///
    /// The new file takes an existing target's permissions, else `0o666` less the umask.
    pub fn create(target: &Path) -> io::Result<Self> {
        let folder = folder_of(target);
        let existing = match target.metadata() {
            Ok(metadata) if !metadata.is_file() => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "the target exists and is not a regular file"));
            }
            Ok(metadata) => Some(metadata.permissions()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let mut builder = tempfile::Builder::new();
        let name = format!(".{}.", target.file_name().unwrap_or_default().to_string_lossy());
        builder.prefix(&name).suffix(".qtk-tmp").permissions(Permissions::from_mode(0o666));
        let (file, temporary) = builder.tempfile_in(folder)?.into_parts();
        if let Some(permissions) = existing {
            file.set_permissions(permissions)?;
        }
        Ok(Self { target: target.to_owned(), temporary, raw: RawFile::from_file(file)? })
    }

    /// The file to write to.
    #[must_use]
    pub fn storage(&self) -> &RawFile {
        &self.raw
    }

    /// The name that the file has until it is committed.
    #[must_use]
    pub fn temporary_path(&self) -> &Path {
        &self.temporary
    }

    /// Puts the file, fsynced, in its target's place and fsyncs the folder.
    pub fn commit(self) -> io::Result<()> {
        self.raw.file().sync_all()?;
        self.temporary.persist(&self.target).map_err(|error| error.error)?;
        File::open(folder_of(&self.target))?.sync_all()
    }
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
        let output = OutputFile::create(&target).unwrap();
        output.storage().write_at(b"new", 0).unwrap();
        drop(output);
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let output = OutputFile::create(&target).unwrap();
        output.storage().write_at(b"new", 0).unwrap();
        output.commit().unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
