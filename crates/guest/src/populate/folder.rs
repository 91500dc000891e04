//! A folder of the host, as it is found.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use qtk_ext4::Timestamp;

use super::manifest::{Attributes, Content, Id, Kind, Manifest, Node};
use super::{Result, host};
use crate::xattr::host_xattrs;

/// What is taken from a folder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FolderOptions {
    /// Owner and group of everything, in place of those found.
    pub owner: Option<(u32, u32)>,
}

impl Manifest {
    /// Adds everything below a folder, and the folder's own attributes for the root. Names of one file stay names of one file.
    pub fn add_folder(&mut self, folder: &Path, options: &FolderOptions) -> Result<()> {
        let metadata = fs::metadata(folder).map_err(host("read", folder))?;
        self.set_attributes(Self::ROOT, attributes(folder, &metadata, options));
        let mut linked: HashMap<(u64, u64), Id> = HashMap::new();
        let mut left = vec![(folder.to_owned(), Self::ROOT)];
        while let Some((path, parent)) = left.pop() {
            for path in sorted_entries(&path)? {
                let Some(name) = path.file_name() else { continue };
                let metadata = fs::symlink_metadata(&path).map_err(host("read", &path))?;
                let identity = (metadata.dev(), metadata.ino());
                if let Some(&known) = linked.get(&identity) {
                    self.link(parent, name.as_bytes(), known);
                    continue;
                }
                let kind = kind(&path, &metadata)?;
                let node = Node { attributes: attributes(&path, &metadata, options), kind };
                let id = self.put(parent, name.as_bytes(), node);
                if metadata.is_dir() {
                    left.push((path, id));
                } else if metadata.nlink() > 1 {
                    linked.insert(identity, id);
                }
            }
        }
        Ok(())
    }
}

fn sorted_entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(host("read", folder))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    let mut paths = paths.map_err(host("read", folder))?;
    paths.sort();
    Ok(paths)
}

fn attributes(path: &Path, metadata: &Metadata, options: &FolderOptions) -> Attributes {
    let (uid, gid) = options.owner.unwrap_or((metadata.uid(), metadata.gid()));
    Attributes {
        permissions: u16::try_from(metadata.mode() & 0o7777).unwrap_or(0),
        uid,
        gid,
        mtime: Some(Timestamp { seconds: metadata.mtime(), nanos: u32::try_from(metadata.mtime_nsec()).unwrap_or(0) }),
        xattrs: host_xattrs(path, metadata.is_symlink()),
    }
}

fn kind(path: &Path, metadata: &Metadata) -> Result<Kind> {
    let file_type = metadata.file_type();
    let numbers = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    Ok(if file_type.is_dir() {
        Kind::Directory(BTreeMap::new())
    } else if file_type.is_symlink() {
        Kind::Symlink(fs::read_link(path).map_err(host("read", path))?.into_os_string().into_vec())
    } else if file_type.is_char_device() {
        Kind::CharDevice(numbers.0, numbers.1)
    } else if file_type.is_block_device() {
        Kind::BlockDevice(numbers.0, numbers.1)
    } else if file_type.is_fifo() {
        Kind::Fifo
    } else if file_type.is_socket() {
        Kind::Socket
    } else {
        let sparse = metadata.blocks() * 512 < metadata.len();
        Kind::File { size: metadata.len(), content: Content::File(path.to_owned()), sparse }
    })
}
