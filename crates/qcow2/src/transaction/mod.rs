//! Changing an image by shadow paging: nothing that the committed state uses is overwritten, and one write of the header's
//! first sector makes everything that was written since the current state.

mod commit;
mod metadata;
mod refcounts;
mod state;
mod write;

use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use qtk_block::{BlockRead, BlockWrite, Extent};

use crate::bitmap::BitmapDirectory;
use crate::error::Error;
use crate::header::Header;
use crate::layer::Layer;
use crate::mapping::L2Tables;
use crate::types::HostOffset;
use commit::Sector;
use metadata::Metadata;
use refcounts::Refcounts;
use state::{Phase, State};

/// A set of changes to an image that happens as a whole or not at all.
///
/// Guest data goes straight to free clusters of the file; only metadata waits in memory. Readers of the transaction see
/// its state; everybody else, a crash included, sees the old one until [`commit`](Self::commit). Dropping the transaction
/// before that takes everything back.
///
/// The caller holds the image's lock. There must be one transaction on a file at a time; a second one fails in its commit.
pub struct Transaction {
    state: RwLock<State>,
    bitmaps: Option<BitmapDirectory>,
    /// The header's first sector as it was when the transaction began.
    committed: Sector,
    old_size: u64,
}

impl Transaction {
    /// Begins to change `layer`, whose unallocated clusters read through to `backing`.
    ///
    /// `layer` must have been opened since the image was last changed. Fails on images that need repair first, that overlap in
    /// their metadata, or whose header names a backing where none is given, or the other way round.
    pub fn begin(layer: Arc<Layer>, backing: Option<Arc<dyn BlockRead>>) -> Result<Self, Error> {
        let file = layer.file().clone();
        if Header::read(&file)? != *layer.header() {
            return Err(Error::ChangedMeanwhile { image: layer.name().to_owned() });
        }
        let bitmaps = BitmapDirectory::read(&file, layer.header())?;
        let committed = commit::read_sector(&file)?;
        commit::check_writable(&layer, backing.is_some(), bitmaps.as_ref(), &committed)?;
        let refcount_table = refcounts::read_table(&file, layer.header())?;
        let metadata = Metadata::collect(&layer, &refcount_table, bitmaps.as_ref())?;
        let old_size = file.storage.size();
        let refcounts = Refcounts::new(file, layer.header(), refcount_table, metadata);
        let state = State { layer, backing, tables: Default::default(), refcounts, phase: Phase::Open };
        Ok(Self { state: RwLock::new(state), bitmaps, committed, old_size })
    }

    /// Makes the changes permanent: when this returns, they are on stable storage.
    ///
    /// Afterwards the transaction can only be read. The layer it began with still describes the old state, whose clusters
    /// may be gone: open the image again. After an error the image has its old state, unless the error came from writing
    /// the header itself: then it has the old state or the new one.
    pub fn commit(&self) -> Result<(), Error> {
        let mut state = self.write_state()?;
        if state.tables.is_empty() {
            state.phase = Phase::Finished;
            return Ok(());
        }
        let file = state.file().clone();
        let prepared = self.prepare(&mut state);
        state.phase = Phase::Finished;
        let sector = match prepared {
            Ok(sector) => sector,
            Err(error) => {
                self.roll_back(&state);
                return Err(error);
            }
        };
        if let Err(error) = file.write(&sector, HostOffset(0)) {
            self.roll_back(&state);
            return Err(error);
        }
        file.sync()?;
        let bits = state.header().cluster_bits.bits();
        for run in state.refcounts.freed_runs() {
            // Only a hint: the clusters are free whether their space is returned to the host or not.
            let _ = file.storage.discard(run.start << bits..run.end << bits);
        }
        Ok(())
    }

    fn prepare(&self, state: &mut State) -> Result<Sector, Error> {
        let sector = state.write_metadata(self.bitmaps.as_ref(), &self.committed)?;
        state.file().sync()?;
        if commit::read_sector(state.file())? != self.committed {
            return Err(Error::ChangedMeanwhile { image: state.file().name.to_string() });
        }
        Ok(sector)
    }

    /// Gives the space of what was written back to the host. The image does not refer to it, so failing does no harm.
    ///
    /// Another header than the one we began with may refer to it: after a write that only seemed to fail, or when somebody
    /// else did not heed the lock.
    fn roll_back(&self, state: &State) {
        if commit::read_sector(state.file()).map_or(true, |sector| sector != self.committed) {
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
