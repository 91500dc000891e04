//! Looking for damage: counts every reference in the image and compares with the refcounts.

mod counts;
mod finding;

use crate::bitmap::BitmapDirectory;
use crate::entry::{Cluster, L1Entry, L2Entry};
use crate::error::{Corruption, Error, Place};
use crate::header::MAX_L1_SIZE;
use crate::layer::Layer;
use crate::snapshot;
use crate::types::{GuestCluster, HostCluster, HostOffset};
use counts::{Counts, Stored};

pub use finding::Finding;

/// Most findings that a report describes; all are counted.
const MAX_FINDINGS: usize = 1000;
/// Clusters of a file that QEMU checks at most.
const MAX_CLUSTERS: u64 = i32::MAX.unsigned_abs() as u64;
const BITMAP_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;

/// What a check found, counted as `qemu-img check` does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Where the last cluster in use ends, in bytes of the file.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Those that the active state stores in the file.
    pub allocated_clusters: u64,
    /// Those of them that do not follow the one before in the file.
    pub fragmented_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Clusters whose refcount is too high.
    pub leaks: u64,
    /// Everything that may cost data.
    pub corruptions: u64,
    /// Parts of the image that could not be checked.
    pub check_errors: u64,
    /// The first findings, in the order in which they came up.
    pub findings: Vec<Finding>,
}

impl CheckReport {
    /// Whether there is neither damage nor a leak, and all was checked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.leaks == 0 && self.corruptions == 0 && self.check_errors == 0
    }

    fn note(&mut self, finding: Finding) {
        let counter = match finding {
            Finding::Leak { .. } => &mut self.leaks,
            Finding::Unreadable(_) => &mut self.check_errors,
            _ => &mut self.corruptions,
        };
        *counter += 1;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }
}

/// Checks a whole image: active state, snapshots, bitmaps, refcounts. Damage is reported, not an error; errors are those of
/// the host, and damage that leaves nothing to check. Nothing is repaired.
///
/// Memory holds one counter for each cluster in use and the refcounts they are compared with.
pub fn check(layer: &Layer) -> Result<CheckReport, Error> {
    let header = layer.header();
    let file_size = layer.storage().size();
    if header.cluster_bits.clusters_for(file_size) > MAX_CLUSTERS {
        return Err(layer.file().unsupported("a check of more than 2^31 clusters"));
    }
    if layer.header().extended_l2() || layer.header().has_data_file() {
        return Err(layer.file().unsupported("a check of subclusters or an external data file"));
    }
    let mut checker = Checker {
        layer,
        file_size,
        counts: Counts::new(header, file_size),
        stored: Stored::read(layer.file(), header)?,
        report: CheckReport {
            // QEMU counts in whole sectors.
            total_clusters: header.cluster_bits.clusters_for(header.size & !511),
            ..CheckReport::default()
        },
    };
    checker.count(Place::Header, HostOffset(0), header.cluster_bits.size());
    checker.active_tables()?;
    checker.snapshots()?;
    let refcount_table_len = u64::from(header.refcount_table_clusters) * header.cluster_bits.size();
    checker.count(Place::RefcountTable, header.refcount_table, refcount_table_len);
    checker.bitmaps()?;
    checker.refcount_blocks();
    checker.compare();
    Ok(checker.report)
}

struct Checker<'a> {
    layer: &'a Layer,
    file_size: u64,
    counts: Counts,
    stored: Stored<'a>,
    report: CheckReport,
}

impl Checker<'_> {
    /// Counts a reference to every cluster of a range of the file. The last cluster of the file may be cut short.
    fn count(&mut self, place: Place, offset: HostOffset, len: u64) {
        let bits = self.layer.header().cluster_bits;
        if len == 0 {
            return;
        }
        let limit = self.file_size.saturating_add(bits.size());
        let Some(end) = offset.0.checked_add(len).filter(|&end| end < limit) else {
            return self.report.note(Finding::PastEnd { place, offset, len });
        };
        for cluster in bits.host_cluster(offset).0..=bits.host_cluster(HostOffset(end - 1)).0 {
            if !self.counts.add(HostCluster(cluster)) {
                let offset = bits.host_offset(HostCluster(cluster));
                self.report.note(Finding::RefcountOverflow { offset });
            }
        }
    }

    fn active_tables(&mut self) -> Result<(), Error> {
        let header = self.layer.header();
        self.count(Place::L1Table, header.l1_table, u64::from(header.l1_size) * 8);
        for (index, &entry) in (0..).zip(self.layer.l1()) {
            self.l2_table(Place::L1Entry(index), entry, Some(index))?;
        }
        Ok(())
    }

    fn snapshots(&mut self) -> Result<(), Error> {
        let header = self.layer.header();
        let (snapshots, table_len) = snapshot::read_table(self.layer.file(), header)?;
        for (index, snapshot) in (0..).zip(&snapshots) {
            let place = Place::SnapshotL1Table(index);
            if header.cluster_bits.offset_within(snapshot.l1_table.0) != 0 {
                self.report.note(Finding::Misaligned { place, offset: snapshot.l1_table });
                continue;
            }
            let len = u64::from(snapshot.l1_size) * 8;
            if len > MAX_L1_SIZE {
                self.report.note(Finding::PastEnd { place, offset: snapshot.l1_table, len });
                continue;
            }
            self.count(place, snapshot.l1_table, len);
            let Ok(l1) = self.layer.file().read_table(place, snapshot.l1_table, snapshot.l1_size.into()) else {
                // Counted as lying past the end; what remains of it would say nothing.
                continue;
            };
            for entry in l1 {
                self.l2_table(place, L1Entry(entry), None)?;
            }
        }
        self.count(Place::SnapshotTable, header.snapshot_table, table_len);
        Ok(())
    }

    /// Follows an L1 entry, which is active if it has an index: only then must its flags be right.
    fn l2_table(&mut self, place: Place, entry: L1Entry, active: Option<u64>) -> Result<(), Error> {
        if entry.0 == 0 {
            return Ok(());
        }
        let bits = self.layer.header().cluster_bits;
        let offset = entry.offset();
        if entry.reserved_bits() != 0 {
            self.report.note(Finding::ReservedBits { place, bits: entry.reserved_bits() });
        }
        self.count(place, offset, bits.size());
        if bits.offset_within(offset.0) != 0 {
            self.report.note(Finding::Misaligned { place, offset });
        }
        if active.is_some() && offset.0 != 0 {
            self.check_copied(place, offset, entry.copied());
        }
        let mut bytes = vec![0; bits.buffer_len()];
        self.layer.file().read_padded(&mut bytes, offset)?;
        let first = active.map(|index| index * self.layer.header().l2_entries());
        self.l2_entries(place, &bytes, first);
        Ok(())
    }

    /// Follows the entries of an L2 table; `first` is the guest cluster of the first one in an active table.
    fn l2_entries(&mut self, table: Place, bytes: &[u8], first: Option<u64>) {
        let header = self.layer.header();
        let bits = header.cluster_bits;
        let mut next = None;
        for (index, &entry) in (0..).zip(header.l2_format().decode(bytes).iter()) {
            if entry == L2Entry::UNALLOCATED {
                continue;
            }
            let place = first.map_or(table, |first| Place::L2Entry(bits.guest_offset(GuestCluster(first + index))));
            if entry.reserved_bits() != 0 {
                self.report.note(Finding::ReservedBits { place, bits: entry.reserved_bits() });
            }
            match entry.decode(header.l2_format()) {
                Cluster::Unallocated | Cluster::Zero { host: None } => {}
                Cluster::Compressed { host, len } => {
                    if entry.copied() {
                        self.report.note(Finding::CompressedCopied(place));
                    }
                    self.count(place, host, len);
                    if first.is_some() {
                        self.report.allocated_clusters += 1;
                        self.report.compressed_clusters += 1;
                        self.report.fragmented_clusters += 1;
                    }
                }
                Cluster::Zero { host: Some(host) } | Cluster::Data { host } => {
                    if bits.offset_within(host.0) != 0 {
                        self.report.note(Finding::Misaligned { place, offset: host });
                    }
                    self.count(place, host, bits.size());
                    if first.is_some() {
                        self.report.allocated_clusters += 1;
                        self.report.fragmented_clusters += u64::from(next.is_some_and(|next| next != host));
                        next = Some(host.plus(bits.size()));
                        self.check_copied(place, host, entry.copied());
                    }
                }
            }
        }
    }

    fn check_copied(&mut self, place: Place, offset: HostOffset, copied: bool) {
        // A refcount that cannot be read is reported once, in the comparison.
        if let Ok(refcount) = self.stored.get(self.layer.header().cluster_bits.host_cluster(offset))
            && (refcount == 1) != copied
        {
            self.report.note(Finding::CopiedFlag { place, refcount });
        }
    }

    fn bitmaps(&mut self) -> Result<(), Error> {
        let header = self.layer.header();
        let file = self.layer.file();
        if let Ok(Some(extension)) = header.bitmaps() {
            let offset = HostOffset(extension.directory_offset);
            self.count(Place::BitmapDirectory, offset, extension.directory_size);
        }
        let directory = match BitmapDirectory::read(file, header) {
            Ok(Some(directory)) => directory,
            Ok(None) => return Ok(()),
            Err(Error::Corrupt { what: Corruption::Misaligned { place, offset }, .. }) => {
                self.report.note(Finding::Misaligned { place, offset });
                return Ok(());
            }
            Err(Error::Corrupt { .. }) => {
                self.report.note(Finding::Unreadable(Place::BitmapDirectory));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for (index, bitmap) in (0..).zip(&directory.bitmaps) {
            let place = Place::Bitmap(index);
            self.count(place, bitmap.table, u64::from(bitmap.table_size) * 8);
            let Ok(table) = file.read_table(place, bitmap.table, bitmap.table_size.into()) else {
                continue;
            };
            for entry in table {
                let offset = HostOffset(entry & BITMAP_OFFSET);
                if entry & BITMAP_RESERVED != 0 {
                    self.report.note(Finding::ReservedBits { place, bits: entry & BITMAP_RESERVED });
                } else if header.cluster_bits.offset_within(offset.0) != 0 {
                    self.report.note(Finding::Misaligned { place, offset });
                } else if offset.0 != 0 {
                    self.count(place, offset, header.cluster_bits.size());
                }
            }
        }
        Ok(())
    }

    fn refcount_blocks(&mut self) {
        let bits = self.layer.header().cluster_bits;
        for index in 0..self.stored.table.len() {
            let Some(&entry) = self.stored.table.get(index).filter(|&&entry| entry != 0) else {
                continue;
            };
            let place = Place::RefcountBlock(index as u64);
            let offset = Stored::offset(entry);
            if Stored::reserved_bits(entry) != 0 {
                self.report.note(Finding::ReservedBits { place, bits: Stored::reserved_bits(entry) });
            } else if bits.offset_within(offset.0) != 0 {
                self.report.note(Finding::Misaligned { place, offset });
            } else if bits.host_cluster(offset).0 >= self.counts.clusters {
                self.report.note(Finding::PastEnd { place, offset, len: bits.size() });
            } else {
                self.count(place, offset, bits.size());
                let references = self.counts.get(bits.host_cluster(offset));
                if references != 1 {
                    self.report.note(Finding::SharedBlock { place, references });
                }
            }
        }
    }

    fn compare(&mut self) {
        let bits = self.layer.header().cluster_bits;
        let width = self.stored.width;
        let per_block = width.per_block(bits);
        let clusters = self.counts.clusters;
        let mut end = 1;
        for index in 0..clusters.div_ceil(per_block) {
            let page = self.counts.page(index);
            let first = index * per_block;
            let in_page = per_block.min(clusters - first);
            let block = match self.stored.block(index) {
                Ok(block) => block,
                Err(_) => {
                    self.report.note(Finding::Unreadable(Place::RefcountBlock(index)));
                    self.report.check_errors += in_page - 1;
                    continue;
                }
            };
            if page.is_none() && block.is_none() {
                continue;
            }
            let count = |page: Option<&[u8]>, within| page.map_or(0, |page| width.get(page, within));
            let in_use = |within: &u64| count(block, *within) > 0 || count(page, *within) > 0;
            if let Some(last) = (0..in_page).rev().find(in_use) {
                end = first + last + 1;
            }
            if in_page == per_block && page == block {
                continue;
            }
            for within in 0..in_page {
                let (refcount, references) = (count(block, within), count(page, within));
                let offset = bits.host_offset(HostCluster(first + within));
                if refcount > references {
                    self.report.note(Finding::Leak { offset, refcount, references });
                } else if refcount < references {
                    self.report.note(Finding::RefcountTooLow { offset, refcount, references });
                }
            }
        }
        self.report.image_end_offset = end << bits.bits();
    }
}
