//! What the L1 table maps as a whole, as snapshots share it and give it up.

use std::ops::Range;
use std::sync::Arc;

use super::state::{Origin, PendingTable, State};
use crate::entry::{Cluster, L1Entry, L2Entry};
use crate::error::{Corruption, Error, Place};
use crate::layer::Layer;
use crate::mapping::L2Tables;
use crate::types::{GuestCluster, HostCluster, in_memory};

impl State {
    /// Lets a snapshot share everything that the active L1 table maps; returns the snapshot's L1 table, to be stored.
    pub(crate) fn share_tree(&mut self) -> Result<Vec<L1Entry>, Error> {
        for index in 0..self.l1.len() as u64 {
            let Some(home) = self.table_home(index) else {
                continue;
            };
            let mut entries: Box<[L2Entry]> = match self.l2_table(index)? {
                Some(entries) => entries.into(),
                None => continue,
            };
            self.refcounts.add(home, Place::L2Table(index))?;
            self.add_users(index, &entries)?;
            let own = self.tables.remove(&index).is_some();
            if own || entries.iter().any(|entry| entry.copied()) {
                entries.iter_mut().for_each(|entry| *entry = entry.with_copied(false));
                self.frozen.insert(home, entries);
            }
        }
        self.l1.iter_mut().for_each(|entry| *entry = entry.with_copied(false));
        self.l1_changed = true;
        Ok(self.l1.clone())
    }

    /// Gives up everything that the active L1 table maps, which is empty afterwards.
    pub(crate) fn drop_active_tree(&mut self) -> Result<(), Error> {
        for index in 0..self.l1.len() as u64 {
            if let Some(PendingTable { entries, origins }) = self.tables.remove(&index) {
                for (entry, (&origin, cluster)) in entries.iter().zip(origins.iter().zip(self.guest_clusters(index))) {
                    self.give_up(*entry, origin, cluster)?;
                }
            } else if let Some(entries) = self.l2_table(index)?.map(<[L2Entry]>::to_vec) {
                let frozen = self.table_home(index).is_some_and(|home| self.frozen.contains_key(&home));
                let origin = if frozen { Origin::Shared } else { Origin::Committed };
                self.drop_users(index, &entries, origin)?;
            }
            self.drop_table(index, self.table_home(index))?;
            self.l1[in_memory(index)] = L1Entry::default();
        }
        self.l1_changed = true;
        Ok(())
    }

    /// Gives up everything that another L1 table maps, as `layer` sees it.
    pub(crate) fn drop_tree(&mut self, layer: &Layer) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        for (index, entry) in (0..).zip(layer.l1()) {
            if let Some(entries) = layer.l2_table(index)? {
                self.drop_users(index, entries, Origin::Committed)?;
            }
            self.drop_table(index, entry.l2_table().map(|table| bits.host_cluster(table)))?;
        }
        Ok(())
    }

    /// Makes a copy of a snapshot's L1 table the active one, after [`drop_active_tree`](Self::drop_active_tree); both share
    /// all that it maps.
    pub(crate) fn adopt_tree(&mut self, l1: Vec<L1Entry>) -> Result<(), Error> {
        self.set_l1(l1)?;
        for index in 0..self.l1.len() as u64 {
            if let (Some(home), Some(entries)) =
                (self.table_home(index), self.l2_table(index)?.map(<[L2Entry]>::to_vec))
            {
                self.refcounts.check_table(home, Place::L2Table(index))?;
                self.refcounts.add(home, Place::L2Table(index))?;
                self.add_users(index, &entries)?;
            }
        }
        self.refresh_copied()
    }

    /// Makes the flags of the active tables say which clusters have one user only.
    pub(crate) fn refresh_copied(&mut self) -> Result<(), Error> {
        for index in 0..self.l1.len() as u64 {
            let Some(home) = self.table_home(index) else {
                continue;
            };
            let only_user = self.refcounts.count(home)? == 1;
            let entry = &mut self.l1[in_memory(index)];
            if entry.copied() != only_user {
                *entry = entry.with_copied(only_user);
                self.l1_changed = true;
            }
            let mut entries = match self.l2_table(index)? {
                Some(entries) => entries.to_vec(),
                None => continue,
            };
            let mut changed = false;
            for entry in &mut entries {
                let copied = match entry.decode(self.header.l2_format()) {
                    Cluster::Data { host } | Cluster::Zero { host: Some(host) } if !self.header.has_data_file() => {
                        self.refcounts.count(self.header.cluster_bits.host_cluster(host))? == 1
                    }
                    _ => entry.copied() && self.header.has_data_file(),
                };
                changed |= entry.copied() != copied;
                *entry = entry.with_copied(copied);
            }
            if changed {
                self.table_mut(index)?.entries.copy_from_slice(&entries);
            }
        }
        self.left_alone.clear();
        Ok(())
    }

    /// Where an L2 table lies, or will lie in the end.
    pub(super) fn table_home(&self, index: u64) -> Option<HostCluster> {
        let table = self.l1.get(in_memory(index))?.l2_table()?;
        Some(self.header.cluster_bits.host_cluster(table))
    }

    pub(super) fn drop_table(&mut self, index: u64, home: Option<HostCluster>) -> Result<(), Error> {
        let Some(home) = home else { return Ok(()) };
        self.refcounts.check_table(home, Place::L2Table(index))?;
        self.refcounts.drop_user(home, Place::L2Table(index))?;
        if self.refcounts.count(home)? == 0 {
            self.frozen.remove(&home);
        }
        Ok(())
    }

    /// Gives the L2 table of an L1 entry a place where it can change for the active L1 table alone.
    pub(super) fn own_table(&mut self, index: u64) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let old = self.table_home(index);
        if let Some(old) = old
            && self.refcounts.count(old)? == 1
        {
            return Ok(());
        }
        let Some(entry) = self.l1.get_mut(in_memory(index)) else { return Ok(()) };
        *entry = L1Entry::owned(bits.host_offset(HostCluster(self.refcounts.allocate_lasting(1)?.start)));
        self.l1_changed = true;
        match old {
            Some(old) => self.refcounts.drop_user(old, Place::L2Table(index)),
            None => Ok(()),
        }
    }

    fn guest_clusters(&self, index: u64) -> impl Iterator<Item = GuestCluster> + use<> {
        let first = index.saturating_mul(self.header.l2_entries());
        (first..).map(GuestCluster)
    }

    fn add_users(&mut self, index: u64, entries: &[L2Entry]) -> Result<(), Error> {
        for (&entry, cluster) in entries.iter().zip(self.guest_clusters(index)) {
            let place = Place::L2Entry(self.header.cluster_bits.guest_offset(cluster));
            for host in self.clusters_of(entry, place)? {
                self.refcounts.add_data(HostCluster(host), place)?;
            }
        }
        Ok(())
    }

    fn drop_users(&mut self, index: u64, entries: &[L2Entry], origin: Origin) -> Result<(), Error> {
        for (&entry, cluster) in entries.iter().zip(self.guest_clusters(index)) {
            self.give_up(entry, origin, cluster)?;
        }
        Ok(())
    }

    /// The host clusters that an entry uses.
    pub(super) fn clusters_of(&self, entry: L2Entry, place: Place) -> Result<Range<u64>, Error> {
        let bits = self.header.cluster_bits;
        if self.header.has_data_file() {
            return Ok(0..0);
        }
        match entry.decode(self.header.l2_format()) {
            Cluster::Unallocated | Cluster::Zero { host: None } => Ok(0..0),
            Cluster::Zero { host: Some(host) } | Cluster::Data { host } => {
                if bits.offset_within(host.0) != 0 {
                    return Err(self.file().corrupt(Corruption::Misaligned { place, offset: host }));
                }
                let first = bits.host_cluster(host).0;
                Ok(first..first + 1)
            }
            Cluster::Compressed { host, len } => {
                Ok(bits.host_cluster(host).0..bits.host_cluster(host.plus(len - 1)).0 + 1)
            }
        }
    }

    /// Replaces the active L1 table; its L2 tables must not have changed, or must have been given up. References stay as they
    /// are counted.
    pub(crate) fn set_l1(&mut self, l1: Vec<L1Entry>) -> Result<(), Error> {
        self.resize_l1(l1.len())?;
        self.l1 = l1;
        self.tables.clear();
        self.layer = Arc::new(self.layer.with_l1(self.header.clone(), self.l1.clone()));
        Ok(())
    }

    /// Gives the active L1 table another length; what it loses must be empty. A longer one gets a new place, as in QEMU.
    pub(super) fn resize_l1(&mut self, len: usize) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let old = self.clusters(self.header.l1_table, u64::from(self.header.l1_size) * 8);
        let needed = bits.clusters_for(len as u64 * 8);
        if len > self.l1.len() {
            let new = self.refcounts.allocate_lasting(needed)?;
            self.header.l1_table = bits.host_offset(HostCluster(new.start));
            self.drop_clusters(old, Place::L1Table)?;
        } else {
            self.drop_clusters(old.start + needed..old.end, Place::L1Table)?;
        }
        self.header.l1_size = u32::try_from(len).unwrap_or(u32::MAX);
        self.l1.resize(len, L1Entry::default());
        self.l1_changed = true;
        Ok(())
    }
}
