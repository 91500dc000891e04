use std::ops::Range;

use crate::error::Error;
use crate::file::{ImageFile, words};
use crate::header::Header;
use crate::refcount::RefcountWidth;
use crate::types::{ClusterBits, HostCluster, HostOffset, in_memory};

/// Mask of the reserved bits of a refcount table entry.
const RESERVED: u64 = 0x1ff;
/// Bytes of refcount blocks that are kept at most.
const KEPT: usize = 32 << 20;

/// The refcounts that an image has on storage. Blocks are read when they are needed, and a bounded number is kept.
pub(crate) struct Stored {
    file: ImageFile,
    bits: ClusterBits,
    pub(crate) width: RefcountWidth,
    table: Vec<u64>,
    /// Those that were read, each at its index in the table.
    blocks: Vec<Option<Box<[u8]>>>,
    /// How many of them there are.
    kept: usize,
}

/// Says that a refcount cannot be told, because of where its block is said to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unreadable {
    pub(crate) block: u64,
    pub(crate) offset: HostOffset,
    /// Whether that is not the start of a cluster; else it is beyond all files.
    pub(crate) misaligned: bool,
}

impl Stored {
    pub(crate) fn read(file: &ImageFile, header: &Header) -> Result<Self, Error> {
        // At most 8 MiB; what lies past the file's end is zero.
        let len = u64::from(header.refcount_table_clusters) * header.cluster_bits.size();
        let mut table = vec![0; in_memory(len)];
        file.read_padded(&mut table, header.refcount_table)?;
        let table = words(&table).collect();
        let width = RefcountWidth::new(header.refcount_order);
        Ok(Self { file: file.clone(), bits: header.cluster_bits, width, table, blocks: Vec::new(), kept: 0 })
    }

    /// Entries of the refcount table.
    pub(crate) fn table(&self) -> &[u64] {
        &self.table
    }

    pub(crate) fn reserved_bits(entry: u64) -> u64 {
        entry & RESERVED
    }

    pub(crate) fn offset(entry: u64) -> HostOffset {
        HostOffset(entry & !RESERVED)
    }

    /// Clusters that a block counts.
    pub(crate) fn per_block(&self) -> u64 {
        self.width.per_block(self.bits)
    }

    /// Which block counts a cluster, and where in it.
    pub(crate) fn place(&self, cluster: HostCluster) -> (u64, u64) {
        let bits = self.width.per_block_bits(self.bits);
        (cluster.0 >> bits, cluster.0 & ((1 << bits) - 1))
    }

    /// Where the clusters that the same block counts end.
    pub(crate) fn block_end(&self, cluster: HostCluster) -> HostCluster {
        HostCluster((self.place(cluster).0 + 1) << self.width.per_block_bits(self.bits))
    }

    /// The block at `index` of the table, if there is one.
    pub(crate) fn block(&mut self, index: u64) -> Result<Option<&[u8]>, Error> {
        let index = in_memory(index);
        let Some(offset) = self.table.get(index).map(|&entry| Self::offset(entry)).filter(|offset| offset.0 != 0)
        else {
            return Ok(None);
        };
        if self.blocks.len() <= index {
            self.blocks.resize_with(index + 1, || None);
        }
        if self.blocks[index].is_none() {
            if self.kept >= (KEPT / self.bits.buffer_len()).max(1) {
                self.blocks.fill_with(|| None);
                self.kept = 0;
            }
            let mut bytes = vec![0; self.bits.buffer_len()].into_boxed_slice();
            self.file.read_padded(&mut bytes, offset)?;
            self.blocks[index] = Some(bytes);
            self.kept += 1;
        }
        Ok(self.blocks[index].as_deref())
    }

    /// The first cluster from `cluster` on that a block counts.
    pub(crate) fn skip_missing(&self, cluster: HostCluster) -> HostCluster {
        let per_block = self.per_block();
        let index = cluster.0 / per_block;
        let rest = self.table.get(in_memory(index)..).unwrap_or_default();
        match rest.iter().position(|&entry| Self::offset(entry).0 != 0) {
            Some(0) => cluster,
            Some(blocks) => HostCluster((index + blocks as u64) * per_block),
            None => HostCluster(u64::MAX),
        }
    }

    /// Fails if the block that counts `cluster` cannot be where it is said to be.
    pub(crate) fn locate(&self, cluster: HostCluster) -> Result<(), Unreadable> {
        let (block, _) = self.place(cluster);
        let offset = self.table.get(in_memory(block)).map_or(HostOffset(0), |&entry| Self::offset(entry));
        let misaligned = self.bits.offset_within(offset.0) != 0;
        if misaligned || i64::try_from(offset.plus(self.bits.size()).0).is_err() {
            return Err(Unreadable { block, offset, misaligned });
        }
        Ok(())
    }

    /// Changes the refcount of a cluster whose block exists.
    pub(crate) fn set(&mut self, cluster: HostCluster, count: u64) -> Result<(), Error> {
        let (index, within) = self.place(cluster);
        let offset = self.table.get(in_memory(index)).map_or(HostOffset(0), |&entry| Self::offset(entry));
        if self.block(index)?.is_none() {
            return Ok(());
        }
        let Some(Some(block)) = self.blocks.get_mut(in_memory(index)) else { return Ok(()) };
        self.width.set(block, within, count);
        let bytes = self.width.bytes_of(within);
        self.file.write(&block[bytes.clone()], offset.plus(bytes.start as u64))
    }

    /// Whether the refcounts of clusters of one block, which can be located, are all one.
    pub(crate) fn all_one(&mut self, clusters: Range<u64>) -> Result<bool, Error> {
        let (block, first) = self.place(HostCluster(clusters.start));
        let (width, end) = (self.width, first + (clusters.end - clusters.start));
        let Some(block) = self.block(block)? else { return Ok(false) };
        Ok((first..end).all(|index| width.get(block, index) == 1))
    }

    /// The refcount of a cluster that can be [located](Self::locate).
    pub(crate) fn get(&mut self, cluster: HostCluster) -> Result<u64, Error> {
        let (block, index) = self.place(cluster);
        let width = self.width;
        if let Some(Some(block)) = self.blocks.get(in_memory(block)) {
            return Ok(width.get(block, index));
        }
        Ok(self.block(block)?.map_or(0, |block| width.get(block, index)))
    }
}
