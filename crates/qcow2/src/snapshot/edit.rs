use super::table::{self, SnapshotEntry, SnapshotTable};
use super::{Snapshot, SnapshotRefusal};
use crate::entry::L1Entry;
use crate::error::{Corruption, Error, Place, WriteObstacle};
use crate::file::table_bytes;
use crate::header::{MAX_L1_SIZE, MAX_SNAPSHOTS};
use crate::mapping::L2Tables;
use crate::transaction::{State, Transaction};
use crate::types::{HostOffset, Version, in_memory};

/// A snapshot to take of a disk without a running guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name, which other snapshots may have too.
    pub name: String,
    /// When it is taken, in seconds since 1970 and nanoseconds.
    pub taken: (u32, u32),
    /// Instructions that the guest had executed, if they were counted. `qemu-img` says 0.
    pub icount: Option<u64>,
}

/// Internal snapshots.
impl Transaction {
    /// Takes a snapshot of the disk as the transaction has it; returns how the table describes it.
    pub fn create_snapshot(&self, new: &NewSnapshot) -> Result<Snapshot, Error> {
        self.change(|state| state.create_snapshot(new))
    }

    /// Gives the disk the content and size that it had in the snapshot whose identifier, or else name, is `wanted`. It must
    /// have been there when the transaction began.
    pub fn apply_snapshot(&self, wanted: &str) -> Result<(), Error> {
        self.change(|state| state.apply_snapshot(wanted))
    }

    /// Deletes the first snapshot called `name`, which must have been there when the transaction began.
    pub fn delete_snapshot(&self, name: &str) -> Result<(), Error> {
        self.change(|state| state.delete_snapshot(name))
    }
}

impl State {
    fn create_snapshot(&mut self, new: &NewSnapshot) -> Result<Snapshot, Error> {
        self.refuse_data_file(&new.name)?;
        let mut entries = self.snapshot_table()?;
        let name_len = u16::try_from(new.name.len());
        let refusal = if entries.len() as u64 >= MAX_SNAPSHOTS {
            Some(SnapshotRefusal::TooMany)
        } else {
            name_len.is_err().then_some(SnapshotRefusal::NameTooLong)
        };
        if let Some(refusal) = refusal {
            return Err(self.refused(&new.name, refusal));
        }
        let place = Place::SnapshotL1Table(entries.len() as u64);
        let l1 = self.share_tree()?;
        let snapshot = Snapshot {
            id: next_id(&entries).to_string(),
            name: new.name.clone(),
            l1_table: self.store_l1(place, &l1)?,
            l1_size: u32::try_from(l1.len()).unwrap_or(u32::MAX),
            taken: new.taken,
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size: Some(self.header().size),
            icount: new.icount,
        };
        entries.push(SnapshotEntry::new(snapshot.clone()));
        self.set_snapshot_table(entries, &new.name)?;
        Ok(snapshot)
    }

    fn apply_snapshot(&mut self, wanted: &str) -> Result<(), Error> {
        if !self.bitmaps.is_empty() {
            return Err(self.refused(wanted, SnapshotRefusal::Bitmaps));
        }
        self.refuse_data_file(wanted)?;
        let snapshots = self.list_snapshots()?;
        let index =
            Snapshot::find(&snapshots, wanted).ok_or_else(|| self.refused(wanted, SnapshotRefusal::NotFound))?;
        let snapshot = &snapshots[index];
        let size = snapshot.disk_size.unwrap_or(self.header().size);
        if size != self.header().size && self.header().version < Version::V3 {
            return Err(self.not_writable(WriteObstacle::SnapshotsInVersion2));
        }
        let place = Place::SnapshotL1Table(index as u64);
        let mut l1 = self.snapshot_l1(snapshot, place)?;
        self.drop_active_tree()?;
        self.header_mut().size = size;
        let len = l1.len().max(self.l1().len()).max(in_memory(self.header().l1_entries_needed()));
        l1.resize(len, L1Entry::default());
        self.adopt_tree(l1)
    }

    fn delete_snapshot(&mut self, name: &str) -> Result<(), Error> {
        let snapshots = self.list_snapshots()?;
        let index =
            Snapshot::find_by_name(&snapshots, name).ok_or_else(|| self.refused(name, SnapshotRefusal::NotFound))?;
        let place = Place::SnapshotL1Table(index as u64);
        let snapshot = &snapshots[index];
        let l1 = self.snapshot_l1(snapshot, place)?;
        // The new table comes first, as in QEMU: it does not take the place of what the snapshot gives up.
        let mut entries = self.snapshot_table()?;
        entries.remove(index);
        self.set_snapshot_table(entries, name)?;
        let layer = self.layer().with_l1(self.header().clone(), l1);
        self.drop_tree(&layer)?;
        self.release(place, snapshot.l1_table, u64::from(snapshot.l1_size) * 8)?;
        self.refresh_copied()
    }

    fn refused(&self, snapshot: &str, refusal: SnapshotRefusal) -> Error {
        Error::Snapshot { image: self.file().name.to_string(), snapshot: snapshot.to_owned(), refusal }
    }

    fn refuse_data_file(&self, wanted: &str) -> Result<(), Error> {
        match self.header().has_data_file() {
            true => Err(self.refused(wanted, SnapshotRefusal::DataFile)),
            false => Ok(()),
        }
    }

    fn list_snapshots(&mut self) -> Result<Vec<Snapshot>, Error> {
        Ok(self.snapshot_table()?.into_iter().map(|entry| entry.snapshot).collect())
    }

    /// The snapshots as the transaction has them.
    pub(crate) fn snapshot_table(&mut self) -> Result<SnapshotTable, Error> {
        if self.snapshots.is_none() {
            self.snapshots = Some(table::read(self.file(), self.header())?);
        }
        Ok(self.snapshots.as_ref().map_or_else(Vec::new, |(entries, _)| entries.clone()))
    }

    /// Stores another snapshot table; `snapshot` is the one to blame if that is too long.
    pub(crate) fn set_snapshot_table(&mut self, entries: SnapshotTable, snapshot: &str) -> Result<(), Error> {
        let bytes = table::encode(&entries, self.header().size);
        let bytes = bytes.ok_or_else(|| self.refused(snapshot, SnapshotRefusal::TooMany))?;
        let offset = if entries.is_empty() { HostOffset(0) } else { self.store(Place::SnapshotTable, &bytes)? };
        if let Some((_, old_len)) = self.snapshots.take() {
            self.release(Place::SnapshotTable, self.header().snapshot_table, old_len)?;
        }
        self.header_mut().snapshot_table = offset;
        self.header_mut().snapshots = u32::try_from(entries.len()).unwrap_or(u32::MAX);
        self.snapshots = Some((entries, bytes.len() as u64));
        Ok(())
    }

    fn store_l1(&mut self, place: Place, l1: &[L1Entry]) -> Result<HostOffset, Error> {
        if l1.is_empty() {
            return Ok(HostOffset(0));
        }
        self.store(place, &table_bytes(l1.iter().map(|entry| entry.0)))
    }

    /// The L1 table of a snapshot that was there when the transaction began.
    pub(crate) fn snapshot_l1(&self, snapshot: &Snapshot, place: Place) -> Result<Vec<L1Entry>, Error> {
        if self.is_pending(snapshot.l1_table) {
            return Err(self.refused(&snapshot.name, SnapshotRefusal::Uncommitted));
        }
        let entries = u64::from(snapshot.l1_size);
        let what = if entries * 8 > MAX_L1_SIZE {
            Some(Corruption::OutOfBounds { place, field: "l1_size", value: entries, allowed: 0..=MAX_L1_SIZE / 8 })
        } else if self.header().cluster_bits.offset_within(snapshot.l1_table.0) != 0 {
            Some(Corruption::Misaligned { place, offset: snapshot.l1_table })
        } else {
            None
        };
        match what {
            Some(what) => Err(self.file().corrupt(what)),
            None => Ok(self.file().read_table(place, snapshot.l1_table, entries)?.into_iter().map(L1Entry).collect()),
        }
    }
}

/// One more than the largest number that an identifier begins with.
fn next_id(entries: &[SnapshotEntry]) -> u64 {
    let number = |id: &str| {
        let digits = id.trim_start().split(|c: char| !c.is_ascii_digit()).next();
        digits.and_then(|digits| digits.parse::<u64>().ok()).unwrap_or(0)
    };
    entries.iter().map(|entry| number(&entry.snapshot.id)).max().unwrap_or(0).saturating_add(1)
}
