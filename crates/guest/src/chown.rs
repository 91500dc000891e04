use qtk_disk::{FileType, Follow, GuestPath, Metadata, Node, SetAttributes, Tree};

use crate::error::{InGuest, Result};
use crate::list::find;
use crate::mode::Mode;
use crate::users::OwnerIds;
use crate::walk::{Found, Step, Walk};

/// How [`chown`] goes about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChownOptions {
    /// Everything below a directory too. Links found on the way are changed themselves.
    pub recursive: bool,
    /// A link that is named is changed itself.
    pub no_dereference: bool,
}

/// Changes a file's permissions, following a link; with `recursive`, also those of everything below, except links.
pub fn chmod(tree: &mut Tree, path: &GuestPath, mode: &Mode, recursive: bool) -> Result<()> {
    const ACTION: &str = "change the mode of";
    let start = find(tree, path, Follow::All, ACTION)?;
    each(tree, start, ACTION, recursive, |tree, found| {
        if found.metadata.file_type == FileType::Symlink {
            return Ok(());
        }
        let permissions = mode.apply(found.metadata.permissions, found.metadata.is_dir());
        let attributes = SetAttributes { permissions: Some(permissions), ..SetAttributes::default() };
        tree.set_attributes(found.node, &attributes).in_guest(ACTION, &found.path)
    })
}

/// Changes whom a file belongs to. As in Linux, a program loses its setuid and setgid bits and its capabilities.
pub fn chown(tree: &mut Tree, path: &GuestPath, owner: OwnerIds, options: ChownOptions) -> Result<()> {
    const ACTION: &str = "change the owner of";
    let follow = if options.no_dereference { Follow::NotLast } else { Follow::All };
    let start = find(tree, path, follow, ACTION)?;
    each(tree, start, ACTION, options.recursive, |tree, found| {
        let OwnerIds { uid, gid } = owner;
        let permissions = without_set_ids(&found.metadata);
        let attributes = SetAttributes { uid, gid, permissions, ..SetAttributes::default() };
        tree.set_attributes(found.node, &attributes).in_guest(ACTION, &found.path)?;
        drop_capabilities(tree, found.node, ACTION, &found.path)
    })
}

/// The extended attribute that gives a program rights of its own.
pub(crate) const CAPABILITIES: &[u8] = b"security.capability";

/// Takes a program's capabilities away.
pub(crate) fn drop_capabilities(tree: &mut Tree, file: Node, action: &'static str, path: &GuestPath) -> Result<()> {
    let xattrs = tree.xattrs(file).in_guest(action, path)?;
    if xattrs.iter().any(|(name, _)| name == CAPABILITIES) {
        tree.remove_xattr(file, CAPABILITIES).in_guest(action, path)?;
    }
    Ok(())
}

/// The permissions of a regular file without setuid, and without setgid where that means execution; `None` if nothing changes.
fn without_set_ids(metadata: &Metadata) -> Option<u16> {
    const SETUID: u16 = 0o4000;
    const SETGID: u16 = 0o2000;
    const GROUP_EXECUTE: u16 = 0o010;
    let setgid = if metadata.permissions & GROUP_EXECUTE != 0 { SETGID } else { 0 };
    let kept = metadata.permissions & !(SETUID | setgid);
    (metadata.file_type == FileType::Regular && kept != metadata.permissions).then_some(kept)
}

fn each(
    tree: &mut Tree,
    start: Found,
    action: &'static str,
    recursive: bool,
    change: impl Fn(&mut Tree, &Found) -> Result<()>,
) -> Result<()> {
    if !recursive {
        return change(tree, &start);
    }
    let mut walk = Walk::new(start, action);
    while let Some(step) = walk.next(tree)? {
        match step {
            Step::File(found) | Step::Enter(found) => change(tree, &found)?,
            Step::Leave(_) => {}
        }
    }
    Ok(())
}
