use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use qtk_block::{BlockRead, BlockWrite, HostStorage, read_padded};

use crate::types::{ClusterBits, in_memory};

/// Changes to an image file that stay in memory until it is known where they can be written.
///
/// Whole clusters are kept. A draft can lie on another one.
pub(super) struct Draft {
    base: Arc<dyn HostStorage>,
    bits: ClusterBits,
    state: RwLock<State>,
}

struct State {
    size: u64,
    clusters: BTreeMap<u64, Box<[u8]>>,
}

impl Draft {
    pub(super) fn new(base: Arc<dyn HostStorage>, bits: ClusterBits) -> Self {
        let size = base.size();
        Self { base, bits, state: RwLock::new(State { size, clusters: BTreeMap::new() }) }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clusters that differ from the base or may do so, in order.
    pub(super) fn changed(&self) -> Vec<u64> {
        self.read().clusters.keys().copied().collect()
    }

    pub(super) fn is_changed(&self, cluster: u64) -> bool {
        self.read().clusters.contains_key(&cluster)
    }

    /// Writes the changed clusters of a range to the storage. The last one of the draft is cut off where the draft ends.
    pub(super) fn write_to(&self, storage: &dyn HostStorage, clusters: Range<u64>) -> io::Result<()> {
        let state = self.read();
        for (&cluster, bytes) in state.clusters.range(clusters) {
            let offset = cluster << self.bits.bits();
            let len = in_memory(state.size.saturating_sub(offset)).min(bytes.len());
            storage.write_at(&bytes[..len], offset)?;
        }
        Ok(())
    }

    /// Splits a range at cluster borders: the cluster, the part of it, and the part of the range.
    fn pieces(&self, offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> + use<> {
        let bits = self.bits;
        let end = offset.saturating_add(len as u64);
        let mut at = offset;
        std::iter::from_fn(move || {
            let cluster = at >> bits.bits();
            let piece_end = end.min((cluster + 1) << bits.bits());
            let inner = bits.offset_within(at);
            let piece = in_memory(inner)..in_memory(inner + piece_end.saturating_sub(at));
            let outer = in_memory(at - offset)..in_memory(piece_end.saturating_sub(offset));
            (at < end).then(|| {
                at = piece_end;
                (cluster, piece, outer)
            })
        })
    }
}

impl BlockRead for Draft {
    fn size(&self) -> u64 {
        self.read().size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.read();
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > state.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (cluster, inner, outer) in self.pieces(offset, buf.len()) {
            match state.clusters.get(&cluster) {
                Some(bytes) => buf[outer].copy_from_slice(&bytes[inner]),
                None => {
                    let at = offset + outer.start as u64;
                    read_padded(&*self.base, &mut buf[outer], at)?;
                }
            }
        }
        Ok(())
    }
}

impl BlockWrite for Draft {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.write();
        for (cluster, inner, outer) in self.pieces(offset, buf.len()) {
            let bytes = match state.clusters.entry(cluster) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let mut bytes = vec![0; self.bits.buffer_len()].into_boxed_slice();
                    if inner.len() < bytes.len() {
                        read_padded(&*self.base, &mut bytes, cluster << self.bits.bits())?;
                    }
                    entry.insert(bytes)
                }
            };
            bytes[inner].copy_from_slice(&buf[outer]);
        }
        state.size = state.size.max(offset + buf.len() as u64);
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        for (_, _, part) in self.pieces(range.start, in_memory(range.end - range.start)) {
            self.write_at(&vec![0; part.len()], range.start + part.start as u64)?;
        }
        Ok(())
    }

    fn discard(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

impl HostStorage for Draft {
    fn set_size(&self, size: u64) -> io::Result<()> {
        let mut state = self.write();
        state.size = size;
        state.clusters.split_off(&self.bits.clusters_for(size));
        Ok(())
    }
}
