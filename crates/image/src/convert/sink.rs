use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_block::{BlockRead, BlockWrite, RawFile};
use qtk_qcow2::{GuestOffset, ImageWriter};

use crate::chain::in_memory;
use crate::{Error, Transaction};

use super::ConvertReport;
use super::unit::{Origin, Piece, Unit};

/// Where the units go.
#[derive(Debug)]
pub(crate) struct Sink {
    path: PathBuf,
    output: Output,
    pub(crate) report: ConvertReport,
}

#[derive(Debug)]
enum Output {
    /// A file that reads as zeroes where nothing was written.
    Raw(Arc<RawFile>),
    Qcow2 {
        writer: Box<ImageWriter>,
        /// Where the last compressed stream was copied from, if it was copied.
        origin: Option<Origin>,
    },
    Existing(Box<Transaction>),
}

impl Sink {
    pub(crate) fn raw(path: &Path, file: Arc<RawFile>) -> Self {
        Self::new(path, Output::Raw(file))
    }

    pub(crate) fn qcow2(path: &Path, writer: ImageWriter) -> Self {
        Self::new(path, Output::Qcow2 { writer: Box::new(writer), origin: None })
    }

    pub(crate) fn existing(path: &Path, transaction: Transaction) -> Self {
        Self::new(path, Output::Existing(Box::new(transaction)))
    }

    fn new(path: &Path, output: Output) -> Self {
        Self { path: path.to_owned(), output, report: ConvertReport::default() }
    }

    pub(crate) fn put(&mut self, unit: &Unit) -> Result<(), Error> {
        for piece in &unit.pieces {
            match piece {
                Piece::Zero { range } => match &mut self.output {
                    Output::Existing(transaction) => {
                        let written = transaction.zero(range.clone());
                        written.map_err(|source| self.write_error(range.start, source))?;
                    }
                    // What is new reads as zeroes.
                    Output::Raw(_) | Output::Qcow2 { .. } => {}
                },
                Piece::Plain { bytes } => {
                    // The disk may end within the last cluster.
                    let end = bytes.end.min(in_memory(unit.range.end - unit.range.start));
                    self.write(unit.offset(bytes.start), &unit.plain[bytes.start..end])?;
                }
                Piece::Compressed { guest, bytes } => {
                    self.report.compressed += 1;
                    let bytes = &unit.packed[bytes.clone()];
                    match &mut self.output {
                        Output::Qcow2 { writer, origin } => {
                            *origin = None;
                            writer.compressed(*guest, bytes)?;
                        }
                        Output::Existing(_) | Output::Raw(_) => return Err(self.not_compressible()),
                    }
                }
                Piece::Copied { guest, bytes, origin: from } => {
                    self.report.copied += 1;
                    let bytes = &unit.packed[bytes.clone()];
                    match &mut self.output {
                        Output::Qcow2 { writer, origin } => {
                            let shared = origin.replace(from.clone()).map_or(0, |before| from.shared(&before));
                            writer.compressed_sharing(*guest, bytes, shared)?;
                        }
                        Output::Existing(_) | Output::Raw(_) => return Err(self.not_compressible()),
                    }
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.report.plain_bytes += bytes.len() as u64;
        let written = match &mut self.output {
            Output::Raw(file) => file.write_at(bytes, offset),
            Output::Qcow2 { writer, .. } => writer.write(GuestOffset(offset), bytes).map_err(io::Error::from),
            Output::Existing(transaction) => transaction.write_at(bytes, offset),
        };
        written.map_err(|source| self.write_error(offset, source))
    }

    fn write_error(&self, offset: u64, source: io::Error) -> Error {
        Error::Write { path: self.path.clone(), offset, source }
    }

    fn not_compressible(&self) -> Error {
        let problem = "its format has no compressed clusters".to_owned();
        Error::Invalid { path: self.path.clone(), problem }
    }

    /// Completes the target and returns what was done.
    pub(crate) fn finish(self) -> Result<ConvertReport, Error> {
        let file_size = match self.output {
            Output::Raw(file) => file.size(),
            Output::Qcow2 { writer, .. } => writer.finish()?,
            Output::Existing(transaction) => {
                transaction.commit()?;
                0
            }
        };
        Ok(ConvertReport { file_size, ..self.report })
    }
}
