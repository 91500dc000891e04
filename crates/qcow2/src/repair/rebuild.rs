use std::collections::BTreeMap;

use crate::check::{Claims, Counts, MAX_CLUSTERS};
use crate::error::{Error, WriteObstacle};
use crate::file::{ImageFile, table_bytes};
use crate::header::{Header, MAX_REFCOUNT_TABLE_SIZE};
use crate::refcount::RefcountWidth;
use crate::types::{HostCluster, in_memory};

/// Clusters that an image may grow by in a repair, besides as many as it has.
const MARGIN: u64 = 1024;

/// Writes refcount blocks and a refcount table for `counts` into free clusters from `from` on, and lets `header` refer to
/// them. They lie where QEMU puts them: each block in the first free cluster that it counts itself, then the table.
pub(super) fn rebuild(
    file: &ImageFile,
    header: &mut Header,
    counts: &mut Counts,
    claims: &Claims,
    from: HostCluster,
) -> Result<(), Error> {
    let limit = counts.clusters().saturating_mul(2).saturating_add(MARGIN);
    let mut rebuilder = Rebuilder { file, header, counts, claims, from, limit, blocks: BTreeMap::new() };
    rebuilder.place_blocks(0, u64::MAX)?;
    let table = loop {
        let clusters = rebuilder.table_clusters();
        let table = rebuilder.allocate(from, clusters)?;
        rebuilder.place_blocks(table.0, table.0 + clusters)?;
        if rebuilder.table_clusters() == clusters {
            break table;
        }
        // It has outgrown its place by counting itself.
        (0..clusters).for_each(|n| rebuilder.counts.set(HostCluster(table.0 + n), 0));
    };
    rebuilder.write(table)
}

struct Rebuilder<'a> {
    file: &'a ImageFile,
    header: &'a mut Header,
    counts: &'a mut Counts,
    claims: &'a Claims,
    from: HostCluster,
    /// The cluster before which everything must find room: damage may claim any space past the end of the file.
    limit: u64,
    blocks: BTreeMap<u64, HostCluster>,
}

impl Rebuilder<'_> {
    fn width(&self) -> RefcountWidth {
        RefcountWidth::new(self.header.refcount_order)
    }

    fn per_block(&self) -> u64 {
        self.width().per_block(self.header.cluster_bits)
    }

    fn table_clusters(&self) -> u64 {
        let entries = self.blocks.keys().last().map_or(0, |last| last + 1);
        self.header.cluster_bits.clusters_for(entries * 8)
    }

    /// Takes the first run of `count` free clusters from `from` on.
    fn allocate(&mut self, from: HostCluster, count: u64) -> Result<HostCluster, Error> {
        let mut start = self.claims.skip(from.0, count);
        let mut next = start;
        while next < start + count {
            if self.counts.get(HostCluster(next)) != 0 {
                start = self.claims.skip(next + 1, count);
                next = start;
            } else {
                next += 1;
            }
        }
        if next > self.countable() {
            return Err(self.full());
        }
        (start..start + count).for_each(|cluster| self.counts.set(HostCluster(cluster), 1));
        Ok(HostCluster(start))
    }

    /// Clusters that the largest table can count, and a check takes.
    fn countable(&self) -> u64 {
        (MAX_REFCOUNT_TABLE_SIZE / 8 * self.per_block()).min(MAX_CLUSTERS).min(self.limit)
    }

    fn full(&self) -> Error {
        let image = self.file.name.to_string();
        Error::NotWritable { image, obstacle: WriteObstacle::RefcountTableFull }
    }

    /// Takes clusters for the blocks that count clusters in use from `cluster` on, and before `end`.
    fn place_blocks(&mut self, cluster: u64, end: u64) -> Result<(), Error> {
        let per_block = self.per_block();
        let mut cluster = cluster;
        let mut first_free = self.from;
        loop {
            cluster = self.counts.skip_unused(HostCluster(cluster)).0;
            if cluster >= self.counts.clusters().min(end) {
                return Ok(());
            }
            let index = cluster / per_block;
            if self.counts.get(HostCluster(cluster)) == 0 {
                cluster += 1;
                continue;
            }
            if !self.blocks.contains_key(&index) {
                first_free = first_free.max(HostCluster(index * per_block));
                first_free = self.allocate(first_free, 1)?;
                self.blocks.insert(index, first_free);
            }
            cluster = (index + 1) * per_block;
        }
    }

    fn write(self, table: HostCluster) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let clusters = self.table_clusters();
        if clusters << bits.bits() > MAX_REFCOUNT_TABLE_SIZE {
            return Err(self.full());
        }
        let (width, per_block) = (self.width(), self.per_block());
        let mut entries = vec![0; in_memory(clusters * bits.words())];
        for (&index, &place) in &self.blocks {
            let mut block = vec![0; bits.buffer_len()];
            for within in 0..per_block {
                let count = self.counts.get(HostCluster(index * per_block + within));
                if count != 0 {
                    width.set(&mut block, within, count);
                }
            }
            self.file.write(&block, bits.host_offset(place))?;
            entries[in_memory(index)] = bits.host_offset(place).0;
        }
        self.header.refcount_table = bits.host_offset(table);
        self.file.write(&table_bytes(entries), self.header.refcount_table)?;
        // The table's limit is 16384 of the smallest clusters.
        self.header.refcount_table_clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        Ok(())
    }
}
