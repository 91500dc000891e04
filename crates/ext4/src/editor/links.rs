//! Names of inodes that exist: added, removed, moved.

use std::collections::BTreeSet;

use super::Editor;
use super::entries::{MAX_LINKS, check_extensible, check_name, check_unprotected};
use crate::Ino;
use crate::error::{Error, Place, Result};
use crate::inode::{Inode, Time};
use crate::metadata::FileType;

impl Editor {
    /// Gives an inode, which must not be a directory, one more name.
    pub fn link(&mut self, ino: Ino, parent: Ino, name: &[u8]) -> Result<()> {
        check_name(name)?;
        let mut inode = self.fs.inode_in_use(ino)?;
        if inode.is(FileType::Directory) {
            return Err(Error::IsADirectory(ino));
        }
        check_unprotected(&inode)?;
        check_extensible(&self.fs.directory_inode(parent)?)?;
        if self.fs.lookup(parent, name)?.is_some() {
            return Err(Error::Exists { parent, name: name.to_vec() });
        }
        if inode.links() >= MAX_LINKS {
            return Err(Error::TooManyLinks(ino));
        }
        self.add_entry(parent, name, ino, inode.file_type()?)?;
        inode.set_links(inode.links() + 1);
        inode.set_time(Time::Change, self.now());
        self.put_inode(&mut inode)
    }

    /// Removes a name of anything but a directory, and with its last name the inode.
    pub fn unlink(&mut self, parent: Ino, name: &[u8]) -> Result<()> {
        check_name(name)?;
        let inode = self.existing(parent, name)?;
        if inode.is(FileType::Directory) {
            return Err(Error::IsADirectory(inode.ino()));
        }
        self.check_removable(parent, &inode)?;
        self.remove_entry(parent, name)?;
        self.drop_link(inode)
    }

    /// Removes an empty directory.
    pub fn remove_dir(&mut self, parent: Ino, name: &[u8]) -> Result<()> {
        check_name(name)?;
        let mut inode = self.existing(parent, name)?;
        self.check_empty(&inode)?;
        self.check_removable(parent, &inode)?;
        self.remove_entry(parent, name)?;
        self.uncount_subdirectory(parent)?;
        self.free_inode(&mut inode)
    }

    /// Moves an entry to a directory and a name, as POSIX has it: what has the name already is replaced if it is of the same
    /// sort, a directory only if it is empty; nothing happens if both names are of the same inode.
    pub fn rename(&mut self, from_parent: Ino, from: &[u8], to_parent: Ino, to: &[u8]) -> Result<()> {
        check_name(from)?;
        check_name(to)?;
        let moved = self.existing(from_parent, from)?;
        let target = self.fs.lookup(to_parent, to)?.map(|ino| self.fs.inode_in_use(ino)).transpose()?;
        if target.as_ref().is_some_and(|target| target.ino() == moved.ino()) {
            return Ok(());
        }
        let changes_parent = moved.is(FileType::Directory) && from_parent != to_parent;
        self.check_removable(from_parent, &moved)?;
        self.check_move(&moved, target.as_ref(), to_parent, changes_parent)?;
        let file_type = moved.file_type()?;
        match target {
            Some(mut target) => {
                self.replace_entry(to_parent, to, moved.ino(), file_type)?;
                if target.is(FileType::Directory) {
                    self.uncount_subdirectory(to_parent)?;
                    self.free_inode(&mut target)?;
                } else {
                    self.drop_link(target)?;
                }
            }
            None => self.add_entry(to_parent, to, moved.ino(), file_type)?,
        }
        self.remove_entry(from_parent, from)?;
        if changes_parent {
            self.move_parent(moved.ino(), from_parent, to_parent)?;
        }
        let mut moved = self.fs.inode(moved.ino())?;
        moved.set_time(Time::Change, self.now());
        self.put_inode(&mut moved)
    }
}

impl Editor {
    /// Refuses a move to a place where the inode cannot be, or over what cannot be replaced by it.
    fn check_move(&self, moved: &Inode, target: Option<&Inode>, to: Ino, changes_parent: bool) -> Result<()> {
        let is_directory = moved.is(FileType::Directory);
        if is_directory && self.is_within(to, moved.ino())? {
            return Err(Error::NotPermitted { ino: moved.ino(), reason: "a directory cannot move into itself" });
        }
        let to_inode = self.fs.directory_inode(to)?;
        match target {
            Some(target) if is_directory => self.check_empty(target)?,
            Some(target) if target.is(FileType::Directory) => return Err(Error::IsADirectory(target.ino())),
            None if changes_parent => self.check_room_for_subdirectory(&to_inode)?,
            _ => {}
        }
        match target {
            Some(target) => self.check_removable(to, target),
            None => check_extensible(&to_inode),
        }
    }

    /// Whether `dir` is `ancestor` or lies below it.
    fn is_within(&self, dir: Ino, ancestor: Ino) -> Result<bool> {
        let mut at = dir;
        let mut seen = BTreeSet::new();
        while at != ancestor {
            if at == Ino::ROOT {
                return Ok(false);
            }
            if !seen.insert(at) {
                return Err(Error::corrupt(Place::Inode(at), "the directory lies below itself"));
            }
            let parent = self.fs.lookup(at, b"..")?;
            at = parent.ok_or_else(|| Error::corrupt(Place::Inode(at), "the directory has no .. entry"))?;
        }
        Ok(true)
    }

    fn check_empty(&self, inode: &Inode) -> Result<()> {
        if !inode.is(FileType::Directory) {
            return Err(Error::NotADirectory(inode.ino()));
        }
        let inode = self.fs.directory_inode(inode.ino())?;
        if self.fs.directory(&inode).is_empty()? { Ok(()) } else { Err(Error::NotEmpty(inode.ino())) }
    }

    /// Refuses to take away a name of what is protected, or of an inode that the file system itself needs.
    fn check_removable(&self, parent: Ino, inode: &Inode) -> Result<()> {
        let ino = inode.ino();
        if ino.get() < self.fs.geometry().first_ino {
            return Err(Error::NotPermitted { ino, reason: "the file system itself needs it" });
        }
        check_unprotected(&self.fs.directory_inode(parent)?)?;
        check_unprotected(inode)
    }

    /// Takes one name away from what is not a directory, and frees it with the last one.
    fn drop_link(&mut self, mut inode: Inode) -> Result<()> {
        inode.set_links(inode.links().saturating_sub(1));
        inode.set_time(Time::Change, self.now());
        if inode.links() == 0 {
            return self.free_inode(&mut inode);
        }
        self.put_inode(&mut inode)
    }

    /// Says in a directory that it has moved, and counts it in its new parent.
    fn move_parent(&mut self, dir: Ino, from: Ino, to: Ino) -> Result<()> {
        let times = self.fs.inode(dir)?.time(Time::Modification);
        self.replace_entry(dir, b"..", to, FileType::Directory)?;
        let mut inode = self.fs.inode(dir)?;
        inode.set_time(Time::Modification, times);
        self.put_inode(&mut inode)?;
        self.uncount_subdirectory(from)?;
        self.count_subdirectory(to)
    }
}
