use crate::bitmap::BitmapDirectory;
use crate::error::{Corruption, Error, Place};
use crate::layer::Layer;
use crate::snapshot;
use crate::types::{HostCluster, HostOffset};

/// What takes part of the file besides guest data, in clusters.
#[derive(Clone, Copy, Debug)]
struct Area {
    start: u64,
    end: u64,
    place: Place,
}

/// The clusters of the committed state that hold metadata, known not to overlap.
#[derive(Clone, Debug)]
pub(super) struct Metadata {
    areas: Vec<Area>,
}

impl Metadata {
    /// Collects the metadata of `layer`, whose refcount table is `refcount_table`. Overlaps are corruption.
    pub(super) fn collect(
        layer: &Layer,
        refcount_table: &[u64],
        bitmaps: Option<&BitmapDirectory>,
    ) -> Result<Self, Error> {
        let header = layer.header();
        let mut collector = Collector { layer, areas: Vec::new() };
        collector.add(Place::Header, HostOffset(0), header.cluster_bits.size())?;
        let refcount_table_len = u64::from(header.refcount_table_clusters) * header.cluster_bits.size();
        collector.add(Place::RefcountTable, header.refcount_table, refcount_table_len)?;
        collector.add(Place::L1Table, header.l1_table, u64::from(header.l1_size) * 8)?;
        for (index, &offset) in (0..).zip(refcount_table) {
            if offset != 0 {
                collector.add(Place::RefcountBlock(index), HostOffset(offset), header.cluster_bits.size())?;
            }
        }
        for (index, entry) in (0..).zip(layer.l1()) {
            if let Some(table) = entry.l2_table() {
                collector.add(Place::L2Table(index), table, header.cluster_bits.size())?;
            }
        }
        let (snapshots, len) = snapshot::read_table(layer.file(), header)?;
        collector.add(Place::SnapshotTable, header.snapshot_table, len)?;
        for (index, snapshot) in (0..).zip(snapshots) {
            collector.add(Place::SnapshotL1Table(index), snapshot.l1_table, u64::from(snapshot.l1_size) * 8)?;
        }
        if let Some(directory) = bitmaps {
            let extension = directory.extension;
            let offset = HostOffset(extension.directory_offset);
            collector.add(Place::BitmapDirectory, offset, extension.directory_size)?;
        }
        collector.finish()
    }

    /// What lies in a cluster, if it is metadata.
    pub(super) fn place_of(&self, cluster: HostCluster) -> Option<Place> {
        self.within(cluster.0..cluster.0 + 1).next().map(|(_, place)| place)
    }

    /// The metadata clusters in a range, with what they hold.
    pub(super) fn within(&self, clusters: std::ops::Range<u64>) -> impl Iterator<Item = (HostCluster, Place)> {
        let first = self.areas.partition_point(|area| area.end <= clusters.start);
        self.areas[first..].iter().take_while(move |area| area.start < clusters.end).flat_map(move |area| {
            let part = area.start.max(clusters.start)..area.end.min(clusters.end);
            part.map(|cluster| (HostCluster(cluster), area.place))
        })
    }
}

struct Collector<'a> {
    layer: &'a Layer,
    areas: Vec<Area>,
}

impl Collector<'_> {
    fn add(&mut self, place: Place, offset: HostOffset, len: u64) -> Result<(), Error> {
        let bits = self.layer.header().cluster_bits;
        let file = self.layer.file();
        if len == 0 {
            return Ok(());
        }
        if bits.offset_within(offset.0) != 0 {
            return Err(file.corrupt(Corruption::Misaligned { place, offset }));
        }
        let file_size = file.storage.size();
        let end = offset.0.checked_add(len).filter(|&end| end <= file_size.next_multiple_of(bits.size()));
        let Some(end) = end else {
            return Err(file.corrupt(Corruption::PastEnd { place, offset, len, file_size }));
        };
        self.areas.push(Area { start: bits.host_cluster(offset).0, end: bits.clusters_for(end), place });
        Ok(())
    }

    fn finish(mut self) -> Result<Metadata, Error> {
        self.areas.sort_by_key(|area| area.start);
        let neighbours = self.areas.iter().zip(self.areas.iter().skip(1));
        if let Some((first, second)) = neighbours.into_iter().find(|(first, second)| second.start < first.end) {
            let offset = self.layer.header().cluster_bits.host_offset(HostCluster(second.start));
            let what = Corruption::Overlap { first: first.place, second: second.place, offset };
            return Err(self.layer.file().corrupt(what));
        }
        Ok(Metadata { areas: self.areas })
    }
}
