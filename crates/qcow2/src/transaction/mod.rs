//! Changing an image by shadow paging: nothing that the committed state uses is overwritten, and one write of the header's
//! first sector makes everything that was written since the current state.

mod commit;
mod compressed;
mod counts;
mod dirty;
mod header;
mod metadata;
mod only_users;
mod primitives;
mod refcounts;
mod resize;
mod state;
mod subclusters;
mod tree;
mod width;
mod write;
mod zeroes;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use qtk_block::{BlockRead, BlockWrite, Extent, Preallocation};

use crate::bitmap::{BitmapDirectory, PendingBitmaps};
use crate::create::Backing;
use crate::error::Error;
use crate::header::Header;
use crate::layer::Layer;
use crate::mapping::L2Tables;
use crate::types::GuestCluster;
use commit::Prepared;
pub(crate) use header::{HeaderArea, replace_header};
use metadata::Metadata;
use refcounts::Refcounts;
use state::Phase;
pub(crate) use state::State;

/// A set of changes to an image that happens as a whole or not at all.
///
/// Guest data goes straight to free clusters of the file; only metadata waits in memory. Readers of the transaction see
/// its state; everybody else, a crash included, sees the old one until [`commit`](Self::commit). Dropping the transaction
/// before that takes everything back.
///
/// The caller holds the image's lock. There must be one transaction on a file at a time; a second one fails in its commit.
pub struct Transaction {
    state: RwLock<State>,
    /// The header as it was when the transaction began, and the cluster that holds it.
    committed: Header,
    committed_area: HeaderArea,
    old_size: u64,
}

impl Transaction {
    /// Begins to change `layer`, whose unallocated clusters read through to `backing`.
    ///
    /// `layer` must have been opened since the image was last changed. Fails on images that need repair first, that overlap in
    /// their metadata, or whose header names a backing where none is given, or the other way round.
    pub fn begin(layer: Arc<Layer>, backing: Option<Arc<dyn BlockRead>>) -> Result<Self, Error> {
        let file = layer.file().clone();
        let committed_area = HeaderArea::read(&file, layer.header())?;
        let committed = Header::read(&file)?;
        if committed != *layer.header() {
            return Err(Error::ChangedMeanwhile { image: layer.name().to_owned() });
        }
        commit::check_writable(&layer, backing.is_some())?;
        let bitmaps = BitmapDirectory::read(&file, &committed)?;
        let refcount_table = counts::read_table(&file, &committed)?;
        let metadata = Metadata::collect(&layer, &refcount_table, bitmaps.as_ref())?;
        let bitmaps = PendingBitmaps::new(bitmaps, &committed);
        let old_size = file.storage.size();
        let state = State {
            header: committed.clone(),
            l1: layer.l1().to_vec(),
            l1_changed: false,
            backing,
            tables: BTreeMap::new(),
            frozen: BTreeMap::new(),
            pointing: BTreeMap::new(),
            refcounts: Refcounts::new(file, &committed, refcount_table, metadata),
            forgotten_data: Vec::new(),
            data_end: None,
            packed_to: None,
            left_alone: Vec::new(),
            cut_tail: false,
            dirty: bitmaps.records_writes().then(Default::default),
            snapshots: None,
            bitmaps,
            phase: Phase::Open,
            layer,
        };
        Ok(Self { state: RwLock::new(state), committed, committed_area, old_size })
    }

    /// Changes the image's metadata. If `change` fails, the transaction can only be rolled back.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> Result<T, Error>) -> Result<T, Error> {
        let mut state = self.write_state()?;
        change(&mut state).inspect_err(|_| state.phase = Phase::Failed)
    }

    /// Gives the guest's disk another size, in bytes. What it grows by reads as zeroes, and gets its place on the host as
    /// `preallocation` says.
    pub fn resize(&self, size: u64, preallocation: Preallocation) -> Result<(), Error> {
        self.change(|state| state.resize(size, preallocation))
    }

    /// Names another backing file in the header, or none; it is not opened. Through this transaction the disk reads as before.
    pub fn set_backing(&self, backing: Option<Backing>) -> Result<(), Error> {
        self.change(|state| state.set_backing(backing))
    }

    /// Stores a cluster of the guest's disk from bytes compressed as the image's other clusters, and shorter than a cluster.
    pub fn write_compressed(&self, cluster: GuestCluster, bytes: &[u8]) -> Result<(), Error> {
        self.change(|state| state.write_compressed(cluster, bytes))
    }

    /// Gives up all guest data, so that the whole disk reads through to the backing, and zeroes where there is none.
    pub fn clear(&self) -> Result<(), Error> {
        self.change(State::clear)
    }

    /// What `look` sees in the transaction's state.
    pub(crate) fn view<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.read_state())
    }

    /// Makes the changes permanent: when this returns, they are on stable storage.
    ///
    /// Afterwards the transaction can only be read. The layer it began with still describes the old state, whose clusters
    /// may be gone: open the image again. After an error the image has its old state, unless the error came from writing
    /// the header itself: then it has the old state or the new one.
    pub fn commit(&self) -> Result<(), Error> {
        self.finish(false)
    }

    /// Commits, and then brings metadata to where it lay before, so that the file neither grows nor scatters by an edit of its
    /// metadata: its layout becomes that of an update in place. This costs a second pass over the changed metadata.
    ///
    /// After an error in the second pass the image has its new state.
    pub fn commit_settled(&self) -> Result<(), Error> {
        self.finish(true)
    }

    fn finish(&self, settle: bool) -> Result<(), Error> {
        let mut state = self.write_state()?;
        if state.is_unchanged(&self.committed) {
            state.phase = Phase::Finished;
            return Ok(());
        }
        let file = state.file().clone();
        let prepared = self.prepare(&mut state, settle);
        state.phase = Phase::Finished;
        let replaced = prepared.and_then(|prepared| {
            let area = replace_header(&file, &self.committed_area, &self.committed, &prepared.header)?;
            Ok((prepared, area))
        });
        let (Prepared { header, lasting }, area) = replaced.inspect_err(|_| self.roll_back(&state))?;
        if let Some(lasting) = lasting {
            let cut = state.cut_tail;
            let (settled, end) = state.write_settled(lasting)?;
            file.sync()?;
            replace_header(&file, &area, &header, &settled)?;
            let end = if cut { end } else { end.max(self.old_size) };
            file.set_size(end.min(file.storage.size()))?;
        }
        let_go(&mut state)
    }

    fn prepare(&self, state: &mut State, settle: bool) -> Result<Prepared, Error> {
        state.mark_only_users()?;
        state.write_bitmaps(settle)?;
        let prepared = state.write_metadata(settle)?;
        if state.header().has_data_file() {
            state.layer.data_file()?.sync()?;
        }
        state.file().sync()?;
        if !self.committed_area.is_current(state.file())? {
            return Err(Error::ChangedMeanwhile { image: state.file().name.to_string() });
        }
        Ok(prepared)
    }

    /// Gives the space of what was written back to the host. The image does not refer to it, so failing does no harm.
    ///
    /// Another header than the one we began with may refer to it: after a write that only seemed to fail, or when somebody
    /// else did not heed the lock.
    fn roll_back(&self, state: &State) {
        if !self.committed_area.is_current(state.file()).unwrap_or(false) {
            return;
        }
        let storage = &state.file().storage;
        let bits = state.header().cluster_bits.bits();
        for run in state.refcounts.taken() {
            let (start, end) = (run.start << bits, (run.end << bits).min(self.old_size));
            if start < end {
                let _ = storage.discard(start..end);
            }
        }
        if storage.size() > self.old_size {
            let _ = storage.set_size(self.old_size);
        }
    }

    fn read_state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_state(&self) -> Result<RwLockWriteGuard<'_, State>, Error> {
        let state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        if state.phase != Phase::Open { Err(over(&state)) } else { Ok(state) }
    }
}

/// Gives the space of what the commit has left unused back to the host.
fn let_go(state: &mut State) -> Result<(), Error> {
    let bits = state.header.cluster_bits.bits();
    for run in state.refcounts.freed_runs()? {
        // Only a hint: the clusters are free whether their space is returned to the host or not.
        let _ = state.file().storage.discard(run.start << bits..run.end << bits);
    }
    if !state.header.has_data_file() {
        return Ok(());
    }
    let data = state.layer.data_file()?;
    for range in state.unused_data()? {
        let _ = data.storage.discard(range);
    }
    match state.data_end.filter(|&end| end < data.storage.size()) {
        Some(end) => data.set_size(end),
        None => Ok(()),
    }
}

fn over(state: &State) -> Error {
    Error::TransactionOver { image: state.file().name.to_string() }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        let state = self.read_state();
        if state.phase != Phase::Finished {
            self.roll_back(&state);
        }
    }
}

impl std::fmt::Debug for Transaction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transaction").field("image", &self.read_state().file().name).finish_non_exhaustive()
    }
}

impl BlockRead for Transaction {
    fn size(&self) -> u64 {
        self.read_state().size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Ok(self.read_state().read(buf, offset)?)
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        self.read_state().extent(range)
    }
}

impl BlockWrite for Transaction {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let done = {
            let state = self.read_state();
            if state.phase != Phase::Open {
                return Err(over(&state).into());
            }
            state.check_range(&(offset..offset.saturating_add(buf.len() as u64)))?;
            state.write_in_place(buf, offset)?
        };
        if done < buf.len() {
            self.write_state()?.write(&buf[done..], offset + done as u64)?;
        }
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let mut state = self.write_state()?;
        state.check_range(&range)?;
        Ok(state.zero(range)?)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let mut state = self.write_state()?;
        state.check_range(&range)?;
        Ok(state.discard(range)?)
    }

    /// Does nothing: only [`commit`](Transaction::commit) makes a transaction's writes permanent.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
