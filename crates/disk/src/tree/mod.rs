mod edit;
mod mount;
mod resolve;
mod root;
mod volume;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use qtk_block::{BlockRead, BlockWrite};
use qtk_ext4::{EditOptions, FileType, Ino, Timestamp};

use crate::{Error, GuestPath, PathProblem, Place, fat};
pub use mount::Warning;
use mount::{Device, Mount};
pub use resolve::{Follow, Location};
use volume::Volume;

/// A file, directory or link of a [`Tree`]. Stays the same file when it is renamed or linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    mount: usize,
    file: FileId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum FileId {
    Ext4(Ino),
    Fat(fat::Handle),
}

impl Node {
    /// Whether both lie on one file system, so that links and renames between them are possible.
    #[must_use]
    pub fn shares_file_system_with(self, other: Self) -> bool {
        self.mount == other.mount
    }
}

/// What a file system knows of a [`Node`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Inode number; on FAT a number made up from the entry's place.
    pub number: u64,
    /// Kind of file.
    pub file_type: FileType,
    /// Permission bits, with setuid, setgid and sticky: `0o7777`.
    pub permissions: u16,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Number of names.
    pub links: u32,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of storage in use.
    pub allocated: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of content.
    pub mtime: Timestamp,
    /// Last change of metadata.
    pub ctime: Timestamp,
    /// Creation, where it is recorded.
    pub crtime: Option<Timestamp>,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
}

impl Metadata {
    /// Whether it is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        self.file_type == FileType::Directory
    }
}

/// An extended attribute: its full name and its value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// A directory's entry. Never `.` or `..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Its name.
    pub name: Vec<u8>,
    /// The file; where a file system is mounted on the entry, that one's root.
    pub node: Node,
}

/// A mounted file system, as [`Tree::mounts`] lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo<'a> {
    /// Where in the tree.
    pub path: &'a GuestPath,
    /// Where on the disk.
    pub place: Place,
}

/// One name space over a guest's `/`, `/boot`, `/boot/efi`, …, put together as its `/etc/fstab` says.
///
/// Opened for writing, a file system is touched only when something on it is first changed; until then, and everywhere else, it
/// is only read. Changes reach the device with [`commit`](Self::commit), except file content, which may reach it before.
pub struct Tree {
    mounts: Vec<Mount>,
    /// Directories that a file system is mounted on, and that file system's root.
    covered: BTreeMap<Node, Node>,
    /// Directories on which something belongs that cannot be opened.
    blocked: BTreeMap<Node, (GuestPath, Arc<Error>)>,
    warnings: Vec<Warning>,
    options: Option<EditOptions>,
}

impl fmt::Debug for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tree").field("mounts", &self.mounts().collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

/// The longest file that is read into memory as a whole: configuration, not content.
const MAX_WHOLE_FILE: u64 = 16 << 20;

impl Tree {
    /// Opens a guest's disk for reading. `root` is the number of the partition to take for `/`; without it, the one that
    /// looks like a root is found.
    pub fn open(device: Arc<dyn BlockRead>, root: Option<u32>) -> Result<Self, Error> {
        Self::assemble(Device::ReadOnly(device), root, None)
    }

    /// Opens a guest's disk for reading and writing; see [`open`](Self::open).
    pub fn open_rw(device: Arc<dyn BlockWrite>, root: Option<u32>, options: EditOptions) -> Result<Self, Error> {
        Self::assemble(Device::Writable(device), root, Some(options))
    }

    /// The file systems in the tree, the root first.
    pub fn mounts(&self) -> impl Iterator<Item = MountInfo<'_>> {
        self.mounts.iter().map(|mount| MountInfo { path: &mount.path, place: mount.place })
    }

    /// What was odd about the disk, but no reason to stop.
    #[must_use]
    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// The tree's root directory.
    #[must_use]
    pub fn root(&self) -> Node {
        self.mounts.first().map_or(Node { mount: 0, file: FileId::Ext4(Ino::ROOT) }, |mount| mount.root(0))
    }

    /// What is known of a file.
    pub fn metadata(&self, node: Node) -> Result<Metadata, Error> {
        self.at(node)?.metadata()
    }

    /// A directory's entries, in the order in which the file system has them.
    pub fn read_dir(&self, dir: Node) -> Result<Vec<DirEntry>, Error> {
        self.check_available(dir)?;
        let entries = self.at(dir)?.read_dir()?;
        let node = |file| self.covering(Node { mount: dir.mount, file });
        Ok(entries.into_iter().map(|(name, file)| DirEntry { name, node: node(file) }).collect())
    }

    /// The entry of a directory by its name, which is not resolved further.
    pub fn lookup(&self, dir: Node, name: &[u8]) -> Result<Option<Node>, Error> {
        self.check_available(dir)?;
        let found = self.at(dir)?.lookup(name)?;
        Ok(found.map(|file| self.covering(Node { mount: dir.mount, file })))
    }

    /// Fills `buf` from `offset` of a file; short only at its end.
    pub fn read_at(&self, file: Node, buf: &mut [u8], offset: u64) -> Result<usize, Error> {
        self.at(file)?.read_at(buf, offset)
    }

    /// The next range at or after `offset` that holds data; `None` if only holes follow.
    pub fn data_range(&self, file: Node, offset: u64) -> Result<Option<Range<u64>>, Error> {
        self.at(file)?.data_range(offset)
    }

    /// A symbolic link's target.
    pub fn read_link(&self, link: Node) -> Result<Vec<u8>, Error> {
        self.at(link)?.read_link()
    }

    /// Extended attributes by full name: `user.x`, `security.capability`. FAT has none.
    pub fn xattrs(&self, node: Node) -> Result<Vec<Xattr>, Error> {
        self.at(node)?.xattrs()
    }

    /// The content of a small file, such as configuration. One of more than 16 MiB is refused.
    pub fn read_small(&self, path: impl AsRef<[u8]>) -> Result<Vec<u8>, Error> {
        let path = path.as_ref();
        let node = self.resolve(path, Follow::All)?;
        let metadata = self.metadata(node)?;
        match metadata.file_type {
            FileType::Regular => {}
            FileType::Directory => return Err(Error::path(path, PathProblem::IsADirectory)),
            _ => return Err(Error::path(path, PathProblem::NotAFile)),
        }
        let len = usize::try_from(metadata.size).ok().filter(|_| metadata.size <= MAX_WHOLE_FILE);
        let mut content = vec![0; len.ok_or_else(|| Error::path(path, PathProblem::TooLarge))?];
        let read = self.read_at(node, &mut content, 0)?;
        content.truncate(read);
        Ok(content)
    }

    fn mount(&self, node: Node) -> Result<&Mount, Error> {
        // Nodes come from this tree; one from another tree must not bring the program down.
        self.mounts.get(node.mount).ok_or_else(|| Error::path("", PathProblem::NotFound))
    }

    fn at(&self, node: Node) -> Result<volume::File<'_>, Error> {
        let mount = self.mount(node)?;
        mount.volume.file(mount.place, node.file).ok_or_else(|| Error::path("", PathProblem::NotFound))
    }

    /// The root of what is mounted on a directory, or else the node itself.
    fn covering(&self, node: Node) -> Node {
        let mut node = node;
        // Every step leads to a mount made later, so this ends.
        while let Some(&root) = self.covered.get(&node).filter(|&&root| root.mount > node.mount) {
            node = root;
        }
        node
    }

    /// Refuses to look into a directory on which something belongs that could not be opened.
    fn check_available(&self, dir: Node) -> Result<(), Error> {
        match self.blocked.get(&dir) {
            Some((path, source)) => Err(Error::Unavailable { path: path.clone(), source: Arc::clone(source) }),
            None => Ok(()),
        }
    }
}
