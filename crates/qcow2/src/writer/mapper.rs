use std::ops::{Range, RangeInclusive};

use super::batch::Batch;
use super::once::Stored;
use crate::allocator::Allocator;
use crate::create::CreateOptions;
use crate::entry::{Cluster, L1Entry, L2Entry, L2Format, SECTOR, Subcluster};
use crate::error::{Error, OptionProblem, Place};
use crate::file::{ImageFile, table_bytes};
use crate::refcount::RefcountWidth;
use crate::types::{GuestCluster, HostOffset, in_memory};

/// QEMU looks at its L2 tables through windows of this size, in bytes, and takes clusters for one window at a time.
const L2_WINDOW: u64 = 64 << 10;

/// The metadata of a new image: gives guest clusters their places.
#[derive(Debug)]
pub(super) struct Mapper {
    pub(super) options: CreateOptions,
    pub(super) format: L2Format,
    pub(super) image: Batch,
    allocator: Allocator,
    l1_table: HostOffset,
    l1: Vec<L1Entry>,
    l2: L2Table,
    /// Guest clusters whose host cluster got a second user.
    shared: Vec<u64>,
    /// Where guest data and L2 tables end in the file, in bytes.
    end: u64,
    /// Whether the file is to end with a whole sector.
    pub(super) whole_sectors: bool,
}

/// The L2 table that is being filled, if it has a place yet.
#[derive(Debug)]
struct L2Table {
    index: u64,
    place: Option<HostOffset>,
    entries: Box<[L2Entry]>,
}

impl Mapper {
    pub(super) fn new(file: ImageFile, options: CreateOptions) -> Result<Self, Error> {
        let bits = options.cluster_bits;
        let format = options.l2_format();
        let l1 = vec![L1Entry::default(); in_memory(options.l1_entries())];
        let mut allocator = Allocator::new(file.clone(), bits, RefcountWidth::new(options.refcount_order()));
        let l1_clusters = bits.clusters_for(l1.len() as u64 * 8);
        let l1_table = if l1.is_empty() { HostOffset(0) } else { allocator.allocate(l1_clusters)? };
        let l2 = L2Table { index: 0, place: None, entries: empty_table(format) };
        let mapper = Self {
            options,
            format,
            image: Batch::new(file),
            allocator,
            l1_table,
            l1,
            l2,
            shared: Vec::new(),
            end: 0,
            whole_sectors: false,
        };
        // Before anything is written.
        mapper.header()?;
        Ok(mapper)
    }

    pub(super) fn invalid(&self, option: &'static str, value: u64, allowed: RangeInclusive<u64>) -> Error {
        Error::InvalidOption { image: self.image.file.name.to_string(), option, value, allowed }
    }

    /// Says that the file reaches to a byte at least.
    pub(super) fn reach(&mut self, end: u64) {
        self.end = self.end.max(end);
    }

    /// What QEMU would have as the size of the file: up to the last byte that it writes. The L1 table need not fill its clusters.
    pub(super) fn file_size(&self) -> u64 {
        let l1_end = self.l1_table.0 + self.l1.len() as u64 * 8;
        self.end.max(l1_end).max(self.allocator.end_of_metadata())
    }

    /// Makes the table that maps `guest` the current one, which gives it a place.
    fn enter(&mut self, guest: u64) -> Result<(), Error> {
        let index = guest / self.format.entries();
        if index != self.l2.index {
            self.leave()?;
            self.l2.index = index;
        }
        if self.l2.place.is_none()
            && let Some(place) = self.l1[in_memory(index)].l2_table()
        {
            self.image.flush()?;
            let bytes =
                self.image.file.read_structure(Place::L2Table(index), place, self.options.cluster_bits.size())?;
            self.l2.entries = self.format.decode(&bytes);
            self.l2.place = Some(place);
        }
        if self.l2.place.is_none() {
            let place = self.allocator.allocate(1)?;
            self.l1[in_memory(index)] = L1Entry::owned(place);
            self.l2.place = Some(place);
        }
        Ok(())
    }

    /// Writes the current table and goes on with an empty one.
    fn leave(&mut self) -> Result<(), Error> {
        if let Some(place) = self.l2.place.take() {
            self.image.put(place, &self.format.encode(&self.l2.entries))?;
            self.reach(place.0 + self.options.cluster_bits.size());
            self.l2.entries.fill(L2Entry::UNALLOCATED);
        }
        Ok(())
    }

    fn bits(&self) -> u32 {
        self.options.cluster_bits.bits()
    }

    fn index_in_table(&self, guest: u64) -> usize {
        in_memory(guest % self.format.entries())
    }

    /// Gives the clusters at the front of a range their places, in one piece, unless they have them; returns the first
    /// one's, and how many they are.
    pub(super) fn place(&mut self, clusters: Range<u64>) -> Result<(HostOffset, u64), Error> {
        let (first, mut count) = self.place_in_window(clusters.clone(), None)?;
        while clusters.start + count < clusters.end {
            let rest = clusters.start + count..clusters.end;
            let (_, more) = self.place_in_window(rest, Some(first.plus(count << self.bits())))?;
            if more == 0 {
                break;
            }
            count += more;
        }
        Ok((first, count))
    }

    /// The same as far as one window on an L2 table reaches; at `wanted` or, if that is taken, not at all.
    fn place_in_window(
        &mut self,
        clusters: Range<u64>,
        wanted: Option<HostOffset>,
    ) -> Result<(HostOffset, u64), Error> {
        self.enter(clusters.start)?;
        let window = self.format.entries().min((L2_WINDOW * self.format.entries()) >> self.bits());
        let len = clusters.end.min((clusters.start / window + 1) * window) - clusters.start;
        let (format, bits) = (self.format, self.bits());
        let entries = self.l2.entries.iter().skip(self.index_in_table(clusters.start)).take(in_memory(len));
        let mut entries = entries.map(|entry| entry.decode(format)).peekable();
        let placed = match entries.peek() {
            Some(&Cluster::Data { host }) => {
                let next = (0..).map(|index| Cluster::Data { host: host.plus(index << bits) });
                Some((host, entries.zip(next).take_while(|(entry, next)| entry == next).count() as u64))
            }
            _ => None,
        };
        if let Some((host, count)) = placed {
            return Ok((host, if wanted.is_none_or(|wanted| wanted == host) { count } else { 0 }));
        }
        let free = self.l2.entries.iter().skip(self.index_in_table(clusters.start)).take(in_memory(len));
        let free = free.take_while(|entry| !matches!(entry.decode(format), Cluster::Data { .. })).count() as u64;
        let (host, count) = match wanted {
            _ if self.format.data_file => (HostOffset(clusters.start << bits), free),
            Some(wanted) => (wanted, self.allocator.allocate_at(wanted, free)?),
            None => (self.allocator.allocate(free)?, free),
        };
        self.link(clusters.start, host, count);
        Ok((host, count))
    }

    /// Lets entries of the current table map `count` clusters from `host` on. None of their subclusters counts as written.
    fn link(&mut self, guest: u64, host: HostOffset, count: u64) {
        let first = self.index_in_table(guest);
        for (entry, index) in self.l2.entries[first..first + in_memory(count)].iter_mut().zip(0..) {
            let subclusters = entry.subclusters;
            *entry = L2Entry::owned(host.plus(index << self.options.cluster_bits.bits()), self.format);
            if self.format.extended {
                entry.subclusters = subclusters;
            }
        }
    }

    /// Gives every cluster of the disk its place, as QEMU preallocates metadata.
    pub(super) fn place_all(&mut self) -> Result<(), Error> {
        let clusters = self.options.cluster_bits.clusters_for(self.options.size);
        let at_once = (i32::MAX as u64) >> self.bits();
        let mut next = 0;
        while next < clusters {
            let (host, count) = self.place(next..clusters.min(next + at_once))?;
            if !self.format.data_file {
                let rest = self.size_in_grains() - (next << self.bits());
                self.reach(host.0 + rest.min(count << self.bits()));
            }
            next += count;
        }
        self.leave()
    }

    /// The disk's size, rounded up to what entries describe.
    pub(super) fn size_in_grains(&self) -> u64 {
        self.options.size.next_multiple_of(1 << self.format.grain_bits())
    }

    /// Gives every cluster its place, all in one piece of the file, which ends with them.
    pub(super) fn place_contiguously(&mut self) -> Result<(), Error> {
        let clusters = self.options.cluster_bits.clusters_for(self.options.size);
        let tables = clusters.div_ceil(self.format.entries());
        let start =
            self.allocator.prepare(self.options.cluster_bits.clusters_for(self.file_size()), clusters + tables)?;
        let host = HostOffset(start << self.bits());
        self.allocator.allocate_at(host, clusters)?;
        self.reach((start + clusters) << self.bits());
        let mut next = 0;
        while next < clusters {
            self.enter(next)?;
            let count = self.format.entries().min(clusters - next);
            self.link(next, host.plus(next << self.bits()), count);
            next += count;
        }
        Ok(())
    }

    /// Says that a range, whose clusters have their places, holds data.
    pub(super) fn mark_data(&mut self, range: Range<u64>) -> Result<(), Error> {
        if self.format.extended { self.mark(range, Subcluster::Data) } else { Ok(()) }
    }

    /// Lets a range read as zeroes: whole clusters, or subclusters.
    pub(super) fn mark_zero(&mut self, range: Range<u64>) -> Result<(), Error> {
        self.mark(range, Subcluster::Zero)
    }

    fn mark(&mut self, range: Range<u64>, state: Subcluster) -> Result<(), Error> {
        let bits = self.options.cluster_bits;
        let mut at = range.start;
        while at < range.end {
            let guest = at >> bits.bits();
            self.enter(guest)?;
            let end = range.end.min((guest + 1) << bits.bits());
            let subclusters = self.subclusters(at..end, state);
            let index = self.index_in_table(guest);
            let entry = &mut self.l2.entries[index];
            if self.format.extended {
                *entry = entry.with_subclusters(subclusters, state);
            } else if *entry == L2Entry::UNALLOCATED {
                // A cluster that has a place was not written: it is zero already.
                *entry = L2Entry::plain_zero(self.format);
            }
            at = end;
        }
        Ok(())
    }

    /// The subclusters of a range within one cluster.
    fn subclusters(&self, range: Range<u64>, state: Subcluster) -> Range<u32> {
        let (bits, grain) = (self.options.cluster_bits, self.format.grain_bits());
        let start = bits.offset_within(range.start);
        // Zeroes from a cluster's start to the disk's end are zeroes to the cluster's end.
        let whole = start == 0 && range.end == self.options.size && state == Subcluster::Zero;
        let end = if whole { bits.size() } else { start + (range.end - range.start) };
        let index = |grains: u64| u32::try_from(grains).unwrap_or(L2Format::SUBCLUSTERS);
        index(start >> grain)..index(end.div_ceil(1 << grain))
    }

    /// Maps a compressed cluster of `len` bytes, whose first `shared` ones may be the last ones stored; returns where it
    /// lies and how many bytes it does share.
    pub(super) fn pack(&mut self, guest: GuestCluster, len: u64, shared: u64) -> Result<(HostOffset, u64), Error> {
        let index = self.index_in_table(guest.0);
        if self.format.data_file {
            return Err(self.image.file.unsupported("compression with an external data file"));
        }
        self.enter(guest.0)?;
        let (host, shared) = self.allocator.pack(len, shared)?;
        let bits = self.options.cluster_bits;
        self.reach((host.0 + len).next_multiple_of(SECTOR));
        let entry = L2Entry::compressed(host, len, bits);
        let entry = entry.ok_or_else(|| self.invalid("length of a compressed cluster", len, 1..=bits.size()))?;
        match std::mem::replace(&mut self.l2.entries[index], entry) {
            L2Entry::UNALLOCATED => Ok((host, shared)),
            _ => Err(self.image.file.unsupported("compression with preallocation")),
        }
    }

    /// Maps a cluster to what is stored for another one, unless a refcount is at its limit; returns whether it did.
    pub(super) fn share(&mut self, guest: u64, stored: Stored) -> Result<bool, Error> {
        self.enter(guest)?;
        let bits = self.options.cluster_bits;
        let (entry, range) = match stored {
            Stored::Plain { host, .. } => {
                (Some(L2Entry::owned(host, self.format).with_copied(false)), host.0..host.0 + bits.size())
            }
            Stored::Compressed { host, len } => (L2Entry::compressed(host, len, bits), host.0..host.0 + len),
        };
        let (Some(entry), Some(users)) = (entry, self.allocator.share(range)) else { return Ok(false) };
        if let (Stored::Plain { first, .. }, 1) = (stored, users) {
            self.shared.push(first);
        }
        let index = self.index_in_table(guest);
        self.l2.entries[index] = entry;
        Ok(true)
    }

    /// Lets the entries of clusters that are shared now say so. The first that used one could not know.
    fn mark_shared(&mut self) -> Result<(), Error> {
        let mut shared = std::mem::take(&mut self.shared);
        shared.sort_unstable();
        for guest in shared {
            self.enter(guest)?;
            let index = self.index_in_table(guest);
            let entry = &mut self.l2.entries[index];
            *entry = entry.with_copied(false);
        }
        Ok(())
    }

    /// Writes what is left, the header last, and returns the file's size.
    pub(super) fn finish(mut self) -> Result<u64, Error> {
        self.mark_shared()?;
        self.leave()?;
        let l1 = table_bytes(self.l1.iter().map(|entry| entry.0));
        self.image.put(self.l1_table, &l1)?;
        for (place, bytes) in self.allocator.encode() {
            self.image.put(place, &bytes)?;
        }
        self.image.flush()?;
        let file = &self.image.file;
        let size = self.file_size().next_multiple_of(if self.whole_sectors { SECTOR } else { 1 });
        file.set_size(size)?;
        // A whole cluster, as QEMU writes it: images take as much space as its own.
        let mut header = self.header()?;
        header.resize(self.options.cluster_bits.buffer_len(), 0);
        file.write(&header, HostOffset(0))?;
        Ok(size)
    }

    fn header(&self) -> Result<Vec<u8>, Error> {
        let mut header = self.options.header();
        header.l1_table = self.l1_table;
        (header.refcount_table, header.refcount_table_clusters) = self.allocator.refcount_table();
        header.encode().ok_or_else(|| {
            let image = self.image.file.name.to_string();
            Error::ImpossibleOptions { image, problem: OptionProblem::HeaderTooLarge }
        })
    }
}

fn empty_table(format: L2Format) -> Box<[L2Entry]> {
    vec![L2Entry::UNALLOCATED; in_memory(format.entries())].into()
}
