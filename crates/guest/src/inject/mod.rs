//! Files from the host into the guest.
//!
//! What arrives where:
//! - A named source that is a link is followed; links inside a directory tree stay links. A named pipe or character device is
//!   read to its end; inside a tree such files are made anew.
//! - `DIR/.` stands for what is in `DIR`.
//! - New files belong to root and have the source's permissions without setuid, setgid and sticky; the modification time is the
//!   source's. `preserve` keeps owner, all permissions, access time and extended attributes too; `mode` (for regular files)
//!   and `owner` go before either.
//! - An existing file gets new content and the permissions, owner and times that a new one would have. Its extended attributes,
//!   such as an SELinux label, stay; capabilities go, as they do whenever a program is written. Other names of the same file
//!   keep the old content.
//! - A guest's link at the destination is followed. Inside a tree, directories follow a guest's links to directories, as a merged
//!   `/usr` needs it, and everything else replaces a link. A directory is never replaced.
//! - Existing directories keep their attributes.

mod content;
mod plan;

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use qtk_disk::{
    FileType, Follow, GuestPath, Location, NewNode, Node, NodeKind, PathProblem, SetAttributes, Timestamp, Tree,
};

use crate::chown::{CAPABILITIES, drop_capabilities};
use crate::error::{Error, InGuest, Result};
use crate::files::{MkdirOptions, directory, make_directories, pour};
use crate::mode::Mode;
use crate::users::OwnerIds;
use plan::{Kind, Planned};

const ACTION: &str = "write";

/// Where content comes from.
pub enum Source<'a> {
    /// A file or directory on the host.
    Path(PathBuf),
    /// Anything that can be read to its end. It needs a file name as its destination.
    Stream(&'a mut dyn Read),
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => f.debug_tuple("Path").field(path).finish(),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

/// How [`inject`] goes about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InjectOptions {
    /// Missing directories above the destination are made, mode 0755, root's.
    pub parents: bool,
    /// Permissions of regular files.
    pub mode: Option<Mode>,
    /// Owner of everything that is written.
    pub owner: OwnerIds,
    /// Owner, permissions, times and extended attributes are those of the source.
    pub preserve: bool,
    /// A named source that is a link stays one.
    pub keep_links: bool,
}

/// What [`inject`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Injected {
    /// Files, links, devices and directories that were written or made.
    pub files: u64,
    /// Bytes of content.
    pub bytes: u64,
}

/// Copies sources to `dest`: into it, if it is a directory, ends in a slash or there are several; else to that name.
///
/// All sources are looked at before anything is written, so that one that is missing or unreadable changes nothing.
pub fn inject(
    tree: &mut Tree,
    sources: &mut [Source<'_>],
    dest: &GuestPath,
    options: &InjectOptions,
) -> Result<Injected> {
    let plans: Vec<Vec<Planned>> = sources
        .iter()
        .map(|source| match source {
            Source::Path(path) => plan::plan(path, options.keep_links),
            Source::Stream(_) => Ok(Vec::new()),
        })
        .collect::<Result<_>>()?;
    let into = destination(tree, sources.len(), dest, options)?;
    let mut injection = Injection { tree, options, linked: BTreeMap::new(), done: Injected::default() };
    for (source, plan) in sources.iter_mut().zip(&plans) {
        match source {
            Source::Path(path) => injection.tree_of_files(plan, &target(path, dest, into)?)?,
            Source::Stream(_) if into => {
                let path = PathBuf::from("standard input");
                return Err(Error::Source { path, problem: "a stream needs a file name as its destination" });
            }
            Source::Stream(stream) => injection.stream(*stream, dest)?,
        }
    }
    Ok(injection.done)
}

/// Makes what must be there first; whether sources go into `dest`, rather than to that name.
fn destination(tree: &mut Tree, sources: usize, dest: &GuestPath, options: &InjectOptions) -> Result<bool> {
    if directory(tree, dest)?.is_some() {
        return Ok(true);
    }
    let parents = MkdirOptions { parents: true, ..MkdirOptions::default() };
    if dest.as_bytes().ends_with(b"/") || sources > 1 {
        if !options.parents {
            let location = tree.locate(dest.as_bytes(), Follow::All).in_guest(ACTION, dest)?;
            location.existing().in_guest("write into", dest)?;
            return Err(Error::refused("write into", dest, PathProblem::NotADirectory));
        }
        make_directories(tree, dest, &parents)?;
        return Ok(true);
    }
    let end_of_parent = dest.as_bytes().iter().rposition(|&byte| byte == b'/').unwrap_or(0);
    if options.parents && end_of_parent > 0 {
        make_directories(tree, &GuestPath::from(&dest.as_bytes()[..end_of_parent]), &parents)?;
    }
    Ok(false)
}

/// Where a source goes.
fn target(source: &Path, dest: &GuestPath, into: bool) -> Result<GuestPath> {
    let bytes = source.as_os_str().as_bytes();
    if !into || bytes == b"." || bytes.ends_with(b"/.") {
        return Ok(dest.clone());
    }
    let unnamed = || Error::Source { path: source.to_owned(), problem: "has no name; write DIR/. for what is in DIR" };
    Ok(dest.join(source.file_name().ok_or_else(unnamed)?.as_bytes()))
}

struct Injection<'a> {
    tree: &'a mut Tree,
    options: &'a InjectOptions,
    /// Files with several names on the host, by device and inode, and what they became.
    linked: BTreeMap<(u64, u64), Node>,
    done: Injected,
}

/// A directory of the plan, now in the guest.
struct Placed {
    path: GuestPath,
    node: Node,
    is_new: bool,
}

impl Injection<'_> {
    fn stream(&mut self, stream: &mut dyn Read, dest: &GuestPath) -> Result<()> {
        let location = self.tree.locate(dest.as_bytes(), Follow::All).in_guest(ACTION, dest)?;
        let owner = self.options.owner;
        let permissions = self.options.mode.as_ref().map_or(0o644, |mode| mode.apply(0o644, false));
        let attributes = SetAttributes {
            permissions: Some(permissions),
            uid: Some(owner.uid.unwrap_or(0)),
            gid: Some(owner.gid.unwrap_or(0)),
            ..SetAttributes::default()
        };
        let file = self.empty_file(&location, &attributes)?;
        self.done.bytes += pour(self.tree, file, stream, 0, dest, Path::new("standard input"))?;
        self.done.files += 1;
        self.tree.set_attributes(file, &attributes).in_guest(ACTION, dest)
    }

    fn tree_of_files(&mut self, plan: &[Planned], dest: &GuestPath) -> Result<()> {
        let mut placed: Vec<Option<Placed>> = Vec::with_capacity(plan.len());
        for item in plan {
            let parent = item.parent.and_then(|index| placed.get(index)?.as_ref());
            let location = match parent {
                Some(parent) => Location {
                    path: parent.path.join(&item.name),
                    parent: parent.node,
                    name: item.name.clone(),
                    node: self.tree.lookup(parent.node, &item.name).in_guest(ACTION, &parent.path)?,
                },
                None => {
                    let follow = if matches!(item.kind, Kind::Symlink(_)) { Follow::NotLast } else { Follow::All };
                    self.tree.locate(dest.as_bytes(), follow).in_guest(ACTION, dest)?
                }
            };
            placed.push(self.place(item, location)?);
        }
        // What was put into a new directory has changed its time.
        for (item, placed) in plan.iter().zip(&placed).rev() {
            if let Some(placed) = placed.as_ref().filter(|placed| placed.is_new) {
                let attributes = self.attributes(item);
                self.tree.set_attributes(placed.node, &attributes).in_guest(ACTION, &placed.path)?;
            }
        }
        Ok(())
    }

    /// Puts one file, or a directory without its content, into the guest.
    fn place(&mut self, item: &Planned, location: Location) -> Result<Option<Placed>> {
        if let Kind::Directory = item.kind {
            return self.place_directory(item, location).map(Some);
        }
        let identity = (item.metadata.dev(), item.metadata.ino());
        let is_file = matches!(item.kind, Kind::File);
        self.done.files += 1;
        if is_file
            && let Some(&known) = self.linked.get(&identity)
            && known.shares_file_system_with(location.parent)
        {
            if location.node != Some(known) {
                self.make_room(&location)?;
                self.tree.link(known, location.parent, &location.name).in_guest("link", &location.path)?;
            }
            return Ok(None);
        }
        let attributes = self.attributes(item);
        let node = match &item.kind {
            Kind::File | Kind::Stream => {
                let node = self.empty_file(&location, &attributes)?;
                self.done.bytes += content::copy(self.tree, item, node, &location.path)?;
                node
            }
            kind => {
                self.make_room(&location)?;
                self.create(&location, kind.node(), &attributes)?
            }
        };
        self.copy_xattrs(item, node, &location.path)?;
        self.tree.set_attributes(node, &attributes).in_guest(ACTION, &location.path)?;
        if is_file && item.metadata.nlink() > 1 {
            self.linked.insert(identity, node);
        }
        Ok(None)
    }

    fn place_directory(&mut self, item: &Planned, location: Location) -> Result<Placed> {
        let mut location = location;
        if let Some(node) = location.node {
            let metadata = self.tree.metadata(node).in_guest(ACTION, &location.path)?;
            if metadata.file_type == FileType::Symlink {
                location = self.tree.locate(location.path.as_bytes(), Follow::All).in_guest(ACTION, &location.path)?;
            }
        }
        match location.node {
            Some(node) if self.tree.metadata(node).in_guest(ACTION, &location.path)?.is_dir() => {
                Ok(Placed { path: location.path, node, is_new: false })
            }
            Some(_) => Err(Error::refused("make the directory", &location.path, PathProblem::NotADirectory)),
            None => {
                let attributes = self.attributes(item);
                let node = self.create(&location, NodeKind::Directory, &attributes)?;
                self.copy_xattrs(item, node, &location.path)?;
                self.done.files += 1;
                Ok(Placed { path: location.path, node, is_new: true })
            }
        }
    }

    /// An empty regular file at the location: the one that is there, or a new one.
    fn empty_file(&mut self, location: &Location, attributes: &SetAttributes) -> Result<Node> {
        let mut kept = Vec::new();
        if let Some(node) = location.node {
            let metadata = self.tree.metadata(node).in_guest(ACTION, &location.path)?;
            if metadata.file_type == FileType::Regular {
                if metadata.links == 1 {
                    self.forget(node);
                    drop_capabilities(self.tree, node, ACTION, &location.path)?;
                    self.tree.truncate(node, 0).in_guest(ACTION, &location.path)?;
                    return Ok(node);
                }
                kept = self.tree.xattrs(node).in_guest(ACTION, &location.path)?;
                kept.retain(|(name, _)| name != CAPABILITIES);
            }
        }
        self.make_room(location)?;
        let node = self.create(location, NodeKind::File, attributes)?;
        for (name, value) in kept {
            self.tree.set_xattr(node, &name, &value).in_guest(ACTION, &location.path)?;
        }
        Ok(node)
    }

    /// What was known under this number is about to become something else.
    fn forget(&mut self, node: Node) {
        self.linked.retain(|_, known| *known != node);
    }

    /// Removes what has the name, unless it is a directory.
    fn make_room(&mut self, location: &Location) -> Result<()> {
        let Some(node) = location.node else { return Ok(()) };
        if self.tree.metadata(node).in_guest(ACTION, &location.path)?.is_dir() {
            return Err(Error::refused(ACTION, &location.path, PathProblem::IsADirectory));
        }
        self.forget(node);
        self.tree.unlink(location.parent, &location.name).in_guest("replace", &location.path)
    }

    fn create(&mut self, location: &Location, kind: NodeKind<'_>, attributes: &SetAttributes) -> Result<Node> {
        let new = NewNode {
            kind,
            permissions: attributes.permissions.unwrap_or(0o777),
            uid: attributes.uid.unwrap_or(0),
            gid: attributes.gid.unwrap_or(0),
            mtime: attributes.mtime,
        };
        self.tree.create(location.parent, &location.name, &new).in_guest("create", &location.path)
    }

    /// The attributes that a file of the plan gets in the guest.
    fn attributes(&self, item: &Planned) -> SetAttributes {
        let options = self.options;
        let metadata = &item.metadata;
        let kept = if options.preserve { 0o7777 } else { 0o777 };
        let from_source = u16::try_from(metadata.mode() & kept).unwrap_or(0);
        let permissions = match (&item.kind, &options.mode) {
            (Kind::Symlink(_), _) => None,
            (Kind::File | Kind::Stream, Some(mode)) => Some(mode.apply(from_source, false)),
            _ => Some(from_source),
        };
        let (uid, gid) = if options.preserve { (metadata.uid(), metadata.gid()) } else { (0, 0) };
        let time = |seconds, nanos| Timestamp { seconds, nanos: u32::try_from(nanos).unwrap_or(0) };
        // The time of a pipe says nothing of its content.
        let is_stream = matches!(item.kind, Kind::Stream);
        let mtime = (!is_stream).then(|| time(metadata.mtime(), metadata.mtime_nsec()));
        let atime = options.preserve.then(|| time(metadata.atime(), metadata.atime_nsec()));
        SetAttributes {
            permissions,
            uid: Some(options.owner.uid.unwrap_or(uid)),
            gid: Some(options.owner.gid.unwrap_or(gid)),
            atime,
            mtime,
        }
    }

    fn copy_xattrs(&mut self, item: &Planned, node: Node, path: &GuestPath) -> Result<()> {
        if !self.options.preserve {
            return Ok(());
        }
        for (name, value) in content::xattrs(item) {
            self.tree.set_xattr(node, &name, &value).in_guest("set the attributes of", path)?;
        }
        Ok(())
    }
}
