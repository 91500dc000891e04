use crate::check::{Checker, Stored};
use crate::entry::{Cluster, L1Entry};
use crate::error::{Error, Place};
use crate::types::{GuestCluster, HostCluster, HostOffset};

/// What uses a cluster of the image that `checker` has begun with, in the order in which a check counts it. Bitmaps are
/// left out: nothing of theirs is ever repaired.
pub(super) fn users(checker: &Checker<'_>, cluster: HostCluster) -> Result<Vec<Place>, Error> {
    let mut search = Search { checker, cluster, found: Vec::new() };
    let header = &checker.header;
    let size = header.cluster_bits.size();
    search.range(Place::Header, HostOffset(0), size);
    search.l1_table(header.l1_table, header.l1_size, None)?;
    for (index, entry) in (0..).zip(&checker.snapshots.entries) {
        search.l1_table(entry.snapshot.l1_table, entry.snapshot.l1_size, Some(index))?;
    }
    search.range(Place::SnapshotTable, header.snapshot_table, checker.snapshots.len);
    search.range(Place::RefcountTable, header.refcount_table, u64::from(header.refcount_table_clusters) * size);
    for (index, &entry) in (0..).zip(checker.stored.table()) {
        if entry != 0 {
            search.range(Place::RefcountBlock(index), Stored::offset(entry), size);
        }
    }
    Ok(search.found)
}

struct Search<'a, 'b> {
    checker: &'a Checker<'b>,
    cluster: HostCluster,
    found: Vec<Place>,
}

impl Search<'_, '_> {
    fn range(&mut self, place: Place, offset: HostOffset, len: u64) {
        let bits = self.checker.header.cluster_bits;
        if len > 0 && (bits.host_cluster(offset)..=bits.host_cluster(offset.plus(len - 1))).contains(&self.cluster) {
            self.found.push(place);
        }
    }

    /// An L1 table: that of a snapshot, which stands for all that it refers to, or the active one.
    fn l1_table(&mut self, offset: HostOffset, size: u32, snapshot: Option<u64>) -> Result<(), Error> {
        let place_or = |active: Place| snapshot.map_or(active, Place::SnapshotL1Table);
        let header = &self.checker.header;
        self.range(place_or(Place::L1Table), offset, u64::from(size) * 8);
        for (index, entry) in (0..).zip(self.checker.read_l1(offset, size)?) {
            let Some(table) = L1Entry::l2_table(entry) else { continue };
            self.range(place_or(Place::L2Table(index)), table, header.cluster_bits.size());
            let first = index * header.l2_entries();
            for (cluster, entry) in (first..).zip(self.checker.read_l2(table)?) {
                let place = place_or(Place::L2Entry(header.cluster_bits.guest_offset(GuestCluster(cluster))));
                match entry.decode(header.l2_format()) {
                    Cluster::Data { host } | Cluster::Zero { host: Some(host) } if !header.has_data_file() => {
                        self.range(place, host, header.cluster_bits.size());
                    }
                    Cluster::Compressed { host, len } => self.range(place, host, len),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}
