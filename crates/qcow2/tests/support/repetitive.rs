use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;

use qtk_block::HostStorage;
use qtk_qcow2::codec::Compressor;
use qtk_qcow2::{
    ClusterBits, CompressionType, CreateOptions, Digest, GuestCluster, GuestOffset, ImageWriter, PackedCluster, Tally,
};

use super::noise;

/// A disk with few different clusters: each is known by a number, and 0 is a hole.
#[derive(Clone, Debug)]
pub(crate) struct Repetitive {
    pub(crate) bits: u32,
    pub(crate) refcount_bits: u32,
    /// Clusters are written plain if there is none.
    pub(crate) codec: Option<CompressionType>,
    pub(crate) clusters: Vec<u8>,
    /// What the last cluster lacks of a whole one, in sectors.
    pub(crate) short: usize,
}

impl Repetitive {
    fn bits(&self) -> ClusterBits {
        ClusterBits::new(self.bits).unwrap()
    }

    /// A third of the contents does not compress. Half a cluster of each is zero, so that one cut short can be like a whole one.
    fn content(&self, number: u8) -> Vec<u8> {
        let len = self.bits().buffer_len();
        let mut bytes = match number % 3 {
            _ if number == 0 => vec![0; len],
            0 => noise(number.into(), len - len / 8),
            _ => vec![number; len / 2],
        };
        bytes.resize(len, 0);
        bytes
    }

    pub(crate) fn size(&self) -> usize {
        self.clusters.len() * self.bits().buffer_len() - self.short * 512
    }

    pub(crate) fn disk(&self) -> Vec<u8> {
        let mut disk: Vec<u8> = self.clusters.iter().flat_map(|&number| self.content(number)).collect();
        disk.truncate(self.size());
        disk
    }

    pub(crate) fn options(&self) -> CreateOptions {
        CreateOptions {
            size: self.size() as u64,
            cluster_bits: self.bits(),
            refcount_bits: self.refcount_bits,
            compression: self.codec.unwrap_or_default(),
            ..CreateOptions::default()
        }
    }

    /// Writes the image; with `asks`, compressed clusters only where the writer does not hold them.
    pub(crate) fn write(&self, image: &Path, asks: bool) -> Tally {
        std::fs::write(image, "").unwrap();
        self.write_to(super::storage(image), asks)
    }

    pub(crate) fn write_to(&self, storage: Arc<dyn HostStorage>, asks: bool) -> Tally {
        let mut writer = ImageWriter::new(storage, "image", self.options()).unwrap();
        match self.codec {
            None => self.write_plain(&mut writer),
            Some(codec) => self.write_packed(&mut writer, codec, asks),
        }
        let tally = writer.tally();
        writer.finish().unwrap();
        tally
    }

    fn write_plain(&self, writer: &mut ImageWriter) {
        let (disk, len) = (self.disk(), self.bits().buffer_len());
        let mut at = 0;
        for run in self.clusters.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            let bytes = &disk[at * len..disk.len().min((at + run.len()) * len)];
            if run[0] != 0 {
                writer.write_once(GuestOffset((at * len) as u64), bytes, &digests(bytes, len)).unwrap();
            }
            at += run.len();
        }
    }

    fn write_packed(&self, writer: &mut ImageWriter, codec: CompressionType, asks: bool) {
        let (disk, len) = (self.disk(), self.bits().buffer_len());
        let mut compressor = Compressor::new(codec, None).unwrap();
        let mut packed = vec![0; len];
        for (index, _) in self.clusters.iter().enumerate().filter(|(_, number)| **number != 0) {
            let guest = GuestCluster(index as u64);
            let bytes = &disk[index * len..disk.len().min((index + 1) * len)];
            let digest = digests(bytes, len)[0];
            let mut whole = bytes.to_vec();
            whole.resize(len, 0);
            if asks && writer.contents().hold(&digest) {
                writer.repeat(guest, &digest).unwrap();
                continue;
            }
            match compressor.compress(&whole, &mut packed).unwrap() {
                Some(len) => {
                    let cluster = PackedCluster { guest, bytes: 0..len, shared: 0 };
                    writer.compressed_once(&packed, cluster, &digest).unwrap();
                }
                None => writer.write_once(GuestOffset((index * len) as u64), bytes, &[digest]).unwrap(),
            }
        }
    }
}

/// Digests of the clusters of `bytes`, the last one filled up.
fn digests(bytes: &[u8], cluster: usize) -> Vec<Digest> {
    let digest = |part: &[u8]| {
        let mut whole = part.to_vec();
        whole.resize(cluster, 0);
        let mut hasher = DefaultHasher::new();
        whole.hash(&mut hasher);
        let mut digest = [0; 32];
        digest[..8].copy_from_slice(&hasher.finish().to_le_bytes());
        digest
    };
    bytes.chunks(cluster).map(digest).collect()
}
