use std::ops::Range;

use qtk_qcow2::{Digest, GuestCluster};

use crate::ConvertWarning;
use crate::chain::in_memory;

use super::twin::Twin;

/// A stretch of the disk, read and, where asked, compressed.
#[derive(Debug, Default)]
pub(crate) struct Unit {
    /// Bytes of the disk.
    pub(crate) range: Range<u64>,
    /// What is to be written, in order.
    pub(crate) pieces: Vec<Piece>,
    /// What the user should hear of it.
    pub(crate) warnings: Vec<ConvertWarning>,
    /// The stretch as the guest sees it, padded to whole clusters.
    pub(crate) plain: Vec<u8>,
    /// The clusters of a packed target, one behind the other.
    pub(crate) packed: Vec<u8>,
    pub(crate) packed_len: usize,
    /// The digests of the clusters to be written, in order, where equal ones are to be stored once.
    pub(crate) digests: Vec<Digest>,
    /// What of [`plain`](Self::plain) lies in a source's file in the same way, in order.
    pub(crate) twins: Vec<Twin>,
}

/// A part of a unit.
#[derive(Debug)]
pub(crate) enum Piece {
    Zero {
        range: Range<u64>,
    },
    /// Bytes of [`Unit::plain`].
    Plain {
        bytes: Range<usize>,
    },
    /// A cluster that does not get smaller, in [`Unit::packed`].
    Stored {
        offset: u64,
        bytes: Range<usize>,
    },
    /// A compressed cluster, in [`Unit::packed`], and where it was copied from if it was.
    Stream {
        guest: GuestCluster,
        bytes: Range<usize>,
        origin: Option<Origin>,
    },
    /// A cluster like one that the target holds.
    Repeat {
        guest: GuestCluster,
    },
}

impl Piece {
    /// Where it begins on the disk, or where its unit does if its cluster's size is not known here.
    pub(crate) fn start(&self, unit: &Unit) -> u64 {
        match self {
            Self::Zero { range } => range.start,
            Self::Plain { bytes } => unit.offset(bytes.start),
            Self::Stored { offset, .. } => *offset,
            Self::Stream { .. } | Self::Repeat { .. } => unit.range.start,
        }
    }

    pub(crate) fn is_stream(&self) -> bool {
        matches!(self, Self::Stream { .. })
    }
}

/// Where copied bytes lie: in which layer of which image, and where in its file.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) layer: (usize, usize),
    pub(crate) range: Range<u64>,
}

impl Origin {
    /// How many of this one's first bytes are the last ones of `before`.
    pub(crate) fn shared(&self, before: &Self) -> u64 {
        let follows = self.layer == before.layer
            && (before.range.start..=before.range.end).contains(&self.range.start)
            && self.range.end >= before.range.end;
        if follows { before.range.end - self.range.start } else { 0 }
    }
}

impl Unit {
    /// Makes room for `range`, whose end is padded to a multiple of `grain`.
    pub(crate) fn reset(&mut self, range: Range<u64>, grain: u64, packs: bool) {
        let len = in_memory((range.end - range.start).next_multiple_of(grain));
        self.plain.resize(len, 0);
        self.packed.resize(if packs { len } else { 0 }, 0);
        self.packed_len = 0;
        self.pieces.clear();
        self.digests.clear();
        self.twins.clear();
        self.warnings.clear();
        self.plain[in_memory(range.end - range.start)..].fill(0);
        self.range = range;
    }

    /// Makes it stand for zeroes.
    pub(crate) fn reset_to_zero(&mut self, range: Range<u64>) {
        self.reset(range.start..range.start, 1, false);
        self.range = range.clone();
        self.add_zero(range);
    }

    /// Where an offset of the disk lies in [`plain`](Self::plain).
    pub(crate) fn position(&self, offset: u64) -> usize {
        in_memory(offset - self.range.start)
    }

    /// Where a range of the disk lies in [`plain`](Self::plain).
    pub(crate) fn positions(&self, range: &Range<u64>) -> Range<usize> {
        self.position(range.start)..self.position(range.end)
    }

    /// The offset on the disk of a position in [`plain`](Self::plain).
    pub(crate) fn offset(&self, position: usize) -> u64 {
        self.range.start + position as u64
    }

    /// What of `bytes`, which begin at `start`, lies on the disk, which may end within the last cluster.
    pub(crate) fn on_disk<'a>(&self, bytes: &'a [u8], start: u64) -> &'a [u8] {
        &bytes[..bytes.len().min(in_memory(self.range.end - start))]
    }

    /// Bytes that will go out, not counting zeroes.
    pub(crate) fn bytes_to_write(&self) -> u64 {
        let bytes = self.pieces.iter().map(|piece| match piece {
            Piece::Zero { .. } | Piece::Repeat { .. } => 0,
            Piece::Plain { bytes } | Piece::Stored { bytes, .. } | Piece::Stream { bytes, .. } => bytes.len() as u64,
        });
        bytes.sum()
    }

    /// Adds bytes to the last piece if they follow it, unless they are to begin a new one.
    pub(crate) fn add_plain(&mut self, bytes: Range<usize>, anew: bool) {
        match self.pieces.last_mut() {
            Some(Piece::Plain { bytes: last }) if last.end == bytes.start && !anew => last.end = bytes.end,
            _ => self.pieces.push(Piece::Plain { bytes }),
        }
    }

    pub(crate) fn add_zero(&mut self, range: Range<u64>) {
        match self.pieces.last_mut() {
            Some(Piece::Zero { range: last }) if last.end == range.start => last.end = range.end,
            _ => self.pieces.push(Piece::Zero { range }),
        }
    }

    /// Adds a compressed cluster, the next `len` bytes of [`packed`](Self::packed).
    pub(crate) fn add_compressed(&mut self, guest: GuestCluster, len: usize) {
        let bytes = self.packed_len..self.packed_len + len;
        self.packed_len = bytes.end;
        self.pieces.push(Piece::Stream { guest, bytes, origin: None });
    }

    /// Adds a cluster, a part of [`plain`](Self::plain), as it is. Each by itself, so that it does not matter to the
    /// target's layout which of them share a unit.
    pub(crate) fn add_stored(&mut self, plain: Range<usize>) {
        let bytes = self.packed_len..self.packed_len + plain.len();
        let offset = self.offset(plain.start);
        self.packed[bytes.clone()].copy_from_slice(&self.plain[plain]);
        self.packed_len = bytes.end;
        self.pieces.push(Piece::Stored { offset, bytes });
    }
}
