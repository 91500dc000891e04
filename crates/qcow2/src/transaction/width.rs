//! Counting references in numbers of another width.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::counts::{Block, Committed};
use super::refcounts::Refcounts;
use super::state::State;
use crate::error::{Error, Place};
use crate::refcount::RefcountWidth;
use crate::types::{HostCluster, HostOffset};

impl State {
    /// Lets refcounts have `1 << order` bits. Returns the first cluster whose count is too large for that, with the count.
    pub(crate) fn set_refcount_order(&mut self, order: u8) -> Result<Option<(HostOffset, u64)>, Error> {
        let too_large = self.refcounts.set_width(RefcountWidth::new(order))?;
        self.header.refcount_order = order;
        Ok(too_large.map(|(cluster, count)| (self.header.cluster_bits.host_offset(cluster), count)))
    }
}

impl Refcounts {
    fn set_width(&mut self, width: RefcountWidth) -> Result<Option<(HostCluster, u64)>, Error> {
        let (old, per_block) = (self.committed.width, self.committed.per_block());
        let old_places: Vec<(u64, HostCluster)> =
            (0..self.table.len() as u64).filter_map(|index| Some((index, self.block_place(index)?))).collect();
        for &(index, _) in &old_places {
            self.block_of(HostCluster(index * per_block))?;
        }
        let old_blocks = std::mem::take(&mut self.blocks);
        let bits = self.committed.bits;
        self.committed = Arc::new(Committed { width, table: Vec::new(), ..(*self.committed).clone() });
        self.table.clear();
        let new_per_block = self.committed.per_block();
        let mut blocks = BTreeMap::<u64, Block>::new();
        for (index, block) in &old_blocks {
            for within in (0..per_block).filter(|&within| block.busy.contains(within)) {
                let (cluster, count) = (index * per_block + within, old.get(&block.counts, within));
                if count > width.max() {
                    return Ok(Some((HostCluster(cluster), count)));
                }
                let new = blocks.entry(cluster / new_per_block).or_insert_with(|| Block::empty(new_per_block, bits));
                let within_new = cluster % new_per_block;
                width.set(&mut new.counts, within_new, count);
                new.busy.set(within_new, true);
                new.ours.set(within_new, block.ours.contains(within));
                new.changed = true;
            }
        }
        self.blocks = blocks;
        let indexes: Vec<u64> = self.blocks.keys().copied().collect();
        for index in indexes {
            let first = index * new_per_block;
            while !self.cover(&(first..first + 1))? {}
        }
        // The table moves too, as in QEMU.
        let run = self.allocate_run(bits.clusters_for(self.table.len() as u64 * 8))?;
        for cluster in std::mem::replace(&mut self.table_run, run) {
            self.drop_user(HostCluster(cluster), Place::RefcountTable)?;
        }
        for (index, place) in old_places {
            self.drop_user(place, Place::RefcountBlock(index))?;
        }
        Ok(None)
    }
}
