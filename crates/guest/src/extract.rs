//! Files from the guest to the host.
//!
//! A guest is not trusted: its links are made as links and never followed, its names cannot lead out of the target directory,
//! and nothing is written through what is already there.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use qtk_disk::{FileType, Follow, GuestPath, Metadata, Node, PathProblem, Timestamp, Tree};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use crate::copy::BUFFER;
use crate::error::{Error, InGuest, OnHost, Result};
use crate::list::find;
use crate::walk::{Found, Step, Walk};

/// How [`extract`] goes about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtractOptions {
    /// Owners, and setuid, setgid and sticky bits, are those of the guest. Needs root.
    pub owners: bool,
}

/// What [`extract`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extracted {
    /// Files, links and directories that were made.
    pub files: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Devices, pipes and sockets, which were left out.
    pub skipped: Vec<GuestPath>,
}

/// Copies files and directory trees into the host directory `dir`, which is made if it is missing, each under the name it was asked for by.
///
/// A named source that is a link is followed inside the guest; links in trees stay links. Modes, times, holes and hard links are
/// kept. A file that is there already is replaced; a directory is filled up, and keeps its attributes.
pub fn extract(tree: &Tree, sources: &[GuestPath], dir: &Path, options: ExtractOptions) -> Result<Extracted> {
    let found = sources.iter().map(|source| {
        let found = find(tree, source, Follow::All, "read")?;
        let asked = source.as_bytes().split(|&byte| byte == b'/').rfind(|name| !name.is_empty()).unwrap_or_default();
        let name = if matches!(asked, b"." | b"..") { found.name.clone() } else { asked.to_vec() };
        Ok(Found { name, ..found })
    });
    // All are looked at first, so that one that is missing leaves nothing behind.
    let found = found.collect::<Result<Vec<_>>>()?;
    std::fs::create_dir_all(dir).on_host("make", dir)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let base = rustix::fs::open(dir, flags, Mode::empty()).on_host("open", dir)?;
    let mut extraction =
        Extraction { tree, options, base: &base, base_path: dir, links: BTreeMap::new(), done: Extracted::default() };
    for found in found {
        extraction.tree_of_files(found)?;
    }
    Ok(extraction.done)
}

struct Extraction<'a> {
    tree: &'a Tree,
    options: ExtractOptions,
    base: &'a OwnedFd,
    base_path: &'a Path,
    /// Files with several names, and the first one's path below `base`.
    links: BTreeMap<Node, PathBuf>,
    done: Extracted,
}

/// A directory on the host that is being filled.
struct HostDir {
    fd: OwnedFd,
    /// Below the target directory.
    path: PathBuf,
    is_new: bool,
}

impl Extraction<'_> {
    fn tree_of_files(&mut self, start: Found) -> Result<()> {
        let base = self.base.try_clone().on_host("open", self.base_path)?;
        let mut open = vec![HostDir { fd: base, path: PathBuf::new(), is_new: false }];
        let mut walk = Walk::new(start, "read");
        while let Some(step) = walk.next(self.tree)? {
            let Some(parent) = open.last() else { break };
            match step {
                Step::File(found) => self.file(&found, parent)?,
                // The guest's root has no name: what is in it goes straight into the target.
                Step::Enter(found) if found.name.is_empty() => {
                    let fd = parent.fd.try_clone().on_host("open", self.base_path)?;
                    open.push(HostDir { fd, path: PathBuf::new(), is_new: false });
                }
                Step::Enter(found) => {
                    let dir = self.directory(&found, parent)?;
                    open.push(dir);
                }
                Step::Leave(found) => {
                    if let Some(dir) = open.pop().filter(|dir| dir.is_new) {
                        self.finish(dir.fd.as_fd(), &found.metadata, &dir.path)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn on_host<T>(&self, result: rustix::io::Result<T>, path: &Path) -> Result<T> {
        result.on_host("write", &self.base_path.join(path))
    }

    fn directory(&mut self, found: &Found, parent: &HostDir) -> Result<HostDir> {
        let name = host_name(found)?;
        let path = parent.path.join(name);
        let is_new = match rustix::fs::mkdirat(&parent.fd, name, Mode::RWXU) {
            Err(Errno::EXIST) => false,
            made => self.on_host(made, &path).map(|()| true)?,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = self.on_host(rustix::fs::openat(&parent.fd, name, flags, Mode::empty()), &path)?;
        self.done.files += u64::from(is_new);
        Ok(HostDir { fd, path, is_new })
    }

    fn file(&mut self, found: &Found, parent: &HostDir) -> Result<()> {
        let name = host_name(found)?;
        let path = parent.path.join(name);
        match found.metadata.file_type {
            FileType::Regular if found.metadata.links > 1 => match self.links.get(&found.node) {
                Some(first) => {
                    let link = || rustix::fs::linkat(self.base, first, &parent.fd, name, AtFlags::empty());
                    self.on_host(replacing(&parent.fd, name, link), &path)?;
                }
                None => {
                    self.regular_file(found, parent, name, &path)?;
                    self.links.insert(found.node, path);
                }
            },
            FileType::Regular => self.regular_file(found, parent, name, &path)?,
            FileType::Symlink => self.symlink(found, parent, name, &path)?,
            _ => {
                self.done.skipped.push(found.path.clone());
                return Ok(());
            }
        }
        self.done.files += 1;
        Ok(())
    }

    fn symlink(&self, found: &Found, parent: &HostDir, name: &OsStr, path: &Path) -> Result<()> {
        let target = self.tree.read_link(found.node).in_guest("read", &found.path)?;
        let link = || rustix::fs::symlinkat(OsStr::from_bytes(&target), &parent.fd, name);
        self.on_host(replacing(&parent.fd, name, link), path)?;
        if self.options.owners {
            let (uid, gid) = (Uid::from_raw(found.metadata.uid), Gid::from_raw(found.metadata.gid));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            self.on_host(rustix::fs::chownat(&parent.fd, name, Some(uid), Some(gid), flags), path)?;
        }
        let times = timestamps(&found.metadata);
        self.on_host(rustix::fs::utimensat(&parent.fd, name, &times, AtFlags::SYMLINK_NOFOLLOW), path)
    }

    fn regular_file(&mut self, found: &Found, parent: &HostDir, name: &OsStr, path: &Path) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let create = || rustix::fs::openat(&parent.fd, name, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(self.on_host(replacing(&parent.fd, name, create), path)?);
        let written = self.content(found, &file, path).and_then(|()| self.finish(file.as_fd(), &found.metadata, path));
        if written.is_err() {
            // Half a file must not be taken for a whole one; the first error is the one to report.
            let _ = rustix::fs::unlinkat(&parent.fd, name, AtFlags::empty());
        }
        written
    }

    fn content(&mut self, found: &Found, file: &File, path: &Path) -> Result<()> {
        let size = found.metadata.size;
        let full = self.base_path.join(path);
        file.set_len(size).on_host("write", &full)?;
        let mut buffer = vec![0; usize::try_from(size).unwrap_or(BUFFER).min(BUFFER)];
        let mut at = 0;
        while let Some(range) = self.tree.data_range(found.node, at).in_guest("read", &found.path)? {
            at = range.start;
            // Blocks behind the file's end are no part of it.
            let end = range.end.min(size);
            while at < end {
                let len = usize::try_from(end - at).unwrap_or(BUFFER).min(BUFFER);
                let read = self.tree.read_at(found.node, &mut buffer[..len], at).in_guest("read", &found.path)?;
                if read == 0 {
                    break;
                }
                file.write_all_at(&buffer[..read], at).on_host("write", &full)?;
                at += read as u64;
            }
            if range.end >= size {
                break;
            }
            at = at.max(range.end);
        }
        self.done.bytes += size;
        Ok(())
    }

    /// Owner first: a change of owner takes setuid away.
    fn finish(&self, fd: BorrowedFd<'_>, metadata: &Metadata, path: &Path) -> Result<()> {
        let kept = if self.options.owners { 0o7777 } else { 0o777 };
        if self.options.owners {
            let (uid, gid) = (Uid::from_raw(metadata.uid), Gid::from_raw(metadata.gid));
            self.on_host(rustix::fs::fchown(fd, Some(uid), Some(gid)), path)?;
        }
        let mode = Mode::from_raw_mode(u32::from(metadata.permissions & kept));
        self.on_host(rustix::fs::fchmod(fd, mode), path)?;
        self.on_host(rustix::fs::futimens(fd, &timestamps(metadata)), path)
    }
}

/// A name that cannot lead anywhere but into the directory it is used in.
fn host_name(found: &Found) -> Result<&OsStr> {
    let is_bad = matches!(found.name.as_slice(), b"" | b"." | b"..");
    if is_bad || found.name.iter().any(|byte| matches!(byte, b'/' | 0)) {
        return Err(Error::refused("extract", &found.path, PathProblem::BadName));
    }
    Ok(OsStr::from_bytes(&found.name))
}

/// Makes something under a name, in the place of a file or link that has it already. A directory stays.
fn replacing<T>(dir: &OwnedFd, name: &OsStr, make: impl Fn() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    match make() {
        Err(Errno::EXIST) => {
            rustix::fs::unlinkat(dir, name, AtFlags::empty())?;
            make()
        }
        made => made,
    }
}

fn timestamps(metadata: &Metadata) -> Timestamps {
    let time = |time: Timestamp| Timespec { tv_sec: time.seconds, tv_nsec: time.nanos.into() };
    Timestamps { last_access: time(metadata.atime), last_modification: time(metadata.mtime) }
}
