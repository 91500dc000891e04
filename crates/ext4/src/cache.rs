//! Metadata blocks in memory: read through, changed in place, written once.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qtk_block::{BlockRead, BlockWrite};

use crate::BlockNr;
use crate::error::{Error, Place, Result};

/// Bytes of unchanged blocks to keep.
const CLEAN_LIMIT: usize = 16 << 20;
/// The most bytes to write at once.
const WRITE_LIMIT: usize = 1 << 20;

type Block = Arc<[u8]>;

/// Unchanged blocks, those used lately kept: when the young half is full, it becomes the old one.
#[derive(Default)]
struct Clean {
    young: HashMap<BlockNr, Block>,
    old: HashMap<BlockNr, Block>,
}

impl Clean {
    fn get(&mut self, number: BlockNr, limit: usize) -> Option<Block> {
        if let Some(block) = self.young.get(&number) {
            return Some(block.clone());
        }
        let block = self.old.remove(&number)?;
        self.insert(number, block.clone(), limit);
        Some(block)
    }

    fn insert(&mut self, number: BlockNr, block: Block, limit: usize) {
        if self.young.len() >= limit {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(number, block);
    }

    fn remove(&mut self, number: BlockNr) -> Option<Block> {
        let old = self.old.remove(&number);
        self.young.remove(&number).or(old)
    }
}

/// The metadata blocks of one file system.
pub(crate) struct Cache {
    device: Arc<dyn BlockRead>,
    block_len: usize,
    blocks: u64,
    clean: Mutex<Clean>,
    dirty: BTreeMap<BlockNr, Block>,
}

impl Cache {
    /// A cache for `blocks` blocks of `block_len` bytes at the front of `device`.
    pub(crate) fn new(device: Arc<dyn BlockRead>, block_len: usize, blocks: u64) -> Self {
        Self { device, block_len, blocks, clean: Mutex::default(), dirty: BTreeMap::new() }
    }

    fn clean(&self) -> MutexGuard<'_, Clean> {
        self.clean.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many blocks each half of the clean ones may hold.
    fn clean_limit(&self) -> usize {
        CLEAN_LIMIT / 2 / self.block_len
    }

    fn offset(&self, number: BlockNr) -> u64 {
        number.0 * self.block_len as u64
    }

    /// A block as it is now.
    pub(crate) fn read(&self, number: BlockNr) -> Result<Block> {
        if let Some(block) = self.dirty.get(&number) {
            return Ok(block.clone());
        }
        if let Some(block) = self.clean().get(number, self.clean_limit()) {
            return Ok(block);
        }
        let block = self.load(number)?;
        self.clean().insert(number, block.clone(), self.clean_limit());
        Ok(block)
    }

    fn load(&self, number: BlockNr) -> Result<Block> {
        if number.0 >= self.blocks {
            return Err(Error::corrupt(Place::Block(number), "something points at this block past the last one"));
        }
        let mut bytes = vec![0; self.block_len];
        let offset = self.offset(number);
        self.device.read_at(&mut bytes, offset).map_err(|source| Error::Io { operation: "read", offset, source })?;
        Ok(bytes.into())
    }

    /// Changes a block.
    pub(crate) fn modify<T>(&mut self, number: BlockNr, edit: impl FnOnce(&mut [u8]) -> T) -> Result<T> {
        if !self.dirty.contains_key(&number) {
            let cached = self.clean().remove(number);
            let block = match cached {
                Some(block) => block,
                None => self.load(number)?,
            };
            self.dirty.insert(number, block);
        }
        let block = self.dirty.entry(number).or_insert_with(|| vec![0; self.block_len].into());
        Ok(edit(Arc::make_mut(block)))
    }

    /// Replaces a whole block; does nothing if that changes nothing.
    pub(crate) fn put(&mut self, number: BlockNr, bytes: Vec<u8>) {
        let unchanged = match self.dirty.get(&number) {
            Some(block) => block[..] == bytes,
            None => self.clean().get(number, self.clean_limit()).is_some_and(|block| block[..] == bytes),
        };
        if !unchanged {
            self.clean().remove(number);
            self.dirty.insert(number, bytes.into());
        }
    }

    /// Drops a block that holds no metadata any more, changed or not.
    pub(crate) fn forget(&mut self, number: BlockNr) {
        self.clean().remove(number);
        self.dirty.remove(&number);
    }

    pub(crate) fn has_changes(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Writes every changed block, in order, neighbours together.
    pub(crate) fn write_back(&mut self, device: &dyn BlockWrite) -> Result<()> {
        let mut run = Vec::new();
        let mut start = BlockNr(0);
        for (&number, block) in &self.dirty {
            let next = start.plus((run.len() / self.block_len) as u64);
            if number != next || run.len() >= WRITE_LIMIT {
                write(device, &run, self.offset(start))?;
                run.clear();
                start = number;
            }
            run.extend_from_slice(block);
        }
        write(device, &run, self.offset(start))?;
        let limit = self.clean_limit();
        for (number, block) in std::mem::take(&mut self.dirty) {
            self.clean().insert(number, block, limit);
        }
        Ok(())
    }
}

/// Writes `bytes`, if there are any.
pub(crate) fn write(device: &dyn BlockWrite, bytes: &[u8], offset: u64) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    device.write_at(bytes, offset).map_err(|source| Error::Io { operation: "write", offset, source })
}

#[cfg(test)]
mod tests {
    use qtk_block::{MemoryDisk, WriteEvent, WriteRecorder};

    use super::*;

    #[test]
    fn writes_changed_blocks_once_and_neighbours_together() {
        let device = Arc::new(WriteRecorder::new(MemoryDisk::new(64 * 1024)));
        let mut cache = Cache::new(device.clone(), 1024, 64);
        for block in [9, 3, 4, 5, 9] {
            cache.modify(BlockNr(block), |bytes| bytes[0] += 1).unwrap();
        }
        cache.put(BlockNr(7), vec![0; 1024]);
        cache.put(BlockNr(8), vec![1; 1024]);
        cache.forget(BlockNr(8));
        assert_eq!(cache.read(BlockNr(9)).unwrap()[0], 2);
        cache.write_back(&*device).unwrap();
        cache.write_back(&*device).unwrap();
        let places: Vec<_> = device
            .events()
            .iter()
            .map(|event| match event {
                WriteEvent::Write { offset, bytes } => (offset / 1024, bytes.len() / 1024),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(places, [(3, 3), (7, 1), (9, 1)]);
        assert!(cache.read(BlockNr(64)).is_err());
    }

    #[test]
    fn rereads_what_was_dropped() {
        let device = Arc::new(MemoryDisk::new(40 << 20));
        let cache = Cache::new(device, 65536, 640);
        for _ in 0..2 {
            for block in 0..640 {
                assert_eq!(cache.read(BlockNr(block)).unwrap().len(), 65536);
            }
        }
        let clean = cache.clean();
        assert!(clean.young.len() + clean.old.len() <= 256);
    }
}
