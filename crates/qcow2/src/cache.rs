use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::types::{ClusterBits, HostOffset, in_memory};

const BYTES: usize = 4 << 20;
const MIN_SLOTS: usize = 2;
const MAX_SLOTS: usize = 64;

type Slot = Mutex<Option<(HostOffset, Arc<[u8]>)>>;

/// The last clusters that were decompressed for the sake of a part of them.
///
/// File systems read in blocks smaller than clusters, so the next read likely wants the same one. Each address has one
/// slot, so readers of different clusters hardly ever meet on a lock.
pub(crate) struct ClusterCache {
    slots: Box<[Slot]>,
}

impl ClusterCache {
    pub(crate) fn new(bits: ClusterBits) -> Self {
        let slots = (BYTES / bits.buffer_len()).clamp(MIN_SLOTS, MAX_SLOTS);
        Self { slots: (0..slots).map(|_| Slot::default()).collect() }
    }

    fn slot(&self, host: HostOffset) -> MutexGuard<'_, Option<(HostOffset, Arc<[u8]>)>> {
        // Compressed data lies at any byte; Fibonacci hashing spreads the addresses.
        let hash = host.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        self.slots[in_memory(hash) % self.slots.len()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, host: HostOffset) -> Option<Arc<[u8]>> {
        self.slot(host).as_ref().filter(|(address, _)| *address == host).map(|(_, cluster)| Arc::clone(cluster))
    }

    pub(crate) fn put(&self, host: HostOffset, cluster: Arc<[u8]>) {
        *self.slot(host) = Some((host, cluster));
    }
}
