use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_block::{BlockRead, BlockWrite, HostStorage};
use qtk_qcow2::{GuestCluster, GuestOffset, ImageWriter};

use crate::{Error, Transaction};

use super::ConvertReport;
use super::bitmaps::CopiedBitmaps;
use super::unit::{Origin, Piece, Unit};

/// Where the units go.
pub(crate) struct Sink {
    path: PathBuf,
    output: Output,
    /// Whether the target has what it takes to store the copy: an external data file holds no compressed clusters.
    able: bool,
    pub(crate) report: ConvertReport,
}

enum Output {
    /// A new file, or a block device.
    Raw(Arc<dyn HostStorage>),
    Qcow2 {
        writer: Box<ImageWriter>,
        /// Where the last compressed stream was copied from, if it was copied.
        origin: Option<Origin>,
    },
    Existing(Box<Transaction>),
}

impl Sink {
    pub(crate) fn raw(path: &Path, file: Arc<dyn HostStorage>) -> Self {
        Self::new(path, Output::Raw(file), true)
    }

    pub(crate) fn qcow2(path: &Path, writer: ImageWriter, able: bool) -> Self {
        Self::new(path, Output::Qcow2 { writer: Box::new(writer), origin: None }, able)
    }

    pub(crate) fn existing(path: &Path, transaction: Transaction, able: bool) -> Self {
        Self::new(path, Output::Existing(Box::new(transaction)), able)
    }

    fn new(path: &Path, output: Output, able: bool) -> Self {
        Self { path: path.to_owned(), output, able, report: ConvertReport::default() }
    }

    pub(crate) fn put(&mut self, unit: &Unit) -> Result<(), Error> {
        for piece in &unit.pieces {
            let start = piece.start(unit);
            self.put_piece(piece, unit, start).map_err(|source| self.write_error(start, source))?;
        }
        Ok(())
    }

    fn put_piece(&mut self, piece: &Piece, unit: &Unit, start: u64) -> io::Result<()> {
        if !self.able && !matches!(piece, Piece::Zero { .. }) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        match piece {
            Piece::Zero { range } => match &mut self.output {
                Output::Raw(file) => file.zero(range.clone()),
                Output::Qcow2 { writer, .. } => Ok(writer.zero(range.clone())?),
                Output::Existing(transaction) => transaction.zero(range.clone()),
            },
            Piece::Plain { bytes } => {
                // The disk may end within the last cluster.
                let end = bytes.end.min(unit.position(unit.range.end));
                let bytes = &unit.plain[bytes.start..end];
                self.report.plain_bytes += bytes.len() as u64;
                match &mut self.output {
                    Output::Raw(file) => file.write_at(bytes, start),
                    Output::Qcow2 { writer, .. } => Ok(writer.write(GuestOffset(start), bytes)?),
                    Output::Existing(transaction) => transaction.write_at(bytes, start),
                }
            }
            Piece::Compressed { guest, bytes } => {
                self.report.compressed += 1;
                self.put_compressed(*guest, &unit.packed[bytes.clone()], None)
            }
            Piece::Copied { guest, bytes, origin } => {
                self.report.copied += 1;
                self.put_compressed(*guest, &unit.packed[bytes.clone()], Some(origin))
            }
        }
    }

    fn put_compressed(&mut self, guest: GuestCluster, bytes: &[u8], from: Option<&Origin>) -> io::Result<()> {
        match &mut self.output {
            Output::Qcow2 { writer, origin } => {
                let before = std::mem::replace(origin, from.cloned());
                let shared = from.zip(before).map_or(0, |(from, before)| from.shared(&before));
                Ok(writer.compressed_sharing(guest, bytes, shared)?)
            }
            Output::Existing(transaction) => match transaction.qcow2() {
                Some(transaction) => Ok(transaction.write_compressed(guest, bytes)?),
                None => Err(io::ErrorKind::Unsupported.into()),
            },
            Output::Raw(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn write_error(&self, offset: u64, source: io::Error) -> Error {
        Error::Write { path: self.path.clone(), offset, source }
    }

    /// Adds bitmaps to an image that is there.
    pub(crate) fn add_bitmaps(&self, bitmaps: &CopiedBitmaps) -> Result<(), Error> {
        match &self.output {
            Output::Existing(transaction) => transaction.qcow2().map_or(Ok(()), |target| bitmaps.add_to(target)),
            Output::Raw(_) | Output::Qcow2 { .. } => Ok(()),
        }
    }

    /// Completes the target and returns what was done.
    pub(crate) fn finish(self) -> Result<ConvertReport, Error> {
        let file_size = match self.output {
            Output::Raw(file) => file.size(),
            Output::Qcow2 { writer, .. } => writer.finish()?,
            Output::Existing(transaction) => {
                transaction.commit_settled()?;
                0
            }
        };
        Ok(ConvertReport { file_size, ..self.report })
    }
}
