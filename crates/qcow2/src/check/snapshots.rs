use super::finding::Finding;
use super::{CheckFailure, Tally};
use crate::error::Error;
use crate::file::ImageFile;
use crate::header::{Header, MAX_SNAPSHOTS};
use crate::types::{HostOffset, Version, in_memory};

/// Most bytes of extra data in an entry of the snapshot table.
pub(super) const MAX_EXTRA: u32 = 1024;
/// Longest snapshot table in bytes.
const MAX_TABLE: u64 = MAX_SNAPSHOTS * 1024;
const FIXED: usize = 40;
/// Extra data that the specification describes, and how much of it version 3 demands.
const KNOWN_EXTRA: usize = 24;
const DEMANDED_EXTRA: u32 = 16;

/// The snapshot table, read with more patience than an opener has.
#[derive(Debug, Default)]
pub(crate) struct SnapshotTable {
    pub(crate) snapshots: Vec<Record>,
    /// Bytes of the table.
    pub(crate) len: u64,
    /// Whether what was read is not what is stored.
    pub(crate) changed: bool,
}

/// An entry of the snapshot table.
#[derive(Debug)]
pub(crate) struct Record {
    fixed: [u8; FIXED],
    extra: Vec<u8>,
    id: Vec<u8>,
    name: Vec<u8>,
}

impl Record {
    /// Where the L1 table begins.
    pub(crate) fn l1_table(&self) -> HostOffset {
        HostOffset(u64::from_be_bytes(self.field(0)))
    }

    pub(crate) fn set_l1_table(&mut self, offset: HostOffset) {
        self.fixed[..8].copy_from_slice(&offset.0.to_be_bytes());
    }

    /// Entries of the L1 table.
    pub(crate) fn l1_size(&self) -> u32 {
        u32::from_be_bytes(self.field(8))
    }

    pub(crate) fn id(&self) -> String {
        String::from_utf8_lossy(&self.id).into_owned()
    }

    pub(crate) fn name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.fixed[at + i])
    }

    fn extra_len(&self) -> u32 {
        u32::from_be_bytes(self.field(36))
    }

    fn read(file: &ImageFile, at: HostOffset) -> Result<Self, Error> {
        let mut fixed = [0; FIXED];
        file.read_padded(&mut fixed, at)?;
        let mut record = Self { fixed, extra: Vec::new(), id: Vec::new(), name: Vec::new() };
        let extra_len = u64::from(record.extra_len());
        record.extra = read(file, at.plus(FIXED as u64), extra_len.min(MAX_EXTRA.into()))?;
        let id_at = at.plus(FIXED as u64 + extra_len);
        record.id = read(file, id_at, u16::from_be_bytes(record.field(12)).into())?;
        record.name = read(file, id_at.plus(record.id.len() as u64), u16::from_be_bytes(record.field(14)).into())?;
        Ok(record)
    }

    fn stored_len(&self) -> u64 {
        FIXED as u64 + u64::from(self.extra_len()) + (self.id.len() + self.name.len()) as u64
    }

    /// The entry with all extra data that the specification describes. `disk_size` is what a missing size stands for.
    pub(crate) fn encode(&self, disk_size: u64) -> Vec<u8> {
        let mut known = [0; KNOWN_EXTRA];
        known[..8].copy_from_slice(&u64::from(u32::from_be_bytes(self.field(32))).to_be_bytes());
        known[8..16].copy_from_slice(&disk_size.to_be_bytes());
        known[16..].fill(0xff);
        let whole_fields = self.extra.len().min(KNOWN_EXTRA) / 8 * 8;
        known[..whole_fields].copy_from_slice(&self.extra[..whole_fields]);
        let unknown = self.extra.get(KNOWN_EXTRA..).unwrap_or_default();
        let mut bytes = self.fixed.to_vec();
        // Both lengths are at most 1024.
        bytes[36..].copy_from_slice(&u32::try_from(KNOWN_EXTRA + unknown.len()).unwrap_or(MAX_EXTRA).to_be_bytes());
        [&known, unknown, &self.id, &self.name].into_iter().for_each(|part| bytes.extend(part));
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }
}

fn read(file: &ImageFile, at: HostOffset, len: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; in_memory(len)];
    file.read_padded(&mut bytes, at)?;
    Ok(bytes)
}

impl SnapshotTable {
    /// Reads the table; what is beyond the limits is dropped if `repair`, and else ends the check.
    pub(super) fn read(
        file: &ImageFile,
        header: &Header,
        repair: bool,
        tally: &mut Tally<'_>,
    ) -> Result<Result<Self, CheckFailure>, Error> {
        let limit = u32::try_from(MAX_SNAPSHOTS).unwrap_or(u32::MAX);
        let mut count = header.snapshots;
        let mut table = Self::default();
        if let Some(overhanging) = count.checked_sub(limit).filter(|&over| over > 0) {
            tally.note_all(
                Finding::TooManySnapshots { overhanging, dropped: repair },
                if repair { overhanging.into() } else { 1 },
            );
            if !repair {
                return Ok(Err(CheckFailure::FileTooLarge));
            }
            (count, table.changed) = (limit, true);
        }
        let start = header.snapshot_table;
        let in_reach = i64::try_from(start.0).is_ok_and(|at| at.checked_add(i64::from(count) * 40).is_some());
        if header.cluster_bits.offset_within(start.0) != 0 || !in_reach {
            tally.note(Finding::SnapshotTableOffset);
            return Ok(Err(CheckFailure::InvalidArgument));
        }
        for index in 0..count {
            let at = table.len.next_multiple_of(8);
            let record = Record::read(file, start.plus(at))?;
            if record.extra_len() > MAX_EXTRA {
                tally.note(Finding::SnapshotExtraData { index, len: record.extra_len(), dropped: repair });
                if !repair {
                    return Ok(Err(CheckFailure::FileTooLarge));
                }
                table.changed = true;
            }
            let end = at + record.stored_len();
            if end > MAX_TABLE {
                let overhanging = count - index;
                tally.note_all(
                    Finding::SnapshotTableTooLong { overhanging, dropped: repair },
                    if repair { overhanging.into() } else { 1 },
                );
                if !repair {
                    return Ok(Err(CheckFailure::FileTooLarge));
                }
                table.changed = true;
                break;
            }
            table.len = end;
            table.snapshots.push(record);
        }
        for (index, record) in (0..).zip(&table.snapshots) {
            if header.version >= Version::V3 && record.extra_len() < DEMANDED_EXTRA {
                tally.note(Finding::SnapshotIncomplete { index, repaired: repair });
                table.changed |= repair;
            }
        }
        Ok(Ok(table))
    }
}
