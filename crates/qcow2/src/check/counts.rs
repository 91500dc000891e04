use std::collections::BTreeMap;

use crate::error::Place;
use crate::file::ImageFile;
use crate::header::Header;
use crate::refcount::RefcountWidth;
use crate::types::{ClusterBits, HostCluster, HostOffset, in_memory};

/// Mask of the reserved bits of a refcount table entry.
const RESERVED: u64 = 0x1ff;

/// References counted so far, in pages that are laid out as refcount blocks and exist where something was counted.
pub(super) struct Counts {
    bits: ClusterBits,
    width: RefcountWidth,
    pages: BTreeMap<u64, Box<[u8]>>,
    /// Clusters of the file, and perhaps one more that reaches past its end.
    pub(super) clusters: u64,
}

impl Counts {
    pub(super) fn new(header: &Header, file_size: u64) -> Self {
        let (bits, width) = (header.cluster_bits, RefcountWidth::new(header.refcount_order));
        Self { bits, width, pages: BTreeMap::new(), clusters: bits.clusters_for(file_size) }
    }

    /// Counts one reference more; false if the count is at its limit.
    pub(super) fn add(&mut self, cluster: HostCluster) -> bool {
        let per_block = self.width.per_block(self.bits);
        let within = cluster.0 % per_block;
        self.clusters = self.clusters.max(cluster.0 + 1);
        let page = self.pages.entry(cluster.0 / per_block).or_insert_with(|| vec![0; self.bits.buffer_len()].into());
        let count = self.width.get(page, within);
        if count == self.width.max() {
            return false;
        }
        self.width.set(page, within, count + 1);
        true
    }

    pub(super) fn get(&self, cluster: HostCluster) -> u64 {
        let per_block = self.width.per_block(self.bits);
        self.page(cluster.0 / per_block).map_or(0, |page| self.width.get(page, cluster.0 % per_block))
    }

    pub(super) fn page(&self, index: u64) -> Option<&[u8]> {
        self.pages.get(&index).map(|page| &**page)
    }
}

/// The refcounts that an image has on storage, its blocks read when first needed.
pub(super) struct Stored<'a> {
    file: &'a ImageFile,
    bits: ClusterBits,
    pub(super) width: RefcountWidth,
    pub(super) table: Vec<u64>,
    blocks: Vec<Option<Block>>,
}

/// A refcount block; `Err` if it cannot be read.
type Block = Result<Box<[u8]>, Unreadable>;

/// Says that a refcount cannot be told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unreadable;

impl<'a> Stored<'a> {
    pub(super) fn read(file: &'a ImageFile, header: &Header) -> Result<Self, crate::Error> {
        let entries = u64::from(header.refcount_table_clusters) * header.cluster_bits.words();
        let table = file.read_table(Place::RefcountTable, header.refcount_table, entries)?;
        let blocks = std::iter::repeat_with(|| None).take(table.len()).collect();
        Ok(Self { file, bits: header.cluster_bits, width: RefcountWidth::new(header.refcount_order), table, blocks })
    }

    pub(super) fn reserved_bits(entry: u64) -> u64 {
        entry & RESERVED
    }

    pub(super) fn offset(entry: u64) -> HostOffset {
        HostOffset(entry & !RESERVED)
    }

    /// The block at `index` of the table, if there is one.
    pub(super) fn block(&mut self, index: u64) -> Result<Option<&[u8]>, Unreadable> {
        let index = in_memory(index);
        let offset = self.table.get(index).map_or(HostOffset(0), |&entry| Self::offset(entry));
        let Some(slot) = self.blocks.get_mut(index).filter(|_| offset.0 != 0) else {
            return Ok(None);
        };
        let block = slot.get_or_insert_with(|| {
            let mut bytes = vec![0; self.bits.buffer_len()].into_boxed_slice();
            if self.bits.offset_within(offset.0) != 0 || self.file.read_padded(&mut bytes, offset).is_err() {
                return Err(Unreadable);
            }
            Ok(bytes)
        });
        block.as_deref().map(Some).map_err(|&error| error)
    }

    pub(super) fn get(&mut self, cluster: HostCluster) -> Result<u64, Unreadable> {
        let width = self.width;
        let per_block = width.per_block(self.bits);
        Ok(self.block(cluster.0 / per_block)?.map_or(0, |block| width.get(block, cluster.0 % per_block)))
    }
}
