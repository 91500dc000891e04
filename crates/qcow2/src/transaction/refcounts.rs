use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use super::metadata::Metadata;
use crate::error::{Corruption, Error, Place, WriteObstacle};
use crate::file::ImageFile;
use crate::header::{Header, MAX_REFCOUNT_TABLE_SIZE};
use crate::refcount::RefcountWidth;
use crate::types::{ClusterBits, HostCluster, HostOffset, in_memory};

/// Mask of the offset in a refcount table entry.
const OFFSET: u64 = !0x1ff;

/// The refcounts as the transaction has them, and the search for clusters that it can use.
///
/// A cluster is free for the transaction only while its refcount is zero both as committed and now: what the transaction
/// gives up still belongs to the committed state until the header is replaced.
#[derive(Debug)]
pub(super) struct Refcounts {
    committed: Committed,
    blocks: BTreeMap<u64, Block>,
    /// No cluster below is free.
    hint: u64,
    /// Clusters taken so far, in runs; some may have been given back.
    taken: Vec<Range<u64>>,
    /// Clusters that nothing will use after the commit.
    freed: Vec<HostCluster>,
}

/// The refcounts that the image has on storage.
#[derive(Debug)]
struct Committed {
    file: ImageFile,
    bits: ClusterBits,
    width: RefcountWidth,
    /// Offsets of the blocks.
    table: Vec<u64>,
    metadata: Metadata,
}

#[derive(Debug)]
struct Block {
    counts: Vec<u8>,
    /// Clusters that are in use as committed or now.
    busy: BitSet,
    /// Clusters that the transaction took.
    ours: BitSet,
    changed: bool,
}

/// A bit for each cluster that a block counts.
#[derive(Debug)]
struct BitSet(Vec<u64>);

impl BitSet {
    fn new(len: u64) -> Self {
        Self(vec![0; in_memory(len.div_ceil(64))])
    }

    fn set(&mut self, index: u64, value: bool) {
        if let Some(word) = self.0.get_mut(in_memory(index / 64)) {
            let bit = 1 << (index % 64);
            *word = if value { *word | bit } else { *word & !bit };
        }
    }

    fn contains(&self, index: u64) -> bool {
        self.0.get(in_memory(index / 64)).is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    /// The first index from `from` on that is not in the set.
    fn first_missing(&self, from: u64) -> Option<u64> {
        let mut words = self.0.iter().zip(0..).skip(in_memory(from / 64));
        let (&first, index) = words.next()?;
        let first = first | ((1 << (from % 64)) - 1);
        std::iter::once((first, index))
            .chain(words.map(|(&word, index)| (word, index)))
            .find(|(word, _)| *word != u64::MAX)
            .map(|(word, index): (u64, u64)| index * 64 + u64::from(word.trailing_ones()))
    }
}

/// Reads an image's refcount table: the offsets of its blocks, zero where there is none.
pub(super) fn read_table(file: &ImageFile, header: &Header) -> Result<Vec<u64>, Error> {
    let entries = u64::from(header.refcount_table_clusters) * header.cluster_bits.words();
    let mut table = file.read_table(Place::RefcountTable, header.refcount_table, entries)?;
    table.iter_mut().for_each(|entry| *entry &= OFFSET);
    Ok(table)
}

impl Committed {
    fn per_block(&self) -> u64 {
        self.width.per_block(self.bits)
    }

    fn load(&self, index: u64) -> Result<Block, Error> {
        let per_block = self.per_block();
        // Entries hold host offsets of 56 bits.
        let addressable = (1_u64 << 56 >> self.bits.bits()).div_ceil(per_block);
        if index >= addressable.min(MAX_REFCOUNT_TABLE_SIZE / 8) {
            return Err(self.full());
        }
        let counts = match self.table.get(in_memory(index)) {
            Some(&offset) if offset != 0 => {
                self.file.read_structure(Place::RefcountBlock(index), HostOffset(offset), self.bits.size())?
            }
            _ => vec![0; self.bits.buffer_len()],
        };
        let (busy, ours) = (BitSet::new(per_block), BitSet::new(per_block));
        let mut block = Block { counts, busy, ours, changed: false };
        for cluster in 0..per_block {
            if self.width.get(&block.counts, cluster) != 0 {
                block.busy.set(cluster, true);
            }
        }
        let first = index * per_block;
        for (cluster, place) in self.metadata.within(first..first + per_block) {
            if self.width.get(&block.counts, cluster.0 - first) == 0 {
                return Err(self.too_low(cluster, place));
            }
        }
        Ok(block)
    }

    fn full(&self) -> Error {
        Error::NotWritable { image: self.file.name.to_string(), obstacle: WriteObstacle::RefcountTableFull }
    }

    fn too_low(&self, cluster: HostCluster, place: Place) -> Error {
        self.file.corrupt(Corruption::RefcountTooLow { place, offset: self.bits.host_offset(cluster) })
    }
}

impl Refcounts {
    pub(super) fn new(file: ImageFile, header: &Header, table: Vec<u64>, metadata: Metadata) -> Self {
        let (bits, width) = (header.cluster_bits, RefcountWidth::new(header.refcount_order));
        let committed = Committed { file, bits, width, table, metadata };
        Self { committed, blocks: BTreeMap::new(), hint: 0, taken: Vec::new(), freed: Vec::new() }
    }

    /// The block that counts `cluster`, and the cluster's index in it.
    fn block_of(&mut self, cluster: HostCluster) -> Result<(&mut Block, u64), Error> {
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
        match self.taken.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.taken.push(clusters),
        }
        Ok(())
    }

    /// Takes the first free clusters, at least one and at most `count`, in one run.
    pub(super) fn allocate(&mut self, count: u64) -> Result<Range<u64>, Error> {
        let start = self.next_free(self.hint)?;
        let end = start + self.free_run(start, count)?.max(1);
        self.take(start..end)?;
        self.hint = end;
        Ok(start..end)
    }

    /// Takes the first run of `count` free clusters.
    pub(super) fn allocate_run(&mut self, count: u64) -> Result<Range<u64>, Error> {
        let mut start = self.next_free(self.hint)?;
        loop {
            let len = self.free_run(start, count)?;
            if len == count {
                self.take(start..start + count)?;
                return Ok(start..start + count);
            }
            start = self.next_free(start + len + 1)?;
        }
    }

    /// Gives back clusters that the transaction took; it may take them again.
    pub(super) fn give_back(&mut self, clusters: Range<u64>) -> Result<(), Error> {
        if clusters.is_empty() {
            return Ok(());
        }
        let width = self.committed.width;
        self.hint = self.hint.min(clusters.start);
        for cluster in clusters {
            let (block, index) = self.block_of(HostCluster(cluster))?;
            width.set(&mut block.counts, index, 0);
            block.busy.set(index, false);
            block.ours.set(index, false);
        }
        Ok(())
    }

    /// Counts one user less of a cluster of the committed state. `place` is the user.
    pub(super) fn drop_data(&mut self, cluster: HostCluster, place: Place) -> Result<(), Error> {
        if let Some(first) = self.committed.metadata.place_of(cluster) {
            let offset = self.committed.bits.host_offset(cluster);
            return Err(self.committed.file.corrupt(Corruption::Overlap { first, second: place, offset }));
        }
        self.drop_metadata(cluster, place)
    }

    /// The same for a cluster that is known to hold metadata.
    pub(super) fn drop_metadata(&mut self, cluster: HostCluster, place: Place) -> Result<(), Error> {
        let width = self.committed.width;
        let (block, index) = self.block_of(cluster)?;
        // An entry that uses a cluster with refcount zero may even mean one that is ours by now.
        let uses = if block.ours.contains(index) { 0 } else { width.get(&block.counts, index) };
        let Some(left) = uses.checked_sub(1) else {
            return Err(self.committed.too_low(cluster, place));
        };
        width.set(&mut block.counts, index, left);
        block.changed = true;
        if left == 0 {
            self.freed.push(cluster);
        }
        Ok(())
    }

    /// What the transaction took, whether it kept it or not.
    pub(super) fn taken(&self) -> &[Range<u64>] {
        &self.taken
    }

    /// What nothing uses any more once the transaction is committed, in runs.
    pub(super) fn freed_runs(&mut self) -> Vec<Range<u64>> {
        self.freed.sort_unstable();
        let mut runs: Vec<Range<u64>> = Vec::new();
        for cluster in &self.freed {
            match runs.last_mut() {
                Some(last) if last.end == cluster.0 => last.end += 1,
                _ => runs.push(cluster.0..cluster.0 + 1),
            }
        }
        runs
    }

    /// Finds new places for all changed blocks and for the refcount table, and writes them there.
    ///
    /// Their own clusters are counted in blocks too, so moving one block may change another: it ends when a round
    /// changes no block that has not moved.
    pub(super) fn write(&mut self, header: &Header) -> Result<NewRefcountTable, Error> {
        let old = self.committed.bits.host_cluster(header.refcount_table).0;
        for cluster in old..old + u64::from(header.refcount_table_clusters) {
            self.drop_metadata(HostCluster(cluster), Place::RefcountTable)?;
        }
        let mut moved = BTreeMap::<u64, HostCluster>::new();
        let mut table = 0..0;
        loop {
            let unmoved: Vec<u64> =
                self.blocks.iter().filter(|(i, b)| b.changed && !moved.contains_key(i)).map(|(&i, _)| i).collect();
            for &index in &unmoved {
                moved.insert(index, HostCluster(self.allocate(1)?.start));
                if let Some(&old) = self.committed.table.get(in_memory(index)).filter(|&&old| old != 0) {
                    self.drop_metadata(self.committed.bits.host_cluster(HostOffset(old)), Place::RefcountBlock(index))?;
                }
            }
            let entries = moved.keys().last().map_or(0, |last| last + 1).max(self.committed.table.len() as u64);
            let clusters = self.committed.bits.clusters_for(entries * 8);
            if table.end - table.start < clusters {
                if clusters << self.committed.bits.bits() > MAX_REFCOUNT_TABLE_SIZE {
                    return Err(self.committed.full());
                }
                self.give_back(table)?;
                table = self.allocate_run(clusters)?;
            } else if unmoved.is_empty() {
                break;
            }
        }
        for (&index, &cluster) in &moved {
            if let Some(block) = self.blocks.get(&index) {
                self.committed.file.write(&block.counts, self.committed.bits.host_offset(cluster))?;
            }
        }
        self.committed.table.resize(in_memory((table.end - table.start) * self.committed.bits.words()), 0);
        for (index, cluster) in moved {
            if let Some(entry) = self.committed.table.get_mut(in_memory(index)) {
                *entry = self.committed.bits.host_offset(cluster).0;
            }
        }
        let offset = self.committed.bits.host_offset(HostCluster(table.start));
        self.committed.file.write(&crate::file::table_bytes(self.committed.table.iter().copied()), offset)?;
        Ok(NewRefcountTable { offset, clusters: table.end - table.start })
    }
}

/// Where a commit has put the refcount table.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewRefcountTable {
    pub(super) offset: HostOffset,
    pub(super) clusters: u64,
}
