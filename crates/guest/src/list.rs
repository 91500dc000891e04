use qtk_disk::{FileType, Follow, GuestPath, Metadata, Tree, Xattr};

use crate::error::{InGuest, Result};
use crate::walk::{Found, Step, Walk};

/// A file and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its path, without links, `.` and `..`.
    pub path: GuestPath,
    /// Its name in the directory.
    pub name: Vec<u8>,
    /// What its file system knows of it.
    pub metadata: Metadata,
    /// The target, of a symbolic link.
    pub target: Option<Vec<u8>>,
}

/// The entries of one directory, sorted by name; or a single file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The directory; `None` where a file was asked for.
    pub directory: Option<Entry>,
    /// What is in it.
    pub entries: Vec<Entry>,
}

/// Lists a directory, or everything below it, one call of `visit` per directory; or a file. A link is followed if it leads to
/// a directory.
pub fn list<E: From<crate::Error>>(
    tree: &Tree,
    path: &GuestPath,
    recursive: bool,
    visit: &mut dyn FnMut(Listing) -> Result<(), E>,
) -> Result<(), E> {
    let start = find(tree, path, Follow::All, "list").or_else(|error| {
        // A link that leads nowhere can be listed all the same.
        find(tree, path, Follow::NotLast, "list").map_err(|_| error)
    })?;
    if !start.metadata.is_dir() {
        let entry = entry(tree, find(tree, path, Follow::NotLast, "list")?)?;
        return visit(Listing { directory: None, entries: vec![entry] });
    }
    let mut walk = Walk::new(start, "list");
    while let Some(step) = walk.next(tree)? {
        let Step::Enter(dir) = step else { continue };
        let entries = walk.entries().iter().map(|child| {
            let path = dir.path.join(&child.name);
            let metadata = tree.metadata(child.node).in_guest("list", &path)?;
            entry(tree, Found { path, parent: dir.node, name: child.name.clone(), node: child.node, metadata })
        });
        let entries = entries.collect::<Result<_>>()?;
        visit(Listing { directory: Some(entry(tree, dir)?), entries })?;
        if !recursive {
            break;
        }
    }
    Ok(())
}

/// What is known of one file, and its extended attributes.
pub fn stat(tree: &Tree, path: &GuestPath, follow: Follow) -> Result<(Entry, Vec<Xattr>)> {
    let found = find(tree, path, follow, "stat")?;
    let xattrs = tree.xattrs(found.node).in_guest("read the attributes of", path)?;
    Ok((entry(tree, found)?, xattrs))
}

/// The file at a path.
pub(crate) fn find(tree: &Tree, path: &GuestPath, follow: Follow, action: &'static str) -> Result<Found> {
    let location = tree.locate(path.as_bytes(), follow).in_guest(action, path)?;
    let node = location.existing().in_guest(action, path)?;
    let metadata = tree.metadata(node).in_guest(action, path)?;
    Ok(Found { path: location.path, parent: location.parent, name: location.name, node, metadata })
}

fn entry(tree: &Tree, found: Found) -> Result<Entry> {
    let is_link = found.metadata.file_type == FileType::Symlink;
    let target = is_link.then(|| tree.read_link(found.node)).transpose().in_guest("read the link", &found.path)?;
    Ok(Entry { path: found.path, name: found.name, metadata: found.metadata, target })
}
