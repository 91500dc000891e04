//! Entries of directories, and what a directory's inode says of them.

use super::Editor;
use super::directory::EditedBlocks;
use crate::Ino;
use crate::dir::{Directory, MAX_NAME};
use crate::error::{Error, Result};
use crate::features::ro_compat;
use crate::inode::{FLAG_APPEND, FLAG_IMMUTABLE, FLAG_INDEX, Inode, Time};
use crate::metadata::FileType;

/// The most links an inode can have. A directory with more subdirectories says that it has one (`dir_nlink`).
pub(super) const MAX_LINKS: u16 = 65_000;
const UNCOUNTED: u16 = 1;

/// Refuses to change what `chattr` has protected: `+i` from everything, `+a` from all but additions.
pub(super) fn check_unprotected(inode: &Inode) -> Result<()> {
    check_flags(inode, FLAG_IMMUTABLE | FLAG_APPEND)
}

/// Refuses to add to what `chattr +i` has protected.
pub(super) fn check_extensible(inode: &Inode) -> Result<()> {
    check_flags(inode, FLAG_IMMUTABLE)
}

fn check_flags(inode: &Inode, flags: u32) -> Result<()> {
    let reason = "it must not be changed (chattr +i or +a)";
    if inode.has(flags) { Err(Error::NotPermitted { ino: inode.ino(), reason }) } else { Ok(()) }
}

/// Refuses what cannot be an entry's name.
pub(super) fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > MAX_NAME {
        return Err(Error::NameTooLong(name.len()));
    }
    if matches!(name, b"" | b"." | b"..") || name.iter().any(|byte| matches!(byte, 0 | b'/')) {
        return Err(Error::InvalidName(name.to_vec()));
    }
    Ok(())
}

impl Editor {
    /// Changes a directory. What `edit` did before it failed is kept: each step leaves the directory whole.
    fn change_directory<T>(
        &mut self,
        dir: Ino,
        edit: impl FnOnce(&mut Directory<EditedBlocks<'_>>) -> Result<T>,
    ) -> Result<T> {
        let mut inode = self.fs.directory_inode(dir)?;
        let mut directory = self.edit_directory(&mut inode);
        let result = edit(&mut directory);
        let indexed = directory.is_indexed();
        inode.set_flag(FLAG_INDEX, indexed);
        if result.is_ok() {
            inode.set_time(Time::Modification, self.now());
            inode.set_time(Time::Change, self.now());
        }
        self.put_inode(&mut inode)?;
        result
    }

    /// Adds an entry whose name is valid and new.
    pub(super) fn add_entry(&mut self, dir: Ino, name: &[u8], ino: Ino, file_type: FileType) -> Result<()> {
        self.change_directory(dir, |directory| directory.insert(name, ino, file_type.entry_code()))
    }

    pub(super) fn remove_entry(&mut self, dir: Ino, name: &[u8]) -> Result<()> {
        self.change_directory(dir, |directory| match directory.lookup(name)? {
            Some(found) => directory.remove(found),
            None => Err(Error::NotFound { parent: dir, name: name.to_vec() }),
        })
    }

    /// Points an entry, `..` as well, to another inode.
    pub(super) fn replace_entry(&mut self, dir: Ino, name: &[u8], ino: Ino, file_type: FileType) -> Result<()> {
        self.change_directory(dir, |directory| match directory.lookup(name)? {
            Some(found) => directory.replace(found, ino, file_type.entry_code()),
            None => Err(Error::NotFound { parent: dir, name: name.to_vec() }),
        })
    }

    /// The inode that an entry stands for.
    pub(super) fn existing(&self, dir: Ino, name: &[u8]) -> Result<Inode> {
        let missing = || Error::NotFound { parent: dir, name: name.to_vec() };
        self.fs.inode_in_use(self.fs.lookup(dir, name)?.ok_or_else(missing)?)
    }

    /// Refuses if the directory cannot count one more subdirectory.
    pub(super) fn check_room_for_subdirectory(&self, inode: &Inode) -> Result<()> {
        let uncounted = self.fs.superblock.features().has_ro_compat(ro_compat::DIR_NLINK) && inode.has(FLAG_INDEX);
        if inode.links() >= MAX_LINKS && !uncounted { Err(Error::TooManyLinks(inode.ino())) } else { Ok(()) }
    }

    pub(super) fn count_subdirectory(&mut self, dir: Ino) -> Result<()> {
        let mut inode = self.fs.directory_inode(dir)?;
        let links = inode.links();
        inode.set_links(if matches!(links, UNCOUNTED | MAX_LINKS..) { UNCOUNTED } else { links + 1 });
        self.put_inode(&mut inode)
    }

    pub(super) fn uncount_subdirectory(&mut self, dir: Ino) -> Result<()> {
        let mut inode = self.fs.directory_inode(dir)?;
        if inode.links() > 2 {
            inode.set_links(inode.links() - 1);
        }
        self.put_inode(&mut inode)
    }
}
