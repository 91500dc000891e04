use super::Bitmap;
use crate::error::{Corruption, Error, Place};
use crate::extension::BitmapsExtension;
use crate::fields::Fields;
use crate::file::ImageFile;
use crate::header::Header;
use crate::types::{ClusterBits, HostOffset, in_memory};

const FIXED: usize = 24;
const FLAGS_AT: usize = 12;
const FLAG_IN_USE: u32 = 1 << 0;
const FLAG_AUTO: u32 = 1 << 1;
const FLAG_EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
const DIRTY_TRACKING: u8 = 1;
/// Longest name that QEMU accepts, in bytes.
pub(super) const MAX_NAME: usize = 1023;
/// Granularities that QEMU accepts.
const GRANULARITIES: std::ops::RangeInclusive<u64> = 1 << 9..=1 << 31;
/// Most bitmaps that QEMU accepts.
pub(super) const MAX_BITMAPS: usize = 65535;
const MAX_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;
/// Most entries of a bitmap's table.
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;

/// The bitmap directory, decoded and as stored.
#[derive(Debug)]
pub(crate) struct BitmapDirectory {
    pub(crate) extension: BitmapsExtension,
    pub(crate) bitmaps: Vec<Bitmap>,
    pub(super) entries: Vec<DirectoryEntry>,
}

/// An entry of the bitmap directory with everything that it says, so that it can be written again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DirectoryEntry {
    pub(super) bitmap: Bitmap,
    /// The name as stored; it need not be UTF-8.
    name: Vec<u8>,
    extra: Vec<u8>,
    /// Flags other than those in `bitmap`.
    other_flags: u32,
}

impl DirectoryEntry {
    /// The entry of a new bitmap.
    pub(super) fn new(bitmap: Bitmap) -> Self {
        Self { name: bitmap.name.clone().into_bytes(), bitmap, extra: Vec::new(), other_flags: 0 }
    }

    /// The first entry in `bytes`, and its length.
    fn decode(bytes: &[u8], cluster_bits: ClusterBits) -> Result<(Self, usize), Corruption> {
        let rest = Some(bytes).filter(|rest| rest.len() >= FIXED).ok_or(CUT_SHORT)?;
        let fixed = Fields(rest);
        let name_at = FIXED.saturating_add(in_memory(fixed.u32(20).into()));
        let end = name_at.saturating_add(fixed.u16(18).into());
        let (extra, name) = rest.get(FIXED..name_at).zip(rest.get(name_at..end)).ok_or(CUT_SHORT)?;
        let [kind, granularity_bits] = fixed.u16(16).to_be_bytes();
        let flags = fixed.u32(FLAGS_AT);
        let entry = Self {
            bitmap: Bitmap {
                name: String::from_utf8_lossy(name).into_owned(),
                granularity: 1_u64.checked_shl(granularity_bits.into()).unwrap_or(0),
                in_use: flags & FLAG_IN_USE != 0,
                auto: flags & FLAG_AUTO != 0,
                table: HostOffset(fixed.u64(0)),
                table_size: fixed.u32(8),
            },
            name: name.to_vec(),
            extra: extra.to_vec(),
            other_flags: flags & !(FLAG_IN_USE | FLAG_AUTO),
        };
        match entry.problem(kind, cluster_bits) {
            Some(problem) => Err(Corruption::Bitmap { name: entry.bitmap.name, problem }),
            None => Ok((entry, end.next_multiple_of(8))),
        }
    }

    /// What is wrong with the entry, if anything is.
    fn problem(&self, kind: u8, cluster_bits: ClusterBits) -> Option<&'static str> {
        let Self { bitmap, name, extra, other_flags } = self;
        let rules = [
            (kind == DIRTY_TRACKING, "its type is unknown"),
            (other_flags & !FLAG_EXTRA_DATA_COMPATIBLE == 0, "it has reserved flags set"),
            (extra.is_empty() || *other_flags != 0, "it has extra data that must be understood"),
            (granularity_is_legal(bitmap.granularity), "its granularity is out of bounds"),
            ((1..=MAX_NAME).contains(&name.len()), "its name has no legal length"),
            ((1..=MAX_TABLE_ENTRIES).contains(&bitmap.table_size), "its table has no legal size"),
            (bitmap.table.0 != 0, "its table has no place"),
            (cluster_bits.offset_within(bitmap.table.0) == 0, "its table is not at the start of a cluster"),
        ];
        rules.into_iter().find_map(|(kept, problem)| (!kept).then_some(problem))
    }

    /// Appends the entry as it is stored.
    fn encode(&self, out: &mut Vec<u8>) {
        let Self { bitmap, name, extra, other_flags } = self;
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = other_flags | flag(bitmap.in_use, FLAG_IN_USE) | flag(bitmap.auto, FLAG_AUTO);
        let [.., granularity_bits] = bitmap.granularity.trailing_zeros().to_be_bytes();
        out.extend(bitmap.table.0.to_be_bytes());
        out.extend(bitmap.table_size.to_be_bytes());
        out.extend(flags.to_be_bytes());
        out.extend([DIRTY_TRACKING, granularity_bits]);
        out.extend(u16::try_from(name.len()).unwrap_or(u16::MAX).to_be_bytes());
        out.extend(u32::try_from(extra.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(extra);
        out.extend(name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

impl BitmapDirectory {
    /// The directory, if the image has consistent bitmaps.
    pub(crate) fn read(file: &ImageFile, header: &Header) -> Result<Option<Self>, Error> {
        let Some(extension) = header.bitmaps().map_err(|what| file.corrupt(what))? else {
            return Ok(None);
        };
        let place = Place::BitmapDirectory;
        let offset = HostOffset(extension.directory_offset);
        if header.cluster_bits.offset_within(offset.0) != 0 {
            return Err(file.corrupt(Corruption::Misaligned { place, offset }));
        }
        if extension.directory_size > MAX_DIRECTORY {
            return Err(file.corrupt(Corruption::Malformed { place, problem: "it is too large" }));
        }
        let bytes = file.read_structure(place, offset, extension.directory_size)?;
        let entries = decode(&bytes, extension.count, header.cluster_bits).map_err(|what| file.corrupt(what))?;
        Ok(Some(Self { extension, bitmaps: entries.iter().map(|entry| entry.bitmap.clone()).collect(), entries }))
    }
}

fn decode(bytes: &[u8], count: u32, cluster_bits: ClusterBits) -> Result<Vec<DirectoryEntry>, Corruption> {
    let mut entries = Vec::new();
    let mut at = 0_usize;
    for _ in 0..count {
        let (entry, len) = DirectoryEntry::decode(bytes.get(at..).unwrap_or_default(), cluster_bits)?;
        entries.push(entry);
        at = at.saturating_add(len);
    }
    if at == bytes.len() { Ok(entries) } else { Err(malformed("its length is not that of its entries")) }
}

/// Whether QEMU takes bitmaps whose bits stand for as many bytes.
pub(super) fn granularity_is_legal(granularity: u64) -> bool {
    granularity.is_power_of_two() && GRANULARITIES.contains(&granularity)
}

const fn malformed(problem: &'static str) -> Corruption {
    Corruption::Malformed { place: Place::BitmapDirectory, problem }
}

const CUT_SHORT: Corruption = malformed("it ends inside an entry");

/// A directory as it is stored.
pub(super) fn encode(entries: &[DirectoryEntry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    entries.iter().for_each(|entry| entry.encode(&mut bytes));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> DirectoryEntry {
        let bitmap = Bitmap {
            name: "changes".into(),
            granularity: 1 << 16,
            in_use: true,
            auto: true,
            table: HostOffset(0x3_0000),
            table_size: 7,
        };
        let compatible = FLAG_EXTRA_DATA_COMPATIBLE;
        DirectoryEntry { extra: b"extra".to_vec(), other_flags: compatible, ..DirectoryEntry::new(bitmap) }
    }

    #[test]
    fn entries_keep_all_that_they_say() {
        let entries = [entry(), DirectoryEntry { name: b"\xff".to_vec(), ..entry() }];
        let bytes = encode(&entries);
        let decoded = decode(&bytes, 2, ClusterBits::default()).unwrap();
        assert_eq!(encode(&decoded), bytes);
        assert_eq!(decoded[0], entries[0]);
        assert!(
            decode(&bytes, 1, ClusterBits::default()).is_err() && decode(&bytes, 3, ClusterBits::default()).is_err()
        );
    }

    #[test]
    fn entries_that_qemu_refuses_are_corrupt() {
        let good = entry();
        let with = |change: fn(&mut DirectoryEntry)| {
            let mut entry = good.clone();
            change(&mut entry);
            decode(&encode(&[entry]), 1, ClusterBits::default())
        };
        assert!(with(|_| {}).is_ok());
        let changes: [fn(&mut DirectoryEntry); 8] = [
            |entry| entry.bitmap.granularity = 1 << 8,
            |entry| entry.bitmap.granularity = 1 << 32,
            |entry| entry.bitmap.table = HostOffset(0),
            |entry| entry.bitmap.table = HostOffset(512),
            |entry| entry.bitmap.table_size = 0,
            |entry| entry.name.clear(),
            |entry| entry.other_flags = 0,
            |entry| entry.other_flags |= 8,
        ];
        for change in changes {
            assert!(matches!(with(change), Err(Corruption::Bitmap { .. })));
        }
    }
}
