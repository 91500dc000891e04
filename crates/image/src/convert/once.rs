//! Clusters that are alike, stored once.

use std::io;

use qtk_qcow2::{CreateOptions, Digest, GuestOffset, ImageWriter, PackedCluster, Preallocation};
use sha2::{Digest as _, Sha256};

use super::ConvertReport;
use super::unit::{Origin, Piece, Unit};

/// What stands for a whole cluster.
pub(super) fn digest(cluster: &[u8]) -> Digest {
    Sha256::digest(cluster).into()
}

/// Why clusters cannot be shared in an image like that, if they cannot.
pub(super) fn obstacle(options: &CreateOptions) -> Option<&'static str> {
    let obstacles = [
        (options.data_file.is_some(), "clusters in an external data file cannot be shared"),
        (options.extended_l2, "clusters with subclusters cannot be shared"),
        (options.preallocation != Preallocation::Off, "preallocated clusters cannot be shared"),
        (options.refcount_bits == 1, "refcounts of one bit cannot count who shares a cluster; use wider ones"),
    ];
    obstacles.into_iter().find(|(applies, _)| *applies).map(|(_, problem)| problem)
}

/// A new image in which equal clusters are stored once.
pub(super) struct Target<'a> {
    pub(super) writer: &'a mut ImageWriter,
    /// Where the last compressed stream was copied from, if it was copied.
    pub(super) last: &'a mut Option<Origin>,
    pub(super) report: &'a mut ConvertReport,
}

impl Target<'_> {
    /// Puts a piece of a unit, whose clusters have the next digests.
    pub(super) fn put<'a>(
        &mut self,
        piece: &Piece,
        unit: &Unit,
        digests: &mut impl Iterator<Item = &'a Digest>,
    ) -> io::Result<()> {
        let start = piece.start(unit);
        match piece {
            Piece::Zero { range } => self.writer.zero(range.clone())?,
            Piece::Plain { bytes } => {
                self.writer.write_once(GuestOffset(start), unit.on_disk(&unit.plain[bytes.clone()], start), digests)?;
            }
            Piece::Stored { bytes, .. } => {
                // As for a repetition, which it may be too.
                *self.last = None;
                self.writer.write_once(
                    GuestOffset(start),
                    unit.on_disk(&unit.packed[bytes.clone()], start),
                    digests,
                )?;
            }
            Piece::Stream { guest, bytes, origin } => {
                let before = self.last.take();
                let shared = origin.as_ref().zip(before).map_or(0, |(origin, before)| origin.shared(&before));
                let cluster = PackedCluster { guest: *guest, bytes: bytes.clone(), shared };
                if self.writer.compressed_once(&unit.packed, cluster, next(digests)?)? {
                    self.last.clone_from(origin);
                    *if origin.is_some() { &mut self.report.copied } else { &mut self.report.compressed } += 1;
                }
            }
            Piece::Repeat { guest } => {
                // Not even by chance may it matter whether the cluster was known before it was compressed.
                *self.last = None;
                self.writer.repeat(*guest, next(digests)?)?;
            }
        }
        Ok(())
    }
}

fn next<'a>(digests: &mut impl Iterator<Item = &'a Digest>) -> io::Result<&'a Digest> {
    digests.next().ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
