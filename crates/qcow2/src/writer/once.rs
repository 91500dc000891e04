use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use qtk_block::Preallocation;

use super::{ImageWriter, PackedCluster};
use crate::error::Error;
use crate::types::{GuestCluster, GuestOffset, HostOffset, in_memory};

/// Stands for a cluster's content. Equal digests are taken for equal content, so it must come from a hash for which nobody
/// finds two contents with one digest, such as SHA-256.
pub type Digest = [u8; 32];

/// What an image that is being written holds already, by digest. The writer adds to it; others may ask it meanwhile.
///
/// It takes up to 200 bytes of memory for each different cluster.
#[derive(Debug, Default)]
pub struct Contents {
    stored: RwLock<HashMap<Digest, Stored>>,
}

impl Contents {
    /// Whether the image holds a cluster with this content. What it holds it keeps.
    #[must_use]
    pub fn hold(&self, digest: &Digest) -> bool {
        self.get(digest).is_some()
    }

    fn get(&self, digest: &Digest) -> Option<Stored> {
        self.stored.read().unwrap_or_else(PoisonError::into_inner).get(digest).copied()
    }

    fn set(&self, digest: Digest, stored: Stored) {
        self.stored.write().unwrap_or_else(PoisonError::into_inner).insert(digest, stored);
    }
}

/// Where a cluster's content lies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stored {
    Plain {
        host: HostOffset,
        /// The guest cluster that it was stored for.
        first: u64,
    },
    Compressed {
        host: HostOffset,
        len: u64,
    },
}

/// What became of the clusters that were to be stored once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Clusters that share what is stored for another one.
    pub shared: u64,
    /// Bytes that they would have taken.
    pub saved: u64,
    /// Bytes stored plain.
    pub plain: u64,
    /// Streams stored again because a refcount was at its limit.
    pub repeated: u64,
}

/// Each content stored once, where refcounts can count its users: an image whose refcounts have n bits lets 2ⁿ − 1 clusters
/// share one, and then stores the content again.
///
/// The result depends on the order of the clusters and on their digests only, whichever of the methods each comes by.
impl ImageWriter {
    /// What the image holds that came by these methods.
    #[must_use]
    pub fn contents(&self) -> Arc<Contents> {
        self.contents.clone()
    }

    /// What came of these methods so far.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Stores whole clusters, and takes the digest of each: that of the cluster filled up with zeroes if the disk ends within it.
    pub fn write_once<'a>(
        &mut self,
        offset: GuestOffset,
        bytes: &[u8],
        digests: impl IntoIterator<Item = &'a Digest>,
    ) -> Result<(), Error> {
        let bits = self.mapper.options.cluster_bits;
        self.can_share()?;
        let end = self.advance(offset.0, bytes.len() as u64)?;
        if bits.offset_within(offset.0) != 0 || bits.offset_within(end) != 0 && end != self.mapper.options.size {
            return Err(self.mapper.invalid("length of whole clusters", bytes.len() as u64, 0..=0));
        }
        // What is to be written in one piece: where to, and which of the bytes.
        let mut run = (HostOffset(0), 0..0);
        let mut digests = digests.into_iter();
        for (guest, part) in (bits.guest_cluster(offset).0..).zip(parts(bytes.len(), bits.buffer_len())) {
            let Some(digest) = digests.next() else {
                let needed = bits.clusters_for(bytes.len() as u64);
                return Err(self.mapper.invalid(
                    "number of digests",
                    guest - bits.guest_cluster(offset).0,
                    needed..=needed,
                ));
            };
            if let Some(stored) = self.contents.get(digest) {
                self.put_run(&mut run, bytes)?;
                self.share(guest, digest, stored)?;
                continue;
            }
            let (host, _) = self.mapper.place(guest..guest + 1)?;
            self.contents.set(*digest, Stored::Plain { host, first: guest });
            if run.1.end != part.start || host != run.0.plus(run.1.len() as u64) {
                self.put_run(&mut run, bytes)?;
                run = (host, part.start..part.start);
            }
            run.1.end = part.end;
        }
        self.put_run(&mut run, bytes)
    }

    /// Writes the run, and leaves an empty one.
    fn put_run(&mut self, run: &mut (HostOffset, Range<usize>), bytes: &[u8]) -> Result<(), Error> {
        let part = &bytes[std::mem::take(&mut run.1)];
        if part.is_empty() {
            return Ok(());
        }
        self.tally.plain += part.len() as u64;
        self.mapper.image.put(run.0, part)?;
        self.mapper.reach(run.0.plus(part.len() as u64).0.next_multiple_of(self.mapper.options.cluster_bits.size()));
        Ok(())
    }

    /// Stores a compressed cluster, whose stream is a part of `bytes`, and returns whether its content was new.
    pub fn compressed_once(&mut self, bytes: &[u8], cluster: PackedCluster, digest: &Digest) -> Result<bool, Error> {
        self.can_share()?;
        if let Some(stored) = self.contents.get(digest) {
            self.advance_over(cluster.guest)?;
            self.share(cluster.guest.0, digest, stored)?;
            return Ok(false);
        }
        self.compressed_run(bytes, [cluster])?;
        let (host, len) = (HostOffset(self.packed.start), self.packed.end - self.packed.start);
        self.contents.set(*digest, Stored::Compressed { host, len });
        Ok(true)
    }

    /// Stores a cluster whose content the image [holds](Contents::hold).
    pub fn repeat(&mut self, guest: GuestCluster, digest: &Digest) -> Result<(), Error> {
        let Some(stored) = self.contents.get(digest) else {
            return Err(self.mapper.image.file.unsupported("the repetition of what is not stored"));
        };
        self.advance_over(guest)?;
        self.share(guest.0, digest, stored)
    }

    fn can_share(&self) -> Result<(), Error> {
        let (format, preallocation) = (self.mapper.format, self.mapper.options.preallocation);
        let obstacles = [
            (format.data_file, "sharing in an external data file"),
            (format.extended, "sharing of subclusters"),
            (preallocation != Preallocation::Off, "sharing with preallocation"),
        ];
        let obstacle = obstacles.into_iter().find(|(applies, _)| *applies);
        obstacle.map_or(Ok(()), |(_, feature)| Err(self.mapper.image.file.unsupported(feature)))
    }

    /// Lets a guest cluster share what is stored, or stores that again if it has too many users.
    fn share(&mut self, guest: u64, digest: &Digest, stored: Stored) -> Result<(), Error> {
        let size = self.mapper.options.cluster_bits.size();
        let (host, len) = match stored {
            Stored::Plain { host, .. } => (host, size),
            Stored::Compressed { host, len } => (host, len),
        };
        if self.mapper.share(guest, stored)? {
            self.tally.shared += 1;
            self.tally.saved += len;
            return Ok(());
        }
        // The caller may have it in another form, or not at all, as time has it.
        let mut bytes = vec![0; in_memory(len)];
        self.mapper.image.flush()?;
        self.mapper.image.file.read_padded(&mut bytes, host)?;
        let again = match stored {
            Stored::Plain { .. } => {
                let (host, _) = self.mapper.place(guest..guest + 1)?;
                self.put_run(&mut (host, 0..bytes.len()), &bytes)?;
                Stored::Plain { host, first: guest }
            }
            Stored::Compressed { .. } => {
                self.tally.repeated += 1;
                let host = self.pack(GuestCluster(guest), &bytes)?;
                Stored::Compressed { host, len }
            }
        };
        self.contents.set(*digest, again);
        Ok(())
    }
}

/// The parts of `len` bytes, each `step` long but for the last.
fn parts(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(step).map(move |start| start..len.min(start + step))
}
