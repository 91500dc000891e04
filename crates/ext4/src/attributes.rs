//! The extended attributes of the file system's inodes, read.

use crate::acl::Acl;
use crate::error::{Error, Place, Result};
use crate::inode::{FLAG_EA_INODE, Inode};
use crate::xattr::{self, Attribute, Name, Value, XattrBlock};
use crate::{BlockNr, Ext4, Ino};

/// The largest value that an inode of its own may hold, in bytes.
const VALUE_LIMIT: u32 = 1 << 24;

/// All attributes of an inode, by where they are kept.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attributes {
    pub(crate) in_inode: Vec<Attribute>,
    pub(crate) in_block: Vec<Attribute>,
}

impl Attributes {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Attribute> {
        self.in_inode.iter().chain(&self.in_block)
    }
}

impl Ext4 {
    /// The names and values of an inode's extended attributes, sorted by name.
    ///
    /// A POSIX access control list (`system.posix_acl_access`, `system.posix_acl_default`) has the form that `getxattr`
    /// gives and `setxattr` takes, not the shorter one on disk.
    pub fn xattrs(&self, ino: Ino) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let inode = self.inode_in_use(ino)?;
        let attributes = self.attributes(&inode)?;
        let shown = attributes.iter().filter(|attribute| attribute.name.is_shown());
        let mut all: Vec<_> = shown
            .map(|attribute| {
                let value = self.attribute_value(&inode, attribute)?;
                let value = if attribute.name.is_acl() { self.acl(&inode, &value)?.to_wire() } else { value };
                Ok((attribute.name.full(), value))
            })
            .collect::<Result<_>>()?;
        all.sort();
        Ok(all)
    }

    pub(crate) fn attributes(&self, inode: &Inode) -> Result<Attributes> {
        let corrupt = |damage| Error::corrupt(Place::Inode(inode.ino()), damage);
        let in_inode = xattr::read_in_inode(inode.xattr_area()).map_err(corrupt)?;
        let in_block = match inode.xattr_block() {
            Some(place) => self.xattr_block(place)?.attributes().map_err(corrupt)?,
            None => Vec::new(),
        };
        Ok(Attributes { in_inode, in_block })
    }

    pub(crate) fn xattr_block(&self, place: BlockNr) -> Result<XattrBlock> {
        if !self.geometry().contains(place, 1) {
            return Err(Error::corrupt(Place::Block(place), "extended attributes lie outside the file system"));
        }
        XattrBlock::parse(self.block(place)?.to_vec(), place, self.checksum_seed())
            .map_err(|damage| Error::corrupt(Place::Block(place), damage))
    }

    /// What does not fit in place of the block map, of content kept within its inode.
    pub(crate) fn inline_tail(&self, inode: &Inode) -> Result<Vec<u8>> {
        let attributes = self.attributes(inode)?;
        let tail = attributes.in_inode.iter().find(|attribute| attribute.name.full() == b"system.data");
        tail.map_or(Ok(Vec::new()), |tail| self.attribute_value(inode, tail))
    }

    /// The value of one attribute, as it is on disk.
    pub(crate) fn attribute(&self, inode: &Inode, name: &Name) -> Result<Option<Vec<u8>>> {
        let attributes = self.attributes(inode)?;
        let found = attributes.iter().find(|attribute| attribute.name == *name);
        found.map(|attribute| self.attribute_value(inode, attribute)).transpose()
    }

    fn attribute_value(&self, inode: &Inode, attribute: &Attribute) -> Result<Vec<u8>> {
        match &attribute.value {
            Value::Here(value) => Ok(value.clone()),
            Value::Inode(ino, size) => {
                let holder = self.inode(*ino)?;
                if !holder.has(FLAG_EA_INODE) || *size > VALUE_LIMIT || u64::from(*size) != holder.size() {
                    let problem = "the value of an extended attribute is not in the inode that it says";
                    return Err(Error::corrupt(Place::Inode(inode.ino()), problem));
                }
                let mut value = vec![0; usize::try_from(*size).unwrap_or(0)];
                self.read_content(&holder, &mut value, 0)?;
                Ok(value)
            }
        }
    }

    /// An access control list from its form on disk.
    pub(crate) fn acl(&self, inode: &Inode, bytes: &[u8]) -> Result<Acl> {
        let corrupt = || Error::corrupt(Place::Inode(inode.ino()), "an access control list is malformed");
        Acl::from_disk(bytes).ok_or_else(corrupt)
    }
}
