//! Copies inside the guest that keep everything: what a move from one file system to another takes.

use std::collections::BTreeMap;

use qtk_disk::{FileType, GuestPath, Metadata, NewNode, Node, NodeKind, SetAttributes, Tree};

use crate::error::{InGuest, Result};
use crate::walk::{Found, Step, Walk};

/// Bytes moved at a time.
pub(crate) const BUFFER: usize = 1 << 20;

/// Copies `source` and everything below it to the free name `name` in `parent`.
pub(crate) fn copy_tree(tree: &mut Tree, source: Found, parent: Node, name: &[u8]) -> Result<()> {
    let mut copied = BTreeMap::new();
    let mut parents = vec![parent];
    let mut walk = Walk::new(source, "copy");
    while let Some(step) = walk.next(tree)? {
        let into = *parents.last().unwrap_or(&parent);
        let is_top = parents.len() == 1;
        match step {
            Step::File(found) => {
                let name = if is_top { name } else { &found.name };
                copy_file(tree, &found, into, name, &mut copied)?;
            }
            Step::Enter(found) => {
                let name = if is_top { name } else { &found.name };
                parents.push(copy_node(tree, &found, into, name, NodeKind::Directory)?);
            }
            Step::Leave(found) => {
                if let Some(copy) = parents.pop() {
                    // What was put into the directory has changed its time.
                    let times = SetAttributes { mtime: Some(found.metadata.mtime), ..SetAttributes::default() };
                    tree.set_attributes(copy, &times).in_guest("copy", &found.path)?;
                }
            }
        }
    }
    Ok(())
}

fn copy_file(
    tree: &mut Tree,
    found: &Found,
    parent: Node,
    name: &[u8],
    copied: &mut BTreeMap<Node, Node>,
) -> Result<()> {
    if let Some(&copy) = copied.get(&found.node) {
        return tree.link(copy, parent, name).in_guest("copy", &found.path);
    }
    let (major, minor) = found.metadata.rdev;
    let target;
    let kind = match found.metadata.file_type {
        FileType::Symlink => {
            target = tree.read_link(found.node).in_guest("copy", &found.path)?;
            NodeKind::Symlink(&target)
        }
        FileType::CharDevice => NodeKind::CharDevice(major, minor),
        FileType::BlockDevice => NodeKind::BlockDevice(major, minor),
        FileType::Fifo => NodeKind::Fifo,
        FileType::Socket => NodeKind::Socket,
        _ => NodeKind::File,
    };
    let copy = copy_node(tree, found, parent, name, kind)?;
    if found.metadata.file_type == FileType::Regular {
        copy_content(tree, found.node, copy, &found.metadata, &found.path)?;
        let times = times_of(&found.metadata);
        tree.set_attributes(copy, &times).in_guest("copy", &found.path)?;
    }
    if found.metadata.links > 1 {
        copied.insert(found.node, copy);
    }
    Ok(())
}

/// Makes the file with the attributes of the one it is a copy of.
fn copy_node(tree: &mut Tree, found: &Found, parent: Node, name: &[u8], kind: NodeKind<'_>) -> Result<Node> {
    let metadata = &found.metadata;
    let new = NewNode {
        kind,
        permissions: metadata.permissions,
        uid: metadata.uid,
        gid: metadata.gid,
        mtime: Some(metadata.mtime),
    };
    let copy = tree.create(parent, name, &new).in_guest("copy", &found.path)?;
    for (name, value) in tree.xattrs(found.node).in_guest("copy", &found.path)? {
        tree.set_xattr(copy, &name, &value).in_guest("copy the attributes of", &found.path)?;
    }
    Ok(copy)
}

fn copy_content(tree: &mut Tree, from: Node, to: Node, metadata: &Metadata, path: &GuestPath) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut at = 0;
    if metadata.allocated >= metadata.size {
        tree.reserve(to, metadata.size).in_guest("copy", path)?;
    }
    while let Some(range) = tree.data_range(from, at).in_guest("copy", path)? {
        at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(BUFFER).min(BUFFER);
            let read = tree.read_at(from, &mut buffer[..len], at).in_guest("copy", path)?;
            if read == 0 {
                break;
            }
            tree.write_at(to, &buffer[..read], at).in_guest("copy", path)?;
            at += read as u64;
        }
        at = at.max(range.end);
    }
    tree.truncate(to, metadata.size).in_guest("copy", path)
}

fn times_of(metadata: &Metadata) -> SetAttributes {
    SetAttributes { atime: Some(metadata.atime), mtime: Some(metadata.mtime), ..SetAttributes::default() }
}
