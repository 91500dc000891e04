use std::ops::Range;

use qtk_block::{BlockRead, is_zero};
use qtk_qcow2::codec::{self, CodecError, Compressor};
use qtk_qcow2::{Digest, GuestCluster, HostOffset};

use crate::Error;
use crate::chain::in_memory;
use crate::layer::SECTOR;

use super::disk::{Class, Stretch};
use super::fill::{Content, Filler, Packing, Part, read_error, take_until};
use super::once::digest;
use super::plan::Zeroes;
use super::unit::{Origin, Piece, Unit};

/// What a thread that packs keeps from unit to unit.
#[derive(Debug)]
pub(crate) struct Packer {
    packing: Packing,
    compressor: Compressor,
    /// Serves as [`Unit::plain`] while the thread works on a unit: nobody needs that once it is packed.
    plain: Vec<u8>,
    /// Compressed clusters that are to be copied together.
    run: Vec<Copied>,
}

/// A compressed cluster that is to stay as it is.
#[derive(Debug)]
struct Copied {
    guest: GuestCluster,
    stretch: Stretch,
    origin: Origin,
    digest: Option<Digest>,
}

impl Packer {
    pub(super) fn new(packing: Packing) -> Result<Self, CodecError> {
        let compressor = Compressor::new(packing.compression, packing.level)?;
        Ok(Self { packing, compressor, plain: Vec::new(), run: Vec::new() })
    }

    /// Gives a unit the memory that it is read into, until it is packed.
    pub(super) fn lend(&mut self, unit: &mut Unit) {
        std::mem::swap(&mut self.plain, &mut unit.plain);
    }
}

impl Filler<'_> {
    /// Where a stretch lies if it is a whole cluster that is compressed as the target wants it.
    pub(super) fn origin(&self, stretch: &Stretch, unit: &mut Unit) -> Result<Option<Origin>, Error> {
        let Some(origin) = stretch.origin() else { return Ok(None) };
        let Some(packing) = self.shape.packing.filter(|packing| packing.copies) else { return Ok(None) };
        let layer = self.disk.layer(origin.layer);
        let cluster = packing.cluster_bits.size();
        let same_codec = layer
            .qcow2()
            .is_some_and(|layer| layer.compression() == packing.compression && layer.cluster_size() == cluster);
        let whole = stretch.range.end - stretch.range.start == cluster && stretch.range.start.is_multiple_of(cluster);
        let len = origin.range.end - origin.range.start;
        // A length may, but need not, be larger than the cluster.
        if !same_codec || !whole || len >= cluster {
            return Ok(None);
        }
        // So little may stand for nothing but zeroes, which are left out.
        let maybe_zero = self.shape.zeroes != Zeroes::Data && len <= cluster / 512 + 2 * SECTOR;
        if maybe_zero || self.shape.contents.is_some() {
            let bytes = unit.positions(&stretch.range);
            let read = self.disk.read_stretch(&mut unit.plain[bytes.clone()], stretch);
            // What cannot be read is read again, which says so.
            if read.is_err() || maybe_zero && is_zero(&unit.plain[bytes]) {
                return Ok(None);
            }
        }
        Ok(Some(origin))
    }

    /// For a target that stores compressed clusters.
    pub(super) fn pack(&self, unit: &mut Unit, parts: &[Part], packer: &mut Packer) -> Result<(), Error> {
        let bits = packer.packing.cluster_bits;
        let mut rest = parts;
        for start in (0..unit.plain.len()).step_by(bits.buffer_len()) {
            let bytes = start..start + bits.buffer_len();
            let guest = GuestCluster(unit.offset(start) >> bits.bits());
            match take_until(&mut rest, bytes.end) {
                [Part { content: Content::Copied(stretch, origin), .. }] => {
                    if packer.run.last().is_some_and(|last| !self.goes_on(&last.origin, origin)) {
                        self.copy_run(unit, packer, None)?;
                    }
                    let (stretch, origin) = (stretch.clone(), origin.clone());
                    let digest = self.shape.contents.as_ref().map(|_| digest(&unit.plain[bytes]));
                    packer.run.push(Copied { guest, stretch, origin, digest });
                }
                parts if parts.iter().all(|part| self.is_left_out(&part.content)) => {}
                parts => {
                    self.copy_run(unit, packer, None)?;
                    self.read_rest(unit, parts, &bytes)?;
                    self.pack_cluster(unit, bytes, packer)?;
                }
            }
        }
        let next = self.next_stream(unit.range.end);
        self.copy_run(unit, packer, next)?;
        packer.lend(unit);
        Ok(())
    }

    fn is_left_out(&self, content: &Content) -> bool {
        match content {
            Content::Backing => true,
            Content::Zero => self.shape.zeroes == Zeroes::Skip,
            Content::Data | Content::Copied(..) => false,
        }
    }

    /// The compressed cluster that a later unit begins with, as far as it is easily known.
    fn next_stream(&self, offset: u64) -> Option<Origin> {
        let mut stretches = self.disk.stretches_from(offset).take(2).map_while(Result::ok);
        stretches.find(|stretch| stretch.class == Class::Data)?.origin()
    }

    fn pack_cluster(&self, unit: &mut Unit, bytes: Range<usize>, packer: &mut Packer) -> Result<(), Error> {
        let cluster = &unit.plain[bytes.clone()];
        if self.shape.zeroes != Zeroes::Data && is_zero(cluster) {
            if self.shape.zeroes == Zeroes::Zero {
                unit.add_zero(unit.offset(bytes.start)..unit.offset(bytes.end).min(unit.range.end));
            }
            return Ok(());
        }
        let guest = GuestCluster(unit.offset(bytes.start) >> packer.packing.cluster_bits.bits());
        if let Some(contents) = &self.shape.contents {
            let digest = digest(cluster);
            unit.digests.push(digest);
            if contents.hold(&digest) {
                unit.pieces.push(Piece::Repeat { guest });
                return Ok(());
            }
        }
        let packed = packer.compressor.compress(cluster, &mut unit.packed[unit.packed_len..]);
        match packed.map_err(|source| Error::Codec { path: self.output.to_owned(), source })? {
            Some(len) => unit.add_compressed(guest, len),
            None => unit.add_stored(bytes),
        }
        Ok(())
    }

    /// Whether two streams can be copied in one piece. One that the end of the file may have cut off is looked at by itself.
    fn goes_on(&self, last: &Origin, next: &Origin) -> bool {
        next.shared(last) > 0 && last.range.end < self.disk.layer(last.layer).file().size()
    }

    /// Copies compressed clusters that lie together; `next` is the one that will be copied behind them.
    ///
    /// Entries say where a stream ends only to the sector. That does no harm where the next stream begins there; elsewhere
    /// the last stream is cut off at its true end.
    fn copy_run(&self, unit: &mut Unit, packer: &mut Packer, next: Option<Origin>) -> Result<(), Error> {
        let (Some(first), Some(last)) = (packer.run.first(), packer.run.last()) else { return Ok(()) };
        let origin = Origin { layer: first.origin.layer, range: first.origin.range.start..last.origin.range.end };
        let layer = self.disk.layer(origin.layer);
        let base = unit.packed_len;
        let position = |host: u64| base + in_memory(host - origin.range.start);
        let bytes = base..position(origin.range.end);
        let read = layer.read_host(&mut unit.packed[bytes], HostOffset(origin.range.start));
        let offset = first.stretch.range.start;
        read.map_err(|source| Error::Read { path: layer.path().to_owned(), offset, source })?;
        let ends_with_it = !next.is_some_and(|next| self.goes_on(&last.origin, &next));
        let last = if ends_with_it { packer.run.pop() } else { None };
        for Copied { guest, origin, digest, .. } in packer.run.drain(..) {
            unit.digests.extend(digest);
            let bytes = position(origin.range.start)..position(origin.range.end);
            unit.packed_len = bytes.end;
            unit.pieces.push(Piece::Stream { guest, bytes, origin: Some(origin) });
        }
        let Some(Copied { guest, stretch, origin, digest }) = last else { return Ok(()) };
        let bytes = position(origin.range.start)..position(origin.range.end);
        let Packing { compression, cluster_bits, .. } = packer.packing;
        if let Ok(len) = codec::stream_len(compression, &unit.packed[bytes.clone()], cluster_bits.buffer_len()) {
            let range = origin.range.start..origin.range.start + len as u64;
            let bytes = bytes.start..bytes.start + len;
            // The stream before may reach further.
            unit.packed_len = unit.packed_len.max(bytes.end);
            unit.digests.extend(digest);
            unit.pieces.push(Piece::Stream { guest, bytes, origin: Some(Origin { range, ..origin }) });
            return Ok(());
        }
        // It does not decode, and reading it says so.
        let bytes = unit.positions(&stretch.range);
        self.read_data(unit, bytes.clone(), &stretch)?;
        self.pack_cluster(unit, bytes, packer)
    }

    /// Completes a cluster of which only a part must be stored: compressed, it is stored as a whole.
    fn read_rest(&self, unit: &mut Unit, parts: &[Part], cluster: &Range<usize>) -> Result<(), Error> {
        for part in parts.iter().filter(|part| !matches!(part.content, Content::Data)) {
            let bytes = part.within(cluster);
            let offset = unit.offset(bytes.start);
            let buf = &mut unit.plain[bytes];
            match part.content {
                Content::Backing => self.disk.read_at(buf, offset).map_err(read_error(self.output, offset))?,
                _ => buf.fill(0),
            }
        }
        Ok(())
    }
}
