use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use super::counts::{Block, Committed};
use super::metadata::Metadata;
use crate::error::{Corruption, Error, Place, WriteObstacle};
use crate::file::{ImageFile, table_bytes};
use crate::header::{Header, MAX_REFCOUNT_TABLE_SIZE};
use crate::refcount::RefcountWidth;
use crate::types::{HostCluster, HostOffset, in_memory};

/// The refcounts as the transaction has them, and the search for clusters that it can use.
///
/// A cluster is free for the transaction only while its refcount is zero both as committed and now: what the transaction
/// gives up still belongs to the committed state until the header is replaced. Every block with a cluster in use has a place.
#[derive(Clone, Debug)]
pub(super) struct Refcounts {
    pub(super) committed: Arc<Committed>,
    pub(super) blocks: BTreeMap<u64, Block>,
    /// Offsets of the blocks.
    pub(super) table: Vec<u64>,
    /// Where the table lies.
    pub(super) table_run: Range<u64>,
    /// Where the search for free clusters begins.
    hint: u64,
    /// Where the search for clusters begins that will be free after the commit.
    unused_hint: u64,
    /// Clusters taken so far, in runs; some may have been given back.
    taken: Vec<Range<u64>>,
    /// Clusters of the committed state that nothing will use after the commit.
    freed: Vec<HostCluster>,
}

impl Refcounts {
    pub(super) fn new(file: ImageFile, header: &Header, table: Vec<u64>, metadata: Metadata) -> Self {
        let (bits, width) = (header.cluster_bits, RefcountWidth::new(header.refcount_order));
        let first = bits.host_cluster(header.refcount_table).0;
        Self {
            table: table.clone(),
            committed: Arc::new(Committed { file, bits, width, table, metadata }),
            blocks: BTreeMap::new(),
            table_run: first..first + u64::from(header.refcount_table_clusters),
            hint: 0,
            unused_hint: 0,
            taken: Vec::new(),
            freed: Vec::new(),
        }
    }

    /// The block that counts `cluster`, and the cluster's index in it.
    pub(super) fn block_of(&mut self, cluster: HostCluster) -> Result<(&mut Block, u64), Error> {
        let per_block = self.committed.per_block();
        let block = match self.blocks.entry(cluster.0 / per_block) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let block = self.committed.load(*entry.key())?;
                entry.insert(block)
            }
        };
        Ok((block, cluster.0 % per_block))
    }

    /// How many users a cluster has.
    pub(super) fn count(&mut self, cluster: HostCluster) -> Result<u64, Error> {
        let width = self.committed.width;
        let (block, index) = self.block_of(cluster)?;
        Ok(width.get(&block.counts, index))
    }

    /// Whether the transaction took the cluster, so that the committed state does not use it.
    pub(super) fn is_ours(&self, cluster: HostCluster) -> bool {
        let per_block = self.committed.per_block();
        self.blocks.get(&(cluster.0 / per_block)).is_some_and(|block| block.ours.contains(cluster.0 % per_block))
    }

    fn set(&mut self, cluster: HostCluster, count: u64) -> Result<(), Error> {
        let width = self.committed.width;
        let (block, index) = self.block_of(cluster)?;
        width.set(&mut block.counts, index, count);
        block.changed = true;
        Ok(())
    }

    fn next_free(&mut self, from: u64) -> Result<u64, Error> {
        let per_block = self.committed.per_block();
        let mut from = from;
        loop {
            let (block, index) = self.block_of(HostCluster(from))?;
            if let Some(free) = block.busy.first_missing(index).filter(|&free| free < per_block) {
                return Ok(from - index + free);
            }
            from = from - index + per_block;
        }
    }

    /// How many of the `count` clusters from `start` on are free, up to the first that is not.
    fn free_run(&mut self, start: u64, count: u64) -> Result<u64, Error> {
        for len in 0..count {
            if self.next_free(start + len)? != start + len {
                return Ok(len);
            }
        }
        Ok(count)
    }

    fn take(&mut self, clusters: Range<u64>) -> Result<(), Error> {
        let width = self.committed.width;
        for cluster in clusters.clone() {
            let (block, index) = self.block_of(HostCluster(cluster))?;
            width.set(&mut block.counts, index, 1);
            block.busy.set(index, true);
            block.ours.set(index, true);
            block.changed = true;
        }
        if clusters.start >= self.unused_hint {
            self.unused_hint = clusters.end;
        }
        match self.taken.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.taken.push(clusters),
        }
        Ok(())
    }

    pub(super) fn block_place(&self, index: u64) -> Option<HostCluster> {
        let &offset = self.table.get(in_memory(index))?;
        (offset != 0).then(|| self.committed.bits.host_cluster(HostOffset(offset)))
    }

    fn place_block(&mut self, index: u64, cluster: HostCluster) {
        let index = in_memory(index);
        if self.table.len() <= index {
            self.table.resize(index + 1, 0);
        }
        self.table[index] = self.committed.bits.host_offset(cluster).0;
    }

    /// Gives the blocks that count `clusters` a place; false if that took a cluster.
    pub(super) fn cover(&mut self, clusters: &Range<u64>) -> Result<bool, Error> {
        let per_block = self.committed.per_block();
        let mut covered = true;
        for index in clusters.start / per_block..=(clusters.end - 1) / per_block {
            if self.block_place(index).is_some() {
                continue;
            }
            covered = false;
            // After what made it necessary, as in QEMU; that may lie in a block that has no place itself.
            let place = loop {
                let place = self.next_free(clusters.end)?;
                if place / per_block == index || self.cover(&(place..place + 1))? {
                    break place;
                }
            };
            self.place_block(index, HostCluster(place));
            self.take(place..place + 1)?;
        }
        Ok(covered)
    }

    /// Takes the first free clusters, at least one and at most `count`, in one run.
    pub(super) fn allocate(&mut self, count: u64) -> Result<Range<u64>, Error> {
        loop {
            let start = self.next_free(self.hint)?;
            let run = start..start + self.free_run(start, count)?.max(1);
            if self.cover(&run)? {
                self.take(run.clone())?;
                self.hint = run.end;
                return Ok(run);
            }
        }
    }

    /// Takes the first run of `count` free clusters.
    pub(super) fn allocate_run(&mut self, count: u64) -> Result<Range<u64>, Error> {
        let mut start = self.next_free(self.hint)?;
        loop {
            let len = self.free_run(start, count)?;
            if len < count {
                start = self.next_free(start + len + 1)?;
            } else if count == 0 || self.cover(&(start..start + count))? {
                self.take(start..start + count)?;
                return Ok(start..start + count);
            } else {
                start = self.next_free(self.hint)?;
            }
        }
    }

    /// The first cluster from `from` on that nothing will use after the commit, though the committed state may.
    fn next_unused(&mut self, from: u64) -> Result<u64, Error> {
        let (width, per_block) = (self.committed.width, self.committed.per_block());
        let mut from = from;
        loop {
            let (block, index) = self.block_of(HostCluster(from))?;
            let found = match block.changed {
                true => (index..per_block).find(|&at| !block.busy.contains(at) || width.get(&block.counts, at) == 0),
                false => block.busy.first_missing(index).filter(|&free| free < per_block),
            };
            if let Some(found) = found {
                return Ok(from - index + found);
            }
            from = from - index + per_block;
        }
    }

    /// Takes the first run of `count` clusters for metadata, which a commit writes elsewhere as long as the committed state has
    /// its place. This is how an update in place would choose.
    pub(super) fn allocate_lasting(&mut self, count: u64) -> Result<Range<u64>, Error> {
        let mut start = self.next_unused(self.unused_hint)?;
        let mut end = start;
        while end < start + count {
            let next = self.next_unused(end)?;
            if next > end {
                start = next;
            }
            end = next + 1;
            if end == start + count && !self.cover(&(start..end))? {
                start = self.next_unused(self.unused_hint)?;
                end = start;
            }
        }
        for cluster in start..end {
            let (block, index) = self.block_of(HostCluster(cluster))?;
            if block.busy.contains(index) {
                self.set(HostCluster(cluster), 1)?;
            } else {
                self.take(cluster..cluster + 1)?;
            }
        }
        self.unused_hint = end;
        Ok(start..end)
    }

    /// Gives back clusters that only the transaction has used; it may take them again.
    pub(super) fn give_back(&mut self, clusters: Range<u64>) -> Result<(), Error> {
        if clusters.is_empty() {
            return Ok(());
        }
        let width = self.committed.width;
        self.hint = self.hint.min(clusters.start);
        self.unused_hint = self.unused_hint.min(clusters.start);
        for cluster in clusters {
            let (block, index) = self.block_of(HostCluster(cluster))?;
            width.set(&mut block.counts, index, 0);
            block.busy.set(index, false);
            block.ours.set(index, false);
        }
        Ok(())
    }

    /// Whether a cluster's count can grow.
    pub(super) fn can_add(&mut self, cluster: HostCluster) -> Result<bool, Error> {
        Ok(self.count(cluster)? < self.committed.width.max())
    }

    /// Counts one user more of a cluster in use. `place` is the user.
    pub(super) fn add(&mut self, cluster: HostCluster, place: Place) -> Result<(), Error> {
        match self.count(cluster)? {
            0 => Err(self.committed.too_low(cluster, place)),
            count if count == self.committed.width.max() => {
                let image = self.committed.file.name.to_string();
                Err(Error::NotWritable { image, obstacle: WriteObstacle::RefcountOverflow })
            }
            count => self.set(cluster, count + 1),
        }
    }

    /// The same for a cluster of guest data; one that holds metadata is damage.
    pub(super) fn add_data(&mut self, cluster: HostCluster, place: Place) -> Result<(), Error> {
        self.refuse_metadata(cluster, place)?;
        self.add(cluster, place)
    }

    /// Fails if a cluster that is to be guest data holds metadata.
    pub(super) fn refuse_metadata(&self, cluster: HostCluster, place: Place) -> Result<(), Error> {
        match self.committed.metadata.place_of(cluster) {
            Some(first) => Err(self.overlap(cluster, first, place)),
            None => Ok(()),
        }
    }

    /// Fails if an L2 table of some snapshot lies on other metadata. That it is an active table too is what sharing means.
    pub(super) fn check_table(&self, cluster: HostCluster, place: Place) -> Result<(), Error> {
        match self.committed.metadata.place_of(cluster) {
            None | Some(Place::L2Table(_)) => Ok(()),
            Some(first) => Err(self.overlap(cluster, first, place)),
        }
    }

    fn overlap(&self, cluster: HostCluster, first: Place, second: Place) -> Error {
        let offset = self.committed.bits.host_offset(cluster);
        self.committed.file.corrupt(Corruption::Overlap { first, second, offset })
    }

    /// Counts one user less of a cluster. `place` is the user.
    pub(super) fn drop_user(&mut self, cluster: HostCluster, place: Place) -> Result<(), Error> {
        let left = self.count(cluster)?.checked_sub(1).ok_or_else(|| self.committed.too_low(cluster, place))?;
        if left > 0 {
            return self.set(cluster, left);
        }
        if self.is_ours(cluster) {
            return self.give_back(cluster.0..cluster.0 + 1);
        }
        self.unused_hint = self.unused_hint.min(cluster.0);
        self.freed.push(cluster);
        self.set(cluster, 0)
    }

    /// The same for a cluster of guest data that the committed state names: one that holds metadata, or that the image
    /// counts as free and that may be ours by now, is damage.
    pub(super) fn drop_data(&mut self, cluster: HostCluster, place: Place) -> Result<(), Error> {
        self.refuse_metadata(cluster, place)?;
        if self.is_ours(cluster) {
            return Err(self.committed.too_low(cluster, place));
        }
        self.drop_user(cluster, place)
    }

    /// What the transaction took, whether it kept it or not.
    pub(super) fn taken(&self) -> &[Range<u64>] {
        &self.taken
    }

    /// What nothing uses any more once the transaction is committed, in runs.
    pub(super) fn freed_runs(&mut self) -> Result<Vec<Range<u64>>, Error> {
        let mut freed = std::mem::take(&mut self.freed);
        freed.sort_unstable();
        freed.dedup();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for cluster in freed {
            if self.count(cluster)? > 0 {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end == cluster.0 => last.end += 1,
                _ => runs.push(cluster.0..cluster.0 + 1),
            }
        }
        Ok(runs)
    }

    /// Whether a single block counts the first `clusters`.
    pub(super) fn one_block_counts(&self, clusters: u64) -> bool {
        clusters <= self.committed.per_block()
    }

    /// Counts the first `used` clusters once and all others as free, with the table in cluster 1 and a block in cluster 2.
    pub(super) fn start_over(&mut self, used: u64) -> Result<(), Error> {
        let (width, per_block) = (self.committed.width, self.committed.per_block());
        for index in 0..self.table.len() as u64 {
            if self.block_place(index).is_none() {
                continue;
            }
            let first = index * per_block;
            let (block, _) = self.block_of(HostCluster(first))?;
            let in_use: Vec<u64> = (0..per_block).filter(|&cluster| width.get(&block.counts, cluster) != 0).collect();
            for cluster in in_use.into_iter().map(|index| first + index) {
                if self.is_ours(HostCluster(cluster)) {
                    self.give_back(cluster..cluster + 1)?;
                } else {
                    self.set(HostCluster(cluster), 0)?;
                    self.freed.push(HostCluster(cluster));
                }
            }
        }
        self.table = vec![self.committed.bits.host_offset(HostCluster(2)).0];
        self.table_run = 1..2;
        for cluster in 0..used {
            let (block, index) = self.block_of(HostCluster(cluster))?;
            if block.busy.contains(index) {
                self.set(HostCluster(cluster), 1)?;
            } else {
                self.take(cluster..cluster + 1)?;
            }
        }
        Ok(())
    }

    /// The end of the last cluster in use.
    pub(super) fn end(&mut self) -> Result<u64, Error> {
        let (width, per_block) = (self.committed.width, self.committed.per_block());
        for index in (0..self.table.len() as u64).rev() {
            if self.block_place(index).is_none() {
                continue;
            }
            let (block, _) = self.block_of(HostCluster(index * per_block))?;
            if let Some(last) = (0..per_block).rev().find(|&cluster| width.get(&block.counts, cluster) != 0) {
                return Ok(index * per_block + last + 1);
            }
        }
        Ok(0)
    }

    /// Gives up the blocks that count nothing but themselves.
    pub(super) fn drop_empty_blocks(&mut self) -> Result<(), Error> {
        let (width, per_block) = (self.committed.width, self.committed.per_block());
        for index in 0..self.table.len() as u64 {
            let Some(place) = self.block_place(index) else {
                continue;
            };
            let first = index * per_block;
            let (block, _) = self.block_of(HostCluster(first))?;
            let own = |cluster: &u64| first + *cluster == place.0;
            let empty = (0..per_block).all(|cluster| own(&cluster) || width.get(&block.counts, cluster) == 0);
            if empty {
                self.drop_user(place, Place::RefcountBlock(index))?;
                self.table[in_memory(index)] = 0;
            }
        }
        Ok(())
    }

    /// The end of what the transaction has taken and kept, if it took anything.
    pub(super) fn end_of_taken(&self) -> u64 {
        let runs = self.taken.iter().cloned().flat_map(|run| run.rev().find(|&at| self.is_ours(HostCluster(at))));
        runs.max().map_or(0, |last| last + 1)
    }

    /// The refcounts are as they were committed.
    pub(super) fn is_unchanged(&self) -> bool {
        !self.blocks.values().any(|block| block.changed)
    }

    /// Makes the table long enough for all blocks, in a new place if need be.
    pub(super) fn fit_table(&mut self) -> Result<(), Error> {
        loop {
            let clusters = self.committed.bits.clusters_for(self.table.len() as u64 * 8);
            if clusters <= self.table_run.end - self.table_run.start {
                return Ok(());
            }
            if clusters << self.committed.bits.bits() > MAX_REFCOUNT_TABLE_SIZE {
                return Err(self.committed.full());
            }
            // Taking its clusters may need more blocks, and so a longer table.
            let run = self.allocate_run(clusters)?;
            for cluster in std::mem::replace(&mut self.table_run, run) {
                self.drop_user(HostCluster(cluster), Place::RefcountTable)?;
            }
        }
    }

    pub(super) fn table_run(&self) -> &Range<u64> {
        &self.table_run
    }

    /// From here on, takes only clusters from `first` on.
    pub(super) fn begin_at(&mut self, first: u64) {
        self.hint = first;
    }

    /// Counts what lies at `from` at a new place instead, and returns that.
    pub(super) fn move_run(&mut self, from: Range<u64>) -> Result<HostCluster, Error> {
        let to = self.allocate_run(from.end - from.start)?.start;
        for (cluster, to) in from.zip(to..) {
            let count = self.count(HostCluster(cluster))?;
            self.set(HostCluster(to), count)?;
            self.set(HostCluster(cluster), 0)?;
            if !self.is_ours(HostCluster(cluster)) {
                self.freed.push(HostCluster(cluster));
            }
        }
        Ok(HostCluster(to))
    }

    /// Moves changed blocks and the table to new places: all, or those that would overwrite the committed state.
    ///
    /// Blocks are counted in blocks too, so moving one may change another: it ends when a round moves none.
    pub(super) fn move_away(&mut self, all: bool) -> Result<(), Error> {
        let lasting = self.table.clone();
        let mut moved = BTreeSet::new();
        let mut table_moved = false;
        loop {
            let place_of = |index: u64| Some(lasting.get(in_memory(index)).copied()?).filter(|&offset| offset != 0);
            let bits = self.committed.bits;
            let next: Vec<(u64, HostCluster)> = (self.blocks.iter())
                .filter(|(index, block)| block.changed && !moved.contains(*index))
                .filter_map(|(&index, _)| Some((index, bits.host_cluster(HostOffset(place_of(index)?)))))
                .filter(|&(_, place)| all || !self.is_ours(place))
                .collect();
            for &(index, place) in &next {
                let to = self.move_run(place.0..place.0 + 1)?;
                self.place_block(index, to);
                moved.insert(index);
            }
            if !table_moved && (all || !self.is_ours(HostCluster(self.table_run.start))) {
                let run = self.table_run.clone();
                let to = self.move_run(run.clone())?.0;
                self.table_run = to..to + (run.end - run.start);
                table_moved = true;
            } else if next.is_empty() {
                let before = self.table_run.clone();
                self.fit_table()?;
                if self.table_run == before {
                    return Ok(());
                }
            }
        }
    }

    /// Writes the changed blocks and the table to their places; returns where the last of them ends.
    pub(super) fn write(&self) -> Result<u64, Error> {
        let Committed { file, bits, .. } = &*self.committed;
        let mut end = self.table_run.end << bits.bits();
        for (&index, block) in self.blocks.iter().filter(|(_, block)| block.changed) {
            if let Some(place) = self.block_place(index) {
                file.write(&block.counts, bits.host_offset(place))?;
                end = end.max((place.0 + 1) << bits.bits());
            }
        }
        let mut table = table_bytes(self.table.iter().copied());
        table.resize(in_memory((self.table_run.end - self.table_run.start) << bits.bits()), 0);
        file.write(&table, bits.host_offset(HostCluster(self.table_run.start)))?;
        Ok(end)
    }
}
