//! What version 2 cannot say of clusters, in the active L2 tables and in those of snapshots.

use std::collections::{BTreeMap, BTreeSet};

use super::state::{Origin, PendingTable, State};
use crate::entry::{Cluster, L1Entry, L2Entry};
use crate::error::{Error, Place};
use crate::file::table_bytes;
use crate::mapping::L2Tables;
use crate::types::{GuestCluster, HostCluster};

/// An L2 table of the image, once for all that share it.
struct Table {
    index: u64,
    entries: Box<[L2Entry]>,
}

impl State {
    /// Whether the disk or a snapshot of it has a compressed cluster.
    pub(crate) fn has_compressed_clusters(&mut self) -> Result<bool, Error> {
        let format = self.header.l2_format();
        let compressed = |entry: &L2Entry| matches!(entry.decode(format), Cluster::Compressed { .. });
        Ok(!self.tables_with(compressed)?.is_empty())
    }

    /// Gives every cluster that is marked as zeroes an entry that reads as zeroes without that mark.
    pub(crate) fn expand_zeroes(&mut self) -> Result<(), Error> {
        let format = self.header.l2_format();
        let marked = |entry: &L2Entry| matches!(entry.decode(format), Cluster::Zero { .. });
        let tables = self.tables_with(marked)?;
        let homes: BTreeSet<HostCluster> = tables.keys().copied().collect();
        self.follow_with_snapshots(&homes)?;
        let active: BTreeMap<HostCluster, u64> =
            (0..self.l1.len() as u64).filter_map(|index| Some((self.table_home(index)?, index))).collect();
        for (home, Table { index, mut entries }) in tables {
            let users = self.refcounts.count(home)?;
            let pending = self.tables.contains_key(&index) && active.get(&home) == Some(&index);
            let mut origins: Box<[Origin]> = match self.tables.get(&index) {
                Some(table) if pending => table.origins.clone(),
                _ => vec![Origin::Committed; entries.len()].into(),
            };
            let first = index * entries.len() as u64;
            for ((entry, origin), cluster) in entries.iter_mut().zip(&mut origins).zip(first..) {
                if let Cluster::Zero { host } = entry.decode(format) {
                    let host = host.map(|host| self.header.cluster_bits.host_cluster(host));
                    let place = Place::L2Entry(self.header.cluster_bits.guest_offset(GuestCluster(cluster)));
                    let kept = match host {
                        Some(host) if !pending && self.refcounts.count(host)? == users => Some(host),
                        _ => None,
                    };
                    (*entry, *origin) = match kept {
                        Some(host) => {
                            self.refcounts.refuse_metadata(host, place)?;
                            (self.zeroes_at(host, users)?, *origin)
                        }
                        None => self.other_zeroes(host, *origin, users, place)?,
                    };
                }
            }
            if users == 1 && active.contains_key(&home) {
                self.tables.insert(index, PendingTable { entries, origins });
            } else {
                self.frozen.insert(home, entries);
            }
        }
        Ok(())
    }

    /// The entry for zeroes in place of a cluster with the mark: `host`, if it had one, is given up.
    fn other_zeroes(
        &mut self,
        host: Option<HostCluster>,
        origin: Origin,
        users: u64,
        place: Place,
    ) -> Result<(L2Entry, Origin), Error> {
        for host in host.into_iter().flat_map(|host| (0..users).map(move |_| host)) {
            match origin {
                Origin::Committed => self.refcounts.drop_data(host, place)?,
                Origin::Own | Origin::Shared => self.refcounts.drop_user(host, place)?,
            }
        }
        if self.header.backing_name.is_none() {
            return Ok((L2Entry::UNALLOCATED, Origin::Committed));
        }
        let new = HostCluster(self.refcounts.allocate(1)?.start);
        for _ in 1..users {
            self.refcounts.add(new, place)?;
        }
        Ok((self.zeroes_at(new, users)?, Origin::Own))
    }

    /// Fills a cluster that nobody reads with zeroes; returns the entry for it in a table with that many users.
    fn zeroes_at(&mut self, host: HostCluster, users: u64) -> Result<L2Entry, Error> {
        let bits = self.header.cluster_bits;
        self.file().write(&vec![0; bits.buffer_len()], bits.host_offset(host))?;
        Ok(L2Entry::owned(bits.host_offset(host), self.header.l2_format()).with_copied(users == 1))
    }

    /// The L2 tables with an entry of a kind, of the disk and of its snapshots, by their places.
    fn tables_with(&mut self, wanted: impl Fn(&L2Entry) -> bool) -> Result<BTreeMap<HostCluster, Table>, Error> {
        let mut tables = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for index in 0..self.l1.len() as u64 {
            if let Some(home) = self.table_home(index)
                && seen.insert(home)
                && let Some(entries) = self.l2_table(index)?.filter(|entries| entries.iter().any(&wanted))
            {
                tables.insert(home, Table { index, entries: entries.into() });
            }
        }
        for l1 in self.snapshot_l1s()? {
            let layer = self.layer.with_l1(self.header.clone(), l1);
            for (index, entry) in (0..).zip(layer.l1()) {
                if let Some(home) = entry.l2_table().map(|table| self.header.cluster_bits.host_cluster(table))
                    && seen.insert(home)
                    && let Some(entries) = layer.l2_table(index)?.filter(|entries| entries.iter().any(&wanted))
                {
                    tables.insert(home, Table { index, entries: entries.into() });
                }
            }
        }
        Ok(tables)
    }

    fn snapshot_l1s(&mut self) -> Result<Vec<Vec<L1Entry>>, Error> {
        let entries = self.snapshot_table()?;
        let numbered = (0..).zip(&entries);
        numbered.map(|(index, entry)| self.snapshot_l1(&entry.snapshot, Place::SnapshotL1Table(index))).collect()
    }

    /// Stores the L1 tables of snapshots that have one of these L2 tables anew, so that they follow where the commit puts those.
    fn follow_with_snapshots(&mut self, homes: &BTreeSet<HostCluster>) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let l1s = self.snapshot_l1s()?;
        let mut entries = self.snapshot_table()?;
        let mut changed = false;
        for ((index, l1), entry) in (0..).zip(&l1s).zip(&mut entries) {
            let tables = l1.iter().filter_map(|entry| entry.l2_table());
            if !tables.into_iter().any(|table| homes.contains(&bits.host_cluster(table))) {
                continue;
            }
            let place = Place::SnapshotL1Table(index);
            let offset = self.store(place, &table_bytes(l1.iter().map(|entry| entry.0)))?;
            self.release(place, entry.snapshot.l1_table, l1.len() as u64 * 8)?;
            entry.snapshot.l1_table = offset;
            changed = true;
        }
        if changed { self.set_snapshot_table(entries, "") } else { Ok(()) }
    }
}
