use std::collections::BTreeSet;

use qtk_disk::{DirEntry, GuestPath, Metadata, Node, Tree};

use crate::error::{Error, InGuest, Result};

/// As deep as a path of 4096 bytes can lead.
const MAX_DEPTH: usize = 2048;

/// A file on the way through a tree.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) path: GuestPath,
    /// The directory it was found in, and its name there.
    pub(crate) parent: Node,
    pub(crate) name: Vec<u8>,
    pub(crate) node: Node,
    pub(crate) metadata: Metadata,
}

#[derive(Debug)]
pub(crate) enum Step {
    /// Anything but a directory.
    File(Found),
    /// A directory, before its entries.
    Enter(Found),
    /// The same directory, after its entries.
    Leave(Found),
}

/// A walk through everything below a file, links not followed, names in order. The tree may be changed between the steps.
///
/// A corrupt file system can have directories in circles, or one directory in many places; each is entered once.
pub(crate) struct Walk {
    start: Option<Found>,
    /// Directories on the way to here, each with the entries that are left.
    open: Vec<(Found, std::vec::IntoIter<DirEntry>)>,
    seen: BTreeSet<Node>,
    action: &'static str,
}

impl Walk {
    pub(crate) fn new(start: Found, action: &'static str) -> Self {
        Self { start: Some(start), open: Vec::new(), seen: BTreeSet::new(), action }
    }

    pub(crate) fn next(&mut self, tree: &Tree) -> Result<Option<Step>> {
        let found = match self.start.take() {
            Some(start) => start,
            None => {
                let Some((dir, entries)) = self.open.last_mut() else { return Ok(None) };
                let Some(DirEntry { name, node }) = entries.next() else {
                    return Ok(self.open.pop().map(|(dir, _)| Step::Leave(dir)));
                };
                let path = dir.path.join(&name);
                let parent = dir.node;
                let metadata = tree.metadata(node).in_guest(self.action, &path)?;
                Found { path, parent, name, node, metadata }
            }
        };
        if found.metadata.is_dir() { self.enter(tree, found).map(Some) } else { Ok(Some(Step::File(found))) }
    }

    /// Entries of the innermost directory that are still to come: all of them, just after it was entered.
    pub(crate) fn entries(&self) -> &[DirEntry] {
        self.open.last().map_or(&[], |(_, entries)| entries.as_slice())
    }

    fn enter(&mut self, tree: &Tree, found: Found) -> Result<Step> {
        let bad = |problem| Error::BadTree { path: found.path.clone(), problem };
        if !self.seen.insert(found.node) {
            return Err(bad("the directory is in the tree twice"));
        }
        if self.open.len() >= MAX_DEPTH {
            return Err(bad("directories are nested more than 2048 deep"));
        }
        let mut entries = tree.read_dir(found.node).in_guest(self.action, &found.path)?;
        entries.sort_by(|left, right| left.name.cmp(&right.name));
        self.open.push((found.clone(), entries.into_iter()));
        Ok(Step::Enter(found))
    }
}
