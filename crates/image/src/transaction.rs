use std::io;
use std::ops::Range;

use qtk_block::{Access, BlockRead, BlockWrite, Extent, Preallocation};

use crate::format::{Probe, probe};
use crate::redo::RedoLog;
use crate::{Chain, Error, Format, Image};

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
            None => Change::Raw(RedoLog::begin(top, &chain)?),
        };
        Ok(Self { format_probed: top.format_probed(), change, chain })
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

    /// Gives a qcow2 image's disk another size. That of a raw image is its file's.
    pub(crate) fn resize(&self, size: u64) -> Result<(), Error> {
        match &self.change {
            Change::Qcow2(transaction) => Ok(transaction.resize(size, Preallocation::Off)?),
            Change::Raw(_) => Ok(()),
        }
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
        self.device().size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.device().read_at(buf, offset)
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        self.device().extent(range)
    }
}

impl BlockWrite for Transaction {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.device().write_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.device().zero(range)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.device().discard(range)
    }

    /// Does nothing: only [`commit`](Transaction::commit) makes a transaction's writes permanent.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
