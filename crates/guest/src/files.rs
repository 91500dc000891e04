use std::io::{Read, Write};
use std::path::Path;

use qtk_disk::{FileType, Follow, GuestPath, Location, NewNode, Node, NodeKind, PathProblem, SetAttributes, Tree};

use crate::chown::drop_capabilities;
use crate::copy::{BUFFER, copy_tree};
use crate::error::{Error, InGuest, OnHost, Result};
use crate::list::find;
use crate::mode::Mode;
use crate::users::OwnerIds;
use crate::walk::{Found, Step, Walk};

/// How [`remove`] goes about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RemoveOptions {
    /// Directories too, with everything below.
    pub recursive: bool,
    /// What is not there is no error.
    pub force: bool,
}

/// Removes a file, or a directory tree. Links are not followed, not even with a slash behind them.
pub fn remove(tree: &mut Tree, path: &GuestPath, options: RemoveOptions) -> Result<()> {
    const ACTION: &str = "remove";
    let start = match entry_of(tree, path, ACTION) {
        Err(Error::Refused { problem: PathProblem::NotFound, .. }) if options.force => return Ok(()),
        found => found?,
    };
    if start.name.is_empty() {
        return Err(Error::refused(ACTION, path, PathProblem::MountPoint));
    }
    if start.metadata.is_dir() && !options.recursive {
        return Err(Error::refused(ACTION, path, PathProblem::IsADirectory));
    }
    let mut walk = Walk::new(start, ACTION);
    while let Some(step) = walk.next(tree)? {
        match step {
            Step::File(found) => tree.unlink(found.parent, &found.name).in_guest(ACTION, &found.path)?,
            // Refused here, and not after everything in it is gone.
            Step::Enter(found) if !found.node.shares_file_system_with(found.parent) => {
                return Err(Error::refused(ACTION, &found.path, PathProblem::MountPoint));
            }
            Step::Enter(_) => {}
            Step::Leave(found) => tree.remove_dir(found.parent, &found.name).in_guest(ACTION, &found.path)?,
        }
    }
    Ok(())
}

/// The directory entry that a path names: a link itself, and what is refused is a name that stands for another entry.
fn entry_of(tree: &Tree, path: &GuestPath, action: &'static str) -> Result<Found> {
    let bare = without_slashes(path);
    if matches!(base_name(bare.as_bytes()), b"." | b"..") {
        return Err(Error::refused(action, path, PathProblem::BadName));
    }
    let found = find(tree, &bare, Follow::NotLast, action)?;
    if bare != *path && !found.metadata.is_dir() {
        return Err(Error::refused(action, path, PathProblem::NotADirectory));
    }
    Ok(found)
}

fn without_slashes(path: &GuestPath) -> GuestPath {
    let end = path.as_bytes().iter().rposition(|&byte| byte != b'/').map_or(0, |last| last + 1);
    GuestPath::from(&path.as_bytes()[..end])
}

/// Refuses a slash behind the new name of anything but a directory.
fn check_new_name(path: &GuestPath, location: &Location, action: &'static str) -> Result<()> {
    if location.node.is_none() && path.as_bytes().ends_with(b"/") {
        return Err(Error::refused(action, path, PathProblem::NotADirectory));
    }
    Ok(())
}

/// How directories are made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MkdirOptions {
    /// Missing parents are made too, and a directory that is there already is no error.
    pub parents: bool,
    /// Permissions of the last directory; 0755 unless asked, and for its parents.
    pub mode: Option<Mode>,
    /// Owner of all that are made; root unless asked.
    pub owner: OwnerIds,
}

const NEW_DIRECTORY: u16 = 0o755;

/// Makes a directory, with its missing parents if asked, and returns it.
pub fn make_directories(tree: &mut Tree, path: &GuestPath, options: &MkdirOptions) -> Result<Node> {
    let path = &without_slashes(path);
    if options.parents {
        for (at, _) in path.as_bytes().iter().enumerate().filter(|&(at, &byte)| byte == b'/' && at > 0) {
            let parent = GuestPath::from(&path.as_bytes()[..at]);
            make_directory(tree, &parent, &MkdirOptions { mode: None, ..options.clone() })?;
        }
    }
    make_directory(tree, path, options)
}

fn make_directory(tree: &mut Tree, path: &GuestPath, options: &MkdirOptions) -> Result<Node> {
    const ACTION: &str = "make the directory";
    let location = tree.locate(path.as_bytes(), Follow::All).in_guest(ACTION, path)?;
    if let Some(node) = location.node {
        let is_dir = tree.metadata(node).in_guest(ACTION, path)?.is_dir();
        return match (is_dir, options.parents) {
            (true, true) => Ok(node),
            (false, true) => Err(Error::refused(ACTION, &location.path, PathProblem::NotADirectory)),
            (_, false) => Err(Error::refused(ACTION, &location.path, PathProblem::Exists)),
        };
    }
    let permissions = options.mode.as_ref().map_or(NEW_DIRECTORY, |mode| mode.apply(NEW_DIRECTORY, true));
    let (uid, gid) = (options.owner.uid.unwrap_or(0), options.owner.gid.unwrap_or(0));
    let new = NewNode { kind: NodeKind::Directory, permissions, uid, gid, mtime: None };
    tree.create(location.parent, &location.name, &new).in_guest(ACTION, path)
}

/// Moves files: to a new name, or into a directory. Between file systems everything is copied and then removed.
pub fn move_files(tree: &mut Tree, sources: &[GuestPath], dest: &GuestPath) -> Result<()> {
    const ACTION: &str = "move";
    let into = directory(tree, dest)?;
    if into.is_none() && sources.len() != 1 {
        return Err(Error::refused(ACTION, dest, PathProblem::NotADirectory));
    }
    for source in sources {
        let found = entry_of(tree, source, ACTION)?;
        if found.name.is_empty() || found.metadata.is_dir() && !found.node.shares_file_system_with(found.parent) {
            return Err(Error::refused(ACTION, source, PathProblem::MountPoint));
        }
        let target = match into {
            Some(_) => dest.join(&found.name),
            None => dest.clone(),
        };
        let target = tree.locate(target.as_bytes(), Follow::NotLast).in_guest(ACTION, dest)?;
        if into.is_none() && !found.metadata.is_dir() {
            check_new_name(dest, &target, ACTION)?;
        }
        if is_within(&target.path, &found.path) {
            return Err(Error::refused(ACTION, &target.path, PathProblem::InsideItself));
        }
        if found.parent.shares_file_system_with(target.parent) {
            let renamed = tree.rename(found.parent, &found.name, target.parent, &target.name);
            renamed.in_guest(ACTION, &target.path)?;
        } else {
            make_room(tree, &target, found.metadata.is_dir(), ACTION)?;
            let path = found.path.clone();
            copy_tree(tree, found, target.parent, &target.name)?;
            remove(tree, &path, RemoveOptions { recursive: true, force: false })?;
        }
    }
    Ok(())
}

fn is_within(path: &GuestPath, dir: &GuestPath) -> bool {
    let rest = path.as_bytes().strip_prefix(dir.as_bytes());
    rest.is_some_and(|rest| rest.starts_with(b"/"))
}

/// Removes what a name would replace, by the rules of rename(2).
fn make_room(tree: &mut Tree, target: &Location, for_directory: bool, action: &'static str) -> Result<()> {
    let Some(node) = target.node else { return Ok(()) };
    let is_dir = tree.metadata(node).in_guest(action, &target.path)?.is_dir();
    match (is_dir, for_directory) {
        (true, false) => Err(Error::refused(action, &target.path, PathProblem::IsADirectory)),
        (false, true) => Err(Error::refused(action, &target.path, PathProblem::NotADirectory)),
        (true, true) => tree.remove_dir(target.parent, &target.name).in_guest(action, &target.path),
        (false, false) => tree.unlink(target.parent, &target.name).in_guest(action, &target.path),
    }
}

/// The directory at a path, if there is one.
pub(crate) fn directory(tree: &Tree, path: &GuestPath) -> Result<Option<Node>> {
    let location = match tree.locate(path.as_bytes(), Follow::All) {
        Err(error) if error.is_not_found() => return Ok(None),
        found => found.in_guest("look up", path)?,
    };
    let Some(node) = location.node else { return Ok(None) };
    Ok(tree.metadata(node).in_guest("look up", path)?.is_dir().then_some(node))
}

/// How [`link`] goes about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkOptions {
    /// A symbolic link, whose target need not exist.
    pub symbolic: bool,
    /// What has the name already is replaced, unless it is a directory.
    pub force: bool,
}

/// Makes a link at `path`, or, if that is a directory, in it under the target's name.
///
/// A symbolic link that is at `path` already is never followed, not even to a directory: as with `ln -n`, it is what `force` replaces.
pub fn link(tree: &mut Tree, target: &[u8], path: &GuestPath, options: LinkOptions) -> Result<()> {
    const ACTION: &str = "make the link";
    let mut location = tree.locate(path.as_bytes(), Follow::NotLast).in_guest(ACTION, path)?;
    check_new_name(path, &location, ACTION)?;
    if let Some(node) = location.node
        && tree.metadata(node).in_guest(ACTION, path)?.is_dir()
    {
        let inside = path.join(base_name(target));
        location = tree.locate(inside.as_bytes(), Follow::NotLast).in_guest(ACTION, &inside)?;
    }
    let source = match options.symbolic {
        true => None,
        false => Some(find(tree, &GuestPath::from(target), Follow::NotLast, "link to")?),
    };
    if let Some(source) = &source {
        if source.metadata.is_dir() {
            return Err(Error::refused("link to", &source.path, PathProblem::IsADirectory));
        }
        if location.node == Some(source.node) {
            return Ok(());
        }
    }
    if location.node.is_some() && !options.force {
        return Err(Error::refused(ACTION, &location.path, PathProblem::Exists));
    }
    make_room(tree, &location, false, ACTION)?;
    match source {
        Some(source) => tree.link(source.node, location.parent, &location.name),
        None => {
            let new = NewNode { kind: NodeKind::Symlink(target), permissions: 0o777, uid: 0, gid: 0, mtime: None };
            tree.create(location.parent, &location.name, &new).map(drop)
        }
    }
    .in_guest(ACTION, &location.path)
}

fn base_name(path: &[u8]) -> &[u8] {
    path.split(|&byte| byte == b'/').rfind(|name| !name.is_empty()).unwrap_or(path)
}

/// How [`write()`] goes about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Permissions; unless asked, those that the file has, and 0644 for a new one.
    pub mode: Option<Mode>,
    /// Owner; unless asked, the one that the file has, and root for a new one.
    pub owner: OwnerIds,
    /// The content goes behind what the file holds.
    pub append: bool,
}

const NEW_FILE: u16 = 0o644;

/// Gives a file this content, following links; a missing file is made. Returns the number of bytes written.
pub fn write(tree: &mut Tree, path: &GuestPath, content: &mut dyn Read, options: &WriteOptions) -> Result<u64> {
    let location = tree.locate(path.as_bytes(), Follow::All).in_guest("write", path)?;
    check_new_name(path, &location, "write")?;
    let (file, permissions) = match location.node {
        Some(node) => {
            let metadata = tree.metadata(node).in_guest("write", path)?;
            check_regular(&metadata.file_type, path)?;
            (node, metadata.permissions)
        }
        None => {
            let new = NewNode { kind: NodeKind::File, permissions: NEW_FILE, uid: 0, gid: 0, mtime: None };
            (tree.create(location.parent, &location.name, &new).in_guest("write", path)?, NEW_FILE)
        }
    };
    let start = if options.append { tree.metadata(file).in_guest("write", path)?.size } else { 0 };
    if location.node.is_some() {
        tree.truncate(file, start).in_guest("write", path)?;
        drop_capabilities(tree, file, "write", path)?;
    }
    let written = pour(tree, file, content, start, path, Path::new("standard input"))?;
    let attributes = SetAttributes {
        permissions: options.mode.as_ref().map(|mode| mode.apply(permissions, false)),
        uid: options.owner.uid,
        gid: options.owner.gid,
        ..SetAttributes::default()
    };
    tree.set_attributes(file, &attributes).in_guest("write", path)?;
    Ok(written)
}

fn check_regular(file_type: &FileType, path: &GuestPath) -> Result<()> {
    match file_type {
        FileType::Regular => Ok(()),
        FileType::Directory => Err(Error::refused("write", path, PathProblem::IsADirectory)),
        _ => Err(Error::refused("write", path, PathProblem::NotAFile)),
    }
}

/// Writes all that a reader gives, from `start` on, in large pieces. `origin` is what a message calls the reader.
pub(crate) fn pour(
    tree: &mut Tree,
    file: Node,
    content: &mut dyn Read,
    start: u64,
    path: &GuestPath,
    origin: &Path,
) -> Result<u64> {
    let mut buffer = Vec::with_capacity(BUFFER);
    let mut written = 0;
    loop {
        buffer.clear();
        let read = Read::take(&mut *content, BUFFER as u64).read_to_end(&mut buffer).on_host("read", origin)?;
        if read == 0 {
            return Ok(written);
        }
        tree.write_at(file, &buffer, start + written).in_guest("write", path)?;
        written += read as u64;
    }
}

/// Copies a file's content to `output`, following links.
pub fn cat(tree: &Tree, path: &GuestPath, output: &mut dyn Write) -> Result<()> {
    let found = find(tree, path, Follow::All, "read")?;
    match found.metadata.file_type {
        FileType::Regular => {}
        FileType::Directory => return Err(Error::refused("read", path, PathProblem::IsADirectory)),
        _ => return Err(Error::refused("read", path, PathProblem::NotAFile)),
    }
    let len = usize::try_from(found.metadata.size).unwrap_or(BUFFER).clamp(1, BUFFER);
    let mut buffer = vec![0; len];
    let mut at = 0;
    loop {
        let read = tree.read_at(found.node, &mut buffer, at).in_guest("read", path)?;
        if read == 0 {
            return Ok(());
        }
        output.write_all(&buffer[..read]).on_host("write", Path::new("the output"))?;
        at += read as u64;
    }
}
