use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{BlockRead, BlockWrite, Extent, HostStorage, MemoryDisk};

/// One change that went through a [`WriteRecorder`], in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteEvent {
    /// Bytes written at an offset.
    Write {
        /// Byte offset.
        offset: u64,
        /// What was written.
        bytes: Vec<u8>,
    },
    /// A range zeroed or discarded.
    Zero(Range<u64>),
    /// The storage's size was set.
    SetSize(u64),
    /// Everything before this point is on stable storage.
    Flush,
}

impl WriteEvent {
    /// Does to `storage` what was recorded.
    pub fn apply(&self, storage: &dyn HostStorage) -> io::Result<()> {
        match self {
            Self::Write { offset, bytes } => storage.write_at(bytes, *offset),
            Self::Zero(range) => storage.zero(range.clone()),
            Self::SetSize(size) => storage.set_size(*size),
            Self::Flush => storage.flush(),
        }
    }
}

/// Storage in memory that remembers every change and flush, so that a crash can be acted out at any point between them.
#[derive(Debug, Default)]
pub struct WriteRecorder {
    disk: MemoryDisk,
    events: Mutex<Vec<WriteEvent>>,
}

impl WriteRecorder {
    /// Records what happens to `disk` from now on.
    #[must_use]
    pub fn new(disk: MemoryDisk) -> Self {
        Self { disk, events: Mutex::default() }
    }

    /// All changes so far, oldest first.
    #[must_use]
    pub fn events(&self) -> Vec<WriteEvent> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<WriteEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, event: WriteEvent) -> io::Result<()> {
        // One lock over both, so that the record's order is the order in which the disk changed.
        let mut events = self.lock();
        event.apply(&self.disk)?;
        events.push(event);
        Ok(())
    }
}

impl BlockRead for WriteRecorder {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_at(buf, offset)
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        self.disk.extent(range)
    }
}

impl BlockWrite for WriteRecorder {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.record(WriteEvent::Write { offset, bytes: buf.to_vec() })
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.record(WriteEvent::Zero(range))
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.record(WriteEvent::Zero(range))
    }

    fn flush(&self) -> io::Result<()> {
        self.record(WriteEvent::Flush)
    }
}

impl HostStorage for WriteRecorder {
    fn set_size(&self, size: u64) -> io::Result<()> {
        self.record(WriteEvent::SetSize(size))
    }
}
