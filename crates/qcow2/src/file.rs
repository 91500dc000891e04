use std::io;
use std::ops::Range;
use std::sync::Arc;

use qtk_block::HostStorage;

use crate::error::{Action, Corruption, Error, Place};
use crate::types::{HostOffset, in_memory};

/// The host storage of an image and the name that errors give it.
#[derive(Clone)]
pub(crate) struct ImageFile {
    pub(crate) storage: Arc<dyn HostStorage>,
    pub(crate) name: Arc<str>,
}

impl ImageFile {
    pub(crate) fn corrupt(&self, what: Corruption) -> Error {
        Error::Corrupt { image: self.name.to_string(), what }
    }

    pub(crate) fn unsupported(&self, feature: impl Into<String>) -> Error {
        Error::Unsupported { image: self.name.to_string(), feature: feature.into() }
    }

    pub(crate) fn io(&self, action: Action, offset: u64, len: u64, source: io::Error) -> Error {
        Error::Io { image: self.name.to_string(), action, offset, len, source }
    }

    pub(crate) fn read(&self, buf: &mut [u8], offset: HostOffset) -> Result<(), Error> {
        let len = buf.len() as u64;
        self.storage.read_at(buf, offset.0).map_err(|source| self.io(Action::Read, offset.0, len, source))
    }

    /// Reads what lies in the file and takes the rest as zeroes: the last cluster may be cut short.
    pub(crate) fn read_padded(&self, buf: &mut [u8], offset: HostOffset) -> Result<(), Error> {
        let len = buf.len() as u64;
        let read = qtk_block::read_padded(&*self.storage, buf, offset.0);
        read.map_err(|source| self.io(Action::Read, offset.0, len, source))
    }

    /// Reads a structure of `len` bytes, after checking that the file holds it, so that memory is bounded by the file.
    pub(crate) fn read_structure(&self, place: Place, offset: HostOffset, len: u64) -> Result<Vec<u8>, Error> {
        let file_size = self.storage.size();
        if offset.0.checked_add(len).is_none_or(|end| end > file_size) {
            return Err(self.corrupt(Corruption::PastEnd { place, offset, len, file_size }));
        }
        let mut bytes = vec![0; in_memory(len)];
        self.read(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// A table of `entries` big-endian words.
    pub(crate) fn read_table(&self, place: Place, offset: HostOffset, entries: u64) -> Result<Vec<u64>, Error> {
        let bytes = self.read_structure(place, offset, entries.saturating_mul(8))?;
        Ok(words(&bytes).collect())
    }

    pub(crate) fn write(&self, bytes: &[u8], offset: HostOffset) -> Result<(), Error> {
        let write = self.storage.write_at(bytes, offset.0);
        write.map_err(|source| self.io(Action::Write, offset.0, bytes.len() as u64, source))
    }

    /// Takes the space of a range and extends the file to its end.
    pub(crate) fn reserve(&self, range: Range<u64>) -> Result<(), Error> {
        let (start, len) = (range.start, range.end.saturating_sub(range.start));
        self.storage.reserve(range).map_err(|source| self.io(Action::Reserve, start, len, source))
    }

    pub(crate) fn write_zeroes(&self, range: Range<u64>) -> Result<(), Error> {
        const STEP: u64 = 2 << 20;
        let zeroes = vec![0; in_memory(STEP.min(range.end.saturating_sub(range.start)))];
        let mut at = range.start;
        while at < range.end {
            let len = STEP.min(range.end - at);
            self.write(&zeroes[..in_memory(len)], HostOffset(at))?;
            at += len;
        }
        Ok(())
    }

    pub(crate) fn sync(&self) -> Result<(), Error> {
        let size = self.storage.size();
        self.storage.flush().map_err(|source| self.io(Action::Sync, 0, size, source))
    }

    pub(crate) fn set_size(&self, size: u64) -> Result<(), Error> {
        self.storage.set_size(size).map_err(|source| self.io(Action::Resize, 0, size, source))
    }
}

impl std::fmt::Debug for ImageFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ImageFile").field(&self.name).finish()
    }
}

/// The big-endian words of a table.
pub(crate) fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|&word| u64::from_be_bytes(word))
}

/// A table as it is stored.
pub(crate) fn table_bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_be_bytes).collect()
}
