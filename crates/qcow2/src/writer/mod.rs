//! New images, written in one pass and laid out as QEMU would lay them out.

mod batch;
mod mapper;
mod once;

use std::ops::Range;
use std::sync::Arc;

use qtk_block::{HostStorage, Preallocation};

use crate::create::CreateOptions;
use crate::error::Error;
use crate::file::ImageFile;
use crate::types::{GuestCluster, GuestOffset, HostOffset, in_memory};
use batch::Batch;
use mapper::Mapper;
pub use once::{Contents, Digest, Tally};

/// Writes a whole new image in one pass: pieces of the guest's disk in ascending order, each written once.
///
/// The image comes out as `qemu-img convert` would lay it out if it wrote the same pieces: L2 tables and refcount blocks lie
/// where the first cluster that needs them is written. A piece is what QEMU would write at once.
///
/// Everything goes out in large writes. Memory holds the L1 table, one L2 table and the refcounts. The header is written
/// last, so a file that was not [finished](Self::finish) is no image at all.
#[derive(Debug)]
pub struct ImageWriter {
    mapper: Mapper,
    /// The external data file, if guest data goes there.
    data: Option<Batch>,
    /// Where the last piece in the data file ends, with what fills up its cluster or subcluster.
    data_end: u64,
    /// Where the last compressed stream lies; the next one may share its end.
    packed: Range<u64>,
    /// End of the last piece on the guest's disk.
    next: u64,
    /// What was stored to be shared.
    contents: Arc<Contents>,
    tally: Tally,
}

/// A compressed cluster on its way into an [`ImageWriter`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedCluster {
    /// Which cluster of the guest's disk it is.
    pub guest: GuestCluster,
    /// Where its stream lies in the bytes that come with it.
    pub bytes: Range<usize>,
    /// How many of the stream's first bytes are the last ones of the stream stored before it.
    ///
    /// Entries say where a stream ends only to the sector, so bytes copied from another image reach into the next stream.
    /// Stored twice, they would add up each time that an image is copied.
    pub shared: u64,
}

impl ImageWriter {
    /// Begins an image in `storage`, which must be empty; errors call it `name`.
    pub fn new(storage: Arc<dyn HostStorage>, name: &str, options: CreateOptions) -> Result<Self, Error> {
        Self::new_with(storage, None, name, options)
    }

    /// The same with the external data file, which [`CreateOptions::data_file`] names and which must be empty.
    pub fn new_with(
        storage: Arc<dyn HostStorage>,
        data: Option<Arc<dyn HostStorage>>,
        name: &str,
        options: CreateOptions,
    ) -> Result<Self, Error> {
        let file = ImageFile { storage, name: name.into() };
        let options = options.checked(&file)?;
        if data.is_some() != options.data_file.is_some() {
            return Err(Error::DataFileMissing { image: file.name.to_string() });
        }
        let data = data.map(|storage| Batch::new(ImageFile { storage, ..file.clone() }));
        let mut writer = Self {
            mapper: Mapper::new(file, options)?,
            data,
            data_end: 0,
            packed: 0..0,
            next: 0,
            contents: Arc::default(),
            tally: Tally::default(),
        };
        writer.preallocate()?;
        Ok(writer)
    }

    /// Gives the whole disk its places, as far as the options want it.
    fn preallocate(&mut self) -> Result<(), Error> {
        let how = self.mapper.options.preallocation;
        let before = self.mapper.file_size();
        match (&self.data, how) {
            (Some(data), Preallocation::Off) => return data.file.set_size(self.mapper.options.size),
            (None, Preallocation::Off) => return Ok(()),
            (None, Preallocation::Falloc | Preallocation::Full) => self.mapper.place_contiguously()?,
            (Some(_), _) | (None, Preallocation::Metadata) => self.mapper.place_all()?,
        }
        if self.data.is_none() && how == Preallocation::Metadata {
            self.clear_tail()?;
        }
        match &self.data {
            Some(data) => reserve(&data.file, 0..self.mapper.size_in_grains(), how),
            None => reserve(&self.mapper.image.file, before..self.mapper.file_size(), how),
        }
    }

    /// Writes what the last cluster has behind the end of the disk.
    fn clear_tail(&mut self) -> Result<(), Error> {
        let bits = self.mapper.options.cluster_bits;
        let used = bits.offset_within(self.mapper.options.size);
        if used == 0 {
            return Ok(());
        }
        let last = self.mapper.options.size >> bits.bits();
        let (host, _) = self.mapper.place(last..last + 1)?;
        self.mapper.image.put(host.plus(used), &vec![0; in_memory(bits.size() - used)])
    }

    /// Stores a piece of the guest's disk. A cluster that is written in part reads as zeroes elsewhere, even with a backing
    /// file beneath; where there are subclusters, that holds for each of them.
    pub fn write(&mut self, offset: GuestOffset, bytes: &[u8]) -> Result<(), Error> {
        for Placed { host, piece } in self.place(offset, bytes.len() as u64)? {
            self.put(host, &bytes[piece])?;
        }
        Ok(())
    }

    /// Gives a piece of the guest's disk its place, as [`write`](Self::write) does. The caller fills it: by [`put`](Self::put), or
    /// in the [file](Self::storage_for) itself.
    pub fn place(&mut self, offset: GuestOffset, len: u64) -> Result<Vec<Placed>, Error> {
        let bits = self.mapper.options.cluster_bits;
        let end = self.advance(offset.0, len)?;
        let mut places = Vec::new();
        let mut at = offset.0;
        while at < end {
            let (host, clusters) = self.mapper.place(at >> bits.bits()..bits.clusters_for(end))?;
            let part = at..end.min(((at >> bits.bits()) + clusters) << bits.bits());
            self.mapper.mark_data(part.clone())?;
            let host = host.plus(bits.offset_within(at));
            let end = (host.0 + (part.end - part.start)).next_multiple_of(1 << self.mapper.format.grain_bits());
            match &self.data {
                Some(_) => self.data_end = end,
                None => self.mapper.reach(end),
            }
            places.push(Placed { host, piece: in_memory(part.start - offset.0)..in_memory(part.end - offset.0) });
            at = part.end;
        }
        Ok(places)
    }

    /// Fills a part of a place.
    pub fn put(&mut self, host: HostOffset, bytes: &[u8]) -> Result<(), Error> {
        self.data_batch().put(host, bytes)
    }

    /// The file that holds the guest's data, for who fills `range` of it, in bytes and a part of a place, with what is no memory's.
    pub fn storage_for(&mut self, range: Range<u64>) -> Result<&dyn HostStorage, Error> {
        let batch = self.data_batch();
        batch.pass_over(HostOffset(range.end))?;
        Ok(&*batch.file.storage)
    }

    fn data_batch(&mut self) -> &mut Batch {
        self.data.as_mut().unwrap_or(&mut self.mapper.image)
    }

    /// Makes a range of the guest's disk read as zeroes whatever lies beneath. Needed on a backing file only.
    ///
    /// Whole clusters (and subclusters) take no space, except in version 2; what is left at the range's ends is written.
    pub fn zero(&mut self, range: Range<u64>) -> Result<(), Error> {
        let grain = 1 << self.mapper.format.grain_bits();
        let whole = match range.end == self.mapper.options.size {
            true => range.start.next_multiple_of(grain)..range.end,
            false => range.start.next_multiple_of(grain)..range.end / grain * grain,
        };
        if whole.is_empty() || !self.mapper.format.zero_flag {
            return self.write_zeroes(range);
        }
        self.write_zeroes(range.start..whole.start)?;
        self.advance(whole.start, whole.end - whole.start)?;
        self.mapper.mark_zero(whole.clone())?;
        self.write_zeroes(whole.end..range.end)
    }

    fn write_zeroes(&mut self, range: Range<u64>) -> Result<(), Error> {
        const STEP: u64 = 2 << 20;
        let zeroes = vec![0; in_memory((range.end - range.start).min(STEP))];
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(STEP);
            self.write(GuestOffset(at), &zeroes[..in_memory(len)])?;
            at += len;
        }
        Ok(())
    }

    /// Stores one compressed cluster. `bytes` is its stream, shorter than a cluster; bytes that follow the stream do no harm.
    pub fn compressed(&mut self, guest: GuestCluster, bytes: &[u8]) -> Result<(), Error> {
        self.compressed_run(bytes, [PackedCluster { guest, bytes: 0..bytes.len(), shared: 0 }])
    }

    /// Stores compressed clusters, in ascending order, whose streams are parts of `bytes`. Those that lie together there and
    /// come to lie together in the file are written at once.
    pub fn compressed_run(
        &mut self,
        bytes: &[u8],
        clusters: impl IntoIterator<Item = PackedCluster>,
    ) -> Result<(), Error> {
        let mut ready = (HostOffset(0), 0..0);
        for PackedCluster { guest, bytes: stream, shared } in clusters {
            if stream.end > bytes.len() {
                return Err(self.mapper.invalid("end of a stream", stream.end as u64, 0..=bytes.len() as u64));
            }
            self.advance_over(guest)?;
            let (host, shared) = self.place_stream(guest, stream.len() as u64, shared)?;
            let (host, own) = (host.plus(shared), stream.start + in_memory(shared)..stream.end);
            if ready.1.end != own.start || ready.0.plus(ready.1.len() as u64) != host {
                self.put_part(bytes, ready)?;
                ready = (host, own.start..own.start);
            }
            ready.1.end = own.end;
        }
        self.put_part(bytes, ready)
    }

    fn put_part(&mut self, bytes: &[u8], (host, part): (HostOffset, Range<usize>)) -> Result<(), Error> {
        if part.is_empty() { Ok(()) } else { self.mapper.image.put(host, &bytes[part]) }
    }

    /// Stores a stream for a cluster, which comes next, and returns where it lies.
    fn pack(&mut self, guest: GuestCluster, bytes: &[u8]) -> Result<HostOffset, Error> {
        let (host, _) = self.place_stream(guest, bytes.len() as u64, 0)?;
        self.mapper.image.put(host, bytes)?;
        Ok(host)
    }

    /// Maps a cluster to a stream of `len` bytes, and returns where that lies and how many bytes it shares with the last one.
    fn place_stream(&mut self, guest: GuestCluster, len: u64, shared: u64) -> Result<(HostOffset, u64), Error> {
        let size = self.mapper.options.cluster_bits.size();
        let largest = len.min(self.packed.end - self.packed.start);
        if shared > largest {
            return Err(self.mapper.invalid("number of shared bytes", shared, 0..=largest));
        }
        if len == 0 || len > 2 * size {
            return Err(self.mapper.invalid("length of a compressed cluster", len, 1..=2 * size));
        }
        let (host, shared) = self.mapper.pack(guest, len, shared)?;
        self.packed = host.0..host.0 + len;
        Ok((host, shared))
    }

    /// Ends the file with a whole sector, as QEMU does whenever it was to compress.
    pub fn end_with_a_sector(&mut self) {
        self.mapper.whole_sectors = true;
    }

    /// Writes the remaining metadata and last the header, and returns the file's size. The file is not synced.
    pub fn finish(mut self) -> Result<u64, Error> {
        if let Some(data) = &mut self.data {
            data.flush()?;
            data.file.set_size(self.data_end.max(data.file.storage.size()))?;
        }
        self.mapper.finish()
    }

    /// Moves on behind a piece and returns its end, if the piece lies on the disk and behind the last one.
    fn advance(&mut self, start: u64, len: u64) -> Result<u64, Error> {
        let size = self.mapper.options.size;
        let end = start.checked_add(len).filter(|&end| start >= self.next && end <= size);
        let end =
            end.ok_or_else(|| self.mapper.invalid("guest offset", start, self.next..=size.saturating_sub(len)))?;
        self.next = end;
        Ok(end)
    }

    /// Moves on behind a cluster.
    fn advance_over(&mut self, guest: GuestCluster) -> Result<(), Error> {
        let size = self.mapper.options.cluster_bits.size();
        let start = guest.0.saturating_mul(size);
        self.advance(start, size.min(self.mapper.options.size.saturating_sub(start)).max(1))?;
        Ok(())
    }
}

/// Where a part of a piece lies in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its place in the file that holds the guest's data.
    pub host: HostOffset,
    /// Which bytes of the piece go there.
    pub piece: Range<usize>,
}

/// Gives a file a new size, and the range that it grows by its space.
fn reserve(file: &ImageFile, range: Range<u64>, how: Preallocation) -> Result<(), Error> {
    match how {
        Preallocation::Off | Preallocation::Metadata => file.set_size(range.end),
        Preallocation::Falloc => file.reserve(range),
        Preallocation::Full => file.write_zeroes(range),
    }
}
