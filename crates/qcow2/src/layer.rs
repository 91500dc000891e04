use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use qtk_block::{BlockRead, Extent, HostStorage};

use crate::bitmap::{self, Bitmap, BitmapContents, BitmapDirectory, BitmapRefusal};
use crate::cache::ClusterCache;
use crate::codec;
use crate::entry::{L1Entry, L2Entry};
use crate::error::{Corruption, Error, Place};
use crate::file::{ImageFile, words};
use crate::header::Header;
use crate::mapping::{self, L2Tables, Mapping, MappingKind, within_cluster};
use crate::refcount;
use crate::snapshot::{self, Snapshot};
use crate::types::{CompressionType, GuestOffset, HostOffset, in_memory};

type L2Slot = OnceLock<Box<[L2Entry]>>;

/// One qcow2 file as it was committed, without its backing: what it does not store reads as zeroes.
///
/// Any number of threads can read. L2 tables are read when first needed and kept; they take no more memory than the file
/// has bytes, since each lies in the file and has one L1 entry.
pub struct Layer {
    file: ImageFile,
    /// The file that holds guest data, if it was opened.
    data: Option<ImageFile>,
    header: Header,
    file_size: u64,
    l1: Vec<L1Entry>,
    /// L1 entries whose L2 table belongs to an earlier one, and that one.
    repeated: Vec<(u64, u64)>,
    l2: Vec<L2Slot>,
    cache: ClusterCache,
}

impl Layer {
    /// Opens the image in `storage`, which errors call `name`. Nothing is written, and no other file is opened.
    ///
    /// Images marked dirty or corrupt open; only a [`Transaction`](crate::Transaction) refuses them.
    pub fn open(storage: Arc<dyn HostStorage>, name: impl Into<String>) -> Result<Self, Error> {
        Self::open_with(storage, name, None)
    }

    /// The same with the external data file, which is left alone if the image has none.
    ///
    /// Without its data file an image shows all of its metadata, and so does an encrypted one: only reading the guest's disk fails.
    pub fn open_with(
        storage: Arc<dyn HostStorage>,
        name: impl Into<String>,
        data: Option<Arc<dyn HostStorage>>,
    ) -> Result<Self, Error> {
        let file = ImageFile { storage, name: name.into().into() };
        let header = Header::read(&file)?;
        let l1 = file.read_table(Place::L1Table, header.l1_table, header.l1_size.into())?;
        Ok(Self::with_data(file, header, l1.into_iter().map(L1Entry).collect(), data))
    }

    /// Opens an image as well whose L1 or snapshot table is out of bounds or whose refcount table is missing: what a
    /// [check](crate::check()) names and a [repair](crate::repair()) mends.
    pub fn open_damaged(
        storage: Arc<dyn HostStorage>,
        name: impl Into<String>,
        data: Option<Arc<dyn HostStorage>>,
    ) -> Result<Self, Error> {
        let file = ImageFile { storage, name: name.into().into() };
        let header = Header::read_damaged(&file)?;
        let mut l1 = vec![0; in_memory(u64::from(header.l1_size) * 8)];
        file.read_padded(&mut l1, header.l1_table)?;
        Ok(Self::with_data(file, header, words(&l1).map(L1Entry).collect(), data))
    }

    fn with_data(file: ImageFile, header: Header, l1: Vec<L1Entry>, data: Option<Arc<dyn HostStorage>>) -> Self {
        let data = match header.has_data_file() {
            true => data.map(|storage| ImageFile { storage, name: file.name.clone() }),
            false => Some(file.clone()),
        };
        Self::with_tables(file, data, header, l1)
    }

    /// The disk as an internal snapshot has it, by the snapshot's index in the table.
    pub fn at_snapshot(&self, index: usize) -> Result<Self, Error> {
        let snapshots = self.snapshots()?;
        let snapshot = snapshots.get(index).ok_or_else(|| Error::InvalidOption {
            image: self.name().to_owned(),
            option: "the snapshot's index",
            value: index as u64,
            allowed: 0..=(snapshots.len() as u64).saturating_sub(1),
        })?;
        let place = Place::SnapshotL1Table(index as u64);
        let mut header = self.header.clone();
        header.size = snapshot.disk_size.unwrap_or(header.size);
        (header.l1_table, header.l1_size) = (snapshot.l1_table, snapshot.l1_size);
        header.check_l1(place).map_err(|what| self.file.corrupt(what))?;
        let l1 = self.file.read_table(place, header.l1_table, header.l1_size.into())?;
        Ok(self.with_l1(header, l1.into_iter().map(L1Entry).collect()))
    }

    /// The same file seen through another header and L1 table.
    pub(crate) fn with_l1(&self, header: Header, l1: Vec<L1Entry>) -> Self {
        Self::with_tables(self.file.clone(), self.data.clone(), header, l1)
    }

    /// The same tables on a disk of another size in bytes: what they map beyond it is out of reach, and what they do not map
    /// is unallocated.
    #[must_use]
    pub fn with_size(&self, size: u64) -> Self {
        self.with_l1(Header { size, ..self.header.clone() }, self.l1.clone())
    }

    fn with_tables(file: ImageFile, data: Option<ImageFile>, header: Header, l1: Vec<L1Entry>) -> Self {
        Self {
            file_size: file.storage.size(),
            repeated: repeated_tables(&l1),
            l2: std::iter::repeat_with(L2Slot::new).take(l1.len()).collect(),
            l1,
            cache: ClusterCache::new(header.cluster_bits),
            header,
            file,
            data,
        }
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file that the image lives in.
    #[must_use]
    pub fn storage(&self) -> &Arc<dyn HostStorage> {
        &self.file.storage
    }

    /// The file that [`MappingKind::Data`] lies in: the external data file, or the image's own where there is none.
    ///
    /// Fails where the guest's disk cannot be read: without the data file, or encrypted.
    pub fn data_storage(&self) -> Result<&Arc<dyn HostStorage>, Error> {
        Ok(&self.data_file()?.storage)
    }

    pub(crate) fn data_file(&self) -> Result<&ImageFile, Error> {
        self.refuse_encrypted()?;
        if self.header.data_file_raw() && !self.header.has_data_file() {
            let problem = "it calls the data file raw, but there is none";
            return Err(self.file.corrupt(Corruption::Malformed { place: Place::Header, problem }));
        }
        self.data.as_ref().ok_or_else(|| Error::DataFileMissing { image: self.name().to_owned() })
    }

    /// What an encrypted image does not store reads as zeroes, which must not be taken for an empty disk.
    fn refuse_encrypted(&self) -> Result<(), Error> {
        match self.header.encryption {
            Some(encryption) => Err(self.file.unsupported(format!("{} encryption", encryption.name().to_uppercase()))),
            None => Ok(()),
        }
    }

    /// What errors call the image.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.file.name
    }

    /// Cluster size in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.header.cluster_bits.size()
    }

    /// How the image's compressed clusters are compressed.
    #[must_use]
    pub fn compression(&self) -> CompressionType {
        self.header.compression
    }

    /// The longest run from `range.start` that is stored in one way: data in one piece of the file, or a single compressed
    /// cluster. `range`, in guest bytes, must not be empty and must lie on the disk.
    pub fn mapping(&self, range: Range<u64>) -> Result<Mapping, Error> {
        self.refuse_encrypted()?;
        mapping::find(self, range)
    }

    /// The front of a range that is [unallocated](crate::MappingKind::Unallocated), and where it would lie in the file if that has
    /// a place for it: with extended L2 entries a cluster gets its place as a whole.
    pub fn reserved(&self, range: Range<u64>) -> Result<(Range<u64>, Option<HostOffset>), Error> {
        if self.header.extended_l2() { mapping::find_reserved(self, range) } else { Ok((range, None)) }
    }

    /// Clusters of the file that count as used; no more than `limit` are counted.
    pub fn used_clusters(&self, limit: u64) -> Result<u64, Error> {
        refcount::count_used(&self.file, &self.header, limit)
    }

    /// The internal snapshots, in the table's order.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, Error> {
        Ok(snapshot::read_table(&self.file, &self.header)?.0)
    }

    /// The persistent dirty bitmaps, in the directory's order; none if some writer did not keep them consistent.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>, Error> {
        Ok(BitmapDirectory::read(&self.file, &self.header)?.map_or_else(Vec::new, |directory| directory.bitmaps))
    }

    /// The bits of the persistent dirty bitmap called `name`, which must be consistent.
    pub fn bitmap_contents(&self, name: &str) -> Result<BitmapContents, Error> {
        let bitmaps = self.bitmaps()?;
        let Some(bitmap) = bitmaps.iter().find(|bitmap| bitmap.name == name) else {
            return Err(bitmap::refused(&self.file, name, BitmapRefusal::NotFound));
        };
        bitmap::read_contents(&self.file, self.header.cluster_bits, self.header.size, bitmap)
    }

    pub(crate) fn file(&self) -> &ImageFile {
        &self.file
    }

    pub(crate) fn l1(&self) -> &[L1Entry] {
        &self.l1
    }

    pub(crate) fn read_l2(&self, index: u64, offset: HostOffset) -> Result<Box<[L2Entry]>, Error> {
        let bits = self.header.cluster_bits;
        if bits.offset_within(offset.0) != 0 {
            return Err(self.file.corrupt(Corruption::Misaligned { place: Place::L1Entry(index), offset }));
        }
        let bytes = self.file.read_structure(Place::L2Table(index), offset, bits.size())?;
        Ok(self.header.l2_format().decode(&bytes))
    }

    /// Fills `buf` with what `mapping`, which is as long, stands for; unallocated is zero.
    pub(crate) fn read_mapping(&self, buf: &mut [u8], mapping: &Mapping) -> Result<(), Error> {
        let data = self.data_file()?;
        match mapping.kind {
            MappingKind::Unallocated | MappingKind::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            MappingKind::Data { host } => data.read_padded(buf, host),
            MappingKind::Compressed { host, len } => self.read_compressed(buf, &mapping.range, host, len),
        }
    }

    fn read_compressed(&self, buf: &mut [u8], range: &Range<u64>, host: HostOffset, len: u64) -> Result<(), Error> {
        let bits = self.header.cluster_bits;
        let guest = bits.guest_offset(bits.guest_cluster(GuestOffset(range.start)));
        if buf.len() == bits.buffer_len() {
            return self.decompress(buf, guest, host, len);
        }
        let part = within_cluster(bits, range);
        if let Some(cluster) = self.cache.get(host) {
            buf.copy_from_slice(&cluster[part]);
            return Ok(());
        }
        let mut cluster = vec![0; bits.buffer_len()];
        self.decompress(&mut cluster, guest, host, len)?;
        buf.copy_from_slice(&cluster[part]);
        self.cache.put(host, cluster.into());
        Ok(())
    }

    fn decompress(&self, cluster: &mut [u8], guest: GuestOffset, host: HostOffset, len: u64) -> Result<(), Error> {
        let mut compressed = vec![0; in_memory(len)];
        self.file.read(&mut compressed, host)?;
        codec::decompress(self.header.compression, &compressed, cluster).map_err(|error| {
            let place = Place::CompressedData(guest);
            self.file.corrupt(Corruption::Undecodable { place, problem: error.to_string() })
        })
    }
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").field("name", &self.file.name).field("header", &self.header).finish_non_exhaustive()
    }
}

impl L2Tables for Layer {
    fn header(&self) -> &Header {
        &self.header
    }

    fn file(&self) -> &ImageFile {
        &self.file
    }

    fn host_end(&self) -> u64 {
        self.file_size
    }

    fn l2_table(&self, l1_index: u64) -> Result<Option<&[L2Entry]>, Error> {
        let index = in_memory(l1_index);
        let (Some(entry), Some(slot)) = (self.l1.get(index), self.l2.get(index)) else {
            return Ok(None);
        };
        let Some(offset) = entry.l2_table() else {
            return Ok(None);
        };
        if let Some(table) = slot.get() {
            return Ok(Some(table));
        }
        if let Ok(found) = self.repeated.binary_search_by_key(&l1_index, |&(index, _)| index) {
            let (first, second) = (Place::L2Table(self.repeated[found].1), Place::L2Table(l1_index));
            return Err(self.file.corrupt(Corruption::Overlap { first, second, offset }));
        }
        // Two threads may both read the table; one copy stays.
        let table = self.read_l2(l1_index, offset)?;
        Ok(Some(slot.get_or_init(|| table)))
    }
}

impl BlockRead for Layer {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = buf;
        let mut at = offset;
        while !rest.is_empty() {
            let mapping = self.mapping(at..at.saturating_add(rest.len() as u64))?;
            let (part, tail) = rest.split_at_mut(in_memory(mapping.range.end - at));
            self.read_mapping(part, &mapping)?;
            (rest, at) = (tail, mapping.range.end);
        }
        Ok(())
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        self.refuse_encrypted()?;
        Ok(extent(self, range)?)
    }
}

/// The L1 entries whose L2 table an earlier entry has, in order, each with the first such entry.
fn repeated_tables(l1: &[L1Entry]) -> Vec<(u64, u64)> {
    let tables = (0..).zip(l1).filter_map(|(index, entry)| Some((entry.l2_table()?, index)));
    let mut tables: Vec<(HostOffset, u64)> = tables.collect();
    tables.sort_unstable();
    let same_table = tables.chunk_by(|(one, _), (next, _)| one == next);
    let mut repeated: Vec<(u64, u64)> =
        same_table.flat_map(|same| same[1..].iter().map(|&(_, index)| (index, same[0].1))).collect();
    repeated.sort_unstable();
    repeated
}

/// The run of one [`ExtentKind`](qtk_block::ExtentKind) from `range.start`, wherever its pieces are stored.
pub(crate) fn extent(tables: &impl L2Tables, range: Range<u64>) -> Result<Extent, Error> {
    let first = mapping::find(tables, range.clone())?;
    let kind = first.kind.extent_kind();
    let mut end = first.range.end;
    while end < range.end
        && let Ok(next) = mapping::find(tables, end..range.end)
        && next.kind.extent_kind() == kind
    {
        end = next.range.end;
    }
    Ok(Extent { range: range.start..end, kind })
}
