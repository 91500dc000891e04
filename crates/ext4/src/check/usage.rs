//! Which clusters are claimed: one bit each, allocated as claims come.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::fs::Ext4;
use crate::{BlockNr, GroupNr};

const WORD_BITS: u64 = 64;

type Words = Box<[AtomicU64]>;

/// The blocks, or clusters of them (`bigalloc`), that something claims.
#[derive(Debug)]
pub(super) struct BlockUse {
    first: u64,
    ratio: u64,
    per_group: u64,
    groups: Vec<OnceLock<Words>>,
    shared: AtomicBool,
}

impl BlockUse {
    pub(super) fn new(fs: &Ext4) -> Self {
        let geometry = fs.geometry();
        let ratio = u64::from(geometry.blocks_per_cluster);
        Self {
            first: geometry.first_data_block,
            ratio,
            per_group: u64::from(geometry.blocks_per_group) / ratio,
            groups: (0..geometry.groups).map(|_| OnceLock::new()).collect(),
            shared: AtomicBool::new(false),
        }
    }

    /// Blocks in a cluster.
    pub(super) fn ratio(&self) -> u64 {
        self.ratio
    }

    /// The cluster that holds a block, counted from the first group's start.
    pub(super) fn cluster(&self, block: u64) -> u64 {
        block.saturating_sub(self.first) / self.ratio
    }

    /// Claims the clusters of a range of blocks, which must lie in the file system. Gives the first block of the first
    /// cluster that was claimed before.
    pub(super) fn claim(&self, start: BlockNr, len: u64) -> Option<BlockNr> {
        if len == 0 {
            return None;
        }
        let shared = self.claim_clusters(self.cluster(start.0)..self.cluster(start.0 + len - 1) + 1);
        if shared.is_some() {
            self.shared.store(true, Ordering::Relaxed);
        }
        shared.map(|cluster| BlockNr(start.0.max(self.first + cluster * self.ratio)))
    }

    /// Claims blocks that may share a cluster with each other.
    pub(super) fn claim_fixed(&self, start: BlockNr, len: u64) -> Option<BlockNr> {
        if self.ratio == 1 {
            return self.claim(start, len);
        }
        self.claim_clusters(self.cluster(start.0)..self.cluster(start.0 + len.max(1) - 1) + 1);
        None
    }

    /// Whether any claim met an older one.
    pub(super) fn has_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    fn words(&self, group: u64) -> Option<&Words> {
        let slot = self.groups.get(usize::try_from(group).ok()?)?;
        let len = self.per_group.div_ceil(WORD_BITS);
        Some(slot.get_or_init(|| (0..len).map(|_| AtomicU64::new(0)).collect()))
    }

    fn claim_clusters(&self, clusters: Range<u64>) -> Option<u64> {
        let mut shared = None;
        let mut at = clusters.start;
        while at < clusters.end {
            let (group, bit) = (at / self.per_group, at % self.per_group);
            let room = (WORD_BITS - bit % WORD_BITS).min(self.per_group - bit).min(clusters.end - at);
            let mask = u64::MAX >> (WORD_BITS - room) << (bit % WORD_BITS);
            let word = self.words(group).and_then(|words| words.get(usize::try_from(bit / WORD_BITS).ok()?));
            let old = word.map_or(0, |word| word.fetch_or(mask, Ordering::Relaxed)) & mask;
            if old != 0 && shared.is_none() {
                shared = Some(at + u64::from((old >> (bit % WORD_BITS)).trailing_zeros()));
            }
            at += room;
        }
        shared
    }

    /// A group's claims as its bitmap should have them, up to a multiple of eight bytes.
    pub(super) fn bitmap(&self, group: GroupNr) -> Vec<u8> {
        let words = self.groups.get(group.0 as usize).and_then(OnceLock::get);
        match words {
            Some(words) => words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect(),
            None => vec![0; usize::try_from(self.per_group.div_ceil(WORD_BITS) * 8).unwrap_or(0)],
        }
    }
}
