//! Repairing an image as `qemu-img check -r` does, but in one atomic step.
//!
//! The checker changes a draft in memory in place. What comes of it is then brought into the file so that a crash leaves the
//! damaged image or the repaired one.

mod apply;
mod draft;
mod rebuild;
mod users;

use std::sync::Arc;

use qtk_block::HostStorage;

use crate::check::{CheckFailure, CheckReport, Checker, Finding, Fix, Stored};
use crate::error::Error;
use crate::features;
use crate::file::ImageFile;
use crate::layer::Layer;
use crate::snapshot;
use crate::types::{HostCluster, HostOffset};
use draft::Draft;

/// How often refcounts are written anew until they count themselves and everything else.
const MAX_REBUILDS: usize = 4;

/// What to repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Only what cannot do harm: clusters that count as used although nothing uses them, and flags.
    Leaks,
    /// Everything that can be repaired.
    All,
}

/// What a repair did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// What was found and is still there. A [check](crate::check()) of the repaired image says so too.
    pub check: CheckReport,
    /// Leaks that are gone.
    pub leaks_fixed: u64,
    /// Damage that is gone.
    pub corruptions_fixed: u64,
}

/// Repairs an image: refcounts, flags of tables, the snapshot table; and takes back the marks of an image that is dirty or
/// corrupt if nothing is left to repair. Guest data is never touched.
///
/// `found` gets every finding, and what was done about it, in the order and words of `qemu-img check`.
///
/// The repair happens as a whole or not at all. If the report names a failure, the image is as it was. The caller holds the
/// image's lock and opens it again afterwards.
pub fn repair(layer: &Layer, repair: Repair, found: &mut dyn FnMut(&Finding)) -> Result<RepairReport, Error> {
    let header = layer.header();
    let draft = Arc::new(Draft::new(Arc::clone(layer.storage()), header.cluster_bits));
    let file = ImageFile { storage: draft.clone(), name: layer.file().name.clone() };
    let fix = match repair {
        Repair::Leaks => Fix::Leaks,
        Repair::All => Fix::All,
    };
    let mut checker = Checker::new(file, header.clone(), fix, found)?;
    if checker.begin()?
        && let Some(in_use) = checker.repair()?
    {
        apply::apply(layer, &draft, &checker.header, &checker.claims, in_use)?;
        checker.discard_freed(&**layer.storage());
    }
    Ok(RepairReport {
        check: checker.tally.report,
        leaks_fixed: checker.tally.leaks_fixed,
        corruptions_fixed: checker.tally.corruptions_fixed,
    })
}

/// Repairs an image that was not closed cleanly, as QEMU does before it writes to one; false if it is not such an image.
///
/// Fails if the image could not be checked as a whole.
pub fn repair_dirty(layer: &Layer, found: &mut dyn FnMut(&Finding)) -> Result<bool, Error> {
    if layer.header().features.incompatible & features::DIRTY == 0 {
        return Ok(false);
    }
    let report = repair(layer, Repair::All, found)?.check;
    if report.failure.is_some() || report.check_errors > 0 {
        let obstacle = crate::error::WriteObstacle::Dirty;
        return Err(Error::NotWritable { image: layer.name().to_owned(), obstacle });
    }
    Ok(true)
}

impl Checker<'_> {
    /// Repairs what was asked for, and tells where the last cluster in use ended before; nothing if that is not possible.
    fn repair(&mut self) -> Result<Option<u64>, Error> {
        // What is wrong with the snapshot table has no bearing on the refcounts.
        let in_snapshot_table = std::mem::take(&mut self.tally.report.corruptions);
        if !self.count_references()? {
            return Ok(None);
        }
        let fix = std::mem::replace(&mut self.fix, Fix::Nothing);
        let before = self.tally.report.clone();
        self.compare()?;
        let in_use = self.tally.report.image_end_offset;
        if self.rebuild && fix == Fix::All {
            self.rebuild_refcounts(fix)?;
        } else if self.rebuild {
            self.tally.note(Finding::NeedsRebuild);
            self.tally.report.failure = Some(CheckFailure::NeedsRebuild);
            return Ok(None);
        } else if self.tally.report.leaks > 0 || self.tally.report.corruptions > 0 {
            self.tally.report = before;
            self.fix = fix;
            self.compare()?;
        }
        self.fix = fix;
        self.check_copied()?;
        if self.snapshots.changed {
            self.replace_snapshot_table()?;
        }
        self.tally.report.corruptions += in_snapshot_table;
        if self.tally.report.check_errors == 0 && self.tally.report.corruptions == 0 {
            self.header.features.incompatible &= !(features::DIRTY | features::CORRUPT);
        }
        Ok(Some(in_use))
    }

    /// Writes all refcounts anew, and gives up the clusters that held the old ones.
    fn rebuild_refcounts(&mut self, fix: Fix) -> Result<(), Error> {
        let old = self.tally.report.clone();
        let fixed = (self.tally.leaks_fixed, self.tally.corruptions_fixed);
        let mut counted = old.clone();
        // A longer file may hold what seemed to lie past its end, and that has to be counted too.
        for _ in 0..MAX_REBUILDS {
            self.tally.note(Finding::Rebuilding);
            rebuild::rebuild(&self.file, &mut self.header, &mut self.counts, &self.claims, HostCluster(0))?;
            self.stored = Stored::read(&self.file, &self.header)?;
            self.recount_from_zero();
            self.tally.report = CheckReport { leaks: 0, corruptions: 0, ..old.without_clusters() };
            (self.fix, self.rebuild) = (Fix::Nothing, false);
            self.count_references()?;
            counted = self.tally.report.clone();
            self.fix = fix;
            self.compare()?;
            if !self.rebuild {
                break;
            }
        }
        // What the old refcounts took is not the image's fault.
        (self.tally.leaks_fixed, self.tally.corruptions_fixed) = fixed;
        self.tally.report = CheckReport { image_end_offset: self.tally.report.image_end_offset, ..counted };
        self.tally.corruptions_fixed += old.corruptions.saturating_sub(self.tally.report.corruptions);
        self.tally.leaks_fixed += old.leaks;
        Ok(())
    }

    /// Writes the snapshot table as it was read, without what is over the limits, and gives up the old one.
    fn replace_snapshot_table(&mut self) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        // A table that lies past the end takes no clusters.
        let old = self.clusters_in_file(self.header.snapshot_table, self.snapshots.len).unwrap_or_default();
        let table = snapshot::encode(&self.snapshots.entries, self.header.size).unwrap_or_default();
        let count = bits.clusters_for(table.len() as u64);
        let free = self.free_run(count)?;
        let offset = match free {
            _ if table.is_empty() => HostOffset(0),
            Some(cluster) => bits.host_offset(cluster),
            None => bits.host_offset(HostCluster(self.claims.skip(self.counts.clusters(), count))),
        };
        let first = bits.host_cluster(offset).0;
        let (new, old) = ((first..first + count).map(HostCluster), old.map(HostCluster));
        new.clone().for_each(|cluster| self.counts.set(cluster, 1));
        old.clone().for_each(|cluster| self.counts.set(cluster, self.counts.get(cluster).saturating_sub(1)));
        if free.is_some() {
            new.chain(old).try_for_each(|cluster| self.stored.set(cluster, self.counts.get(cluster)))?;
        } else {
            self.move_refcounts()?;
        }
        self.header.snapshots = u32::try_from(self.snapshots.entries.len()).unwrap_or(u32::MAX);
        self.header.snapshot_table = offset;
        self.file.write(&table, offset)
    }

    /// Returns the space of freed clusters to the host. That is only a hint: they are free whether it takes it or not.
    fn discard_freed(&self, storage: &dyn HostStorage) {
        let bits = self.header.cluster_bits.bits();
        let in_use = |&cluster: &u64| self.counts.get(HostCluster(cluster)) != 0;
        for run in &self.freed {
            let mut next = run.start;
            while let Some(start) = (next..run.end).find(|cluster| !in_use(cluster)) {
                next = (start..run.end).find(in_use).unwrap_or(run.end);
                let _ = storage.discard(start << bits..(next << bits).min(storage.size()));
            }
        }
    }

    /// The first of `count` free clusters in a row that have refcounts.
    fn free_run(&mut self, count: u64) -> Result<Option<HostCluster>, Error> {
        let per_block = self.stored.per_block();
        let end = self.stored.table().len() as u64 * per_block;
        let (mut start, mut next) = (0, 0);
        while next < end && next - start < count {
            if self.stored.block(next / per_block)?.is_none() {
                next = (next / per_block + 1) * per_block;
                start = next;
                continue;
            }
            let cluster = HostCluster(next);
            next += 1;
            let free = self.counts.get(cluster) == 0 && self.stored.get(cluster)? == 0;
            if !free || self.claims.skip(cluster.0, 1) != cluster.0 {
                start = next;
            }
        }
        Ok((next - start >= count).then_some(HostCluster(start)))
    }

    /// Writes the refcounts to other places, where there is room for more.
    fn move_refcounts(&mut self) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let table = bits.host_cluster(self.header.refcount_table).0;
        let blocks = self.stored.table().iter().filter(|&&entry| entry != 0);
        let blocks = blocks.map(|&entry| bits.host_cluster(Stored::offset(entry)));
        let table = (table..table + u64::from(self.header.refcount_table_clusters)).map(HostCluster);
        for cluster in table.chain(blocks) {
            self.counts.set(cluster, self.counts.get(cluster).saturating_sub(1));
        }
        rebuild::rebuild(&self.file, &mut self.header, &mut self.counts, &self.claims, HostCluster(0))?;
        self.stored = Stored::read(&self.file, &self.header)?;
        Ok(())
    }
}
