//! POSIX access control lists: as ext4 keeps them, as `getxattr` shows them, and how they and a file's mode keep in step.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// On disk an entry without a name in it has no id; in the form that `getxattr` gives every entry has one.
const DISK_VERSION: u32 = 1;
const WIRE_VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;

/// Whom an entry is for, in the order in which entries are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Tag {
    Owner,
    User,
    OwningGroup,
    Group,
    Mask,
    Other,
}

const TAGS: [(u16, Tag); 6] =
    [(1, Tag::Owner), (2, Tag::User), (4, Tag::OwningGroup), (8, Tag::Group), (0x10, Tag::Mask), (0x20, Tag::Other)];

impl Tag {
    fn from_code(code: u16) -> Option<Self> {
        TAGS.iter().find(|(known, _)| *known == code).map(|&(_, tag)| tag)
    }

    fn code(self) -> u16 {
        TAGS.iter().find(|(_, known)| *known == self).map_or(0, |&(code, _)| code)
    }

    fn is_named(self) -> bool {
        matches!(self, Self::User | Self::Group)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: Tag,
    permissions: u16,
    /// Of a named user or group; [`NO_ID`] otherwise.
    id: u32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    tag: U16,
    permissions: U16,
}

impl RawEntry {
    fn with_id(&self, id: u32) -> Option<Entry> {
        let permissions = self.permissions.get();
        let tag = Tag::from_code(self.tag.get())?;
        (permissions <= 7).then_some(Entry { tag, permissions, id: if tag.is_named() { id } else { NO_ID } })
    }
}

/// A valid list: the three basic entries once each, a mask if anybody is named, in the kernel's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Acl(Vec<Entry>);

impl Acl {
    /// From the form on disk.
    pub(crate) fn from_disk(bytes: &[u8]) -> Option<Self> {
        Self::parse(bytes, DISK_VERSION, Tag::is_named)
    }

    /// From the form of the system calls. An empty list, which stands for none, is not valid either.
    pub(crate) fn from_wire(bytes: &[u8]) -> Option<Self> {
        Self::parse(bytes, WIRE_VERSION, |_| true)
    }

    fn parse(bytes: &[u8], version: u32, has_id: impl Fn(Tag) -> bool) -> Option<Self> {
        let (stored, mut rest) = U32::read_from_prefix(bytes).ok()?;
        if stored.get() != version {
            return None;
        }
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let (raw, after) = RawEntry::ref_from_prefix(rest).ok()?;
            let tag = Tag::from_code(raw.tag.get())?;
            let (id, after) = if has_id(tag) { U32::read_from_prefix(after).ok()? } else { (NO_ID.into(), after) };
            entries.push(raw.with_id(id.get())?);
            rest = after;
        }
        Self::of_entries(entries)
    }

    fn of_entries(entries: Vec<Entry>) -> Option<Self> {
        let count = |tag| entries.iter().filter(|entry| entry.tag == tag).count();
        let basic = [Tag::Owner, Tag::OwningGroup, Tag::Other].into_iter().all(|tag| count(tag) == 1);
        let masked =
            count(Tag::Mask) == 1 || count(Tag::Mask) == 0 && !entries.iter().any(|entry| entry.tag.is_named());
        (basic && masked && entries.is_sorted_by_key(|entry| entry.tag)).then_some(Self(entries))
    }

    /// The form on disk.
    pub(crate) fn to_disk(&self) -> Vec<u8> {
        self.serialize(DISK_VERSION, Tag::is_named)
    }

    /// The form of the system calls.
    pub(crate) fn to_wire(&self) -> Vec<u8> {
        self.serialize(WIRE_VERSION, |_| true)
    }

    fn serialize(&self, version: u32, has_id: impl Fn(Tag) -> bool) -> Vec<u8> {
        let mut bytes = version.to_le_bytes().to_vec();
        for &Entry { tag, permissions, id } in &self.0 {
            bytes.extend(RawEntry { tag: tag.code().into(), permissions: permissions.into() }.as_bytes());
            if has_id(tag) {
                bytes.extend(id.to_le_bytes());
            }
        }
        bytes
    }

    fn permissions_of(&self, tag: Tag) -> Option<u16> {
        self.0.iter().find(|entry| entry.tag == tag).map(|entry| entry.permissions)
    }

    fn set(&mut self, tag: Tag, permissions: u16) {
        for entry in self.0.iter_mut().filter(|entry| entry.tag == tag) {
            entry.permissions = permissions;
        }
    }

    /// What a file's mode shows as the group's permissions: the mask, or the owning group's where there is no mask.
    fn group_class(&self) -> Tag {
        if self.permissions_of(Tag::Mask).is_some() { Tag::Mask } else { Tag::OwningGroup }
    }

    /// The nine permission bits that a file with this list has.
    pub(crate) fn mode(&self) -> u16 {
        let bits = |tag| self.permissions_of(tag).unwrap_or(0);
        bits(Tag::Owner) << 6 | bits(self.group_class()) << 3 | bits(Tag::Other)
    }

    /// Whether the list says no more than a mode does, so that it need not be kept.
    pub(crate) fn is_plain(&self) -> bool {
        self.0.len() == 3
    }

    /// Follows a `chmod` of its file to these nine bits.
    pub(crate) fn set_mode(&mut self, mode: u16) {
        self.set(Tag::Owner, mode >> 6 & 7);
        self.set(self.group_class(), mode >> 3 & 7);
        self.set(Tag::Other, mode & 7);
    }

    /// The list of a file made with the permissions `mode` in a directory with this default list. The file's own nine
    /// bits become those of its list.
    pub(crate) fn inherit(&self, mode: u16) -> Self {
        let mut acl = self.clone();
        acl.set_mode(mode & self.mode());
        acl
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (tag, permissions, id) of each entry.
    fn acl(entries: &[(u16, u16, u32)]) -> Option<Acl> {
        let mut bytes = WIRE_VERSION.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            bytes.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
            bytes.extend(id.to_le_bytes());
        }
        Acl::from_wire(&bytes)
    }

    const NAMED: [(u16, u16, u32); 6] =
        [(1, 7, NO_ID), (2, 6, 1000), (4, 5, NO_ID), (8, 4, 70_000), (0x10, 6, NO_ID), (0x20, 4, NO_ID)];

    #[test]
    fn keeps_ids_only_where_they_are_named() {
        let acl = acl(&NAMED).unwrap();
        let disk = acl.to_disk();
        assert_eq!(disk.len(), 4 + 4 * 4 + 2 * 8);
        assert_eq!(disk[..8], [1, 0, 0, 0, 1, 0, 7, 0]);
        assert_eq!(Acl::from_disk(&disk), Some(acl.clone()));
        assert_eq!(Acl::from_wire(&acl.to_wire()), Some(acl));
    }

    #[test]
    fn refuses_lists_that_the_kernel_refuses() {
        assert!(acl(&[(1, 7, NO_ID), (4, 5, NO_ID), (0x20, 4, NO_ID)]).unwrap().is_plain());
        for without in [0, 2, 4, 5] {
            let mut entries = NAMED.to_vec();
            entries.remove(without);
            assert_eq!(acl(&entries), None, "without entry {without}");
        }
        let mut swapped = NAMED;
        swapped.swap(0, 5);
        for bad in [&swapped[..], &[(1, 8, NO_ID), NAMED[2], NAMED[5]], &[NAMED[0]; 3], &[]] {
            assert_eq!(acl(bad), None, "{bad:?}");
        }
        assert_eq!(Acl::from_disk(&acl(&NAMED).unwrap().to_wire()), None);
        assert_eq!(Acl::from_wire(&[2, 0, 0, 0, 1]), None);
    }

    #[test]
    fn chmod_moves_the_mask() {
        let mut acl = acl(&NAMED).unwrap();
        assert_eq!(acl.mode(), 0o764);
        acl.set_mode(0o640);
        assert_eq!((acl.mode(), acl.permissions_of(Tag::OwningGroup)), (0o640, Some(5)));
        let mut plain = super::tests::acl(&[NAMED[0], NAMED[2], NAMED[5]]).unwrap();
        plain.set_mode(0o610);
        assert_eq!(plain.permissions_of(Tag::OwningGroup), Some(1));
    }

    #[test]
    fn a_new_file_gets_no_more_than_both_allow() {
        let inherited = acl(&NAMED).unwrap().inherit(0o660);
        assert_eq!(inherited.mode(), 0o660 & 0o764);
        assert_eq!(inherited.permissions_of(Tag::User), Some(6));
    }
}
