use std::ops::Range;

use crate::error::{Error, WriteObstacle};
use crate::file::{ImageFile, table_bytes};
use crate::header::MAX_REFCOUNT_TABLE_SIZE;
use crate::refcount::RefcountWidth;
use crate::types::{ClusterBits, HostCluster, HostOffset, in_memory};

/// Hands out the host clusters of a new image, and keeps their refcounts.
///
/// Clusters come in the order in which QEMU takes them when it does the same, so that images are laid out as its own: a
/// refcount block is made when the first cluster that it counts is taken, and behind that, and what is asked for next is
/// looked for behind the block.
#[derive(Debug)]
pub(crate) struct Allocator {
    file: ImageFile,
    bits: ClusterBits,
    width: RefcountWidth,
    blocks: Vec<Option<Block>>,
    /// Clusters of the refcount table.
    table: Range<u64>,
    /// Where the search for a free cluster begins.
    next: u64,
    /// End of the last compressed stream, in bytes.
    packed_end: u64,
}

#[derive(Debug)]
struct Block {
    cluster: u64,
    counts: Vec<u8>,
}

/// Whether clusters were taken, or must be looked for again because a new refcount block may lie where they were to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Taken,
    Again,
}

impl Allocator {
    /// The allocator of an image that has its header, refcount table and first refcount block in its first three clusters.
    pub(crate) fn new(file: ImageFile, bits: ClusterBits, width: RefcountWidth) -> Self {
        let counts = vec![0; bits.buffer_len()];
        let blocks = vec![Some(Block { cluster: 2, counts })];
        let mut new = Self { file, bits, width, blocks, table: 1..2, next: 3, packed_end: 0 };
        (0..3).for_each(|cluster| new.set(cluster, 1));
        new
    }

    fn per_block(&self) -> u64 {
        self.width.per_block(self.bits)
    }

    /// Refcount blocks that the table has room for.
    fn table_entries(&self) -> u64 {
        (self.table.end - self.table.start) * self.bits.words()
    }

    fn count(&self, cluster: u64) -> u64 {
        let per_block = self.per_block();
        let block = self.blocks.get(in_memory(cluster / per_block)).and_then(Option::as_ref);
        block.map_or(0, |block| self.width.get(&block.counts, cluster % per_block))
    }

    /// Sets a count whose block is there.
    fn set(&mut self, cluster: u64, count: u64) {
        let per_block = self.per_block();
        if let Some(Some(block)) = self.blocks.get_mut(in_memory(cluster / per_block)) {
            self.width.set(&mut block.counts, cluster % per_block, count);
        }
        if count == 0 {
            self.next = self.next.min(cluster);
        }
    }

    /// Where the header, the refcount table and its blocks end in the file, in bytes.
    pub(crate) fn end_of_metadata(&self) -> u64 {
        let blocks = self.blocks.iter().flatten().map(|block| block.cluster + 1);
        blocks.fold(self.table.end, u64::max) << self.bits.bits()
    }

    /// `count` free clusters in one piece.
    pub(crate) fn allocate(&mut self, count: u64) -> Result<HostOffset, Error> {
        loop {
            let start = self.search(count);
            if self.take(start..start + count)? == Outcome::Taken {
                return Ok(self.bits.host_offset(HostCluster(start)));
            }
        }
    }

    /// Takes clusters from `start` on, `count` at most, up to the first that is not free; returns how many.
    pub(crate) fn allocate_at(&mut self, start: HostOffset, count: u64) -> Result<u64, Error> {
        let start = self.bits.host_cluster(start).0;
        loop {
            let free = (start..start + count).take_while(|&cluster| self.count(cluster) == 0).count() as u64;
            if self.take(start..start + free)? == Outcome::Taken {
                return Ok(free);
            }
        }
    }

    /// Room for a compressed stream of `len` bytes, whose first `shared` ones are the last ones of the stream before.
    ///
    /// Returns where the stream begins, and how many of those bytes it does share.
    pub(crate) fn pack(&mut self, len: u64, shared: u64) -> Result<(HostOffset, u64), Error> {
        let size = self.bits.size();
        let end = self.packed_end;
        let can_continue = (!end.is_multiple_of(size) || shared > 0)
            && ((end - shared) / size..end.div_ceil(size)).all(|cluster| self.count(cluster) < self.width.max());
        let mut begin = can_continue.then_some(end - shared);
        loop {
            let held = end.next_multiple_of(size);
            let place = match begin.filter(|begin| begin + len <= held) {
                Some(begin) => begin,
                None => {
                    let fresh = self.search(len.div_ceil(size)) * size;
                    begin = begin.filter(|_| fresh == held);
                    begin.unwrap_or(fresh)
                }
            };
            if self.take(place / size..(place + len).div_ceil(size))? == Outcome::Taken {
                self.packed_end = place + len;
                return Ok((HostOffset(place), begin.map_or(0, |_| shared)));
            }
            begin = None;
        }
    }

    /// Counts one more user of the clusters in which a range of bytes lies, unless one of them has as many as can be counted.
    ///
    /// Returns how many the first of them had before.
    pub(crate) fn share(&mut self, range: Range<u64>) -> Option<u64> {
        let size = self.bits.size();
        let clusters = range.start / size..range.end.div_ceil(size);
        if clusters.clone().any(|cluster| self.count(cluster) == self.width.max()) {
            return None;
        }
        let users = self.count(clusters.start);
        clusters.for_each(|cluster| self.set(cluster, self.count(cluster) + 1));
        Some(users)
    }

    /// The first `count` clusters in one piece that are free, from where the last search ended.
    fn search(&mut self, count: u64) -> u64 {
        let mut found = 0;
        while found < count {
            found = if self.count(self.next) == 0 { found + 1 } else { 0 };
            self.next += 1;
        }
        self.next - count
    }

    fn take(&mut self, clusters: Range<u64>) -> Result<Outcome, Error> {
        for cluster in clusters.clone() {
            if self.blocks.get(in_memory(cluster / self.per_block())).is_none_or(Option::is_none) {
                self.add_block(cluster)?;
                for taken in clusters.start..cluster {
                    self.set(taken, self.count(taken) - 1);
                }
                self.next = self.next.min(clusters.start);
                return Ok(Outcome::Again);
            }
            let count = self.count(cluster);
            if count == self.width.max() {
                return Err(self.full());
            }
            self.set(cluster, count + 1);
        }
        Ok(Outcome::Taken)
    }

    /// Makes the refcount block that counts `cluster`; does nothing if another one had to be made first.
    fn add_block(&mut self, cluster: u64) -> Result<(), Error> {
        let index = cluster / self.per_block();
        let place = self.search(1);
        let counts_itself = place / self.per_block() == index;
        if !counts_itself && self.take(place..place + 1)? == Outcome::Again {
            return Ok(());
        }
        self.insert(index, place);
        if counts_itself {
            self.set(place, 1);
        }
        if index >= self.table_entries() {
            let used = (cluster + 1).max(place).div_ceil(self.per_block());
            self.replace_table(used * self.per_block(), 0, false)?;
        }
        Ok(())
    }

    fn insert(&mut self, index: u64, cluster: u64) {
        let index = in_memory(index);
        if self.blocks.len() <= index {
            self.blocks.resize_with(index + 1, || None);
        }
        self.blocks[index] = Some(Block { cluster, counts: vec![0; self.bits.buffer_len()] });
    }

    /// Makes room for `more` clusters whose refcounts need no new blocks, at the end of the file, which is `start` clusters
    /// long; returns where they can begin. They are not taken yet.
    pub(crate) fn prepare(&mut self, start: u64, more: u64) -> Result<u64, Error> {
        self.replace_table(start, more, true)
    }

    /// Puts a new refcount table, with blocks that count it and `more` clusters behind it, at cluster `start`; frees the old one.
    fn replace_table(&mut self, start: u64, more: u64, exact: bool) -> Result<u64, Error> {
        let total = self.blocks_needed(start + more, !exact);
        let entries = if exact { total } else { total + total.div_ceil(2) };
        let table_len = self.bits.clusters_for(entries * 8);
        if table_len << self.bits.bits() > MAX_REFCOUNT_TABLE_SIZE {
            return Err(self.full());
        }
        let mut place = start;
        for index in start / self.per_block()..total {
            if self.blocks.get(in_memory(index)).is_none_or(Option::is_none) {
                self.insert(index, place);
                place += 1;
            }
        }
        let old = std::mem::replace(&mut self.table, place..place + table_len);
        (start..place + table_len).for_each(|cluster| self.set(cluster, 1));
        old.for_each(|cluster| self.set(cluster, 0));
        Ok(place + table_len)
    }

    /// Refcount blocks that count `clusters` and the blocks and table that this takes, and half a table more if `generous`.
    fn blocks_needed(&self, clusters: u64, generous: bool) -> u64 {
        let settle = |clusters: u64| {
            let (mut blocks, mut table) = (0, 0);
            loop {
                let more = (clusters + blocks + table).div_ceil(self.per_block());
                let longer = more.div_ceil(self.bits.words());
                if (more, longer) == (blocks, table) {
                    return (blocks, table);
                }
                (blocks, table) = (more, longer);
            }
        };
        let (blocks, table) = settle(clusters);
        if generous { settle(clusters + table.div_ceil(2)).0 } else { blocks }
    }

    fn full(&self) -> Error {
        Error::NotWritable { image: self.file.name.to_string(), obstacle: WriteObstacle::RefcountTableFull }
    }

    /// Where the refcount table lies, and how many clusters it has.
    pub(crate) fn refcount_table(&self) -> (HostOffset, u32) {
        let clusters = u32::try_from(self.table.end - self.table.start).unwrap_or(u32::MAX);
        (self.bits.host_offset(HostCluster(self.table.start)), clusters)
    }

    /// The refcount table and its blocks as they are stored, with their places.
    pub(crate) fn encode(&self) -> impl Iterator<Item = (HostOffset, Vec<u8>)> {
        let place = |cluster| self.bits.host_offset(HostCluster(cluster));
        let entries = self.blocks.iter().map(move |block| block.as_ref().map_or(0, |block| place(block.cluster).0));
        let mut table = table_bytes(entries);
        table.resize(in_memory(self.table_entries() * 8), 0);
        let blocks = self.blocks.iter().flatten().map(move |block| (place(block.cluster), block.counts.clone()));
        std::iter::once((place(self.table.start), table)).chain(blocks)
    }
}
