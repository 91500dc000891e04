use std::io;
use std::ops::Range;

use qtk_block::{Preallocation, is_zero};

use super::state::{Origin, State};
use crate::create::Backing;
use crate::entry::{L1Entry, L2Entry};
use crate::error::{Action, Error, WriteObstacle};
use crate::extension::{self, Extension};
use crate::header::{MAX_BACKING_NAME, MAX_L1_SIZE};
use crate::mapping::{self, L2Tables, MappingKind};
use crate::types::{GuestCluster, HostCluster, Version, in_memory};

impl State {
    /// Gives the disk another size.
    pub(crate) fn resize(&mut self, size: u64, preallocation: Preallocation) -> Result<(), Error> {
        self.check_resizable()?;
        let old = self.size();
        if size < old {
            self.shrink(size)?;
        } else {
            // The entries of a raw data file's clusters say that they are there.
            let least = if self.header.data_file_raw() { Preallocation::Metadata } else { Preallocation::Off };
            self.grow(size)?;
            self.zero_added(old..size)?;
            self.preallocate(old..size, if preallocation == Preallocation::Off { least } else { preallocation })?;
        }
        self.resize_data_file(size, size < old)
    }

    /// A data file grows with the disk at once, and shrinks with it after the commit.
    fn resize_data_file(&mut self, size: u64, shrinks: bool) -> Result<(), Error> {
        if !self.header.has_data_file() {
            return Ok(());
        }
        let data = self.layer.data_file()?;
        if data.storage.size() < size {
            data.set_size(size)?;
        }
        self.data_end = shrinks.then_some(size);
        Ok(())
    }

    fn check_resizable(&self) -> Result<(), Error> {
        if self.header.snapshots > 0 && self.header.version < Version::V3 {
            return Err(self.not_writable(WriteObstacle::SnapshotsInVersion2));
        }
        self.bitmaps.check_resizable(self.file())
    }

    fn shrink(&mut self, size: u64) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        self.discard_clusters(bits.clusters_for(size)..bits.clusters_for(self.size()), L2Entry::UNALLOCATED)?;
        self.header.size = size;
        for index in self.header.l1_entries_needed()..self.l1.len() as u64 {
            // What lies there past the disk is a saved state of the machine, not of the disk.
            let empty =
                self.l2_table(index)?.is_some_and(|entries| entries.iter().all(|&entry| entry == L2Entry::UNALLOCATED));
            if empty {
                let home = self.table_home(index);
                self.tables.remove(&index);
                self.drop_table(index, home)?;
                self.l1[in_memory(index)] = L1Entry::default();
                self.l1_changed = true;
            }
        }
        self.cut_tail = true;
        Ok(())
    }

    fn grow(&mut self, size: u64) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let max = (MAX_L1_SIZE / 8).saturating_mul(self.header.l2_entries()).saturating_mul(bits.size());
        if size > max {
            return Err(self.invalid("the size", size, 0..=max));
        }
        self.header.size = size;
        let needed = in_memory(self.header.l1_entries_needed());
        if needed > self.l1.len() { self.resize_l1(needed) } else { Ok(()) }
    }

    /// Makes what a disk has grown by read as zeroes, whatever the last cluster or the backing has there.
    fn zero_added(&mut self, added: Range<u64>) -> Result<(), Error> {
        let hidden = self.backing.as_ref().is_some_and(|backing| backing.size() > added.start);
        // What hides the backing takes as little space as it can.
        let grain = if hidden { self.header.subcluster_size() } else { self.header.cluster_bits.size() };
        let tail = added.start..added.start.next_multiple_of(grain).min(added.end);
        let mut bytes = vec![0; in_memory(tail.end - tail.start)];
        self.read(&mut bytes, tail.start)?;
        if hidden || !is_zero(&bytes) {
            bytes.fill(0);
            self.write(&bytes, tail.start)?;
        }
        if hidden && tail.end < added.end { self.zero(tail.end..added.end) } else { Ok(()) }
    }

    /// Gives the clusters of a part of the disk that has none their places in the file.
    fn preallocate(&mut self, range: Range<u64>, preallocation: Preallocation) -> Result<(), Error> {
        if preallocation == Preallocation::Off || range.is_empty() {
            return Ok(());
        }
        let bits = self.header.cluster_bits;
        let mut next = bits.clusters_for(range.start);
        let end = bits.clusters_for(range.end);
        while next < end {
            let start = next << bits.bits();
            let found = mapping::find(self, start..range.end)?;
            let found_end = bits.clusters_for(found.range.end);
            if matches!(found.kind, MappingKind::Unallocated | MappingKind::Zero { host: None }) {
                next = self.preallocate_run(next..found_end, preallocation)?;
            } else {
                next = found_end;
            }
        }
        Ok(())
    }

    /// Does that for the front of some clusters; returns the first one that is left.
    fn preallocate_run(&mut self, wanted: Range<u64>, preallocation: Preallocation) -> Result<u64, Error> {
        let (bits, format) = (self.header.cluster_bits, self.header.l2_format());
        let per_table = self.header.l2_entries();
        let in_table = wanted.end.min((wanted.start / per_table + 1) * per_table);
        self.table_mut(wanted.start / per_table)?;
        let taken = self.take_for_guest(wanted.start..in_table)?;
        let host = taken.start << bits.bits()..taken.end << bits.bits();
        self.make_zeroes(host.clone(), preallocation)
            .map_err(|source| self.file().io(Action::Write, host.start, host.end - host.start, source))?;
        let end = wanted.start + (taken.end - taken.start);
        for (guest, host) in (wanted.start..end).zip(taken) {
            // Subclusters stay what they are until they are written.
            let old = self.entry(GuestCluster(guest))?;
            let entry = L2Entry::owned(bits.host_offset(HostCluster(host)), format);
            let entry = if format.extended { L2Entry { subclusters: old.subclusters, ..entry } } else { entry };
            self.map(GuestCluster(guest), entry, Origin::Own)?;
        }
        Ok(end)
    }

    /// Makes a part of the file read as zeroes and take the space that `preallocation` says.
    fn make_zeroes(&self, host: Range<u64>, preallocation: Preallocation) -> io::Result<()> {
        let storage = self.layer.data_storage().map_err(io::Error::from)?;
        // Clusters that were used before hold what they held.
        let used = host.start..host.end.min(storage.size());
        if !used.is_empty() {
            storage.zero(used)?;
        }
        if storage.size() < host.end {
            storage.set_size(host.end)?;
        }
        match preallocation {
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => storage.reserve(host),
            Preallocation::Full => {
                let zeroes = vec![0; in_memory(host.end - host.start).min(1 << 20)];
                let mut at = host.start;
                while at < host.end {
                    let len = (host.end - at).min(zeroes.len() as u64);
                    storage.write_at(&zeroes[..in_memory(len)], at)?;
                    at += len;
                }
                Ok(())
            }
        }
    }

    /// Names another backing file, or none. What the disk reads as through this transaction stays the same.
    pub(crate) fn set_backing(&mut self, backing: Option<Backing>) -> Result<(), Error> {
        let extensions = &mut self.header.extensions;
        extensions.retain(|extension| extension.magic != extension::BACKING_FORMAT);
        let Some(Backing { name, format }) = backing else {
            self.header.backing_name = None;
            return Ok(());
        };
        if let Some(format) = format {
            extensions.push(Extension::new(extension::BACKING_FORMAT, format.into_bytes()));
        }
        let len = name.len() as u64;
        if !(1..=MAX_BACKING_NAME).contains(&len) {
            return Err(self.invalid("the backing name's length", len, 1..=MAX_BACKING_NAME));
        }
        self.header.backing_name = Some(name);
        Ok(())
    }

    /// Gives up all guest data, so that the whole disk reads through to the backing. Bitmaps do not record it, as in QEMU: this
    /// follows a commit, after which the guest sees what it saw.
    pub(crate) fn clear(&mut self) -> Result<(), Error> {
        let simple = self.header.version >= Version::V3
            && self.header.snapshots == 0
            && self.header.encryption.is_none()
            && !self.header.has_data_file()
            && self.header.extension(extension::BITMAPS).is_none();
        let bits = self.header.cluster_bits;
        // Header, refcount table, one refcount block and the L1 table are what is left.
        let l1 = 3..3 + bits.clusters_for(self.l1.len() as u64 * 8);
        if !simple || !self.refcounts.one_block_counts(l1.end) {
            return self.discard_clusters(0..bits.clusters_for(self.size()), L2Entry::UNALLOCATED);
        }
        self.drop_active_tree()?;
        self.refcounts.start_over(l1.end)?;
        self.header.l1_table = bits.host_offset(HostCluster(l1.start));
        self.packed_to = None;
        self.cut_tail = true;
        Ok(())
    }

    pub(crate) fn not_writable(&self, obstacle: WriteObstacle) -> Error {
        Error::NotWritable { image: self.file().name.to_string(), obstacle }
    }

    pub(super) fn invalid(&self, option: &'static str, value: u64, allowed: std::ops::RangeInclusive<u64>) -> Error {
        Error::InvalidOption { image: self.file().name.to_string(), option, value, allowed }
    }
}
