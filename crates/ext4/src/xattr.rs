//! Extended attributes: names, and the two places that hold them (kernel documentation, "Extended Attributes").

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::{self, Seed};
use crate::{BlockNr, Ino};

const MAGIC: u32 = 0xea02_0000;

/// The number of each prefix. Those that end without a dot are whole names.
const PREFIXES: [(u8, &[u8]); 7] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
    (8, b"system.richacl"),
    (7, b"system."),
];

/// What is wrong with a set of attributes.
type Damage = &'static str;

/// A name as it is stored: the number of its prefix and the rest. Ordered as a block keeps them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    prefix: u8,
    rest: Vec<u8>,
}

/// A name that the file system itself uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NameRef {
    prefix: u8,
    rest: &'static [u8],
}

impl PartialEq<NameRef> for Name {
    fn eq(&self, other: &NameRef) -> bool {
        self.prefix == other.prefix && self.rest == other.rest
    }
}

impl Name {
    /// Content of a file that does not fit in place of its block map: `system.data`.
    pub(crate) const INLINE_DATA: NameRef = NameRef { prefix: 7, rest: b"data" };
    /// How a file is encrypted.
    pub(crate) const ENCRYPTION_CONTEXT: NameRef = NameRef { prefix: 9, rest: b"c" };
    pub(crate) const ACCESS_ACL: Self = Self { prefix: 2, rest: Vec::new() };
    pub(crate) const DEFAULT_ACL: Self = Self { prefix: 3, rest: Vec::new() };

    /// From a full name; `None` if it is too long or in no known namespace.
    pub(crate) fn parse(full: &[u8]) -> Option<Self> {
        PREFIXES.iter().find_map(|&(prefix, text)| {
            let rest = full.strip_prefix(text)?;
            let whole = !text.ends_with(b".");
            (whole == rest.is_empty() && rest.len() <= 255).then(|| Self { prefix, rest: rest.to_vec() })
        })
    }

    /// The full name; the prefix of an unknown number is left out.
    pub(crate) fn full(&self) -> Vec<u8> {
        let prefix = PREFIXES.iter().find(|(number, _)| *number == self.prefix).map_or(&b""[..], |(_, text)| text);
        [prefix, &self.rest].concat()
    }

    /// Whether it is one that a file's owner or the system gave the file, and not a part of how the file is kept.
    pub(crate) fn is_shown(&self) -> bool {
        *self != Self::INLINE_DATA && PREFIXES.iter().any(|(number, _)| *number == self.prefix)
    }

    /// Whether users may set it: the kernel has handlers for these prefixes alone.
    pub(crate) fn is_settable(&self) -> bool {
        matches!(self.prefix, 1..=4 | 6)
    }

    pub(crate) fn is_acl(&self) -> bool {
        *self == Self::ACCESS_ACL || *self == Self::DEFAULT_ACL
    }

    /// Whether only files and directories may have it: what their owner may set freely.
    pub(crate) fn is_user(&self) -> bool {
        self.prefix == 1
    }

    fn order(&self) -> (u8, usize, &[u8]) {
        (self.prefix, self.rest.len(), &self.rest)
    }
}

/// Where an attribute's value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// With the name.
    Here(Vec<u8>),
    /// In an inode of its own (`ea_inode`), with its size in bytes.
    Inode(Ino, u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attribute {
    pub(crate) name: Name,
    pub(crate) value: Value,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    name_len: u8,
    prefix: u8,
    value_offset: U16,
    value_ino: U32,
    value_size: U32,
    hash: U32,
}

const ENTRY: usize = size_of::<RawEntry>();
/// Four zero bytes end the list of entries.
const END: usize = 4;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct BlockHeader {
    magic: U32,
    references: U32,
    blocks: U32,
    hash: U32,
    checksum: U32,
    reserved: [U32; 3],
}

const HEADER: usize = size_of::<BlockHeader>();

fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

const CUT: Damage = "an extended attribute reaches past the end of its space";

/// Reads the entries that start at `start`. Values are counted from the start of `bytes`.
fn read_entries(bytes: &[u8], start: usize) -> Result<Vec<Attribute>, Damage> {
    let mut attributes = Vec::new();
    let mut at = start;
    loop {
        let rest = bytes.get(at..).ok_or(CUT)?;
        if rest.get(..END).ok_or(CUT)? == [0; END] {
            return Ok(attributes);
        }
        let (raw, rest) = RawEntry::ref_from_prefix(rest).map_err(|_| CUT)?;
        let name = rest.get(..usize::from(raw.name_len)).ok_or(CUT)?;
        let value = match Ino::new(raw.value_ino.get()) {
            Some(ino) => Value::Inode(ino, raw.value_size.get()),
            None => {
                let from = usize::from(raw.value_offset.get());
                let len = usize::try_from(raw.value_size.get()).map_err(|_| CUT)?;
                Value::Here(from.checked_add(len).and_then(|to| bytes.get(from..to)).ok_or(CUT)?.to_vec())
            }
        };
        attributes.push(Attribute { name: Name { prefix: raw.prefix, rest: name.to_vec() }, value });
        at += ENTRY + padded(name.len());
    }
}

/// Writes entries from `start` on, in the order that a block needs, and their values from the end of `bytes` down.
/// False if they do not fit; then `bytes` is to be thrown away. Entries within an inode have no hash.
fn write_entries(bytes: &mut [u8], start: usize, attributes: &[Attribute], hashed: bool) -> bool {
    let mut sorted: Vec<_> = attributes.iter().collect();
    sorted.sort_by(|a, b| a.name.order().cmp(&b.name.order()));
    let Some(area) = bytes.get_mut(start..) else { return false };
    area.fill(0);
    let (mut at, mut values) = (start, bytes.len());
    for Attribute { name, value } in sorted {
        let Value::Here(value) = value else { return false };
        let (Ok(name_len), Ok(size)) = (u8::try_from(name.rest.len()), u32::try_from(value.len())) else {
            return false;
        };
        let next = at + ENTRY + padded(name.rest.len());
        if next + END + padded(value.len()) > values {
            return false;
        }
        values -= padded(value.len());
        bytes[values..values + value.len()].copy_from_slice(value);
        let hash = if hashed { entry_hash(&name.rest, &bytes[values..values + padded(value.len())]) } else { 0 };
        let offset = if value.is_empty() { 0 } else { values };
        let Ok(value_offset) = u16::try_from(offset) else { return false };
        let raw = RawEntry {
            name_len,
            prefix: name.prefix,
            value_offset: value_offset.into(),
            value_ino: U32::ZERO,
            value_size: size.into(),
            hash: hash.into(),
        };
        bytes[at..at + ENTRY].copy_from_slice(raw.as_bytes());
        bytes[at + ENTRY..at + ENTRY + name.rest.len()].copy_from_slice(&name.rest);
        at = next;
    }
    true
}

/// Of a name and its padded value, as the kernel computes it since name bytes count as unsigned.
fn entry_hash(name: &[u8], padded_value: &[u8]) -> u32 {
    let hash = name.iter().fold(0_u32, |hash, &byte| hash.rotate_left(5) ^ u32::from(byte));
    hash_value(hash, padded_value)
}

/// Of all of a block's entries, in their order. Zero, if any entry has none: such a block is never shared.
fn block_hash(bytes: &[u8]) -> u32 {
    let mut hash = 0_u32;
    let mut rest = bytes.get(HEADER..).unwrap_or_default();
    while let Ok((raw, _)) = RawEntry::ref_from_prefix(rest) {
        if raw.as_bytes().first_chunk() == Some(&[0; END]) {
            break;
        }
        if raw.hash.get() == 0 {
            return 0;
        }
        hash = hash.rotate_left(16) ^ raw.hash.get();
        rest = rest.get(ENTRY + padded(raw.name_len.into())..).unwrap_or_default();
    }
    hash
}

/// The attributes that start at `start`, checked as a whole: that neither entries nor values overlap, and that hashes
/// are right. Entries within an inode may have none.
fn check_entries(bytes: &[u8], start: usize, needs_hash: bool) -> Result<Vec<Attribute>, Damage> {
    let attributes = read_entries(bytes, start)?;
    let mut values = Vec::new();
    let mut at = start;
    for attribute in &attributes {
        let (raw, _) = RawEntry::ref_from_prefix(&bytes[at..]).map_err(|_| CUT)?;
        at += ENTRY + padded(attribute.name.rest.len());
        let Value::Here(value) = &attribute.value else { continue };
        let from = usize::from(raw.value_offset.get());
        let padded_value = bytes.get(from..from + padded(value.len())).ok_or(CUT)?;
        if !value.is_empty() {
            values.push(from..from + padded_value.len());
        }
        let stored = raw.hash.get();
        let name = &attribute.name.rest;
        let is_right = stored == entry_hash(name, padded_value) || stored == signed_entry_hash(name, padded_value);
        if !is_right && (needs_hash || stored != 0) {
            return Err("the hash of an extended attribute is wrong");
        }
    }
    values.sort_by_key(|range| range.start);
    let entries_end = at + END;
    let ends = std::iter::once(entries_end).chain(values.iter().map(|range| range.end));
    if values.iter().zip(ends).any(|(range, end)| range.start < end) {
        return Err("extended attributes overlap");
    }
    Ok(attributes)
}

/// As the kernel computed it while name bytes counted as signed.
fn signed_entry_hash(name: &[u8], padded_value: &[u8]) -> u32 {
    let widen = |byte: &u8| i32::from(byte.cast_signed()).cast_unsigned();
    let hash = name.iter().fold(0_u32, |hash, byte| hash.rotate_left(5) ^ widen(byte));
    hash_value(hash, padded_value)
}

fn hash_value(hash: u32, padded_value: &[u8]) -> u32 {
    let (words, _) = padded_value.as_chunks();
    words.iter().fold(hash, |hash, &word| hash.rotate_left(16) ^ u32::from_le_bytes(word))
}

/// The attributes in the space behind an inode's fields, thoroughly checked.
pub(crate) fn check_in_inode(area: &[u8]) -> Result<Vec<Attribute>, Damage> {
    match area.split_first_chunk() {
        Some((magic, entries)) if u32::from_le_bytes(*magic) == MAGIC => check_entries(entries, 0, false),
        _ => Ok(Vec::new()),
    }
}

/// The attributes in the space behind an inode's fields.
pub(crate) fn read_in_inode(area: &[u8]) -> Result<Vec<Attribute>, Damage> {
    match area.split_first_chunk() {
        Some((magic, entries)) if u32::from_le_bytes(*magic) == MAGIC => read_entries(entries, 0),
        _ => Ok(Vec::new()),
    }
}

/// What the space behind an inode's fields, `len` bytes, must hold for these attributes. `None` if they do not fit.
pub(crate) fn write_in_inode(attributes: &[Attribute], len: usize) -> Option<Vec<u8>> {
    let mut area = vec![0; len];
    if attributes.is_empty() {
        return Some(area);
    }
    let (magic, entries) = area.split_first_chunk_mut()?;
    *magic = MAGIC.to_le_bytes();
    write_entries(entries, 0, attributes, false).then_some(area)
}

/// A block of attributes, which several inodes may share.
#[derive(Clone, Debug)]
pub(crate) struct XattrBlock(Vec<u8>);

impl XattrBlock {
    /// Checks the block read from `place`.
    pub(crate) fn parse(bytes: Vec<u8>, place: BlockNr, seed: Option<Seed>) -> Result<Self, Damage> {
        let (header, _) = BlockHeader::ref_from_prefix(&bytes).map_err(|_| "the block is too small")?;
        if header.magic.get() != MAGIC || header.blocks.get() != 1 || header.references.get() == 0 {
            return Err("the header of the extended attributes is wrong");
        }
        if seed.is_some_and(|seed| checksum::xattr_block(seed, place, &bytes) != header.checksum.get()) {
            return Err("the checksum of the extended attributes is wrong");
        }
        Ok(Self(bytes))
    }

    /// A block for one inode. `None` if the attributes do not fit.
    pub(crate) fn build(attributes: &[Attribute], block_size: usize) -> Option<Self> {
        let mut bytes = vec![0; block_size];
        if !write_entries(&mut bytes, HEADER, attributes, true) {
            return None;
        }
        let hash = block_hash(&bytes);
        let (header, _) = BlockHeader::mut_from_prefix(&mut bytes).ok()?;
        (header.magic, header.references, header.blocks) = (MAGIC.into(), 1.into(), 1.into());
        header.hash = hash.into();
        Some(Self(bytes))
    }

    pub(crate) fn attributes(&self) -> Result<Vec<Attribute>, Damage> {
        read_entries(&self.0, HEADER)
    }

    /// All attributes, thoroughly checked.
    pub(crate) fn check(&self) -> Result<Vec<Attribute>, Damage> {
        check_entries(&self.0, HEADER, true)
    }

    /// How many inodes have this block.
    pub(crate) fn references(&self) -> u32 {
        BlockHeader::ref_from_prefix(&self.0).map_or(0, |(header, _)| header.references.get())
    }

    pub(crate) fn set_references(&mut self, references: u32) {
        if let Ok((header, _)) = BlockHeader::mut_from_prefix(&mut self.0) {
            header.references = references.into();
        }
    }

    /// The bytes to store at `place`.
    pub(crate) fn seal(mut self, place: BlockNr, seed: Option<Seed>) -> Vec<u8> {
        let checksum = seed.map_or(0, |seed| checksum::xattr_block(seed, place, &self.0));
        if let Ok((header, _)) = BlockHeader::mut_from_prefix(&mut self.0) {
            header.checksum = checksum.into();
        }
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(name: &str, value: &[u8]) -> Attribute {
        Attribute { name: Name::parse(name.as_bytes()).unwrap(), value: Value::Here(value.to_vec()) }
    }

    fn some() -> Vec<Attribute> {
        vec![
            attribute("user.b", b"1"),
            attribute("user.a", b""),
            attribute("security.capability", &[7; 20]),
            attribute("trusted.long-name", &[1; 33]),
            attribute("system.posix_acl_access", &[9; 28]),
        ]
    }

    fn names(attributes: &[Attribute]) -> Vec<Vec<u8>> {
        attributes.iter().map(|attribute| attribute.name.full()).collect()
    }

    #[test]
    fn names_have_one_stored_form() {
        for name in
            ["user.x", "trusted.y.z", "security.selinux", "system.posix_acl_default", "system.richacl", "system.data"]
        {
            assert_eq!(Name::parse(name.as_bytes()).unwrap().full(), name.as_bytes());
        }
        for name in ["user.", "user", "other.x", "", &format!("user.{}", "x".repeat(256))] {
            assert_eq!(Name::parse(name.as_bytes()), None, "{name}");
        }
    }

    #[test]
    fn both_places_keep_what_they_are_given_sorted() {
        let seed = Some(Seed::stored(3));
        let block = XattrBlock::build(&some(), 1024).unwrap().seal(BlockNr(5), seed);
        let read = XattrBlock::parse(block.clone(), BlockNr(5), seed).unwrap().attributes().unwrap();
        assert_eq!(names(&read)[..2], [b"user.a", b"user.b"]);
        assert_eq!(read.len(), some().len());
        assert!(some().iter().all(|attribute| read.contains(attribute)));
        assert_eq!(read_in_inode(&write_in_inode(&some(), 512).unwrap()).unwrap(), read);
        assert!(XattrBlock::parse(block, BlockNr(6), seed).is_err());
    }

    #[test]
    fn says_what_does_not_fit() {
        // Magic, entry, one letter, end, value.
        let one = [attribute("user.a", b"1234")];
        let needed = 4 + ENTRY + 4 + END + 4;
        assert!(write_in_inode(&one, needed).is_some());
        assert!(write_in_inode(&one, needed - 4).is_none());
        assert!(write_in_inode(&one, 0).is_none());
        assert_eq!(write_in_inode(&[], 0), Some(Vec::new()));
        assert!(XattrBlock::build(&[attribute("user.a", &[0; 1024])], 1024).is_none());
    }

    #[test]
    fn damage_is_an_error() {
        let good = write_in_inode(&some(), 256).unwrap();
        for at in 0..good.len() {
            for byte in [0, 1, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = byte;
                let _ = read_in_inode(&bad);
            }
        }
        let mut cut = good;
        cut.truncate(30);
        assert!(read_in_inode(&cut).is_err());
    }
}
