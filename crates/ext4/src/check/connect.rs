//! Whether every directory hangs together with the root, and every inode has as many links as names.

use super::Claims;
use super::state::{DirStates, InodeStates, Role};
use crate::metadata::FileType;
use crate::{FindingKind, GroupNr, Ino, Place};

/// The most links that a directory can count; with more subdirectories it has one.
const MAX_LINKS: u32 = 65_000;

/// Follows every directory's parents up to the root.
pub(super) fn check_tree(claims: &Claims<'_>, dirs: &DirStates) {
    let Some(root) = dirs.index(Ino::ROOT) else {
        claims.findings.damage(FindingKind::Connection, Place::Inode(Ino::ROOT), "the root directory is missing");
        return;
    };
    let mut connected = vec![false; dirs.0.len()];
    connected[root] = true;
    let mut path = Vec::new();
    for start in 0..dirs.0.len() {
        let mut at = start;
        path.clear();
        let reaches_root = loop {
            if connected[at] {
                break true;
            }
            path.push(at);
            // A path longer than there are directories goes round in circles.
            let parent = dirs.0[at].parent().and_then(|parent| dirs.index(parent));
            match parent {
                Some(parent) if path.len() <= dirs.0.len() => at = parent,
                _ => break false,
            }
        };
        if reaches_root {
            path.iter().for_each(|&at| connected[at] = true);
        } else {
            let ino = dirs.0[start].ino;
            claims.findings.damage(FindingKind::Connection, Place::Inode(ino), "the directory cannot be reached");
        }
    }
    for dir in &dirs.0 {
        let parent = if dir.ino == Ino::ROOT { Some(Ino::ROOT) } else { dir.parent() };
        if parent.is_some_and(|parent| dir.dot_dot() != parent.get()) {
            let text = format!("its entry .. leads to inode {}", dir.dot_dot());
            claims.findings.damage(FindingKind::Connection, Place::Inode(dir.ino), text);
        }
    }
}

/// Compares every inode's links with the names found.
pub(super) fn check_links(claims: &Claims<'_>, states: &InodeStates) {
    let geometry = claims.check.fs.geometry();
    for group in (0..geometry.groups).map(GroupNr) {
        let first = group.0 * geometry.inodes_per_group + 1;
        for (number, state) in (first..).zip(states.of_group(group)) {
            let Some(ino) = Ino::new(number) else { continue };
            let is_hidden = number < geometry.first_ino && ino != Ino::ROOT || claims.check.is_hidden_file(number);
            match state.role {
                Role::File(_) | Role::Broken if !is_hidden => links_of(claims, ino, state),
                _ => {}
            }
        }
    }
}

fn links_of(claims: &Claims<'_>, ino: Ino, state: &super::state::InodeState) {
    let damage = |text: String| claims.findings.damage(FindingKind::Links, Place::Inode(ino), text);
    let names = state.names();
    let is_dir = state.role == Role::File(FileType::Directory);
    if names == 0 {
        if !is_dir {
            damage("no name leads to it".to_owned());
        }
        return;
    }
    let expected = if is_dir && names >= MAX_LINKS { 1 } else { names };
    if u32::from(state.links) != expected {
        damage(format!("it has {} links, but {names} names lead to it", state.links));
    }
}
