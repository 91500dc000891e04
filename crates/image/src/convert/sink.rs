use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_block::{BlockRead, BlockWrite, HostStorage};
use qtk_qcow2::{GuestOffset, ImageWriter, PackedCluster, Placed, Tally};

use crate::{Error, Transaction};

use super::ConvertReport;
use super::bitmaps::CopiedBitmaps;
use super::once;
use super::twin::Storer;
use super::unit::{Origin, Piece, Unit};

/// Where the units go.
pub(crate) struct Sink {
    path: PathBuf,
    output: Output,
    /// Whether the target has what it takes to store the copy: an external data file holds no compressed clusters.
    able: bool,
    storer: Storer,
    pub(crate) report: ConvertReport,
}

enum Output {
    /// A new file, or a block device.
    Raw(Arc<dyn HostStorage>),
    Qcow2 {
        writer: Box<ImageWriter>,
        /// Where the last compressed stream was copied from, if it was copied.
        last: Option<Origin>,
    },
    Existing(Box<Transaction>),
}

impl Sink {
    pub(crate) fn raw(path: &Path, file: Arc<dyn HostStorage>) -> Self {
        Self::new(path, Output::Raw(file), true)
    }

    pub(crate) fn qcow2(path: &Path, writer: ImageWriter, able: bool) -> Self {
        Self::new(path, Output::Qcow2 { writer: Box::new(writer), last: None }, able)
    }

    pub(crate) fn existing(path: &Path, transaction: Transaction, able: bool) -> Self {
        Self::new(path, Output::Existing(Box::new(transaction)), able)
    }

    fn new(path: &Path, output: Output, able: bool) -> Self {
        Self { path: path.to_owned(), output, able, storer: Storer::default(), report: ConvertReport::default() }
    }

    /// Whether it can copy from files what was not read.
    pub(crate) fn takes_files(&self) -> bool {
        match &self.output {
            Output::Raw(file) => file.as_raw_file().is_some(),
            Output::Qcow2 { .. } => true,
            Output::Existing(_) => false,
        }
    }

    pub(crate) fn put(&mut self, unit: &Unit) -> Result<(), Error> {
        if !unit.digests.is_empty() {
            return self.put_once(unit);
        }
        for pieces in unit.pieces.chunk_by(|one, next| one.is_stream() && next.is_stream()) {
            let start = pieces[0].start(unit);
            self.put_pieces(pieces, unit, start).map_err(|source| self.write_error(start, source))?;
        }
        Ok(())
    }

    /// Puts a unit whose clusters are to be stored once.
    fn put_once(&mut self, unit: &Unit) -> Result<(), Error> {
        let mut digests = unit.digests.iter();
        for piece in &unit.pieces {
            let result = match &mut self.output {
                Output::Qcow2 { writer, last } => {
                    once::Target { writer, last, report: &mut self.report }.put(piece, unit, &mut digests)
                }
                Output::Raw(_) | Output::Existing(_) => Err(io::ErrorKind::Unsupported.into()),
            };
            result.map_err(|source| self.write_error(piece.start(unit), source))?;
        }
        Ok(())
    }

    /// Puts a single piece, or compressed clusters, into the target.
    fn put_pieces(&mut self, pieces: &[Piece], unit: &Unit, start: u64) -> io::Result<()> {
        match pieces {
            [Piece::Zero { range }] => match &mut self.output {
                Output::Raw(file) => file.zero(range.clone()),
                Output::Qcow2 { writer, .. } => Ok(writer.zero(range.clone())?),
                Output::Existing(transaction) => transaction.zero(range.clone()),
            },
            _ if !self.able => Err(io::ErrorKind::Unsupported.into()),
            [Piece::Plain { bytes }] => self.put_read(unit, bytes, start),
            [Piece::Stored { bytes, .. }] => self.put_plain(unit, &unit.packed[bytes.clone()], start),
            streams => self.put_streams(streams, &unit.packed),
        }
    }

    /// Puts a part of [`Unit::plain`] into the target, which need not have been read where it has a twin.
    fn put_read(&mut self, unit: &Unit, bytes: &Range<usize>, start: u64) -> io::Result<()> {
        let len = unit.on_disk(&unit.plain[bytes.clone()], start).len();
        let bytes = bytes.start..bytes.start + len;
        match &mut self.output {
            Output::Raw(file) => self.storer.store(file, unit, bytes, start)?,
            Output::Qcow2 { writer, .. } => {
                for Placed { host, piece } in writer.place(GuestOffset(start), len as u64)? {
                    let part = bytes.start + piece.start..bytes.start + piece.end;
                    self.storer.store(&mut **writer, unit, part, host.0)?;
                }
            }
            Output::Existing(_) => return self.put_plain(unit, &unit.plain[bytes], start),
        }
        self.report.plain_bytes += len as u64;
        Ok(())
    }

    fn put_plain(&mut self, unit: &Unit, bytes: &[u8], start: u64) -> io::Result<()> {
        let bytes = unit.on_disk(bytes, start);
        self.report.plain_bytes += bytes.len() as u64;
        match &mut self.output {
            Output::Raw(file) => file.write_at(bytes, start),
            Output::Qcow2 { writer, .. } => Ok(writer.write(GuestOffset(start), bytes)?),
            Output::Existing(transaction) => transaction.write_at(bytes, start),
        }
    }

    fn put_streams(&mut self, pieces: &[Piece], packed: &[u8]) -> io::Result<()> {
        let streams = pieces.iter().filter_map(|piece| match piece {
            Piece::Stream { guest, bytes, origin } => Some((*guest, bytes.clone(), origin.as_ref())),
            _ => None,
        });
        let copied = streams.clone().filter(|(.., origin)| origin.is_some()).count() as u64;
        self.report.copied += copied;
        self.report.compressed += pieces.len() as u64 - copied;
        match &mut self.output {
            Output::Qcow2 { writer, last } => {
                let streams = streams.map(|(guest, bytes, origin)| {
                    let before = std::mem::replace(last, origin.cloned());
                    let shared = origin.zip(before).map_or(0, |(origin, before)| origin.shared(&before));
                    PackedCluster { guest, bytes, shared }
                });
                Ok(writer.compressed_run(packed, streams)?)
            }
            Output::Existing(transaction) => {
                let Some(transaction) = transaction.qcow2() else { return Err(io::ErrorKind::Unsupported.into()) };
                for (guest, bytes, _) in streams {
                    transaction.write_compressed(guest, &packed[bytes])?;
                }
                Ok(())
            }
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
        let mut report = ConvertReport { reflinked: self.storer.shared, ..self.report };
        report.file_size = match self.output {
            Output::Raw(file) => file.size(),
            Output::Qcow2 { writer, .. } => {
                let Tally { shared, saved, plain, repeated } = writer.tally();
                (report.shared, report.saved) = (shared, saved);
                report.plain_bytes += plain;
                report.copied += repeated;
                writer.finish()?
            }
            Output::Existing(transaction) => {
                transaction.commit_settled()?;
                0
            }
        };
        Ok(report)
    }
}
