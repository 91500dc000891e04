//! A file tree in memory: what an image must hold after the same operations.
#![allow(dead_code, clippy::unwrap_used, reason = "every test program uses its own part of this module")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use qtk_ext4::{Ext4, FileType, Ino, Metadata, NewNode, NodeKind, Timestamp};

use crate::support::{Image, read_all, tool};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File(Vec<u8>),
    Directory(BTreeMap<Vec<u8>, Ino>),
    Symlink(Vec<u8>),
    Device(FileType, (u32, u32)),
    Other(FileType),
}

/// What all names of an inode share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) atime: Timestamp,
    pub(crate) mtime: Timestamp,
    pub(crate) ctime: Timestamp,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Node {
    pub(crate) fn file_type(&self) -> FileType {
        match &self.kind {
            Kind::File(_) => FileType::Regular,
            Kind::Directory(_) => FileType::Directory,
            Kind::Symlink(_) => FileType::Symlink,
            Kind::Device(file_type, _) | Kind::Other(file_type) => *file_type,
        }
    }

    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory(_))
    }

    pub(crate) fn entries(&self) -> &BTreeMap<Vec<u8>, Ino> {
        match &self.kind {
            Kind::Directory(entries) => entries,
            other => panic!("{other:?}"),
        }
    }

    fn of(node: &NewNode<'_>, now: Timestamp) -> Self {
        let kind = match node.kind {
            NodeKind::File => Kind::File(Vec::new()),
            NodeKind::Directory => Kind::Directory(BTreeMap::new()),
            NodeKind::Symlink(target) => Kind::Symlink(target.to_vec()),
            NodeKind::CharDevice(major, minor) => Kind::Device(FileType::CharDevice, (major, minor)),
            NodeKind::BlockDevice(major, minor) => Kind::Device(FileType::BlockDevice, (major, minor)),
            NodeKind::Fifo => Kind::Other(FileType::Fifo),
            NodeKind::Socket => Kind::Other(FileType::Socket),
        };
        let permissions = if matches!(kind, Kind::Symlink(_)) { 0o777 } else { node.permissions };
        let mtime = node.mtime.unwrap_or(now);
        let NewNode { uid, gid, .. } = *node;
        Self { kind, permissions, uid, gid, atime: mtime, mtime, ctime: now, xattrs: BTreeMap::new() }
    }
}

/// A tree of nodes by inode number.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    pub(crate) nodes: BTreeMap<Ino, Node>,
    /// The time of the operations that follow.
    pub(crate) now: Timestamp,
}

impl Tree {
    /// What a file system holds now.
    pub(crate) fn read(fs: &Ext4, now: Timestamp) -> Self {
        let mut tree = Self { nodes: BTreeMap::new(), now };
        tree.read_node(fs, Ino::ROOT);
        tree
    }

    fn read_node(&mut self, fs: &Ext4, ino: Ino) {
        let Metadata { file_type, permissions, uid, gid, atime, mtime, ctime, rdev, .. } = fs.metadata(ino).unwrap();
        let kind = match file_type {
            FileType::Regular => Kind::File(read_all(fs, ino)),
            FileType::Directory => {
                let entries = fs.read_dir(ino).unwrap();
                for entry in &entries {
                    assert!(entry.file_type.is_none_or(|hint| hint == fs.metadata(entry.ino).unwrap().file_type));
                    if !self.nodes.contains_key(&entry.ino) {
                        self.read_node(fs, entry.ino);
                    }
                }
                Kind::Directory(entries.into_iter().map(|entry| (entry.name, entry.ino)).collect())
            }
            FileType::Symlink => Kind::Symlink(fs.read_link(ino).unwrap()),
            FileType::CharDevice | FileType::BlockDevice => Kind::Device(file_type, rdev),
            other => Kind::Other(other),
        };
        let xattrs = fs.xattrs(ino).unwrap().into_iter().collect();
        self.nodes.insert(ino, Node { kind, permissions, uid, gid, atime, mtime, ctime, xattrs });
    }

    pub(crate) fn node(&mut self, ino: Ino) -> &mut Node {
        self.nodes.get_mut(&ino).unwrap()
    }

    pub(crate) fn entries(&mut self, dir: Ino) -> &mut BTreeMap<Vec<u8>, Ino> {
        match &mut self.node(dir).kind {
            Kind::Directory(entries) => entries,
            other => panic!("{other:?}"),
        }
    }

    /// Every entry: directory, name, inode.
    pub(crate) fn all_entries(&self) -> impl Iterator<Item = (Ino, &[u8], Ino)> {
        let directories = self.nodes.iter().filter(|(_, node)| node.is_directory());
        directories.flat_map(|(&dir, node)| node.entries().iter().map(move |(name, &ino)| (dir, name.as_slice(), ino)))
    }

    fn subdirectories(&self, dir: &Node) -> usize {
        dir.entries().values().filter(|ino| self.nodes[ino].is_directory()).count()
    }

    /// How many links each inode has.
    pub(crate) fn links(&self) -> BTreeMap<Ino, u64> {
        let mut links = BTreeMap::new();
        for (_, _, ino) in self.all_entries() {
            *links.entry(ino).or_insert(0) += 1;
        }
        for (&ino, node) in &self.nodes {
            if node.is_directory() {
                links.insert(ino, 2 + self.subdirectories(node) as u64);
            }
        }
        links
    }

    /// Whether `dir` is `ancestor` or lies below it.
    pub(crate) fn is_within(&self, dir: Ino, ancestor: Ino) -> bool {
        dir == ancestor
            || self.nodes[&ancestor]
                .entries()
                .values()
                .any(|&child| self.nodes[&child].is_directory() && self.is_within(dir, child))
    }

    fn touch(&mut self, dir: Ino) {
        let now = self.now;
        let node = self.node(dir);
        (node.mtime, node.ctime) = (now, now);
    }

    pub(crate) fn create(&mut self, dir: Ino, name: &[u8], ino: Ino, node: &NewNode<'_>) {
        self.nodes.insert(ino, Node::of(node, self.now));
        self.link(dir, name, ino);
    }

    /// Adds a name.
    pub(crate) fn link(&mut self, dir: Ino, name: &[u8], ino: Ino) {
        self.entries(dir).insert(name.to_vec(), ino);
        self.touch(dir);
        self.node(ino).ctime = self.now;
    }

    /// Removes a name, and the inode with its last one.
    pub(crate) fn unlink(&mut self, dir: Ino, name: &[u8]) {
        let ino = self.entries(dir).remove(name).unwrap();
        self.touch(dir);
        self.node(ino).ctime = self.now;
        if !self.all_entries().any(|(_, _, other)| other == ino) {
            self.nodes.remove(&ino);
        }
    }

    pub(crate) fn rename(&mut self, from: Ino, old: &[u8], to: Ino, new: &[u8]) {
        if self.entries(to).contains_key(new) {
            self.unlink(to, new);
        }
        let ino = self.entries(from).remove(old).unwrap();
        self.touch(from);
        self.link(to, new, ino);
    }

    /// Asserts that this is what `fs` holds.
    pub(crate) fn assert_same(&self, fs: &Ext4) {
        let found = Self::read(fs, self.now);
        let links = self.links();
        for (ino, node) in &self.nodes {
            assert_eq!(found.nodes.get(ino), Some(node), "inode {ino}");
            assert_eq!(
                u64::from(fs.metadata(*ino).unwrap().links),
                links.get(ino).copied().unwrap_or(2),
                "links of {ino}"
            );
            if node.is_directory() {
                for (name, &child) in node.entries() {
                    assert_eq!(fs.lookup(*ino, name).unwrap(), Some(child));
                }
            }
        }
        assert_eq!(found.nodes.len(), self.nodes.len());
    }

    /// Asserts that this is what the kernel finds in the image, or debugfs where the kernel cannot be asked.
    pub(crate) fn assert_seen_by_others(&self, image: &Image, block_size: u32) {
        let is_root = std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
        if is_root && block_size <= 4096 {
            image.mounted(|root| {
                tool("mount", &["-o", "remount,ro,noatime", root.to_str().unwrap()]);
                self.assert_path(root, Ino::ROOT, &self.links());
            });
        } else {
            let target = tempfile::tempdir().unwrap();
            image.debugfs(&format!("rdump / {}", target.path().display()));
            self.assert_dumped(target.path(), Ino::ROOT);
        }
    }

    /// Compares what debugfs copies: names, content, targets.
    fn assert_dumped(&self, path: &Path, ino: Ino) {
        let at = path.display();
        match &self.nodes[&ino].kind {
            Kind::File(content) => assert!(std::fs::read(path).unwrap() == *content, "{at}"),
            Kind::Symlink(target) => assert_eq!(std::fs::read_link(path).unwrap().as_os_str().as_bytes(), target),
            Kind::Directory(entries) => {
                for (name, &child) in entries {
                    self.assert_dumped(&path.join(OsStr::from_bytes(name)), child);
                }
            }
            Kind::Device(..) | Kind::Other(_) => {}
        }
    }

    /// Compares all that the kernel shows, below a mount that keeps times of access.
    fn assert_path(&self, path: &Path, ino: Ino, links: &BTreeMap<Ino, u64>) {
        let node = &self.nodes[&ino];
        let at = path.display();
        let found = path.symlink_metadata().unwrap();
        assert_eq!(found.ino(), u64::from(ino.get()), "{at}");
        assert_eq!(found.mode() & 0o7777, u32::from(node.permissions), "{at}");
        assert_eq!((found.uid(), found.gid()), (node.uid, node.gid), "{at}");
        assert_eq!(found.nlink(), links.get(&ino).copied().unwrap_or(2), "{at}");
        let time = |seconds, nanos| Timestamp { seconds, nanos: u32::try_from(nanos).unwrap() };
        assert_eq!(time(found.mtime(), found.mtime_nsec()), node.mtime, "{at}");
        assert_eq!(time(found.ctime(), found.ctime_nsec()), node.ctime, "{at}");
        assert_eq!(time(found.atime(), found.atime_nsec()), node.atime, "{at}");
        assert_eq!(kernel_xattrs(path), node.xattrs, "{at}");
        match &node.kind {
            Kind::File(content) => assert!(std::fs::read(path).unwrap() == *content, "{at}"),
            Kind::Symlink(target) => assert_eq!(std::fs::read_link(path).unwrap().as_os_str().as_bytes(), target),
            Kind::Device(_, (major, minor)) => {
                let device = found.rdev();
                assert_eq!((rustix::fs::major(device), rustix::fs::minor(device)), (*major, *minor), "{at}");
            }
            Kind::Other(_) => {}
            Kind::Directory(entries) => {
                let mut names: Vec<_> = std::fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().as_bytes().to_vec())
                    .collect();
                names.sort();
                assert!(names.iter().eq(entries.keys()), "{at}");
                for (name, &child) in entries {
                    self.assert_path(&path.join(OsStr::from_bytes(name)), child, links);
                }
            }
        }
    }
}

/// The extended attributes that the kernel shows.
pub(crate) fn kernel_xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let len = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..len].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 1 << 16];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            (name.to_vec(), value[..len].to_vec())
        })
        .collect()
}
