//! FAT12, FAT16 and FAT32, for reading: what an EFI system partition holds.
//!
//! A reader of our own, because it is small, shares one device without a cursor, and follows every cluster chain for a
//! bounded number of steps; `hadris-fat` wants `Read + Seek` to itself.
//!
//! Layout as in Microsoft's "FAT: General Overview of On-Disk Format" 1.03.

mod boot;
mod dir;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use qtk_block::BlockRead;
use qtk_ext4::Timestamp;

use boot::{Geometry, Width};
pub use dir::Entry;
use dir::{RawEntry, SLOT, Slots};

/// Why a FAT volume, or a file on it, cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device failed.
    #[error("cannot read at byte {offset}")]
    Io {
        /// Byte offset on the volume.
        offset: u64,
        /// What the device said.
        source: io::Error,
    },
    /// A structure contradicts itself or the volume's size.
    #[error("the volume is corrupt at byte {offset}: {problem}; fsck.vfat may repair it")]
    Corrupt {
        /// Byte offset on the volume.
        offset: u64,
        /// What is wrong there.
        problem: &'static str,
    },
    /// The boot sector does not describe a FAT volume.
    #[error("no FAT file system here")]
    NotFat,
    /// A directory was wanted.
    #[error("not a directory")]
    NotADirectory,
    /// A file was wanted.
    #[error("is a directory")]
    IsADirectory,
}

/// A file or directory of a volume: the byte offset of its short directory entry, 0 for the root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(u64);

impl Handle {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    /// A number that tells this file from all others of its volume. Never 0.
    #[must_use]
    pub fn number(self) -> u64 {
        (self.0 / SLOT).saturating_add(1)
    }
}

/// What a directory entry says of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Whether it is a directory.
    pub is_dir: bool,
    /// The read-only attribute.
    pub read_only: bool,
    /// Size in bytes; 0 for a directory.
    pub size: u64,
    /// Last change, its local time taken as UTC.
    pub modified: Timestamp,
}

/// A FAT volume, open for reading.
pub struct Fat {
    device: Arc<dyn BlockRead>,
    geometry: Geometry,
}

impl std::fmt::Debug for Fat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fat").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

/// Whether the device's boot sector describes a FAT volume.
pub(crate) fn is_fat(device: &dyn BlockRead) -> io::Result<bool> {
    Ok(Geometry::read(device)?.is_some())
}

impl Fat {
    /// Opens the volume that fills `device`.
    pub fn open(device: Arc<dyn BlockRead>) -> Result<Self, Error> {
        let geometry = Geometry::read(&device).map_err(|source| Error::Io { offset: 0, source })?;
        let geometry = geometry.ok_or(Error::NotFat)?;
        Ok(Self { device, geometry })
    }

    /// The serial number as `blkid` prints it: `1234-ABCD`.
    #[must_use]
    pub fn uuid(&self) -> String {
        format!("{:04X}-{:04X}", self.geometry.serial >> 16, self.geometry.serial & 0xffff)
    }

    /// The label: the root directory's, else the boot sector's.
    pub fn label(&self) -> Result<Option<Vec<u8>>, Error> {
        let mut slots = Slots::new(self, self.extents_of(Handle::ROOT)?);
        while let Some((_, entry)) = slots.next_raw()? {
            if entry.is_label() {
                return Ok(Some(entry.label()));
            }
        }
        let label = self.geometry.label.trim_ascii_end();
        Ok((!label.is_empty() && label != b"NO NAME").then(|| label.to_vec()))
    }

    /// What is known of a file or directory.
    pub fn metadata(&self, handle: Handle) -> Result<Metadata, Error> {
        match self.entry(handle)? {
            Some(entry) => Ok(entry.metadata()),
            None => {
                Ok(Metadata { is_dir: true, read_only: false, size: 0, modified: Timestamp { seconds: 0, nanos: 0 } })
            }
        }
    }

    /// The entries of a directory, without `.` and `..`.
    pub fn read_dir(&self, dir: Handle) -> Result<Vec<Entry>, Error> {
        let mut slots = Slots::new(self, self.extents_of_directory(dir)?);
        let mut entries = Vec::new();
        while let Some(entry) = slots.next_entry()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// The entry of that name, without regard to case. Names are UTF-8.
    pub fn lookup(&self, dir: Handle, name: &[u8]) -> Result<Option<Handle>, Error> {
        let Ok(name) = std::str::from_utf8(name) else { return Ok(None) };
        let folded = name.to_lowercase();
        let mut slots = Slots::new(self, self.extents_of_directory(dir)?);
        while let Some(entry) = slots.next_entry()? {
            if entry.name.to_lowercase() == folded || entry.short_name.to_lowercase() == folded {
                return Ok(Some(entry.handle));
            }
        }
        Ok(None)
    }

    /// Fills `buf` from `offset` of a file; short only at its end.
    pub fn read_at(&self, file: Handle, buf: &mut [u8], offset: u64) -> Result<usize, Error> {
        let entry = self.entry(file)?.filter(|entry| !entry.metadata().is_dir).ok_or(Error::IsADirectory)?;
        let size = entry.metadata().size;
        let wanted = size.saturating_sub(offset).min(buf.len() as u64);
        let end = if wanted == 0 { 0 } else { offset.saturating_add(wanted) };
        let mut extents = self.chain(entry.first_cluster(self.geometry.width));
        let mut done = 0;
        let mut at = 0_u64;
        while at < end {
            let Some(extent) = extents.next(self)? else {
                return Err(Error::Corrupt { offset: file.0, problem: "the file's clusters end before its size does" });
            };
            let next = at.saturating_add(extent.end.saturating_sub(extent.start));
            if next > offset {
                let skipped = offset.saturating_sub(at);
                let from = extent.start.saturating_add(skipped);
                let len = next.min(end).saturating_sub(at.max(offset));
                // `len` is a part of `buf.len()`, which is a usize.
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                let Some(part) = buf.get_mut(done..).and_then(|rest| rest.get_mut(..len)) else { break };
                self.read_device(part, from)?;
                done = done.saturating_add(len);
            }
            at = next;
        }
        Ok(done)
    }

    fn read_device(&self, buf: &mut [u8], offset: u64) -> Result<(), Error> {
        self.device.read_at(buf, offset).map_err(|source| Error::Io { offset, source })
    }

    /// The raw entry behind a handle; `None` for the root directory, which has none.
    fn entry(&self, handle: Handle) -> Result<Option<RawEntry>, Error> {
        if handle == Handle::ROOT {
            return Ok(None);
        }
        let mut entry = RawEntry::default();
        self.read_device(entry.bytes_mut(), handle.0)?;
        Ok(Some(entry))
    }

    fn extents_of_directory(&self, dir: Handle) -> Result<Extents, Error> {
        if self.metadata(dir)?.is_dir { self.extents_of(dir) } else { Err(Error::NotADirectory) }
    }

    fn extents_of(&self, handle: Handle) -> Result<Extents, Error> {
        Ok(match self.entry(handle)? {
            Some(entry) => self.chain(entry.first_cluster(self.geometry.width)),
            None => match self.geometry.width {
                Width::Fat32 => self.chain(self.geometry.root_cluster),
                Width::Fat12 | Width::Fat16 => Extents::Fixed(Some(self.geometry.root.clone())),
            },
        })
    }

    fn chain(&self, first: u32) -> Extents {
        Extents::Chain(Chain { next: first, left: self.geometry.clusters, window: Vec::new(), window_at: 0 })
    }
}

/// Where a file or directory lies on the volume, piece by piece.
enum Extents {
    /// The root directory of FAT12 and FAT16.
    Fixed(Option<Range<u64>>),
    Chain(Chain),
}

impl Extents {
    fn next(&mut self, fat: &Fat) -> Result<Option<Range<u64>>, Error> {
        match self {
            Self::Fixed(range) => Ok(range.take()),
            Self::Chain(chain) => chain.next(fat),
        }
    }
}

/// A walk along the file allocation table.
struct Chain {
    next: u32,
    /// Clusters that may still come: a longer chain than the volume has clusters is a circle.
    left: u32,
    window: Vec<u8>,
    window_at: u64,
}

impl Chain {
    const WINDOW: u64 = 4096;
    const MAX_RUN: u64 = 1 << 20;

    /// The next run of clusters that lie one behind the other.
    fn next(&mut self, fat: &Fat) -> Result<Option<Range<u64>>, Error> {
        let Some(mut run) = self.step(fat)? else { return Ok(None) };
        while run.end.saturating_sub(run.start) < Self::MAX_RUN
            && fat.geometry.cluster(self.next).is_some_and(|range| range.start == run.end)
            && let Some(range) = self.step(fat)?
        {
            run.end = range.end;
        }
        Ok(Some(run))
    }

    fn step(&mut self, fat: &Fat) -> Result<Option<Range<u64>>, Error> {
        let cluster = self.next;
        let geometry = &fat.geometry;
        // A file without content has no cluster at all.
        if cluster == 0 || cluster >= geometry.width.end_of_chain() {
            return Ok(None);
        }
        let offset = geometry.entry_offset(cluster);
        let Some(range) = geometry.cluster(cluster) else {
            return Err(Error::Corrupt { offset, problem: "a chain leads to a cluster that the volume does not have" });
        };
        let left = self.left.checked_sub(1);
        self.left = left.ok_or(Error::Corrupt { offset, problem: "a chain of clusters runs in a circle" })?;
        let mut raw = [0; 4];
        for (at, byte) in (offset..).zip(raw.iter_mut().take(geometry.width.entry_bytes())) {
            *byte = self.table_byte(fat, at)?;
        }
        self.next = geometry.width.decode(u32::from_le_bytes(raw), cluster);
        Ok(Some(range))
    }

    fn table_byte(&mut self, fat: &Fat, offset: u64) -> Result<u8, Error> {
        let start = offset.checked_div(Self::WINDOW).unwrap_or(0).saturating_mul(Self::WINDOW);
        if self.window.is_empty() || self.window_at != start {
            let len = fat.device.size().saturating_sub(start).min(Self::WINDOW);
            self.window.resize(usize::try_from(len).unwrap_or(0), 0);
            fat.read_device(&mut self.window, start)?;
            self.window_at = start;
        }
        let at = usize::try_from(offset.saturating_sub(start)).unwrap_or(usize::MAX);
        self.window
            .get(at)
            .copied()
            .ok_or(Error::Corrupt { offset, problem: "the allocation table reaches past the volume's end" })
    }
}
