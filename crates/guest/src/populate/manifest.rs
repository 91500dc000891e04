//! The tree of what is to be made.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use qtk_ext4::Timestamp;

use super::archive::Archive;
use super::{PopulateError, Result};

/// How many links are followed on the way to one name.
const MAX_LINKS: u32 = 40;

/// A file of the manifest by its place in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Id(usize);

/// Owner, permissions, time and extended attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) permissions: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Of the last change; now if the source does not say.
    pub(super) mtime: Option<Timestamp>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    /// Of a directory that only names in it imply.
    pub(super) fn implied() -> Self {
        Self { permissions: 0o755, uid: 0, gid: 0, mtime: None, xattrs: Vec::new() }
    }
}

/// Where a file's content is read.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// A file of the host.
    File(PathBuf),
    /// Pieces of an archive: each the range of the file that it fills, and where it lies in the archive.
    Pieces(Arc<Archive>, Vec<(Range<u64>, u64)>),
}

/// What something is, with what only that has.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Directory(BTreeMap<Vec<u8>, Id>),
    /// Size in bytes, content, and whether it may have holes.
    File {
        size: u64,
        content: Content,
        sparse: bool,
    },
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
    Socket,
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) attributes: Attributes,
    pub(super) kind: Kind,
}

/// Everything that a new file system is to hold.
#[derive(Clone, Debug)]
pub struct Manifest {
    nodes: Vec<Node>,
    /// Whether a source said what the root directory is to be like.
    pub(super) has_root: bool,
}

impl Default for Manifest {
    fn default() -> Self {
        Self::new()
    }
}

impl Manifest {
    /// An empty root directory.
    #[must_use]
    pub fn new() -> Self {
        let root = Node { attributes: Attributes::implied(), kind: Kind::Directory(BTreeMap::new()) };
        Self { nodes: vec![root], has_root: false }
    }

    pub(super) const ROOT: Id = Id(0);

    pub(super) fn node(&self, id: Id) -> &Node {
        &self.nodes[id.0]
    }

    pub(super) fn children(&self, id: Id) -> Option<&BTreeMap<Vec<u8>, Id>> {
        match &self.node(id).kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, id: Id) -> Option<&mut BTreeMap<Vec<u8>, Id>> {
        match &mut self.nodes[id.0].kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Puts something into a directory, in place of what has the name. A directory that is there already keeps what is in it.
    pub(super) fn put(&mut self, parent: Id, name: &[u8], node: Node) -> Id {
        let existing = self.children(parent).and_then(|children| children.get(name)).copied();
        if let Some(existing) = existing
            && matches!((&self.node(existing).kind, &node.kind), (Kind::Directory(_), Kind::Directory(_)))
        {
            self.set_attributes(existing, node.attributes);
            return existing;
        }
        let id = Id(self.nodes.len());
        self.nodes.push(node);
        self.link(parent, name, id);
        id
    }

    pub(super) fn set_attributes(&mut self, id: Id, attributes: Attributes) {
        self.has_root |= id == Self::ROOT;
        self.nodes[id.0].attributes = attributes;
    }

    /// Gives something a name, in place of what has it.
    pub(super) fn link(&mut self, parent: Id, name: &[u8], id: Id) {
        if let Some(children) = self.children_mut(parent) {
            children.insert(name.to_vec(), id);
        }
    }

    pub(super) fn remove(&mut self, parent: Id, name: &[u8]) {
        if let Some(children) = self.children_mut(parent) {
            children.remove(name);
        }
    }

    pub(super) fn retain(&mut self, directory: Id, keep: impl Fn(&[u8]) -> bool) {
        if let Some(children) = self.children_mut(directory) {
            children.retain(|name, _| keep(name));
        }
    }

    /// The directory in which the last name of a path lies, and that name; `None` for the root itself. Missing directories are
    /// made, links to directories followed; nothing leads out of the root.
    pub(super) fn parent_of<'a>(&mut self, path: &'a [u8]) -> Result<Option<(Id, &'a [u8])>> {
        let names: Vec<&[u8]> = components(path).collect();
        let mut way = Way { trail: vec![Self::ROOT], links: 0 };
        let Some((last, above)) = names.split_last() else { return Ok(None) };
        for name in above {
            self.step(&mut way, name, path, true)?;
        }
        if *last == b".." {
            return Ok(None);
        }
        Ok(Some((way.here(), last)))
    }

    /// What an existing path names; links on the way are followed, the last name is not.
    pub(super) fn find(&mut self, path: &[u8]) -> Result<Option<Id>> {
        Ok(match self.parent_of(path)? {
            None => Some(Self::ROOT),
            Some((parent, name)) => self.children(parent).and_then(|children| children.get(name)).copied(),
        })
    }

    fn step(&mut self, way: &mut Way, name: &[u8], path: &[u8], make: bool) -> Result<()> {
        let refuse = |problem| PopulateError::Name { name: path.to_vec(), problem };
        if name == b".." {
            if way.trail.len() > 1 {
                way.trail.pop();
            }
            return Ok(());
        }
        let here = way.here();
        let child = match self.children(here).and_then(|children| children.get(name)).copied() {
            Some(child) => child,
            None if make => {
                let directory = Node { attributes: Attributes::implied(), kind: Kind::Directory(BTreeMap::new()) };
                self.put(here, name, directory)
            }
            None => return Err(refuse("a link on the way to it leads nowhere")),
        };
        match &self.node(child).kind {
            Kind::Directory(_) => way.trail.push(child),
            Kind::Symlink(target) => {
                way.links += 1;
                if way.links > MAX_LINKS {
                    return Err(refuse("there are too many links on the way to it"));
                }
                let target = target.clone();
                if target.starts_with(b"/") {
                    way.trail.truncate(1);
                }
                for name in components(&target) {
                    self.step(way, name, path, false)?;
                }
            }
            _ => return Err(refuse("something on the way to it is not a directory")),
        }
        Ok(())
    }
}

/// Where a walk through the tree has come to.
struct Way {
    trail: Vec<Id>,
    links: u32,
}

impl Way {
    fn here(&self) -> Id {
        self.trail.last().copied().unwrap_or(Manifest::ROOT)
    }
}

/// The names of a path, without those that lead nowhere.
fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Node {
        Node { attributes: Attributes::implied(), kind: Kind::Fifo }
    }

    fn add(manifest: &mut Manifest, path: &[u8]) -> Result<()> {
        if let Some((parent, name)) = manifest.parent_of(path)? {
            manifest.put(parent, name, file());
        }
        Ok(())
    }

    #[test]
    fn paths_stay_inside() {
        let mut manifest = Manifest::new();
        for path in [&b"../../x"[..], b"/a/../../y", b"./a/b/c", b"..", b"/"] {
            add(&mut manifest, path).unwrap();
        }
        let names: Vec<_> = manifest.children(Manifest::ROOT).unwrap().keys().map(|name| &name[..]).collect();
        assert_eq!(names, [&b"a"[..], b"x", b"y"]);
        assert!(manifest.find(b"a/b/c").unwrap().is_some());
        assert!(matches!(add(&mut manifest, b"x/under"), Err(PopulateError::Name { .. })));
    }

    #[test]
    fn links_are_followed_inside() {
        let mut manifest = Manifest::new();
        add(&mut manifest, b"usr/lib/one").unwrap();
        for (name, target) in [(&b"lib"[..], &b"../../usr/lib"[..]), (b"loop", b"/loop"), (b"lost", b"nowhere")] {
            let link = Node { attributes: Attributes::implied(), kind: Kind::Symlink(target.to_vec()) };
            manifest.put(Manifest::ROOT, name, link);
        }
        add(&mut manifest, b"lib/two").unwrap();
        assert!(manifest.find(b"usr/lib/two").unwrap().is_some());
        assert!(add(&mut manifest, b"loop/x").is_err());
        assert!(add(&mut manifest, b"lost/x").is_err());
    }
}
