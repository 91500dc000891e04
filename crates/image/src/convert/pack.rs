use std::ops::Range;

use qtk_block::{BlockRead, is_zero};
use qtk_qcow2::codec::{self, CodecError, Compressor};
use qtk_qcow2::{Digest, GuestCluster, HostOffset};

use crate::Error;
use crate::chain::in_memory;
use crate::layer::SECTOR;

use super::disk::Stretch;
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
        let whole = stretch.len() == cluster && stretch.range.start.is_multiple_of(cluster);
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
                    if packer.run.last().is_some_and(|last| !self.goes_on(last, stretch, origin)) {
                        self.copy_run(unit, packer)?;
                    }
                    let (stretch, origin) = (stretch.clone(), origin.clone());
                    let digest = self.shape.contents.as_ref().map(|_| digest(&unit.plain[bytes]));
                    packer.run.push(Copied { guest, stretch, origin, digest });
                }
                parts if parts.iter().all(|part| self.is_left_out(&part.content)) => {}
                parts => {
                    self.copy_run(unit, packer)?;
                    self.read_rest(unit, parts, &bytes)?;
                    self.pack_cluster(unit, bytes, packer)?;
                }
            }
        }
        self.copy_run(unit, packer)?;
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

    /// Whether a cluster is copied in one piece with the last one of the run.
    fn goes_on(&self, last: &Copied, stretch: &Stretch, origin: &Origin) -> bool {
        let is_next = || self.next(&last.stretch, &last.origin).is_some_and(|(next, _)| next.range == stretch.range);
        self.lie_together(&last.origin, origin) && (last.stretch.range.end == stretch.range.start || is_next())
    }

    /// Whether a stream begins within the sector that another one ends in, and behind where that begins.
    fn lie_together(&self, one: &Origin, next: &Origin) -> bool {
        // A stream that the end of the file may have cut off is looked at.
        let is_cut = one.range.end >= self.disk.layer(one.layer).file().size();
        (1..SECTOR).contains(&next.shared(one)) && next.range.start > one.range.start && !is_cut
    }

    /// The cluster that is copied behind another, if it is the next one in the layer that holds both and begins where the
    /// other one ends.
    fn next(&self, stretch: &Stretch, origin: &Origin) -> Option<(Stretch, Origin)> {
        let next = self.disk.next_of_layer(stretch)?;
        let next_origin = next.origin()?;
        let unused = self.unused.partition_point(|unused| unused.end <= next.range.start);
        let is_used = self.unused.get(unused).is_none_or(|unused| unused.start >= next.range.end);
        let is_whole = next.len() == stretch.len();
        (is_used && is_whole && self.lie_together(origin, &next_origin)).then_some((next, next_origin))
    }

    /// The last stream of those that lie together with the last one of a run, unless they go on in another sector.
    fn end_of_streams(&self, last: &Copied) -> Option<Origin> {
        let (mut stretch, mut origin) = (last.stretch.clone(), last.origin.clone());
        while let Some((next, next_origin)) = self.next(&stretch, &origin) {
            if next_origin.range.end > origin.range.end {
                return None;
            }
            (stretch, origin) = (next, next_origin);
        }
        Some(origin)
    }

    /// Copies compressed clusters that lie together.
    ///
    /// Entries say where a stream ends only to the sector. That does no harm where the next stream begins there; elsewhere
    /// the streams of the last sector are cut off where the last of them truly ends. All that depends on the disk alone, not
    /// on where units end.
    fn copy_run(&self, unit: &mut Unit, packer: &mut Packer) -> Result<(), Error> {
        let (Some(first), Some(last)) = (packer.run.first(), packer.run.last()) else { return Ok(()) };
        let origin = Origin { layer: first.origin.layer, range: first.origin.range.start..last.origin.range.end };
        let layer = self.disk.layer(origin.layer);
        let base = unit.packed_len;
        let position = |host: u64| base + in_memory(host - origin.range.start);
        let bytes = base..position(origin.range.end);
        let read = layer.read_host(&mut unit.packed[bytes], HostOffset(origin.range.start));
        let offset = first.stretch.range.start;
        read.map_err(|source| Error::Read { path: layer.path().to_owned(), offset, source })?;

        let Packing { compression, cluster_bits, .. } = packer.packing;
        let true_end = |unit: &Unit, start: u64| {
            let stored = &unit.packed[position(start)..position(origin.range.end)];
            let len = codec::stream_len(compression, stored, cluster_bits.buffer_len()).ok()?;
            Some(start + len as u64)
        };
        let end = self.end_of_streams(last).map(|last| (last.range.start, true_end(unit, last.range.start)));
        let undecodable = match end {
            Some((start, None)) if start == last.origin.range.start => packer.run.pop(),
            _ => None,
        };
        for Copied { guest, origin: mut stream, digest, .. } in packer.run.drain(..) {
            unit.digests.extend(digest);
            if let Some((last, Some(end))) = end
                && stream.range.end == origin.range.end
                && (stream.range.start == last || true_end(unit, stream.range.start).is_some_and(|own| own <= end))
            {
                stream.range.end = end;
            }
            let bytes = position(stream.range.start)..position(stream.range.end);
            // Streams that nobody wrote in order need not end in order.
            unit.packed_len = unit.packed_len.max(bytes.end);
            unit.pieces.push(Piece::Stream { guest, bytes, origin: Some(stream) });
        }
        let Some(Copied { stretch, .. }) = undecodable else { return Ok(()) };
        // Reading it says what is wrong with it.
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
