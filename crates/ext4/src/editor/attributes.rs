//! What inodes have besides content and names: owners, permissions, times, extended attributes.

use super::Editor;
use super::entries::check_unprotected;
use crate::Ino;
use crate::acl::Acl;
use crate::error::{Error, Result};
use crate::features::compat;
use crate::inode::{Inode, Time};
use crate::metadata::{FileType, Timestamp};
use crate::xattr::{self, Attribute, Name, Value, XattrBlock};

/// Attributes to change; `None` leaves one as it is.
///
/// Nothing else changes with them: a new owner takes no set-uid bit and no capability away, as the kernel's `chown` would.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttributes {
    /// Permission bits with set-uid, set-gid and sticky: `0o7777`. An access control list's mask follows, as with `chmod`.
    pub permissions: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Time of the last read.
    pub atime: Option<Timestamp>,
    /// Time of the last change of content.
    pub mtime: Option<Timestamp>,
}

const NO_ROOM: Error = Error::NoSpace("room for extended attributes of one inode");

impl Editor {
    /// Changes an inode's owner, permissions or times. A symbolic link has no permissions to change.
    pub fn set_attributes(&mut self, ino: Ino, attributes: &SetAttributes) -> Result<()> {
        let mut inode = self.changeable(ino)?;
        if let Some(permissions) = attributes.permissions {
            self.change_mode(&mut inode, permissions)?;
        }
        if let Some(uid) = attributes.uid {
            inode.set_uid(uid);
        }
        if let Some(gid) = attributes.gid {
            inode.set_gid(gid);
        }
        for (which, time) in [(Time::Access, attributes.atime), (Time::Modification, attributes.mtime)] {
            if let Some(time) = time {
                inode.set_time(which, time);
            }
        }
        self.put_changed(inode)
    }

    fn changeable(&self, ino: Ino) -> Result<Inode> {
        let inode = self.fs.inode_in_use(ino)?;
        check_unprotected(&inode)?;
        Ok(inode)
    }

    fn change_mode(&mut self, inode: &mut Inode, permissions: u16) -> Result<()> {
        if inode.is(FileType::Symlink) {
            return Err(Error::NotPermitted {
                ino: inode.ino(),
                reason: "a symbolic link has no permissions to change",
            });
        }
        if let Some(bytes) = self.fs.attribute(inode, &Name::ACCESS_ACL)? {
            let mut acl = self.fs.acl(inode, &bytes)?;
            acl.set_mode(permissions);
            self.store_attribute(inode, &Name::ACCESS_ACL, Some(acl.to_disk()))?;
        }
        inode.set_permissions(permissions);
        Ok(())
    }

    /// Sets an extended attribute, new or not. Access control lists are given as to `setxattr`; an access list changes the
    /// permissions, and only a directory can have a default list. Names are those of the `user`, `trusted` and `security`
    /// namespaces; only files and directories can have the first.
    pub fn set_xattr(&mut self, ino: Ino, name: &[u8], value: &[u8]) -> Result<()> {
        let mut inode = self.changeable(ino)?;
        let name = attribute_name(&inode, name)?;
        if name.is_acl() {
            self.set_acl(&mut inode, &name, value)?;
        } else {
            self.store_attribute(&mut inode, &name, Some(value.to_vec()))?;
        }
        self.put_changed(inode)
    }

    /// Removes an extended attribute.
    pub fn remove_xattr(&mut self, ino: Ino, name: &[u8]) -> Result<()> {
        let mut inode = self.changeable(ino)?;
        let stored = attribute_name(&inode, name)?;
        if !self.fs.attributes(&inode)?.iter().any(|attribute| attribute.name == stored) {
            return Err(Error::NoSuchAttribute { ino, name: name.to_vec() });
        }
        self.store_attribute(&mut inode, &stored, None)?;
        self.put_changed(inode)
    }

    fn set_acl(&mut self, inode: &mut Inode, name: &Name, value: &[u8]) -> Result<()> {
        let refused = |reason| Error::NotPermitted { ino: inode.ino(), reason };
        let acl = Acl::from_wire(value).ok_or_else(|| refused("the access control list is not valid"))?;
        if *name == Name::DEFAULT_ACL {
            if !inode.is(FileType::Directory) {
                return Err(refused("only a directory has a default access control list"));
            }
            return self.store_attribute(inode, name, Some(acl.to_disk()));
        }
        self.store_attribute(inode, name, (!acl.is_plain()).then(|| acl.to_disk()))?;
        inode.set_permissions(inode.mode() & 0o7000 | acl.mode());
        Ok(())
    }

    /// Gives a new inode what the default access control list of its directory says.
    pub(super) fn inherit_acl(&mut self, inode: &mut Inode, parent: &Inode) -> Result<()> {
        if inode.is(FileType::Symlink) {
            return Ok(());
        }
        let Some(default) = self.fs.attribute(parent, &Name::DEFAULT_ACL)? else { return Ok(()) };
        let acl = self.fs.acl(parent, &default)?.inherit(inode.mode());
        inode.set_permissions(inode.mode() & 0o7000 | acl.mode());
        if inode.is(FileType::Directory) {
            self.store_attribute(inode, &Name::DEFAULT_ACL, Some(default))?;
        }
        if acl.is_plain() { Ok(()) } else { self.store_attribute(inode, &Name::ACCESS_ACL, Some(acl.to_disk())) }
    }

    /// Stores the inode as changed now.
    fn put_changed(&mut self, mut inode: Inode) -> Result<()> {
        inode.set_time(Time::Change, self.now());
        self.put_inode(&mut inode)
    }

    /// Replaces, adds or removes an attribute. Like the kernel, keeps it within the inode if it fits there, else in the
    /// block. Nothing has changed if there is no space for it. The inode is not stored.
    fn store_attribute(&mut self, inode: &mut Inode, name: &Name, value: Option<Vec<u8>>) -> Result<()> {
        let mut attributes = self.fs.attributes(inode)?;
        if attributes.iter().any(|attribute| matches!(attribute.value, Value::Inode(..))) {
            return Err(Error::unsupported_for_writing("ea_inode"));
        }
        attributes.in_inode.retain(|attribute| attribute.name != *name);
        let in_block_before = attributes.in_block.len();
        attributes.in_block.retain(|attribute| attribute.name != *name);
        let mut block_changes = attributes.in_block.len() != in_block_before;
        let room = inode.xattr_area().len();
        let mut area = xattr::write_in_inode(&attributes.in_inode, room);
        if let Some(value) = value {
            let attribute = Attribute { name: name.clone(), value: Value::Here(value) };
            attributes.in_inode.push(attribute.clone());
            match xattr::write_in_inode(&attributes.in_inode, room) {
                Some(with) => area = Some(with),
                None => {
                    attributes.in_block.push(attribute);
                    block_changes = true;
                }
            }
        }
        let area = area.ok_or(NO_ROOM)?;
        self.enable_attributes()?;
        if block_changes {
            self.store_block(inode, &attributes.in_block)?;
        }
        inode.xattr_area_mut().copy_from_slice(&area);
        Ok(())
    }

    fn enable_attributes(&mut self) -> Result<()> {
        if self.fs.superblock.features().has_compat(compat::EXT_ATTR) {
            return Ok(());
        }
        let mut possible = false;
        self.modify_superblock(|superblock| possible = superblock.set_ext_attr());
        if possible {
            Ok(())
        } else {
            Err(Error::unsupported_for_writing("an extended attribute of a revision 0 file system"))
        }
    }

    /// Gives the inode a block with these attributes, or none if there are none.
    fn store_block(&mut self, inode: &mut Inode, attributes: &[Attribute]) -> Result<()> {
        if attributes.is_empty() {
            return self.release_xattr_block(inode);
        }
        let block = XattrBlock::build(attributes, self.fs.geometry().block_len()).ok_or(NO_ROOM)?;
        let place = match inode.xattr_block() {
            Some(place) if self.fs.xattr_block(place)?.references() == 1 => place,
            _ => {
                let goal = self.goal_for(inode.ino());
                let place = self.allocate(goal, 1)?.start;
                self.release_xattr_block(inode)?;
                let block_size = self.fs.block_size();
                let allocated = self.fs.allocated(inode).saturating_add(block_size.into());
                inode.set_allocated(allocated, self.fs.has_huge_file(), block_size)?;
                inode.set_xattr_block(Some(place));
                place
            }
        };
        let sealed = block.seal(place, self.fs.checksum_seed());
        self.put_metadata(place, sealed);
        Ok(())
    }
}

/// The stored form of a name that this kind of inode can have.
fn attribute_name(inode: &Inode, full: &[u8]) -> Result<Name> {
    let unknown = || Error::unsupported_for_writing(format!("extended attribute {:?}", String::from_utf8_lossy(full)));
    let name = Name::parse(full).filter(Name::is_settable).ok_or_else(unknown)?;
    let refused = |reason| Err(Error::NotPermitted { ino: inode.ino(), reason });
    if name.is_user() && !inode.is(FileType::Regular) && !inode.is(FileType::Directory) {
        return refused("only files and directories have user attributes");
    }
    if name.is_acl() && inode.is(FileType::Symlink) {
        return refused("a symbolic link has no access control list");
    }
    Ok(name)
}
