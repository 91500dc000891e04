use super::finding::Finding;
use super::{CheckFailure, Tally};
use crate::error::Error;
use crate::fields::Fields;
use crate::file::ImageFile;
use crate::header::{Header, MAX_SNAPSHOTS};
use crate::snapshot::SnapshotEntry;
use crate::types::{HostOffset, Version, in_memory};

/// Most bytes of extra data in an entry of the snapshot table.
pub(super) const MAX_EXTRA: u32 = 1024;
/// Longest snapshot table in bytes.
const MAX_TABLE: u64 = MAX_SNAPSHOTS * 1024;
const FIXED: u64 = 40;
/// Extra data that version 3 demands.
const DEMANDED_EXTRA: u32 = 16;

/// The snapshot table, read with more patience than an opener has: what lies past the end of the file is zero.
#[derive(Debug, Default)]
pub(crate) struct FoundSnapshots {
    pub(crate) entries: Vec<SnapshotEntry>,
    /// Bytes of the table.
    pub(crate) len: u64,
    /// Whether something was dropped or must be added.
    pub(crate) changed: bool,
}

impl FoundSnapshots {
    /// Reads the table. What is over the limits is dropped if `repair`, and else ends the check.
    pub(super) fn read(
        file: &ImageFile,
        header: &Header,
        repair: bool,
        tally: &mut Tally<'_>,
    ) -> Result<Result<Self, CheckFailure>, Error> {
        let limit = u32::try_from(MAX_SNAPSHOTS).unwrap_or(u32::MAX);
        let overhanging = header.snapshots.saturating_sub(limit);
        if overhanging > 0 {
            tally.note_dropped(Finding::TooManySnapshots { overhanging, dropped: repair }, overhanging);
            if !repair {
                return Ok(Err(CheckFailure::FileTooLarge));
            }
        }
        let count = header.snapshots - overhanging;
        let start = header.snapshot_table;
        let end = start.0.checked_add(u64::from(count) * FIXED);
        if header.cluster_bits.offset_within(start.0) != 0 || end.is_none_or(|end| i64::try_from(end).is_err()) {
            tally.note(Finding::SnapshotTableOffset);
            return Ok(Err(CheckFailure::InvalidArgument));
        }
        let mut found = Self { changed: overhanging > 0, ..Self::default() };
        let mut incomplete = Vec::new();
        for index in 0..count {
            let at = found.len.next_multiple_of(8);
            let (entry, extra_len, len) = read_entry(file, start.plus(at))?;
            if extra_len > MAX_EXTRA {
                tally.note(Finding::SnapshotExtraData { index, len: extra_len, dropped: repair });
            } else if header.version >= Version::V3 && extra_len < DEMANDED_EXTRA {
                incomplete.push(index);
            }
            let too_long = at + len > MAX_TABLE;
            if too_long && (repair || extra_len <= MAX_EXTRA) {
                let overhanging = count - index;
                tally.note_dropped(Finding::SnapshotTableTooLong { overhanging, dropped: repair }, overhanging);
            }
            if !repair && (too_long || extra_len > MAX_EXTRA) {
                return Ok(Err(CheckFailure::FileTooLarge));
            }
            found.changed |= too_long || extra_len > MAX_EXTRA;
            if too_long {
                break;
            }
            found.len = at + len;
            found.entries.push(entry);
        }
        for index in incomplete {
            tally.note(Finding::SnapshotIncomplete { index, repaired: repair });
            found.changed |= repair;
        }
        Ok(Ok(found))
    }
}

/// An entry, the length that it gives its extra data, and its own.
fn read_entry(file: &ImageFile, at: HostOffset) -> Result<(SnapshotEntry, u32, u64), Error> {
    let read = |at: HostOffset, len: u64| {
        let mut bytes = vec![0; in_memory(len)];
        file.read_padded(&mut bytes, at).map(|()| bytes)
    };
    let fixed = read(at, FIXED)?;
    let fixed = Fields(&fixed);
    let extra_len = fixed.u32(36);
    let extra = read(at.plus(FIXED), extra_len.min(MAX_EXTRA).into())?;
    let (id_len, name_len) = (fixed.u16(12).into(), fixed.u16(14).into());
    let id_at = at.plus(FIXED + u64::from(extra_len));
    let (id, name) = (read(id_at, id_len)?, read(id_at.plus(id_len), name_len)?);
    let len = FIXED + u64::from(extra_len) + id_len + name_len;
    Ok((SnapshotEntry::parse(fixed, Fields(&extra), &id, &name), extra_len, len))
}
