//! Clusters that several entries of the active tables share, as in images that store equal clusters once.

use std::collections::BTreeSet;

use super::state::State;
use crate::entry::{Cluster, L2Entry};
use crate::error::Error;
use crate::types::HostCluster;

impl State {
    /// Remembers that an entry gave up a cluster, if another user has it for itself now.
    pub(super) fn note_given_up(&mut self, entry: L2Entry, cluster: HostCluster) -> Result<(), Error> {
        let shared = !entry.copied() && self.place_of(entry) == Some(cluster);
        if shared && self.refcounts.count(cluster)? == 1 {
            self.left_alone.push(cluster);
        }
        Ok(())
    }

    /// Lets entries say that they are the only users left of their clusters. Where the last user is a snapshot there is none.
    pub(super) fn mark_only_users(&mut self) -> Result<(), Error> {
        let mut alone = BTreeSet::new();
        for cluster in std::mem::take(&mut self.left_alone) {
            if self.refcounts.count(cluster)? == 1 {
                alone.insert(cluster);
            }
        }
        for index in 0..self.l1.len() as u64 {
            if alone.is_empty() {
                return Ok(());
            }
            // What lies in a table with several users has as many.
            let Some(home) = self.table_home(index) else { continue };
            if self.refcounts.count(home)? > 1 {
                continue;
            }
            let mut taken = |entry: L2Entry| self.place_of(entry).is_some_and(|place| alone.remove(&place));
            let read = match (self.tables.get(&index), self.frozen.get(&home)) {
                (Some(table), _) => &table.entries,
                (None, Some(entries)) => entries,
                // Not kept: the whole image may have to be searched.
                (None, None) => &self.layer.read_l2(index, self.header.cluster_bits.host_offset(home))?,
            };
            let marked: Vec<usize> = (0..read.len()).filter(|&at| taken(read[at]) && !read[at].copied()).collect();
            if !marked.is_empty() {
                let entries = &mut self.table_mut(index)?.entries;
                marked.iter().for_each(|&at| entries[at] = entries[at].with_copied(true));
            }
        }
        Ok(())
    }

    /// The cluster that an entry refers to as a whole.
    fn place_of(&self, entry: L2Entry) -> Option<HostCluster> {
        match entry.decode(self.header.l2_format()) {
            Cluster::Data { host } | Cluster::Zero { host: Some(host) } => {
                Some(self.header.cluster_bits.host_cluster(host))
            }
            Cluster::Unallocated | Cluster::Zero { host: None } | Cluster::Compressed { .. } => None,
        }
    }
}
