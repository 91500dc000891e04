//! Looking for damage: counts every reference in the image and compares with the refcounts.
//!
//! What is found, in which order, and how it is counted and worded, is what `qemu-img check` does.

mod claims;
mod counts;
mod finding;
mod refcounts;
mod references;
mod snapshots;
mod stored;

use crate::entry::{L1Entry, L2Entry, L2Format};
use crate::error::Error;
use crate::file::{ImageFile, words};
use crate::header::Header;
use crate::layer::Layer;
use crate::refcount::RefcountWidth;
use crate::types::{HostOffset, in_memory};

pub(crate) use claims::Claims;
pub(crate) use counts::Counts;
pub use finding::Finding;
use finding::Severity;
pub(crate) use snapshots::FoundSnapshots;
pub(crate) use stored::Stored;

/// Most findings that [`check`] describes; all are counted.
const MAX_FINDINGS: usize = 1000;
/// Clusters of a file that QEMU checks at most.
pub(crate) const MAX_CLUSTERS: u64 = i32::MAX.unsigned_abs() as u64;

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
    /// Why the check ended before its end, if it did; the counters then say little.
    pub failure: Option<CheckFailure>,
    /// The first findings, in the order in which they came up.
    pub findings: Vec<Finding>,
}

/// Why a check could not go on. Displayed as the system calls the error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckFailure {
    /// The snapshot table is not where one can be.
    #[error("Invalid argument")]
    InvalidArgument,
    /// The image or its snapshot table is larger than QEMU takes, or its tables overlap beyond reason.
    #[error("File too large")]
    FileTooLarge,
    /// An L1 table is said to lie beyond all files.
    #[error("Input/output error")]
    OutOfReach,
    /// The refcounts would have to be written anew, which was not asked for.
    #[error("Input/output error")]
    NeedsRebuild,
}

impl CheckReport {
    /// Whether there is neither damage nor a leak, and all was checked.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.leaks == 0 && self.corruptions == 0 && self.check_errors == 0 && self.failure.is_none()
    }
}

impl CheckReport {
    /// The report as it is before clusters are counted.
    pub(crate) fn without_clusters(&self) -> Self {
        Self { allocated_clusters: 0, fragmented_clusters: 0, compressed_clusters: 0, ..self.clone() }
    }
}

/// Checks a whole image: active state, snapshots, bitmaps, refcounts. Damage is reported, not an error; errors are those of
/// the host, and damage that leaves nothing to check. Nothing is repaired.
///
/// Images with a damaged snapshot table or without a refcount table open with [`Layer::open_damaged`].
pub fn check(layer: &Layer) -> Result<CheckReport, Error> {
    let mut findings = Vec::new();
    let mut report = check_each(layer, &mut |finding| {
        if findings.len() < MAX_FINDINGS {
            findings.push(finding.clone());
        }
    })?;
    report.findings = findings;
    Ok(report)
}

/// The same, with every finding given to `found` when it comes up instead of listed in the report.
///
/// Memory holds two bits for most clusters in use, the active L1 table, and a bounded number of refcount blocks.
pub fn check_each(layer: &Layer, found: &mut dyn FnMut(&Finding)) -> Result<CheckReport, Error> {
    let mut checker = Checker::new(layer.file().clone(), layer.header().clone(), Fix::Nothing, found)?;
    if checker.begin()? && checker.count_references()? {
        checker.compare()?;
        checker.check_copied()?;
    }
    Ok(checker.tally.report)
}

/// What a checker repairs on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fix {
    Nothing,
    Leaks,
    All,
}

/// Counts findings and passes them on.
pub(crate) struct Tally<'a> {
    pub(crate) report: CheckReport,
    pub(crate) leaks_fixed: u64,
    pub(crate) corruptions_fixed: u64,
    found: &'a mut dyn FnMut(&Finding),
}

impl Tally<'_> {
    pub(crate) fn note(&mut self, finding: Finding) {
        self.count(&finding, 1);
        (self.found)(&finding);
    }

    /// Notes that snapshots are over a limit: one error, or that many if they are dropped.
    fn note_dropped(&mut self, finding: Finding, snapshots: u32) {
        self.count(&finding, if finding.repaired() { snapshots.into() } else { 1 });
        (self.found)(&finding);
    }

    fn count(&mut self, finding: &Finding, count: u64) {
        let counter = match (finding.severity(), finding.repaired()) {
            (Severity::Leak, false) => &mut self.report.leaks,
            (Severity::Leak, true) => &mut self.leaks_fixed,
            (Severity::Corruption, false) => &mut self.report.corruptions,
            (Severity::Corruption, true) => &mut self.corruptions_fixed,
            (Severity::CheckError, _) => &mut self.report.check_errors,
            (Severity::Note, _) => return,
        };
        *counter += count;
    }
}

/// One pass over an image, and what it knows so far. With a [`Fix`] it changes `file` in place.
pub(crate) struct Checker<'a> {
    pub(crate) file: ImageFile,
    pub(crate) header: Header,
    format: L2Format,
    pub(crate) snapshots: FoundSnapshots,
    pub(crate) counts: Counts,
    pub(crate) claims: Claims,
    pub(crate) stored: Stored,
    pub(crate) tally: Tally<'a>,
    effort: references::Effort,
    /// The memory of the last L2 table, for the next one.
    l2_buffer: Vec<u8>,
    /// Clusters that were made free, in runs.
    pub(crate) freed: Vec<std::ops::Range<u64>>,
    pub(crate) fix: Fix,
    /// Whether refcounts in place cannot be corrected.
    pub(crate) rebuild: bool,
}

impl<'a> Checker<'a> {
    pub(crate) fn new(
        file: ImageFile,
        header: Header,
        fix: Fix,
        found: &'a mut dyn FnMut(&Finding),
    ) -> Result<Self, Error> {
        let report = CheckReport {
            // QEMU counts in whole sectors.
            total_clusters: header.cluster_bits.clusters_for(header.size & !511),
            ..CheckReport::default()
        };
        Ok(Self {
            format: header.l2_format(),
            snapshots: FoundSnapshots::default(),
            counts: Self::no_counts(&file, &header),
            claims: Claims::default(),
            stored: Stored::read(&file, &header)?,
            tally: Tally { report, leaks_fixed: 0, corruptions_fixed: 0, found },
            file,
            header,
            effort: references::Effort::default(),
            l2_buffer: Vec::new(),
            freed: Vec::new(),
            fix,
            rebuild: false,
        })
    }

    /// Forgets the references counted so far.
    pub(crate) fn recount_from_zero(&mut self) {
        self.counts = Self::no_counts(&self.file, &self.header);
        self.effort = references::Effort::default();
    }

    fn no_counts(file: &ImageFile, header: &Header) -> Counts {
        let clusters = header.cluster_bits.clusters_for(file.storage.size());
        Counts::new(RefcountWidth::new(header.refcount_order), clusters)
    }

    /// Reads what the rest relies on; false if the check ends here.
    pub(crate) fn begin(&mut self) -> Result<bool, Error> {
        let repair = self.fix == Fix::All;
        let failure = match FoundSnapshots::read(&self.file, &self.header, repair, &mut self.tally)? {
            Ok(_) if self.counts.clusters() > MAX_CLUSTERS => {
                self.tally.report.check_errors += 1;
                CheckFailure::FileTooLarge
            }
            Ok(table) => {
                self.snapshots = table;
                return Ok(true);
            }
            Err(failure) => failure,
        };
        self.tally.report.failure = Some(failure);
        Ok(false)
    }

    /// The entries of an L1 table as far as the file has them; the rest would be zero.
    pub(crate) fn read_l1(&self, offset: HostOffset, entries: u32) -> Result<Vec<L1Entry>, Error> {
        let in_file = self.file.storage.size().saturating_sub(offset.0).div_ceil(8);
        let mut bytes = vec![0; in_memory(u64::from(entries).min(in_file) * 8)];
        self.file.read_padded(&mut bytes, offset)?;
        Ok(words(&bytes).map(L1Entry).collect())
    }

    pub(crate) fn read_l2(&self, offset: HostOffset) -> Result<Box<[L2Entry]>, Error> {
        let mut table = vec![0; self.header.cluster_bits.buffer_len()];
        self.file.read_padded(&mut table, offset)?;
        Ok(self.format.decode(&table))
    }

    /// An L2 table as it is stored, in the buffer, which is to be put back.
    fn take_l2(&mut self, offset: HostOffset) -> Result<Vec<u8>, Error> {
        let mut table = std::mem::take(&mut self.l2_buffer);
        table.resize(self.header.cluster_bits.buffer_len(), 0);
        self.file.read_padded(&mut table, offset)?;
        Ok(table)
    }
}
