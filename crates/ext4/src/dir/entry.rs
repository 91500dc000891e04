//! A block of directory records (kernel documentation, "Linear (Classic) Directories").

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Damage;
use crate::checksum::Seed;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RecordHeader {
    ino: U32,
    space: U16,
    name_len: u8,
    file_type: u8,
}

const HEADER: usize = size_of::<RecordHeader>();

/// The smallest record: a header and a name of one to four bytes.
const SMALLEST: usize = 12;

/// The checksum at a block's end looks like an unused record of this length and type.
const TAIL: usize = 12;
const TAIL_TYPE: u8 = 0xde;

const UNUSED: Entry<'_> = Entry { ino: 0, file_type: 0, name: b"" };

/// What a directory says of one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    /// The inode number; zero in a record that is not in use.
    pub(crate) ino: u32,
    /// The code of the inode's type; zero where the file system does not keep it.
    pub(crate) file_type: u8,
    pub(crate) name: &'a [u8],
}

impl Entry<'_> {
    /// Whether this is `.` or `..`.
    pub(crate) fn is_dot(&self) -> bool {
        matches!(self.name, b"." | b"..")
    }

    /// The bytes that a record needs for it.
    pub(crate) fn space(&self) -> usize {
        (HEADER + self.name.len()).next_multiple_of(4)
    }
}

/// An entry in its block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record<'a> {
    /// Where it starts, in bytes.
    pub(crate) offset: usize,
    /// From its start to the next record's, in bytes.
    pub(crate) space: usize,
    pub(crate) entry: Entry<'a>,
}

impl<'a> Record<'a> {
    fn read(bytes: &'a [u8], offset: usize) -> Option<Self> {
        let (header, rest) = RecordHeader::ref_from_prefix(bytes.get(offset..)?).ok()?;
        let name = rest.get(..usize::from(header.name_len))?;
        let entry = Entry { ino: header.ino.get(), file_type: header.file_type, name };
        Some(Self { offset, space: decode_space(header.space.get(), bytes.len()), entry })
    }

    /// The bytes that the entry itself takes, the slack behind its name left out.
    fn used(&self) -> usize {
        if self.entry.ino == 0 { 0 } else { self.entry.space() }
    }

    fn damage(&self, end: usize) -> Option<Damage> {
        let Entry { ino, name, .. } = self.entry;
        let left = end.checked_sub(self.offset + self.space);
        if self.space < SMALLEST || !self.space.is_multiple_of(4) || self.space < self.entry.space() {
            Some("an entry's length is wrong")
        } else if left.is_none_or(|left| left != 0 && left < SMALLEST) {
            Some("an entry reaches past the end of its block")
        } else if ino != 0 && name.is_empty() {
            Some("an entry's name is empty")
        } else {
            None
        }
    }

    /// Encrypted names may hold any byte.
    fn has_bad_name(&self) -> bool {
        self.entry.ino != 0 && self.entry.name.iter().any(|byte| matches!(byte, 0 | b'/'))
    }
}

/// 64 KiB does not fit in 16 bits; such lengths keep their two highest bits in the lowest two.
fn decode_space(raw: u16, block_size: usize) -> usize {
    let raw = usize::from(raw);
    if block_size < 0x1_0000 {
        raw
    } else if raw == 0 || raw == 0xffff {
        block_size
    } else {
        raw & 0xfffc | (raw & 3) << 16
    }
}

pub(crate) fn encode_space(space: usize) -> u16 {
    u16::try_from(space).unwrap_or(u16::MAX)
}

/// A block that holds nothing but records. Reading it has shown that they tile it.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    bytes: Vec<u8>,
    end: usize,
}

impl Leaf {
    /// Checks a block's checksum, where `seed` says that it has one, and its records.
    pub(crate) fn parse(bytes: Vec<u8>, seed: Option<Seed>) -> Result<Self, Damage> {
        let leaf = Self::parse_encrypted(bytes, seed)?;
        if leaf.records().any(|record| record.has_bad_name()) {
            return Err("an entry's name has a character that no name may have");
        }
        Ok(leaf)
    }

    /// The same for a block of an encrypted directory.
    pub(crate) fn parse_encrypted(bytes: Vec<u8>, seed: Option<Seed>) -> Result<Self, Damage> {
        let end = match seed {
            Some(seed) => verified_end(&bytes, seed)?,
            None => bytes.len(),
        };
        let leaf = Self { bytes, end };
        let mut at = 0;
        while at < end {
            let record = Record::read(&leaf.bytes, at).ok_or("an entry reaches past the end of its block")?;
            if let Some(damage) = record.damage(end) {
                return Err(damage);
            }
            at += record.space;
        }
        Ok(leaf)
    }

    /// A block with these entries, the last of which gets the remaining space. `None` if they do not fit.
    pub(crate) fn build<'a>(
        block_size: usize,
        checksummed: bool,
        entries: impl IntoIterator<Item = Entry<'a>>,
    ) -> Option<Self> {
        let end = if checksummed { block_size - TAIL } else { block_size };
        let mut leaf = Self { bytes: vec![0; block_size], end };
        leaf.put(0, end, UNUSED);
        let (mut last, mut used) = (0, 0);
        for entry in entries {
            let at = last + used;
            if end - at < entry.space() {
                return None;
            }
            if used > 0 {
                leaf.set_space(last, used);
            }
            leaf.put(at, end - at, entry);
            (last, used) = (at, entry.space());
        }
        Some(leaf)
    }

    /// Every record, those not in use too.
    pub(crate) fn records(&self) -> impl Iterator<Item = Record<'_>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let record = if at < self.end { Record::read(&self.bytes, at) } else { None }?;
            at += record.space;
            Some(record)
        })
    }

    /// The block's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The records in use, `.` and `..` too.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = Record<'_>> {
        self.records().filter(|record| record.entry.ino != 0)
    }

    pub(crate) fn find(&self, name: &[u8]) -> Option<Record<'_>> {
        self.in_use().find(|record| record.entry.name == name)
    }

    /// Adds an entry in the first gap that holds it. False, and nothing changed, if there is none.
    pub(crate) fn insert(&mut self, entry: Entry<'_>) -> bool {
        let gap = self
            .records()
            .find(|record| record.space - record.used() >= entry.space())
            .map(|record| (record.offset, record.used(), record.space));
        let Some((offset, used, space)) = gap else { return false };
        if used > 0 {
            self.set_space(offset, used);
        }
        self.put(offset + used, space - used, entry);
        true
    }

    /// Gives the record at `offset` to its predecessor, or marks it as not in use.
    pub(crate) fn remove(&mut self, offset: usize) {
        let position = |record: Record<'_>| (record.offset, record.space);
        let before = self.records().take_while(|record| record.offset < offset).last().map(position);
        let Some((_, freed)) = self.records().find(|record| record.offset == offset).map(position) else { return };
        self.bytes[offset..offset + freed].fill(0);
        match before {
            Some((before, space)) => self.set_space(before, space + freed),
            None => self.put(offset, freed, UNUSED),
        }
    }

    /// Points the record at `offset` to another inode.
    pub(crate) fn replace(&mut self, offset: usize, ino: u32, file_type: u8) {
        if let Ok((header, _)) = RecordHeader::mut_from_prefix(&mut self.bytes[offset..]) {
            header.ino = U32::new(ino);
            header.file_type = file_type;
        }
    }

    /// The block's bytes, checksummed if `seed` says so.
    pub(crate) fn seal(mut self, seed: Option<Seed>) -> Vec<u8> {
        if let Some(seed) = seed {
            let (records, tail) = self.bytes.split_at_mut(self.end);
            let checksum = seed.with(records).value();
            tail.copy_from_slice(&tail_bytes(checksum));
        }
        self.bytes
    }

    fn set_space(&mut self, offset: usize, space: usize) {
        if let Ok((header, _)) = RecordHeader::mut_from_prefix(&mut self.bytes[offset..]) {
            header.space = U16::new(encode_space(space));
        }
    }

    /// Writes a record; the space behind its name keeps what it held.
    fn put(&mut self, offset: usize, space: usize, entry: Entry<'_>) {
        let Entry { ino, file_type, name } = entry;
        let name_len = u8::try_from(name.len()).unwrap_or(u8::MAX);
        let header = RecordHeader { ino: U32::new(ino), space: U16::new(encode_space(space)), name_len, file_type };
        let target = &mut self.bytes[offset..offset + entry.space()];
        target.fill(0);
        target[..HEADER].copy_from_slice(header.as_bytes());
        target[HEADER..HEADER + name.len()].copy_from_slice(name);
    }
}

/// A checksum tail: an unused record of its own type whose "name" is the checksum.
fn tail_bytes(checksum: u32) -> [u8; TAIL] {
    let mut tail = [0, 0, 0, 0, 12, 0, 0, TAIL_TYPE, 0, 0, 0, 0];
    tail[HEADER..].copy_from_slice(&checksum.to_le_bytes());
    tail
}

/// Where the records end in a block whose checksum is right.
fn verified_end(bytes: &[u8], seed: Seed) -> Result<usize, Damage> {
    let end = bytes.len().checked_sub(TAIL).ok_or("the block is too small")?;
    let (records, tail) = bytes.split_at(end);
    if tail == tail_bytes(seed.with(records).value()) {
        Ok(end)
    } else {
        Err("the checksum of a directory block is wrong")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: Option<Seed> = Some(Seed::stored(7));

    fn entry(ino: u32, name: &[u8]) -> Entry<'_> {
        Entry { ino, file_type: 1, name }
    }

    fn names(leaf: &Leaf) -> Vec<&[u8]> {
        leaf.in_use().map(|record| record.entry.name).collect()
    }

    #[test]
    fn fills_gaps_and_merges_them_again() {
        for (block_size, seed) in [(1024, None), (4096, SEED), (65536, None), (65536, SEED)] {
            let empty = Leaf::build(block_size, seed.is_some(), []).unwrap().seal(seed);
            let mut leaf = Leaf::parse(empty.clone(), seed).unwrap();
            let mut count = 0_u32;
            while leaf.insert(entry(count + 1, format!("name{count}").as_bytes())) {
                count += 1;
            }
            assert!(count as usize >= (block_size - 12) / 20);
            let mut leaf = Leaf::parse(leaf.seal(seed), seed).unwrap();
            assert_eq!(names(&leaf).len(), count as usize);
            for number in (0..count).rev() {
                let offset = leaf.find(format!("name{number}").as_bytes()).unwrap().offset;
                leaf.remove(offset);
            }
            assert_eq!(leaf.seal(seed), empty);
        }
    }

    #[test]
    fn reuses_the_first_record() {
        let mut leaf = Leaf::build(1024, false, [entry(5, b"a"), entry(6, b"b")]).unwrap();
        leaf.remove(0);
        assert_eq!(names(&leaf), [b"b"]);
        assert!(leaf.insert(entry(7, b"c")));
        assert_eq!(names(&leaf), [b"c", b"b"]);
        leaf.replace(0, 9, 2);
        assert_eq!(leaf.find(b"c").map(|record| record.entry), Some(Entry { ino: 9, file_type: 2, name: b"c" }));
    }

    #[test]
    fn builds_no_more_than_fits() {
        let name = [b'n'; 255];
        assert!(Leaf::build(1024, true, [entry(5, &name); 3]).is_some());
        assert!(Leaf::build(1024, true, [entry(5, &name); 4]).is_none());
    }

    #[test]
    fn refuses_damage() {
        let good = Leaf::build(1024, true, [entry(2, b"."), entry(2, b".."), entry(12, b"file")]).unwrap().seal(SEED);
        assert!(Leaf::parse(good.clone(), SEED).is_ok());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(Leaf::parse(bad, SEED).is_err(), "flipped byte {at}");
        }
        // Without a checksum, the structure alone tells.
        for (at, byte) in [(4, 0), (4, 8), (4, 13), (5, 0xff), (6, 0), (6, 5), (8, b'/'), (8, 0), (28, 0xf8)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert!(Leaf::parse(bad, None).is_err(), "byte {at} = {byte}");
        }
    }
}
