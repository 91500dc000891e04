use crate::error::Error;
use crate::file::ImageFile;
use crate::types::{HostOffset, in_memory};

/// Collects neighbouring writes into large ones.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) file: ImageFile,
    start: u64,
    bytes: Vec<u8>,
}

impl Batch {
    const LIMIT: usize = 2 << 20;
    /// So much goes out without being copied first.
    const DIRECT: usize = 64 << 10;
    /// Gaps as long as this are worth a write of their own, which keeps them holes.
    const GAP: usize = 4 << 10;

    pub(super) fn new(file: ImageFile) -> Self {
        Self { file, start: 0, bytes: Vec::new() }
    }

    /// Writes `bytes` at `offset` now or later. What lies in a short gap between two puts becomes zeroes.
    pub(super) fn put(&mut self, offset: HostOffset, bytes: &[u8]) -> Result<(), Error> {
        let Some(within) = offset.0.checked_sub(self.start).map(in_memory) else {
            // More for a host cluster whose front has gone out.
            return self.file.write(bytes, offset);
        };
        let too_far = within >= self.bytes.len() + Self::GAP;
        if too_far || bytes.len() >= Self::DIRECT || within + bytes.len() > Self::LIMIT {
            self.flush()?;
            self.start = offset.0;
        }
        if bytes.len() >= Self::DIRECT {
            self.start += bytes.len() as u64;
            return self.file.write(bytes, offset);
        }
        let within = in_memory(offset.0 - self.start);
        let end = within + bytes.len();
        if end > self.bytes.len() {
            self.bytes.resize(end, 0);
        }
        self.bytes[within..end].copy_from_slice(bytes);
        Ok(())
    }

    /// Says that somebody else writes from here to `end`: what is collected goes out before, and no gap is filled there.
    pub(super) fn pass_over(&mut self, end: HostOffset) -> Result<(), Error> {
        self.flush()?;
        self.start = self.start.max(end.0);
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<(), Error> {
        if !self.bytes.is_empty() {
            self.file.write(&self.bytes, HostOffset(self.start))?;
        }
        self.start += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}
