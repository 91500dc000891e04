use crate::error::{Corruption, Error, Place, WriteObstacle};
use crate::file::ImageFile;
use crate::header::{Header, MAX_REFCOUNT_TABLE_SIZE};
use crate::refcount::RefcountWidth;
use crate::types::{ClusterBits, HostCluster, HostOffset, in_memory};

use super::metadata::Metadata;

/// Mask of the offset in a refcount table entry.
const OFFSET: u64 = !0x1ff;

/// Reads an image's refcount table: the offsets of its blocks, zero where there is none.
pub(super) fn read_table(file: &ImageFile, header: &Header) -> Result<Vec<u64>, Error> {
    let entries = u64::from(header.refcount_table_clusters) * header.cluster_bits.words();
    let mut table = file.read_table(Place::RefcountTable, header.refcount_table, entries)?;
    table.iter_mut().for_each(|entry| *entry &= OFFSET);
    Ok(table)
}

/// The refcounts that the image has on storage.
#[derive(Clone, Debug)]
pub(super) struct Committed {
    pub(super) file: ImageFile,
    pub(super) bits: ClusterBits,
    pub(super) width: RefcountWidth,
    /// Offsets of the blocks.
    pub(super) table: Vec<u64>,
    pub(super) metadata: Metadata,
}

#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) counts: Vec<u8>,
    /// Clusters that are in use as committed or now.
    pub(super) busy: BitSet,
    /// Clusters that the transaction took.
    pub(super) ours: BitSet,
    pub(super) changed: bool,
}

impl Block {
    pub(super) fn empty(per_block: u64, bits: ClusterBits) -> Self {
        let (busy, ours) = (BitSet::new(per_block), BitSet::new(per_block));
        Self { counts: vec![0; bits.buffer_len()], busy, ours, changed: false }
    }
}

/// A bit for each cluster that a block counts.
#[derive(Clone, Debug)]
pub(super) struct BitSet(Vec<u64>);

impl BitSet {
    fn new(len: u64) -> Self {
        Self(vec![0; in_memory(len.div_ceil(64))])
    }

    pub(super) fn set(&mut self, index: u64, value: bool) {
        if let Some(word) = self.0.get_mut(in_memory(index / 64)) {
            let bit = 1 << (index % 64);
            *word = if value { *word | bit } else { *word & !bit };
        }
    }

    pub(super) fn contains(&self, index: u64) -> bool {
        self.0.get(in_memory(index / 64)).is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    /// The first index from `from` on that is not in the set.
    pub(super) fn first_missing(&self, from: u64) -> Option<u64> {
        let mut words = self.0.iter().zip(0..).skip(in_memory(from / 64));
        let (&first, index) = words.next()?;
        let first = first | ((1 << (from % 64)) - 1);
        std::iter::once((first, index))
            .chain(words.map(|(&word, index)| (word, index)))
            .find(|(word, _)| *word != u64::MAX)
            .map(|(word, index): (u64, u64)| index * 64 + u64::from(word.trailing_ones()))
    }
}

impl Committed {
    pub(super) fn per_block(&self) -> u64 {
        self.width.per_block(self.bits)
    }

    pub(super) fn load(&self, index: u64) -> Result<Block, Error> {
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
        let mut block = Block { counts, ..Block::empty(per_block, self.bits) };
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

    pub(super) fn full(&self) -> Error {
        Error::NotWritable { image: self.file.name.to_string(), obstacle: WriteObstacle::RefcountTableFull }
    }

    pub(super) fn too_low(&self, cluster: HostCluster, place: Place) -> Error {
        self.file.corrupt(Corruption::RefcountTooLow { place, offset: self.bits.host_offset(cluster) })
    }
}
