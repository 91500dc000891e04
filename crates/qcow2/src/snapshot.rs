use crate::error::{Corruption, Error, Place};
use crate::file::ImageFile;
use crate::header::Header;
use crate::types::{HostOffset, in_memory};

/// An internal snapshot, as its entry in the snapshot table describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its identifier, a number by custom.
    pub id: String,
    /// The name its maker gave it.
    pub name: String,
    /// Where its L1 table begins.
    pub l1_table: HostOffset,
    /// Entries of its L1 table.
    pub l1_size: u32,
    /// When it was taken, in seconds since 1970 and nanoseconds.
    pub taken: (u32, u32),
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Size of the guest's saved memory in bytes.
    pub vm_state_size: u64,
    /// Size of the guest's disk then, if it was recorded.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, if they were counted.
    pub icount: Option<u64>,
}

const FIXED: u64 = 40;
const MAX_EXTRA: u64 = 1024;

/// Snapshots in the table's order, and the table's length in bytes.
pub(crate) fn read_table(file: &ImageFile, header: &Header) -> Result<(Vec<Snapshot>, u64), Error> {
    let mut snapshots = Vec::new();
    let mut len = 0;
    for index in 0..u64::from(header.snapshots) {
        let at = header.snapshot_table.plus(len);
        let fixed = file.read_structure(Place::SnapshotTable, at, FIXED)?;
        let entry = Entry(&fixed);
        let (id_len, name_len) = (u64::from(entry.u16(12)), u64::from(entry.u16(14)));
        let extra_len = u64::from(entry.u32(36));
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
        let extra_word = |at: usize| extra.get(at..at + 8).map(|_| Entry(extra).u64(at));
        snapshots.push(Snapshot {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            l1_table: HostOffset(entry.u64(0)),
            l1_size: entry.u32(8),
            taken: (entry.u32(16), entry.u32(20)),
            vm_clock_nsec: entry.u64(24),
            vm_state_size: extra_word(0).unwrap_or_else(|| entry.u32(32).into()),
            disk_size: extra_word(8),
            icount: extra_word(16).filter(|&count| count != u64::MAX),
        });
        len += (FIXED + variable.len() as u64).next_multiple_of(8);
    }
    Ok((snapshots, len))
}

/// Big-endian fields of a byte string; what lies past its end is zero.
pub(crate) struct Entry<'a>(pub(crate) &'a [u8]);

impl Entry<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| self.0.get(at + i).copied().unwrap_or_default())
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.bytes(at))
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.bytes(at))
    }

    pub(crate) fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.bytes(at))
    }
}
