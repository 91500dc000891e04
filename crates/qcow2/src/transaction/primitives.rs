//! What the operations on metadata are made of: snapshots, bitmaps, repair, resizing.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::commit::Pointing;
use super::state::State;
use crate::entry::L1Entry;
use crate::error::{Error, Place};
use crate::header::Header;
use crate::layer::Layer;
use crate::mapping::L2Tables;
use crate::types::{HostCluster, HostOffset};

impl State {
    /// The image as it was committed, or as [`set_l1`](Self::set_l1) made it.
    pub(crate) fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// The header that the commit will write.
    pub(crate) fn header_mut(&mut self) -> &mut Header {
        &mut self.header
    }

    /// The active L1 table. Where a table's offset is final depends on the commit; copies that are stored follow it.
    pub(crate) fn l1(&self) -> &[L1Entry] {
        &self.l1
    }

    /// Writes a structure to free clusters and returns where it lies.
    pub(crate) fn store(&mut self, place: Place, bytes: &[u8]) -> Result<HostOffset, Error> {
        let bits = self.header.cluster_bits;
        let clusters = bits.clusters_for(bytes.len() as u64);
        if let Place::SnapshotTable | Place::SnapshotL1Table(_) = place {
            let start = HostCluster(self.refcounts.allocate_lasting(clusters)?.start);
            self.pointing.insert(start, Pointing { place, bytes: bytes.to_vec() });
            return Ok(bits.host_offset(start));
        }
        let offset = bits.host_offset(HostCluster(self.refcounts.allocate_run(clusters)?.start));
        self.file().write(bytes, offset)?;
        Ok(offset)
    }

    /// Gives up the clusters of a structure `len` bytes long.
    pub(crate) fn release(&mut self, place: Place, offset: HostOffset, len: u64) -> Result<(), Error> {
        let clusters = self.clusters(offset, len);
        self.pointing.remove(&HostCluster(clusters.start));
        self.drop_clusters(clusters, place)
    }

    /// The same for a structure of the committed state that may overlap others, which is damage.
    pub(crate) fn release_checked(&mut self, place: Place, offset: HostOffset, len: u64) -> Result<(), Error> {
        self.clusters(offset, len).try_for_each(|cluster| self.refcounts.drop_data(HostCluster(cluster), place))
    }

    pub(super) fn drop_clusters(&mut self, clusters: Range<u64>, place: Place) -> Result<(), Error> {
        for cluster in clusters {
            self.refcounts.drop_user(HostCluster(cluster), place)?;
        }
        Ok(())
    }

    pub(super) fn clusters(&self, offset: HostOffset, len: u64) -> Range<u64> {
        let bits = self.header.cluster_bits;
        let first = bits.host_cluster(offset).0;
        first..first + bits.clusters_for(len)
    }

    /// Whether the structure at `offset` waits for the commit, so that it cannot be read from the file.
    pub(crate) fn is_pending(&self, offset: HostOffset) -> bool {
        self.pointing.contains_key(&self.header.cluster_bits.host_cluster(offset))
    }

    /// The guest ranges that have changed since they were last taken, joined and in order; kept while bitmaps record writes.
    pub(crate) fn dirty_ranges(&self) -> Vec<Range<u64>> {
        let dirty = self.dirty.as_ref().map(|dirty| dirty.lock().unwrap_or_else(PoisonError::into_inner));
        dirty.map_or_else(Vec::new, |dirty| dirty.iter().collect())
    }

    /// Takes the ranges that have changed so far, and from here on keeps them or not.
    pub(crate) fn take_dirty_ranges(&mut self, keep: bool) -> Vec<Range<u64>> {
        let dirty = self.dirty_ranges();
        self.dirty = keep.then(Default::default);
        dirty
    }
}
