use std::ops::Range;

use super::finding::Finding;
use super::stored::Stored;
use super::{CheckFailure, Checker, Counts, Fix};
use crate::bitmap::BitmapDirectory;
use crate::entry::{COPIED, Cluster, L1Entry, L2Entry, PlainRun, ZERO};
use crate::error::{Corruption, Error, Place};
use crate::header::MAX_L1_SIZE;
use crate::types::{ClusterBits, HostOffset, in_memory};

const BITMAP_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Size of the largest file in ext4: further away nothing can be.
const MAX_FILE: u64 = (16 << 40) - 4096;

impl Checker<'_> {
    /// Counts every reference in the image; false if the check ends here. What can only be repaired before refcounts are
    /// compared is repaired on the way.
    pub(crate) fn count_references(&mut self) -> Result<bool, Error> {
        let bits = self.header.cluster_bits;
        self.count(HostOffset(0), bits.size());
        if !self.l1_table(self.header.l1_table, self.header.l1_size, true)? || !self.snapshots()? {
            return Ok(false);
        }
        self.count(self.header.snapshot_table, self.snapshots.len);
        self.count(self.header.refcount_table, u64::from(self.header.refcount_table_clusters) * bits.size());
        if let Some((offset, len)) = self.header.encryption_header() {
            self.count(offset, len);
        }
        self.bitmaps()?;
        self.refcount_blocks()?;
        Ok(true)
    }

    /// Counts a reference to every cluster of a range of the file.
    fn count(&mut self, offset: HostOffset, len: u64) {
        let bits = self.header.cluster_bits;
        let Some(clusters) = self.clusters_in_file(offset, len) else {
            self.claims.add(bits.host_cluster(offset).0..bits.clusters_for(offset.0.saturating_add(len)));
            return self.tally.note(Finding::PastEnd { offset, len });
        };
        self.count_clusters(clusters);
    }

    fn count_clusters(&mut self, clusters: Range<u64>) {
        let (bits, tally) = (self.header.cluster_bits, &mut self.tally);
        self.counts.add(clusters, |cluster| tally.note(Finding::RefcountOverflow(bits.host_offset(cluster))));
    }

    /// The clusters of a range, unless it lies past the end of the file. The last cluster of the file may be cut short.
    pub(crate) fn clusters_in_file(&self, offset: HostOffset, len: u64) -> Option<Range<u64>> {
        let bits = self.header.cluster_bits;
        let limit = self.file.storage.size().saturating_add(bits.size());
        let first = bits.host_cluster(offset).0;
        match offset.0.checked_add(len)? {
            _ if len == 0 => Some(first..first),
            end => (end < limit).then(|| first..bits.clusters_for(end)),
        }
    }

    /// Follows the snapshots; false if the check ends here.
    fn snapshots(&mut self) -> Result<bool, Error> {
        if self.format.data_file && !self.snapshots.entries.is_empty() {
            self.tally.note(Finding::SnapshotsWithDataFile(self.header.snapshots));
        }
        for index in 0..self.snapshots.entries.len() {
            let snapshot = &self.snapshots.entries[index].snapshot;
            let (offset, entries) = (snapshot.l1_table, snapshot.l1_size);
            let names = || (snapshot.id.clone(), snapshot.name.clone());
            if self.header.cluster_bits.offset_within(offset.0) != 0 {
                let (id, name) = names();
                self.tally.note(Finding::SnapshotL1Misaligned { id, name, offset });
            } else if u64::from(entries) > MAX_L1_SIZE / 8 {
                let (id, name) = names();
                self.tally.note(Finding::SnapshotL1TooLarge { id, name, entries });
            } else if !self.l1_table(offset, entries, false)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Follows an L1 table; false if the check ends here. Only the active one describes the guest's disk as it is now.
    fn l1_table(&mut self, offset: HostOffset, entries: u32, active: bool) -> Result<bool, Error> {
        self.count(offset, u64::from(entries) * 8);
        if i64::try_from(offset.0).is_err() && entries > 0 {
            return Ok(self.give_up(Finding::L1OutOfReach, CheckFailure::OutOfReach));
        }
        let entries = self.read_l1(offset, entries)?;
        let used: Vec<L1Entry> = entries.iter().copied().filter(|entry| entry.0 != 0).collect();
        if !self.effort.takes(&self.counts, self.header.cluster_bits, entries.len(), used.len()) {
            return Ok(self.give_up(Finding::TablesOverlap, CheckFailure::FileTooLarge));
        }
        used.into_iter().try_for_each(|entry| self.l2_table(entry, active))?;
        Ok(true)
    }

    fn give_up(&mut self, finding: Finding, failure: CheckFailure) -> bool {
        self.tally.note(finding);
        self.tally.report.failure = Some(failure);
        false
    }

    fn l2_table(&mut self, entry: L1Entry, active: bool) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let offset = entry.offset();
        if entry.reserved_bits() != 0 {
            self.tally.note(Finding::L1ReservedBits(entry.0));
        }
        self.count(offset, bits.size());
        if bits.offset_within(offset.0) != 0 {
            self.tally.note(Finding::L2TableMisaligned(offset));
        }
        let mut table = self.take_l2(offset)?;
        let (entries, file_size) = (in_memory(self.format.entries()), self.file.storage.size());
        let mut changed = false;
        let mut next = None;
        let mut index = 0;
        while index < entries {
            if let Some(run) = self.format.plain_run(&table, index, file_size) {
                self.plain_clusters(run, active, &mut next);
                index += run.clusters;
                continue;
            }
            match self.l2_entry(index as u64, self.format.load(&table, index), active, &mut next) {
                Entry::Kept => {}
                Entry::Zeroed => {
                    self.format.store(&mut table, index, L2Entry::plain_zero(self.format));
                    changed = true;
                }
            }
            index += 1;
        }
        if changed && bits.offset_within(offset.0) == 0 {
            self.file.write(&table, offset)?;
        }
        self.l2_buffer = table;
        Ok(())
    }

    /// Follows entries of an L2 table in which nothing is wrong; see [`l2_entry`](Self::l2_entry).
    fn plain_clusters(&mut self, run: PlainRun, active: bool, next: &mut Option<HostOffset>) {
        let bits = self.header.cluster_bits;
        if active {
            self.tally.report.allocated_clusters += run.clusters as u64;
            self.tally.report.fragmented_clusters += u64::from(next.is_some_and(|next| next != run.host));
            *next = Some(run.host.plus(run.len(bits)));
        }
        let first = bits.host_cluster(run.host).0;
        self.count_clusters(first..first + run.clusters as u64);
    }

    /// Follows an entry of an L2 table; `next` is where the cluster after the last one of the table would lie in one piece with it.
    fn l2_entry(&mut self, index: u64, entry: L2Entry, active: bool, next: &mut Option<HostOffset>) -> Entry {
        let bits = self.header.cluster_bits;
        if entry.reserved_bits() != 0 {
            self.tally.note(Finding::L2ReservedBits(entry.word));
        }
        let cluster = entry.decode(self.format);
        let contradicts = entry.contradiction(cluster).is_some();
        match cluster {
            Cluster::Unallocated if contradicts => self.tally.note(Finding::SubclustersUnallocated),
            Cluster::Unallocated | Cluster::Zero { host: None } => {}
            Cluster::Compressed { host, len } => self.compressed(index, entry, host, len, active),
            Cluster::Zero { host: Some(host) } | Cluster::Data { host } => {
                if contradicts {
                    self.tally.note(Finding::SubclusterStates(host));
                }
                if bits.offset_within(host.0) != 0 && self.misaligned(entry, host) {
                    return Entry::Zeroed;
                }
                if active {
                    self.tally.report.allocated_clusters += 1;
                    self.tally.report.fragmented_clusters += u64::from(next.is_some_and(|next| next != host));
                    *next = Some(host.plus(bits.size())).filter(|next| next.0 != 0);
                }
                if !self.format.data_file {
                    self.count(host, bits.size());
                }
            }
        }
        Entry::Kept
    }

    fn compressed(&mut self, index: u64, entry: L2Entry, host: HostOffset, len: u64, active: bool) {
        if entry.copied() {
            self.tally.note(Finding::CompressedCopied(host));
        }
        let entry = L2Entry { word: entry.word & !COPIED, ..entry };
        if self.format.data_file {
            return self.tally.note(Finding::CompressedInDataFile { index, entry: entry.word });
        }
        if entry.subclusters != 0 {
            return self.tally.note(Finding::CompressedSubclusters { index, entry: entry.word });
        }
        self.count(host, len);
        if active {
            self.tally.report.allocated_clusters += 1;
            self.tally.report.compressed_clusters += 1;
            self.tally.report.fragmented_clusters += 1;
        }
    }

    /// Reports a cluster that does not begin where clusters do; true if the entry need not refer to it, and is repaired.
    fn misaligned(&mut self, entry: L2Entry, offset: HostOffset) -> bool {
        // The flag counts even in version 2.
        let holds_data =
            if self.format.extended { entry.subclusters & L2Entry::ALL_DATA != 0 } else { entry.word & ZERO == 0 };
        if holds_data {
            self.tally.note(Finding::DataMisaligned(offset));
            return false;
        }
        let repaired = self.fix == Fix::All;
        self.tally.note(Finding::PreallocatedMisaligned { offset, repaired });
        repaired
    }

    fn bitmaps(&mut self) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        if let Ok(Some(extension)) = self.header.bitmaps() {
            self.count(HostOffset(extension.directory_offset), extension.directory_size);
        }
        let directory = match BitmapDirectory::read(&self.file, &self.header) {
            Ok(Some(directory)) => directory,
            Ok(None) => return Ok(()),
            Err(Error::Corrupt { what: Corruption::Misaligned { .. } | Corruption::PastEnd { .. }, .. }) => {
                self.tally.note(Finding::BitmapTable(0));
                return Ok(());
            }
            Err(Error::Corrupt { .. }) => {
                self.tally.note(Finding::BitmapDirectory);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        // Tables do not overlap: more than the file holds would keep a check busy for years.
        let mut left = self.file.storage.size();
        for (index, bitmap) in (0..).zip(&directory.bitmaps) {
            self.count(bitmap.table, u64::from(bitmap.table_size) * 8);
            let Ok(table) = self.file.read_table(Place::Bitmap(index), bitmap.table, bitmap.table_size.into()) else {
                continue;
            };
            let Some(rest) = left.checked_sub(table.len() as u64 * 8) else {
                self.tally.note(Finding::BitmapDirectory);
                return Ok(());
            };
            left = rest;
            for entry in table {
                let offset = entry & BITMAP_OFFSET;
                if entry & BITMAP_RESERVED != 0 || bits.offset_within(offset) != 0 {
                    self.tally.note(Finding::BitmapTable(index));
                } else if offset != 0 {
                    self.count(HostOffset(offset), bits.size());
                }
            }
        }
        Ok(())
    }

    /// Lets the file reach to `end`; false if files do not.
    fn extend_to(&mut self, end: HostOffset) -> bool {
        let extended = end.0 <= MAX_FILE && self.file.set_size(self.file.storage.size().max(end.0)).is_ok();
        if !extended {
            self.tally.note(Finding::CannotExtend { too_large: i64::try_from(end.0).is_ok() });
        }
        extended
    }

    fn refcount_blocks(&mut self) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        for index in 0..self.stored.table().len() {
            let entry = self.stored.table()[index];
            let (index, offset) = (index as u64, Stored::offset(entry));
            if Stored::reserved_bits(entry) != 0 {
                self.rebuild = true;
                self.tally.note(Finding::RefcountTableReservedBits(index));
            } else if bits.offset_within(offset.0) != 0 {
                self.rebuild = true;
                self.tally.note(Finding::RefcountBlockMisaligned(index));
            } else if bits.host_cluster(offset).0 >= self.counts.clusters() {
                self.refcount_block_past_end(index, offset);
            } else if offset.0 != 0 {
                self.count(offset, bits.size());
                let references = self.counts.get(bits.host_cluster(offset));
                if references != 1 {
                    self.rebuild = true;
                    self.tally.note(Finding::RefcountBlockShared { index, references });
                }
            }
        }
        Ok(())
    }

    fn refcount_block_past_end(&mut self, index: u64, offset: HostOffset) {
        let repair = self.fix == Fix::All;
        self.tally.note(Finding::RefcountBlockPastEnd { index, repaired: repair });
        let end = offset.plus(self.header.cluster_bits.size());
        if repair && self.extend_to(end) {
            self.count(offset, self.header.cluster_bits.size());
        } else if repair {
            // Not repaired after all, but it will be by new refcounts.
            self.tally.corruptions_fixed -= 1;
            self.tally.report.corruptions += 1;
            self.rebuild = true;
        }
    }
}

/// What becomes of an L2 entry.
enum Entry {
    Kept,
    Zeroed,
}

/// How much of a file's tables was read, against what its size can justify: L1 tables do not overlap, and none refers to an L2
/// table twice. A hostile image in which they do could keep a check busy for years.
#[derive(Debug, Default)]
pub(super) struct Effort {
    l1_bytes: u64,
    /// L2 tables over the number of clusters in the file, for each L1 table.
    repeated: u64,
}

impl Effort {
    /// Damage that is no attack may let as many bytes of tables be read again.
    const SLACK: u64 = 1 << 30;

    /// Takes an L1 table of `entries` entries into account of which `used` refer to an L2 table; false if it is too much.
    fn takes(&mut self, counts: &Counts, bits: ClusterBits, entries: usize, used: usize) -> bool {
        self.l1_bytes += entries as u64 * 8;
        self.repeated += (used as u64).saturating_sub(counts.clusters());
        self.l1_bytes <= (counts.clusters() << bits.bits()).saturating_add(MAX_L1_SIZE)
            && self.repeated <= Self::SLACK >> bits.bits()
    }
}
