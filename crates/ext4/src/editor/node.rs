//! New inodes: files, directories, links and devices.

use super::Editor;
use super::entries::{check_extensible, check_name};
use crate::Ino;
use crate::error::{Error, Result};
use crate::inode::{Inode, MAP_LEN, Time};
use crate::metadata::{FileType, Timestamp};

/// What to make, with what only that kind has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind<'a> {
    /// An empty file.
    File,
    /// An empty directory.
    Directory,
    /// A link to this target: at least one byte, no zero bytes, shorter than a block and than 4096 bytes.
    Symlink(&'a [u8]),
    /// A character device: major number below 2^12, minor below 2^20.
    CharDevice(u32, u32),
    /// A block device, its numbers within the same limits.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
}

impl NodeKind<'_> {
    fn file_type(&self) -> FileType {
        match self {
            Self::File => FileType::Regular,
            Self::Directory => FileType::Directory,
            Self::Symlink(_) => FileType::Symlink,
            Self::CharDevice(..) => FileType::CharDevice,
            Self::BlockDevice(..) => FileType::BlockDevice,
            Self::Fifo => FileType::Fifo,
            Self::Socket => FileType::Socket,
        }
    }
}

/// A new inode.
///
/// Owner and group are taken as given: a set-group-id directory does not pass on its group or its bit, as it would for a
/// process that says nothing of either. A directory's default access control list is passed on as the kernel does it, and may
/// take permissions away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewNode<'a> {
    /// What to make.
    pub kind: NodeKind<'a>,
    /// Permission bits with set-uid, set-gid and sticky: `0o7777`. A symbolic link always has 0777.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Times of modification and last read; the time of the edit if `None`.
    pub mtime: Option<Timestamp>,
}

/// The longest target that a path may be.
const MAX_TARGET: usize = 4095;

/// Inode flags that a directory passes on (`EXT4_FL_INHERITED`): secrm, unrm, compr, sync, nodump, noatime, nocomp, journal
/// data, notail, dirsync, dax, projinherit.
const INHERITED: u32 = 0x2201_c4cf;
/// Of those, what only directories take: dirsync and projinherit.
const DIRECTORIES_ONLY: u32 = 0x2001_0000;
/// Of those, what anything but files and directories takes: nodump and noatime.
const SPECIAL: u32 = 0xc0;

impl Editor {
    /// Makes an inode and its first name.
    pub fn create(&mut self, parent: Ino, name: &[u8], node: &NewNode<'_>) -> Result<Ino> {
        check_name(name)?;
        self.check_kind(parent, &node.kind)?;
        let directory = self.fs.directory_inode(parent)?;
        check_extensible(&directory)?;
        if self.fs.lookup(parent, name)?.is_some() {
            return Err(Error::Exists { parent, name: name.to_vec() });
        }
        let file_type = node.kind.file_type();
        if file_type == FileType::Directory {
            self.check_room_for_subdirectory(&directory)?;
        }
        let permissions = if file_type == FileType::Symlink { 0o777 } else { node.permissions };
        let mut inode = self.allocate_inode(parent, file_type, permissions)?;
        let ino = inode.ino();
        let furnished = self.furnish(&mut inode, &directory, node);
        self.put_inode(&mut inode)?;
        if let Err(error) = furnished.and_then(|()| self.add_entry(parent, name, ino, file_type)) {
            self.free_inode(&mut inode)?;
            return Err(error);
        }
        if file_type == FileType::Directory {
            self.count_subdirectory(parent)?;
        }
        Ok(ino)
    }

    fn check_kind(&self, parent: Ino, kind: &NodeKind<'_>) -> Result<()> {
        match *kind {
            NodeKind::Symlink(target) => {
                if target.len() > MAX_TARGET.min(self.fs.geometry().block_len() - 1) {
                    Err(Error::NameTooLong(target.len()))
                } else if target.is_empty() || target.contains(&0) {
                    Err(Error::InvalidName(target.to_vec()))
                } else {
                    Ok(())
                }
            }
            NodeKind::CharDevice(major, minor) | NodeKind::BlockDevice(major, minor)
                if major > 0xfff || minor > 0xf_ffff =>
            {
                Err(Error::NotPermitted { ino: parent, reason: "the numbers of a device in it would be too large" })
            }
            _ => Ok(()),
        }
    }

    /// Gives a new inode its attributes and its content.
    fn furnish(&mut self, inode: &mut Inode, parent: &Inode, node: &NewNode<'_>) -> Result<()> {
        inode.set_uid(node.uid);
        inode.set_gid(node.gid);
        inode.set_flag(inherited_flags(parent.flags(), node.kind.file_type()), true);
        match node.kind {
            NodeKind::Directory => {
                inode.set_links(2);
                let place = self.append_block(inode)?;
                let block = self.fs.dir_format(inode).first_block(parent.ino())?;
                self.put_metadata(place, block);
            }
            NodeKind::Symlink(target) if target.len() < MAP_LEN => {
                inode.map_mut()[..target.len()].copy_from_slice(target);
                inode.set_size(target.len() as u64);
            }
            NodeKind::Symlink(target) => {
                self.clear_map(inode);
                self.write_content(inode, target, 0)?;
            }
            NodeKind::CharDevice(major, minor) | NodeKind::BlockDevice(major, minor) => inode.set_device(major, minor),
            NodeKind::File | NodeKind::Fifo | NodeKind::Socket => {}
        }
        if let Some(mtime) = node.mtime {
            inode.set_time(Time::Access, mtime);
            inode.set_time(Time::Modification, mtime);
        }
        self.inherit_acl(inode, parent)
    }
}

fn inherited_flags(parent: u32, file_type: FileType) -> u32 {
    let accepted = match file_type {
        FileType::Directory => INHERITED,
        FileType::Regular => INHERITED & !DIRECTORIES_ONLY,
        _ => SPECIAL,
    };
    parent & accepted
}
