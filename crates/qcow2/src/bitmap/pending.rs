use super::directory::{self, DirectoryEntry, MAX_BITMAPS, MAX_NAME};
use super::read::{TableEntry, read_contents, read_table, refused};
use super::{Bitmap, BitmapContents, BitmapDirectory, BitmapRefusal, NewBitmap};
use crate::error::{Error, Place};
use crate::extension::BitmapsExtension;
use crate::file::{ImageFile, table_bytes};
use crate::header::Header;
use crate::mapping::L2Tables;
use crate::transaction::State;
use crate::types::{HostOffset, Version, in_memory};

/// Most bytes that the bits of one bitmap may take.
const MAX_BITS_LEN: u64 = 0x2000_0000;

/// The bitmaps as a transaction has them.
#[derive(Debug)]
pub(crate) struct PendingBitmaps {
    entries: Vec<Pending>,
    stored: Option<BitmapsExtension>,
    /// What stored bits describe.
    disk_size: u64,
    changed: bool,
}

#[derive(Debug)]
struct Pending {
    entry: DirectoryEntry,
    /// The bits, once they differ from the stored ones.
    contents: Option<BitmapContents>,
}

impl PendingBitmaps {
    /// The bitmaps as committed.
    pub(crate) fn new(directory: Option<BitmapDirectory>, header: &Header) -> Self {
        let stored = directory.as_ref().map(|directory| directory.extension);
        let entries = directory.map_or_else(Vec::new, |directory| directory.entries);
        let entries = entries.into_iter().map(|entry| Pending { entry, contents: None }).collect();
        Self { entries, stored, disk_size: header.size, changed: false }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(crate) fn list(&self) -> impl Iterator<Item = &Bitmap> {
        self.entries.iter().map(|pending| &pending.entry.bitmap)
    }

    /// Whether a commit has something to store.
    pub(crate) fn is_changed(&self) -> bool {
        self.changed
    }

    /// Whether writes must be recorded in some bitmap.
    pub(crate) fn records_writes(&self) -> bool {
        self.list().any(|bitmap| bitmap.auto && !bitmap.in_use)
    }

    /// Fails if some bitmap cannot follow the disk to another size.
    pub(crate) fn check_resizable(&self, file: &ImageFile) -> Result<(), Error> {
        match self.list().find(|bitmap| bitmap.in_use) {
            Some(bitmap) => Err(refused(file, &bitmap.name, BitmapRefusal::Inconsistent)),
            None => Ok(()),
        }
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.list().position(|bitmap| bitmap.name == name)
    }
}

/// The granularity that QEMU gives a bitmap where none is asked for, in bytes.
fn default_granularity(header: &Header) -> u64 {
    header.cluster_bits.size().clamp(4096, 65536)
}

/// Why an image cannot have a new bitmap, if it cannot.
fn obstacle(pending: &PendingBitmaps, header: &Header, name: &str, granularity: u64) -> Option<BitmapRefusal> {
    if name.is_empty() {
        Some(BitmapRefusal::EmptyName)
    } else if !directory::granularity_is_legal(granularity) {
        Some(BitmapRefusal::Granularity(granularity))
    } else if header.version < Version::V3 {
        Some(BitmapRefusal::Version2)
    } else if name.len() > MAX_NAME {
        Some(BitmapRefusal::NameTooLong { max: MAX_NAME })
    } else if header.size.div_ceil(granularity).div_ceil(8) > MAX_BITS_LEN {
        Some(BitmapRefusal::TooLarge)
    } else if header.size == 0 {
        Some(BitmapRefusal::EmptyDisk)
    } else if pending.entries.len() >= MAX_BITMAPS {
        Some(BitmapRefusal::TooMany)
    } else {
        pending.position(name).map(|_| BitmapRefusal::Exists)
    }
}

impl State {
    pub(super) fn add_bitmap(&mut self, new: &NewBitmap) -> Result<(), Error> {
        let header = self.header();
        let granularity = new.granularity.unwrap_or_else(|| default_granularity(header));
        if let Some(refusal) = obstacle(&self.bitmaps, header, &new.name, granularity) {
            return Err(refused(self.file(), &new.name, refusal));
        }
        let contents = BitmapContents::new(header.size, granularity, header.cluster_bits.buffer_len());
        self.record_dirty()?;
        let entry = DirectoryEntry::new(Bitmap {
            name: new.name.clone(),
            granularity,
            in_use: false,
            auto: new.enabled,
            table: HostOffset(0),
            table_size: 0,
        });
        self.bitmaps.entries.push(Pending { entry, contents: Some(contents) });
        self.bitmaps.changed = true;
        self.record_dirty()
    }

    pub(crate) fn remove_bitmap(&mut self, name: &str) -> Result<(), Error> {
        let index = self.find_bitmap(name)?;
        let Pending { entry, .. } = self.bitmaps.entries.remove(index);
        self.bitmaps.changed = true;
        self.release_bitmap(Place::Bitmap(index as u64), &entry.bitmap)
    }

    /// Lets `change` have the bits of a consistent bitmap.
    pub(super) fn change_bits(&mut self, name: &str, change: impl FnOnce(&mut BitmapContents)) -> Result<(), Error> {
        let index = self.find_consistent_bitmap(name)?;
        self.record_dirty()?;
        let mut contents = self.take_contents(index)?;
        change(&mut contents);
        self.set_contents(index, contents);
        Ok(())
    }

    pub(super) fn enable_bitmap(&mut self, name: &str, enabled: bool) -> Result<(), Error> {
        let index = self.find_consistent_bitmap(name)?;
        self.record_dirty()?;
        if let Some(pending) = self.bitmaps.entries.get_mut(index) {
            pending.entry.bitmap.auto = enabled;
        }
        self.bitmaps.changed = true;
        self.record_dirty()
    }

    pub(super) fn bitmap_contents(&self, name: &str) -> Result<BitmapContents, Error> {
        let index = self.find_consistent_bitmap(name)?;
        let mut contents = self.contents(index)?;
        if self.bitmaps.list().nth(index).is_some_and(|bitmap| bitmap.auto) {
            self.dirty_ranges().into_iter().for_each(|range| contents.mark(range));
        }
        Ok(contents)
    }

    /// Brings the enabled bitmaps up to date and stores what has changed; then they are consistent. With `all`, stores the
    /// others anew as well, as QEMU does whenever it has had an image open for writing, so that the file is laid out alike.
    pub(crate) fn write_bitmaps(&mut self, all: bool) -> Result<(), Error> {
        self.record_dirty()?;
        self.resize_bitmaps()?;
        let anew = if all { self.consistent_bitmaps(|_| true) } else { Vec::new() };
        if !self.bitmaps.changed && anew.is_empty() {
            return Ok(());
        }
        for index in 0..self.bitmaps.entries.len() {
            if anew.binary_search(&index).is_ok() {
                let contents = self.take_contents(index)?;
                self.set_contents(index, contents);
            }
            self.store_bitmap(index)?;
        }
        if let Some(old) = self.bitmaps.stored.take() {
            self.release(Place::BitmapDirectory, HostOffset(old.directory_offset), old.directory_size)?;
        }
        if !self.bitmaps.is_empty() {
            let entries: Vec<DirectoryEntry> =
                self.bitmaps.entries.iter().map(|pending| pending.entry.clone()).collect();
            let bytes = directory::encode(&entries);
            let offset = self.store(Place::BitmapDirectory, &bytes)?;
            let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
            self.bitmaps.stored =
                Some(BitmapsExtension { count, directory_size: bytes.len() as u64, directory_offset: offset.0 });
        }
        let stored = self.bitmaps.stored;
        self.header_mut().set_bitmaps(stored);
        self.bitmaps.changed = false;
        Ok(())
    }

    pub(super) fn merge_bitmap(&mut self, name: &str, source: &BitmapContents) -> Result<(), Error> {
        let destination = self.header().size;
        if source.disk_size() != destination {
            let refusal = BitmapRefusal::DifferentSizes { destination, source_size: source.disk_size() };
            return Err(refused(self.file(), name, refusal));
        }
        self.change_bits(name, |contents| contents.merge(source))
    }

    fn find_bitmap(&self, name: &str) -> Result<usize, Error> {
        self.bitmaps.position(name).ok_or_else(|| refused(self.file(), name, BitmapRefusal::NotFound))
    }

    fn find_consistent_bitmap(&self, name: &str) -> Result<usize, Error> {
        let index = self.find_bitmap(name)?;
        match self.bitmaps.list().nth(index) {
            Some(bitmap) if !bitmap.in_use => Ok(index),
            _ => Err(refused(self.file(), name, BitmapRefusal::Inconsistent)),
        }
    }

    /// The bits of a bitmap as they were last recorded, to be changed.
    fn take_contents(&mut self, index: usize) -> Result<BitmapContents, Error> {
        let pending = self.bitmaps.entries.get_mut(index);
        let taken = pending.and_then(|pending| pending.contents.take());
        taken.map_or_else(|| self.contents(index), Ok)
    }

    fn contents(&self, index: usize) -> Result<BitmapContents, Error> {
        match self.bitmaps.entries.get(index) {
            Some(Pending { contents: Some(contents), .. }) => Ok(contents.clone()),
            Some(Pending { entry, contents: None }) => {
                read_contents(self.file(), self.header().cluster_bits, self.bitmaps.disk_size, &entry.bitmap)
            }
            None => Err(refused(self.file(), "", BitmapRefusal::NotFound)),
        }
    }

    fn set_contents(&mut self, index: usize, contents: BitmapContents) {
        if let Some(pending) = self.bitmaps.entries.get_mut(index) {
            pending.contents = Some(contents);
            self.bitmaps.changed = true;
        }
    }

    /// Indexes of the bitmaps that follow the disk.
    fn consistent_bitmaps(&self, also: impl Fn(&Bitmap) -> bool) -> Vec<usize> {
        let bitmaps = self.bitmaps.list().enumerate();
        bitmaps.filter(|(_, bitmap)| !bitmap.in_use && also(bitmap)).map(|(index, _)| index).collect()
    }

    /// Marks in the enabled bitmaps what the transaction has changed since this was last done.
    fn record_dirty(&mut self) -> Result<(), Error> {
        let dirty = self.take_dirty_ranges(self.bitmaps.records_writes());
        let recorders = if dirty.is_empty() { Vec::new() } else { self.consistent_bitmaps(|bitmap| bitmap.auto) };
        for index in recorders {
            let mut contents = self.take_contents(index)?;
            // The disk may have grown.
            contents.resize(contents.disk_size().max(self.header().size));
            dirty.iter().for_each(|range| contents.mark(range.clone()));
            self.set_contents(index, contents);
        }
        Ok(())
    }

    fn resize_bitmaps(&mut self) -> Result<(), Error> {
        let size = self.header().size;
        if size == self.bitmaps.disk_size {
            return Ok(());
        }
        self.bitmaps.check_resizable(self.file())?;
        for index in self.consistent_bitmaps(|_| true) {
            let mut contents = self.take_contents(index)?;
            contents.resize(size);
            if contents.byte_len() > MAX_BITS_LEN || size == 0 {
                let name = self.bitmaps.list().nth(index).map_or("", |bitmap| &bitmap.name);
                let refusal = if size == 0 { BitmapRefusal::EmptyDisk } else { BitmapRefusal::TooLarge };
                return Err(refused(self.file(), name, refusal));
            }
            self.set_contents(index, contents);
        }
        self.bitmaps.disk_size = size;
        Ok(())
    }

    /// Writes the bits of a bitmap to new clusters, if they have changed.
    fn store_bitmap(&mut self, index: usize) -> Result<(), Error> {
        let place = Place::Bitmap(index as u64);
        let Some((old, contents)) = self.bitmaps.entries.get_mut(index).and_then(|pending| {
            let contents = pending.contents.take()?;
            Some((pending.entry.bitmap.clone(), contents))
        }) else {
            return Ok(());
        };
        self.release_bitmap(place, &old)?;
        let mut table = vec![0; in_memory(contents.page_count())];
        for (page, bytes) in contents.stored_pages() {
            let offset = self.store(place, &bytes)?;
            if let Some(entry) = table.get_mut(in_memory(page)) {
                *entry = offset.0;
            }
        }
        let offset = self.store(place, &table_bytes(table.iter().copied()))?;
        if let Some(pending) = self.bitmaps.entries.get_mut(index) {
            pending.entry.bitmap.table = offset;
            pending.entry.bitmap.table_size = u32::try_from(table.len()).unwrap_or(u32::MAX);
        }
        Ok(())
    }

    /// Gives up the clusters of a bitmap, if it has any yet.
    fn release_bitmap(&mut self, place: Place, bitmap: &Bitmap) -> Result<(), Error> {
        if bitmap.table_size == 0 {
            return Ok(());
        }
        let cluster_bits = self.header().cluster_bits;
        for entry in read_table(self.file(), cluster_bits, bitmap)? {
            if let TableEntry::Stored(offset) = entry {
                self.release_checked(place, offset, cluster_bits.size())?;
            }
        }
        self.release_checked(place, bitmap.table, u64::from(bitmap.table_size) * 8)
    }
}
