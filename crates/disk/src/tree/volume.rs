use std::ops::Range;
use std::sync::Arc;

use qtk_block::BlockWrite;
use qtk_ext4::{EditOptions, Editor, Ext4, FileType, Ino};

use super::{FileId, Metadata, Xattr};
use crate::fat::{self, Fat};
use crate::{Error, Place};

/// A mounted file system.
pub(super) enum Volume {
    /// Not changed so far; the device is there if it may be.
    Ext4(Box<Ext4>, Option<Arc<dyn BlockWrite>>),
    /// With changes, or about to have some.
    Ext4Edited(Box<Editor>),
    Fat(Fat),
}

impl Volume {
    pub(super) fn root(&self) -> FileId {
        match self {
            Self::Fat(_) => FileId::Fat(fat::Handle::ROOT),
            Self::Ext4(..) | Self::Ext4Edited(_) => FileId::Ext4(Ino::ROOT),
        }
    }

    /// The file of that number, if it is of this kind of file system.
    pub(super) fn file(&self, place: Place, file: FileId) -> Option<File<'_>> {
        match (self, file) {
            (Self::Ext4(fs, _), FileId::Ext4(ino)) => Some(File::Ext4 { fs, ino, place }),
            (Self::Ext4Edited(editor), FileId::Ext4(ino)) => Some(File::Ext4 { fs: editor.fs(), ino, place }),
            (Self::Fat(fs), FileId::Fat(handle)) => Some(File::Fat { fs, handle, place }),
            _ => None,
        }
    }

    /// Turns a file system that is only read into one that is edited. `None` if it cannot be.
    pub(super) fn edit(&mut self, place: Place, options: EditOptions) -> Result<Option<&mut Editor>, Error> {
        if let Self::Ext4(_, Some(device)) = self {
            let editor = Editor::open(Arc::clone(device), options).map_err(|source| Error::ext4(place, source))?;
            *self = Self::Ext4Edited(Box::new(editor));
        }
        match self {
            Self::Ext4Edited(editor) => Ok(Some(editor)),
            Self::Ext4(..) | Self::Fat(_) => Ok(None),
        }
    }
}

/// A file on its file system, for reading.
pub(super) enum File<'a> {
    Ext4 { fs: &'a Ext4, ino: Ino, place: Place },
    Fat { fs: &'a Fat, handle: fat::Handle, place: Place },
}

impl File<'_> {
    fn ext4<T>(result: Result<T, qtk_ext4::Error>, place: Place) -> Result<T, Error> {
        result.map_err(|source| Error::ext4(place, source))
    }

    fn fat<T>(result: Result<T, fat::Error>, place: Place) -> Result<T, Error> {
        result.map_err(|source| Error::Fat { place, source })
    }

    pub(super) fn metadata(&self) -> Result<Metadata, Error> {
        match *self {
            Self::Ext4 { fs, ino, place } => Self::ext4(fs.metadata(ino), place).map(Metadata::from),
            Self::Fat { fs, handle, place } => {
                Self::fat(fs.metadata(handle), place).map(|metadata| Metadata::of_fat(handle, &metadata))
            }
        }
    }

    pub(super) fn read_dir(&self) -> Result<Vec<(Vec<u8>, FileId)>, Error> {
        match *self {
            Self::Ext4 { fs, ino, place } => {
                let entries = Self::ext4(fs.read_dir(ino), place)?;
                Ok(entries.into_iter().map(|entry| (entry.name, FileId::Ext4(entry.ino))).collect())
            }
            Self::Fat { fs, handle, place } => {
                let entries = Self::fat(fs.read_dir(handle), place)?;
                Ok(entries.into_iter().map(|entry| (entry.name.into_bytes(), FileId::Fat(entry.handle))).collect())
            }
        }
    }

    pub(super) fn lookup(&self, name: &[u8]) -> Result<Option<FileId>, Error> {
        match *self {
            Self::Ext4 { fs, ino, place } => Ok(Self::ext4(fs.lookup(ino, name), place)?.map(FileId::Ext4)),
            Self::Fat { fs, handle, place } => Ok(Self::fat(fs.lookup(handle, name), place)?.map(FileId::Fat)),
        }
    }

    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, Error> {
        match *self {
            Self::Ext4 { fs, ino, place } => Self::ext4(fs.read_at(ino, buf, offset), place),
            Self::Fat { fs, handle, place } => Self::fat(fs.read_at(handle, buf, offset), place),
        }
    }

    pub(super) fn data_range(&self, offset: u64) -> Result<Option<Range<u64>>, Error> {
        match *self {
            Self::Ext4 { fs, ino, place } => Self::ext4(fs.data_range(ino, offset), place),
            Self::Fat { fs, handle, place } => {
                let size = Self::fat(fs.metadata(handle), place)?.size;
                Ok((offset < size).then_some(offset..size))
            }
        }
    }

    pub(super) fn read_link(&self) -> Result<Vec<u8>, Error> {
        match *self {
            Self::Ext4 { fs, ino, place } => Self::ext4(fs.read_link(ino), place),
            Self::Fat { place, .. } => Err(Error::Unsupported { place, feature: "FAT has no symbolic links" }),
        }
    }

    pub(super) fn xattrs(&self) -> Result<Vec<Xattr>, Error> {
        match *self {
            Self::Ext4 { fs, ino, place } => Self::ext4(fs.xattrs(ino), place),
            Self::Fat { .. } => Ok(Vec::new()),
        }
    }
}

impl From<qtk_ext4::Metadata> for Metadata {
    fn from(found: qtk_ext4::Metadata) -> Self {
        Self {
            number: found.ino.get().into(),
            file_type: found.file_type,
            permissions: found.permissions,
            uid: found.uid,
            gid: found.gid,
            links: found.links,
            size: found.size,
            allocated: found.allocated,
            atime: found.atime,
            mtime: found.mtime,
            ctime: found.ctime,
            crtime: found.crtime,
            rdev: found.rdev,
        }
    }
}

impl Metadata {
    /// As the kernel shows a FAT file under the default masks.
    fn of_fat(handle: fat::Handle, found: &fat::Metadata) -> Self {
        let (file_type, links) = if found.is_dir { (FileType::Directory, 2) } else { (FileType::Regular, 1) };
        Self {
            number: handle.number(),
            file_type,
            permissions: if found.read_only { 0o555 } else { 0o755 },
            uid: 0,
            gid: 0,
            links,
            size: found.size,
            allocated: found.size.next_multiple_of(512),
            atime: found.modified,
            mtime: found.modified,
            ctime: found.modified,
            crtime: None,
            rdev: (0, 0),
        }
    }
}
