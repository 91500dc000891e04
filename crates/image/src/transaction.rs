use std::io;
use std::ops::Range;

use qtk_block::{Access, BlockRead, BlockWrite, Extent, Preallocation};

use crate::format::{Probe, probe};
use crate::layer::SECTOR;
use crate::redo::RedoLog;
use crate::storage::Part;
use crate::{Chain, Error, Format, Image, SpecError};

/// Changes to an image that happen as a whole or not at all. Dropping it takes them back.
///
/// A qcow2 image gets its new state by one write of its header. A raw image gets its by a redo log, `IMAGE.qtk-txn`: once
/// that is complete, the change has happened, and whoever opens the image next finishes what was cut short.
#[derive(Debug)]
pub struct Transaction {
    // Before the chain, whose locks must outlive it.
    change: Change,
    chain: Chain,
    format_probed: bool,
    /// The part of a raw image's file that is its disk; a qcow2 image's is all of it.
    part: Part,
}

#[derive(Debug)]
enum Change {
    Qcow2(qtk_qcow2::Transaction),
    Raw(RedoLog),
}

impl Transaction {
    pub(crate) fn begin(image: Image) -> Result<Self, Error> {
        let invalid = |problem: &str| Error::Invalid { path: image.path().to_owned(), problem: problem.to_owned() };
        if image.access() != Access::ReadWrite {
            return Err(invalid("it was opened for reading only"));
        }
        let chain = image.chain().clone();
        let Some(top) = chain.layers().first() else { return Err(invalid("it has no content")) };
        let change = match top.qcow2() {
            Some(layer) => {
                let beneath = chain.beneath().map(|beneath| std::sync::Arc::new(beneath) as _);
                Change::Qcow2(qtk_qcow2::Transaction::begin(layer.clone(), beneath)?)
            }
            None => Change::Raw(RedoLog::begin(top)?),
        };
        let part = if top.qcow2().is_some() { Part::default() } else { top.part() };
        Ok(Self { format_probed: top.format_probed(), part, change, chain })
    }

    /// Makes the changes permanent: when this returns, they are on stable storage. Afterwards the transaction can only be
    /// read.
    pub fn commit(&self) -> Result<(), Error> {
        self.finish(qtk_qcow2::Transaction::commit)
    }

    /// The same, and a qcow2 image's metadata is where writing in place would have left it.
    pub(crate) fn commit_settled(&self) -> Result<(), Error> {
        self.finish(qtk_qcow2::Transaction::commit_settled)
    }

    fn finish(&self, commit: fn(&qtk_qcow2::Transaction) -> Result<(), qtk_qcow2::Error>) -> Result<(), Error> {
        match &self.change {
            Change::Qcow2(transaction) => Ok(commit(transaction)?),
            Change::Raw(log) => {
                self.refuse_other_format(log)?;
                log.commit()
            }
        }
    }

    /// Lets the disk have `size` bytes, which is more than it has.
    pub(crate) fn grow(&self, size: u64) -> Result<(), Error> {
        if self.part.len.is_some() {
            return Err(SpecError::FixedSize.into());
        }
        let path = || self.chain.named().map_or_else(Default::default, |layer| layer.path().to_owned());
        let end = self.part.start.checked_add(size).and_then(|end| end.checked_next_multiple_of(SECTOR));
        let end = end.ok_or_else(|| Error::SizeNotPositive { path: path() })?;
        Ok(self.device().resize(end, Preallocation::Off)?)
    }

    /// Where a range of the disk lies on the device.
    fn place(&self, range: &Range<u64>) -> io::Result<Range<u64>> {
        if range.start > range.end || range.end > self.size() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // The disk's end does not overflow there.
        Ok(self.part.start + range.start..self.part.start + range.end)
    }

    fn place_of(&self, len: usize, offset: u64) -> io::Result<u64> {
        let end = offset.checked_add(len as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(self.place(&(offset..end))?.start)
    }

    /// A guest must not be able to choose how its disk is read the next time.
    fn refuse_other_format(&self, log: &RedoLog) -> Result<(), Error> {
        let Some(path) = self.chain.layers().first().map(crate::ChainLayer::path) else { return Ok(()) };
        if !self.format_probed {
            return Ok(());
        }
        match probe(log.overlay()).map_err(Error::io(path, "read its first bytes"))? {
            Probe::Known(Format::Raw) => Ok(()),
            other => Err(Error::WouldChangeFormat { path: path.to_owned(), format: other.name().to_owned() }),
        }
    }

    /// The change of a qcow2 image, for what only that format can do.
    pub(crate) fn qcow2(&self) -> Option<&qtk_qcow2::Transaction> {
        match &self.change {
            Change::Qcow2(transaction) => Some(transaction),
            Change::Raw(_) => None,
        }
    }

    fn device(&self) -> &qtk_qcow2::Transaction {
        match &self.change {
            Change::Qcow2(transaction) => transaction,
            Change::Raw(log) => log.overlay(),
        }
    }
}

impl BlockRead for Transaction {
    fn size(&self) -> u64 {
        let device = self.device().size().saturating_sub(self.part.start);
        // As a raw layer's, in whole sectors.
        self.part.len.map_or(device, |len| len.next_multiple_of(SECTOR).min(device))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.device().read_at(buf, self.place_of(buf.len(), offset)?)
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        let found = self.device().extent(self.place(&range)?)?;
        Ok(Extent { range: range.start..found.range.end - self.part.start, ..found })
    }
}

impl BlockWrite for Transaction {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.device().write_at(buf, self.place_of(buf.len(), offset)?)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.device().zero(self.place(&range)?)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.device().discard(self.place(&range)?)
    }

    /// Does nothing: only [`commit`](Transaction::commit) makes a transaction's writes permanent.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
