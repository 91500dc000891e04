use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use qtk_block::HostStorage;

use crate::create::CreateOptions;
use crate::entry::{L1Entry, L2Entry};
use crate::error::Error;
use crate::features::{self, Features};
use crate::file::{ImageFile, table_bytes};
use crate::header::{Header, MAX_L1_SIZE, MAX_REFCOUNT_TABLE_SIZE};
use crate::types::{CompressionType, GuestCluster, GuestOffset, HostOffset, Version, in_memory};

const HEADER_LENGTH: u32 = 112;

/// Writes a whole new image without backing in one pass: guest clusters in ascending order, each written once.
///
/// Everything goes out in large writes. Memory holds the L1 table, one L2 table and two bytes for each cluster of the
/// file. The header is written last, so a file that was not [finished](Self::finish) is no image at all.
#[derive(Debug)]
pub struct ImageWriter {
    options: CreateOptions,
    file: ImageFile,
    batch: Batch,
    refcounts: Vec<u16>,
    /// Where the last compressed stream lies; the next one can go right behind it.
    packed: Range<u64>,
    l1_table: HostOffset,
    l1: Vec<L1Entry>,
    l2: L2Table,
    next: GuestCluster,
}

/// The L2 table that is being filled.
#[derive(Debug)]
struct L2Table {
    index: u64,
    entries: Vec<L2Entry>,
    used: bool,
}

impl ImageWriter {
    /// Begins an image in `storage`, which must be empty; errors call it `name`.
    pub fn new(storage: Arc<dyn HostStorage>, name: &str, options: CreateOptions) -> Result<Self, Error> {
        let bits = options.cluster_bits;
        let file = ImageFile { storage, name: name.into() };
        let l1_entries = bits.clusters_for(options.size).div_ceil(bits.words());
        if l1_entries > MAX_L1_SIZE / 8 {
            let largest = (MAX_L1_SIZE / 8).saturating_mul(bits.words()).saturating_mul(bits.size());
            return Err(invalid(&file, "size", options.size, 0..=largest));
        }
        let mut writer = Self {
            options,
            batch: Batch::default(),
            refcounts: Vec::new(),
            packed: 0..0,
            l1_table: HostOffset::default(),
            l1: vec![L1Entry::default(); in_memory(l1_entries)],
            l2: L2Table { index: 0, entries: vec![L2Entry::UNALLOCATED; in_memory(bits.words())], used: false },
            next: GuestCluster(0),
            file,
        };
        writer.allocate(1);
        writer.l1_table = writer.allocate(bits.clusters_for(l1_entries * 8));
        writer.batch.start = writer.end();
        Ok(writer)
    }

    /// Stores plain clusters from `offset` on. Only the last cluster of the disk may be cut short.
    pub fn write(&mut self, offset: GuestOffset, bytes: &[u8]) -> Result<(), Error> {
        let bits = self.options.cluster_bits;
        let first = bits.guest_cluster(offset);
        let count = bits.clusters_for(bytes.len() as u64);
        let host = self.allocate(count);
        self.batch.put(&self.file, host.0, bytes)?;
        for index in 0..count {
            let entry = L2Entry::owned(host.plus(index << bits.bits()), self.options.l2_format());
            self.map(GuestCluster(first.0 + index), entry)?;
        }
        Ok(())
    }

    /// Stores one compressed cluster. `bytes` is its stream, shorter than a cluster; bytes that follow the stream do no harm.
    pub fn compressed(&mut self, guest: GuestCluster, bytes: &[u8]) -> Result<(), Error> {
        self.compressed_sharing(guest, bytes, 0)
    }

    /// Stores one compressed cluster whose first `shared` bytes are the last ones of the stream stored before it.
    ///
    /// Entries say where a stream ends only to the sector, so bytes copied from another image reach into the next stream.
    /// Stored twice, they would add up each time that an image is copied.
    pub fn compressed_sharing(&mut self, guest: GuestCluster, bytes: &[u8], shared: u64) -> Result<(), Error> {
        let len = bytes.len() as u64;
        let largest = len.min(self.packed.end - self.packed.start);
        if shared > largest {
            return Err(invalid(&self.file, "number of shared bytes", shared, 0..=largest));
        }
        let stored = self.packed.end;
        let host = self.pack(len, shared);
        let Some(entry) = L2Entry::compressed(host, len, self.options.cluster_bits) else {
            let largest = self.options.cluster_bits.size();
            return Err(invalid(&self.file, "length of a compressed cluster", len, 1..=largest));
        };
        let new = stored.max(host.0);
        self.batch.put(&self.file, new, &bytes[in_memory(new - host.0)..])?;
        self.map(guest, entry)
    }

    /// Writes the remaining metadata and last the header, and returns the file's size. The file is not synced.
    pub fn finish(mut self) -> Result<u64, Error> {
        self.finish_l2()?;
        let l1 = table_bytes(self.l1.iter().map(|entry| entry.0));
        self.batch.put(&self.file, self.l1_table.0, &l1)?;
        let (refcount_table, refcount_table_clusters) = self.put_refcounts()?;
        self.batch.flush(&self.file)?;
        let size = self.end();
        self.file.set_size(size)?;
        let header = self.header(refcount_table, refcount_table_clusters);
        let encoded = header.encode().ok_or_else(|| self.file.unsupported("a header larger than a cluster"))?;
        self.file.write(&encoded, HostOffset(0))?;
        Ok(size)
    }

    fn header(&self, refcount_table: HostOffset, refcount_table_clusters: u32) -> Header {
        let compression = self.options.compression;
        let incompatible = if compression == CompressionType::Zlib { 0 } else { features::COMPRESSION_TYPE };
        Header {
            version: Version::V3,
            size: self.options.size,
            cluster_bits: self.options.cluster_bits,
            backing_name: None,
            l1_table: self.l1_table,
            l1_size: u32::try_from(self.l1.len()).unwrap_or(u32::MAX),
            refcount_table,
            refcount_table_clusters,
            refcount_order: 4,
            snapshots: 0,
            snapshot_table: HostOffset::default(),
            features: Features { incompatible, ..Features::default() },
            compression,
            encryption: None,
            header_length: HEADER_LENGTH,
            unknown_fields: Vec::new(),
            extensions: Vec::new(),
        }
    }

    fn end(&self) -> u64 {
        (self.refcounts.len() as u64) << self.options.cluster_bits.bits()
    }

    /// `count` fresh clusters at the end of the file, each in use once.
    fn allocate(&mut self, count: u64) -> HostOffset {
        let start = HostOffset(self.end());
        self.refcounts.extend(std::iter::repeat_n(1, in_memory(count)));
        start
    }

    /// Room for `len` bytes, of which the first `shared` are those stored last, if the last stream's host clusters have it or
    /// can be continued; else in fresh clusters.
    fn pack(&mut self, len: u64, shared: u64) -> HostOffset {
        let bits = self.options.cluster_bits;
        let start = self.packed.end - shared;
        let first = bits.host_cluster(HostOffset(start)).0;
        let (held, needed) = (bits.clusters_for(self.packed.end), bits.clusters_for(start + len));
        // Fresh clusters continue the last one only if nothing was allocated since.
        let reaches = needed <= held || held == self.refcounts.len() as u64;
        let open = self
            .refcounts
            .get_mut(in_memory(first)..in_memory(held))
            .filter(|open| reaches && !open.is_empty() && open.iter().all(|&count| count < u16::MAX));
        let host = match open {
            Some(open) => {
                open.iter_mut().for_each(|count| *count += 1);
                self.allocate(needed.saturating_sub(held));
                HostOffset(start)
            }
            None => self.allocate(bits.clusters_for(len)),
        };
        self.packed = host.0..host.0 + len;
        host
    }

    fn map(&mut self, guest: GuestCluster, entry: L2Entry) -> Result<(), Error> {
        let entries = self.options.cluster_bits.words();
        let clusters = self.options.cluster_bits.clusters_for(self.options.size);
        if !(self.next.0..clusters).contains(&guest.0) {
            return Err(invalid(&self.file, "guest cluster", guest.0, self.next.0..=clusters.saturating_sub(1)));
        }
        self.next = GuestCluster(guest.0 + 1);
        if guest.0 / entries != self.l2.index {
            self.finish_l2()?;
            self.l2.index = guest.0 / entries;
        }
        self.l2.entries[in_memory(guest.0 % entries)] = entry;
        self.l2.used = true;
        Ok(())
    }

    fn finish_l2(&mut self) -> Result<(), Error> {
        if !std::mem::take(&mut self.l2.used) {
            return Ok(());
        }
        let host = self.allocate(1);
        self.l1[in_memory(self.l2.index)] = L1Entry::owned(host);
        let bytes = self.options.l2_format().encode(&self.l2.entries);
        self.l2.entries.fill(L2Entry::UNALLOCATED);
        self.batch.put(&self.file, host.0, &bytes)
    }

    /// Writes refcount blocks and table, which count themselves, at the end of the file.
    fn put_refcounts(&mut self) -> Result<(HostOffset, u32), Error> {
        let bits = self.options.cluster_bits;
        let per_block = bits.size() / 2;
        let used = self.refcounts.len() as u64;
        let (mut blocks, mut table) = (0, 0);
        loop {
            let needed = (used + blocks + table).div_ceil(per_block);
            let needed_table = bits.clusters_for(needed * 8).max(1);
            if (needed, needed_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (needed, needed_table);
        }
        if table << bits.bits() > MAX_REFCOUNT_TABLE_SIZE {
            let largest = MAX_REFCOUNT_TABLE_SIZE / 8 * per_block;
            return Err(invalid(&self.file, "number of clusters", used, 1..=largest));
        }
        let first_block = self.allocate(blocks);
        let table_at = self.allocate(table);
        let counts: Vec<u8> = self.refcounts.iter().flat_map(|count| count.to_be_bytes()).collect();
        self.batch.put(&self.file, first_block.0, &counts)?;
        let table_entries = table_bytes((0..blocks).map(|block| first_block.plus(block << bits.bits()).0));
        self.batch.put(&self.file, table_at.0, &table_entries)?;
        Ok((table_at, u32::try_from(table).unwrap_or(u32::MAX)))
    }
}

fn invalid(file: &ImageFile, option: &'static str, value: u64, allowed: RangeInclusive<u64>) -> Error {
    Error::InvalidOption { image: file.name.to_string(), option, value, allowed }
}

/// Collects neighbouring writes into large ones.
#[derive(Debug, Default)]
struct Batch {
    start: u64,
    bytes: Vec<u8>,
}

impl Batch {
    const LIMIT: usize = 2 << 20;
    const DIRECT: usize = 1 << 20;

    /// Writes `bytes` at `offset` now or later. What lies between two puts and is never put becomes zeroes.
    fn put(&mut self, file: &ImageFile, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let Some(within) = offset.checked_sub(self.start).map(in_memory) else {
            // More for a host cluster whose front has gone out.
            return file.write(bytes, HostOffset(offset));
        };
        if bytes.len() >= Self::DIRECT || within + bytes.len() > Self::LIMIT {
            self.flush(file)?;
            self.start = offset;
        }
        if bytes.len() >= Self::DIRECT {
            self.start += bytes.len() as u64;
            return file.write(bytes, HostOffset(offset));
        }
        let within = in_memory(offset - self.start);
        let end = within + bytes.len();
        if end > self.bytes.len() {
            self.bytes.resize(end, 0);
        }
        self.bytes[within..end].copy_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self, file: &ImageFile) -> Result<(), Error> {
        if !self.bytes.is_empty() {
            file.write(&self.bytes, HostOffset(self.start))?;
        }
        self.start += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}
