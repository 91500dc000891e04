use super::Snapshot;
use crate::error::{Corruption, Error, Place};
use crate::fields::Fields;
use crate::file::ImageFile;
use crate::header::Header;
use crate::types::{HostOffset, in_memory};

const FIXED: u64 = 40;
/// Most extra data that QEMU reads.
const MAX_EXTRA: u64 = 1024;
/// Extra data that is defined: sizes of the VM state and the disk, and the instruction count.
const KNOWN_EXTRA: usize = 24;
/// The size of a table that QEMU opens: as many snapshots as it takes, at a kilobyte each.
const MAX_LEN: u64 = 64 << 20;

/// The entries of a snapshot table in order.
pub(crate) type SnapshotTable = Vec<SnapshotEntry>;

/// An entry of the snapshot table with everything that it says, so that it can be written again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotEntry {
    pub(crate) snapshot: Snapshot,
    /// Identifier and name as stored; they need not be UTF-8.
    id: Vec<u8>,
    name: Vec<u8>,
    /// Extra data past what is defined.
    unknown: Vec<u8>,
}

impl SnapshotEntry {
    /// The entry of a new snapshot.
    pub(crate) fn new(snapshot: Snapshot) -> Self {
        let (id, name) = (snapshot.id.clone().into_bytes(), snapshot.name.clone().into_bytes());
        Self { snapshot, id, name, unknown: Vec::new() }
    }

    fn read(file: &ImageFile, index: u64, at: HostOffset) -> Result<(Self, u64), Error> {
        let fixed = file.read_structure(Place::SnapshotTable, at, FIXED)?;
        let fixed = Fields(&fixed);
        let (id_len, name_len) = (u64::from(fixed.u16(12)), u64::from(fixed.u16(14)));
        let extra_len = u64::from(fixed.u32(36));
        if extra_len > MAX_EXTRA {
            return Err(file.corrupt(Corruption::OutOfBounds {
                place: Place::Snapshot(index),
                field: "extra_data_size",
                value: extra_len,
                allowed: 0..=MAX_EXTRA,
            }));
        }
        let variable = file.read_structure(Place::Snapshot(index), at.plus(FIXED), extra_len + id_len + name_len)?;
        let (extra, names) = variable.split_at(in_memory(extra_len));
        let (id, name) = names.split_at(in_memory(id_len));
        let len = (FIXED + variable.len() as u64).next_multiple_of(8);
        Ok((Self::parse(fixed, Fields(extra), id, name), len))
    }

    /// The entry with these parts. Extra data that is not there has its default, and a zero ends identifier and name.
    pub(crate) fn parse(fixed: Fields<'_>, extra: Fields<'_>, id: &[u8], name: &[u8]) -> Self {
        let [id, name] = [id, name].map(|text| text.split(|&byte| byte == 0).next().unwrap_or_default());
        let extra_word = |at: usize| (extra.0.len() >= at + 8).then(|| extra.u64(at));
        let snapshot = Snapshot {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            l1_table: HostOffset(fixed.u64(0)),
            l1_size: fixed.u32(8),
            taken: (fixed.u32(16), fixed.u32(20)),
            vm_clock_nsec: fixed.u64(24),
            vm_state_size: extra_word(0).unwrap_or_else(|| fixed.u32(32).into()),
            disk_size: extra_word(8),
            icount: extra_word(16).filter(|&count| count != u64::MAX),
        };
        let unknown = extra.0.get(KNOWN_EXTRA..).unwrap_or_default().to_vec();
        Self { id: id.to_vec(), name: name.to_vec(), unknown, snapshot }
    }

    /// Appends the entry as it is stored. Where no size was recorded, the disk had the one it has now: `disk_size`.
    fn encode(&self, disk_size: u64, out: &mut Vec<u8>) {
        let Self { snapshot, id, name, unknown } = self;
        // Entries are aligned, the table's end is not.
        out.resize(out.len().next_multiple_of(8), 0);
        let len16 = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes();
        out.extend(snapshot.l1_table.0.to_be_bytes());
        out.extend(snapshot.l1_size.to_be_bytes());
        out.extend(len16(id));
        out.extend(len16(name));
        out.extend(snapshot.taken.0.to_be_bytes());
        out.extend(snapshot.taken.1.to_be_bytes());
        out.extend(snapshot.vm_clock_nsec.to_be_bytes());
        // A size that needs the extra data reads as no state to those who do not know it.
        out.extend(u32::try_from(snapshot.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend(u32::try_from(KNOWN_EXTRA + unknown.len()).unwrap_or(u32::MAX).to_be_bytes());
        out.extend(snapshot.vm_state_size.to_be_bytes());
        out.extend(snapshot.disk_size.unwrap_or(disk_size).to_be_bytes());
        out.extend(snapshot.icount.unwrap_or(u64::MAX).to_be_bytes());
        out.extend(unknown);
        out.extend(id);
        out.extend(name);
    }
}

/// Snapshots in the table's order, and the table's length in bytes.
pub(crate) fn read_table(file: &ImageFile, header: &Header) -> Result<(Vec<Snapshot>, u64), Error> {
    let (entries, len) = read(file, header)?;
    Ok((entries.into_iter().map(|entry| entry.snapshot).collect(), len))
}

/// The snapshot table, and its length in bytes.
pub(crate) fn read(file: &ImageFile, header: &Header) -> Result<(SnapshotTable, u64), Error> {
    let mut entries = Vec::new();
    let mut total = 0;
    for index in 0..u64::from(header.snapshots) {
        let (entry, len) = SnapshotEntry::read(file, index, header.snapshot_table.plus(total))?;
        entries.push(entry);
        total += len;
        if total > MAX_LEN {
            let problem = "it is longer than 64 MiB";
            return Err(file.corrupt(Corruption::Malformed { place: Place::SnapshotTable, problem }));
        }
    }
    Ok((entries, total))
}

/// The table as it is stored in an image whose disk has `disk_size` bytes; `None` if QEMU would not open it.
pub(crate) fn encode(entries: &[SnapshotEntry], disk_size: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    entries.iter().for_each(|entry| entry.encode(disk_size, &mut bytes));
    (bytes.len() as u64 <= MAX_LEN).then_some(bytes)
}

/// Where the entries of a stored table begin in it.
pub(crate) fn entry_starts(table: &[u8]) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut at = 0;
    // Entries that we store have extra data; zeroes fill the table's last cluster.
    while let Some(rest) = table.get(at..).filter(|rest| rest.len() as u64 >= FIXED && Fields(rest).u32(36) != 0) {
        let entry = Fields(rest);
        let variable = u64::from(entry.u16(12)) + u64::from(entry.u16(14)) + u64::from(entry.u32(36));
        starts.push(at);
        at = at.saturating_add(in_memory((FIXED + variable).next_multiple_of(8)));
    }
    starts
}
