use super::finding::Finding;
use super::stored::Unreadable;
use super::{Checker, Fix};
use crate::entry::{COPIED, Cluster, L1Entry, L2Entry};
use crate::error::Error;
use crate::types::{HostCluster, HostOffset};

impl Checker<'_> {
    /// Compares refcounts with references, and corrects those that `fix` allows.
    pub(crate) fn compare(&mut self) -> Result<(), Error> {
        let mut next = HostCluster(0);
        let mut last_in_use = 0;
        let mut misaligned_said = false;
        let clusters = self.counts.clusters();
        while next.0 < clusters {
            let cluster = next;
            next = HostCluster(cluster.0 + 1);
            if let Err(Unreadable { block, offset, misaligned }) = self.stored.locate(cluster) {
                if misaligned && !std::mem::replace(&mut misaligned_said, true) {
                    self.tally.note(Finding::RefcountsUnreadable { block, offset });
                }
                self.tally.note(Finding::UnknownRefcount(cluster));
                continue;
            }
            // Both are zero where there is neither a block nor a page.
            let used = self.counts.skip_unused(cluster).min(self.stored.skip_missing(cluster));
            if used != cluster {
                next = used;
                continue;
            }
            let (refcount, references) = (self.stored.get(cluster)?, self.counts.get(cluster));
            if refcount > 0 || references > 0 {
                last_in_use = cluster.0;
            }
            if refcount != references {
                self.differs(cluster, refcount, references)?;
            }
        }
        self.tally.report.image_end_offset = (last_in_use + 1) << self.header.cluster_bits.bits();
        Ok(())
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
        let mut entries = self.read_l2(table)?;
        let mut changed = false;
        for entry in &mut entries {
            let (Cluster::Data { host } | Cluster::Zero { host: Some(host) }) = entry.decode(self.format) else {
                continue;
            };
            let refcount = if self.format.data_file { Some(1) } else { self.refcount_to_tell(host)? };
            if let Some(refcount) = refcount
                && (refcount == 1) != entry.copied()
            {
                self.tally.note(Finding::L2Copied { entry: entry.word, refcount, repaired: repair });
                *entry = L2Entry { word: entry.word ^ COPIED, ..*entry };
                changed = repair;
            }
        }
        if changed { self.file.write(&self.format.encode(&entries), table) } else { Ok(()) }
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
