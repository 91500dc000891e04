use std::ops::Range;

use super::finding::Finding;
use super::stored::Unreadable;
use super::{Checker, Counts, Fix};
use crate::entry::{COPIED, Cluster, L1Entry, L2Entry, PlainRun};
use crate::error::Error;
use crate::types::{HostCluster, HostOffset, in_memory};

impl Checker<'_> {
    /// Compares refcounts with references, and corrects those that `fix` allows.
    pub(crate) fn compare(&mut self) -> Result<(), Error> {
        let mut next = 0;
        let mut last_in_use = 0;
        let mut misaligned_said = false;
        let clusters = self.counts.clusters();
        while next < clusters {
            let cluster = HostCluster(next);
            if let Err(Unreadable { block, offset, misaligned }) = self.stored.locate(cluster) {
                if misaligned && !std::mem::replace(&mut misaligned_said, true) {
                    self.tally.note(Finding::RefcountsUnreadable { block, offset });
                }
                self.tally.note(Finding::UnknownRefcount(cluster));
                next += 1;
                continue;
            }
            // Both are zero where there is neither a block nor a page.
            let used = self.counts.skip_unused(cluster).min(self.stored.skip_missing(cluster));
            if used != cluster {
                next = used.0;
                continue;
            }
            let end = clusters.min(self.stored.block_end(cluster).0).min(Counts::page_end(cluster).0);
            last_in_use = self.compare_run(next..end)?.unwrap_or(last_in_use);
            next = end;
        }
        self.tally.report.image_end_offset = (last_in_use + 1) << self.header.cluster_bits.bits();
        Ok(())
    }

    /// Compares clusters of one refcount block and one page of counts; returns the last one in use.
    fn compare_run(&mut self, clusters: Range<u64>) -> Result<Option<u64>, Error> {
        let (counts, width) = (self.counts.run(clusters.clone()), self.stored.width);
        let (block, first) = self.stored.place(HostCluster(clusters.start));
        let block = self.stored.block(block)?.unwrap_or_default();
        let mut last_in_use = None;
        let mut different = Vec::new();
        for ((cluster, index), references) in clusters.zip(first..).zip(counts) {
            let refcount = width.get(block, index);
            if refcount > 0 || references > 0 {
                last_in_use = Some(cluster);
            }
            if refcount != references {
                different.push((HostCluster(cluster), refcount, references));
            }
        }
        for (cluster, refcount, references) in different {
            self.differs(cluster, refcount, references)?;
        }
        Ok(last_in_use)
    }

    fn differs(&mut self, cluster: HostCluster, refcount: u64, references: u64) -> Result<(), Error> {
        self.rebuild |= refcount == 0;
        let repaired = match self.fix {
            Fix::Nothing => false,
            Fix::Leaks => refcount > references,
            Fix::All => refcount > 0,
        };
        self.tally.note(Finding::Refcount { cluster, refcount, references, repaired });
        if !repaired {
            return Ok(());
        }
        match self.freed.last_mut() {
            _ if references > 0 => {}
            Some(run) if run.end == cluster.0 => run.end += 1,
            _ => self.freed.push(cluster.0..cluster.0 + 1),
        }
        self.stored.set(cluster, references)
    }

    /// Checks, and with a `fix` corrects, the flags that say whether the refcount of a cluster is exactly one. Only those of
    /// the active state must be right.
    pub(crate) fn check_copied(&mut self) -> Result<(), Error> {
        let report = &self.tally.report;
        let repair = match self.fix {
            Fix::Nothing => false,
            Fix::All => true,
            // Other damage would let the refcounts mislead.
            Fix::Leaks => report.check_errors == 0 && report.corruptions == 0 && report.leaks == 0,
        };
        let mut l1 = self.read_l1(self.header.l1_table, self.header.l1_size)?;
        let mut changed = false;
        for (index, entry) in (0..).zip(&mut l1) {
            let Some(table) = entry.l2_table() else { continue };
            if let Some(refcount) = self.refcount_to_tell(table)?
                && (refcount == 1) != entry.copied()
            {
                self.tally.note(Finding::L1Copied { index, entry: entry.0, refcount, repaired: repair });
                *entry = L1Entry(entry.0 ^ COPIED);
                changed = repair;
            }
            self.check_copied_entries(table, repair)?;
        }
        if changed {
            self.file.write(&crate::file::table_bytes(l1.iter().map(|entry| entry.0)), self.header.l1_table)?;
        }
        Ok(())
    }

    fn check_copied_entries(&mut self, table: HostOffset, repair: bool) -> Result<(), Error> {
        let mut stored = self.take_l2(table)?;
        let (entries, file_size) = (in_memory(self.format.entries()), self.file.storage.size());
        let mut changed = false;
        let mut next = 0;
        while next < entries {
            let run = self.format.plain_run(&stored, next, file_size);
            let end = next + run.map_or(1, |run| run.clusters);
            if !run.map_or(Ok(false), |run| self.is_copied(run))? {
                for index in next..end {
                    changed |= self.check_copied_entry(&mut stored, index, repair)?;
                }
            }
            next = end;
        }
        if changed {
            self.file.write(&stored, table)?;
        }
        self.l2_buffer = stored;
        Ok(())
    }

    /// Whether a run's entries say that refcounts are one, and they are: true for most of a sound image.
    fn is_copied(&mut self, run: PlainRun) -> Result<bool, Error> {
        let mut next = self.header.cluster_bits.host_cluster(run.host);
        let end = HostCluster(next.0 + run.clusters as u64);
        while run.copied && next < end {
            let stop = end.min(self.stored.block_end(next));
            if self.stored.locate(next).is_err() || !self.stored.all_one(next.0..stop.0)? {
                return Ok(false);
            }
            next = stop;
        }
        Ok(run.copied)
    }

    /// Checks the flag of one entry of a stored table; true if it was corrected.
    fn check_copied_entry(&mut self, table: &mut [u8], index: usize, repair: bool) -> Result<bool, Error> {
        let entry = self.format.load(table, index);
        let (Cluster::Data { host } | Cluster::Zero { host: Some(host) }) = entry.decode(self.format) else {
            return Ok(false);
        };
        let refcount = if self.format.data_file { Some(1) } else { self.refcount_to_tell(host)? };
        let Some(refcount) = refcount.filter(|&refcount| (refcount == 1) != entry.copied()) else { return Ok(false) };
        self.tally.note(Finding::L2Copied { entry: entry.word, refcount, repaired: repair });
        self.format.store(table, index, L2Entry { word: entry.word ^ COPIED, ..entry });
        Ok(repair)
    }

    /// The refcount of a cluster, unless its block is out of reach, which the comparison has said.
    fn refcount_to_tell(&mut self, offset: HostOffset) -> Result<Option<u64>, Error> {
        let cluster = self.header.cluster_bits.host_cluster(offset);
        match self.stored.locate(cluster) {
            Ok(()) => self.stored.get(cluster).map(Some),
            Err(_) => Ok(None),
        }
    }
}
