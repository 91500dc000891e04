use std::io;
use std::ops::Range;

use crate::{BlockRead, BlockWrite, Extent, checked_range};

/// A contiguous part of another device, such as a partition, as a device of its own.
#[derive(Clone, Debug)]
pub struct Window<D> {
    device: D,
    range: Range<u64>,
}

impl<D: BlockRead> Window<D> {
    /// The part of `device` in `range` (bytes). A range that is reversed or reaches past the device's end is `InvalidInput`.
    pub fn new(device: D, range: Range<u64>) -> io::Result<Self> {
        if range.start > range.end || range.end > device.size() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("bytes {}..{} do not lie on a device of {} bytes", range.start, range.end, device.size()),
            ));
        }
        Ok(Self { device, range })
    }

    /// Where the window lies on the device beneath, in bytes.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    fn translate(&self, range: Range<u64>) -> io::Result<Range<u64>> {
        let len = range.end.checked_sub(range.start).and_then(|len| usize::try_from(len).ok());
        let inner = checked_range(range.start, len.ok_or(io::ErrorKind::InvalidInput)?, self.size())?;
        Ok(self.range.start + inner.start..self.range.start + inner.end)
    }
}

impl<D: BlockRead> BlockRead for Window<D> {
    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        checked_range(offset, buf.len(), self.size())?;
        self.device.read_at(buf, self.range.start + offset)
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        let found = self.device.extent(self.translate(range)?)?;
        let range = found.range.start - self.range.start..found.range.end - self.range.start;
        Ok(Extent { range, ..found })
    }
}

impl<D: BlockWrite> BlockWrite for Window<D> {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        checked_range(offset, buf.len(), self.size())?;
        self.device.write_at(buf, self.range.start + offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.device.zero(self.translate(range)?)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.device.discard(self.translate(range)?)
    }

    fn flush(&self) -> io::Result<()> {
        self.device.flush()
    }
}
