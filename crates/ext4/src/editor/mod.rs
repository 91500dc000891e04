//! Writing to a file system: changes of metadata wait in memory for a commit, file data goes straight to the device.

mod attributes;
mod blocks;
mod directory;
mod entries;
mod file;
mod inodes;
mod links;
mod map;
mod node;
mod placed;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use qtk_block::BlockWrite;

use crate::cache;
use crate::checksum;
use crate::error::{Error, Place, Result};
use crate::features::compat;
use crate::group::GroupDescriptor;
use crate::group_bitmap::BitmapKind;
use crate::inode::Inode;
use crate::journal::Journal;
use crate::metadata::Timestamp;
use crate::superblock::{SUPERBLOCK_OFFSET, Superblock};
use crate::{BlockNr, Ext4, GroupNr, Ino};
pub use attributes::SetAttributes;
use blocks::BlockRange;
pub(crate) use file::LARGE;
pub use node::{NewNode, NodeKind};
pub use placed::PlacedRun;

/// How an [`Editor`] works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EditOptions {
    /// The time of every change; the crate itself reads no clock.
    pub now: Timestamp,
}

impl EditOptions {
    /// Edits made at the time `now`.
    #[must_use]
    pub const fn new(now: Timestamp) -> Self {
        Self { now }
    }
}

/// A file system open for writing.
///
/// Nothing that readers of the device see as files changes before [`commit`](Self::commit): metadata waits in memory. The
/// content of files, and of a journal that had to be replayed, is written as it comes, so the device should be a
/// transaction or a copy that is thrown away unless the commit succeeds.
pub struct Editor {
    fs: Ext4,
    device: Arc<dyn BlockWrite>,
    options: EditOptions,
    /// Bitmaps whose checksum was found right, or that were changed since.
    checked: BTreeSet<(GroupNr, BitmapKind)>,
    changed_bitmaps: BTreeSet<(GroupNr, BitmapKind)>,
    superblock_changed: bool,
    /// Where the next search for blocks starts, by flexible group.
    cursors: BTreeMap<u32, BlockNr>,
    /// Blocks set aside for files that are being written, in order.
    reservations: BTreeMap<Ino, Vec<BlockRange>>,
    /// Bits of the block bitmaps that were cleared since the last commit.
    freed: Vec<(GroupNr, Range<u32>)>,
}

impl std::fmt::Debug for Editor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Editor").field("fs", &self.fs).finish_non_exhaustive()
    }
}

impl Editor {
    /// Opens the file system at the front of `device` for writing. A journal that was not played to its end is played now,
    /// and inodes left over by a crash are freed or truncated, as a mount would do.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the features that writing would not keep up; [`Error::Corrupt`] where the file system
    /// is marked as damaged or found to be.
    pub fn open(device: Arc<dyn BlockWrite>, options: EditOptions) -> Result<Self> {
        let fs = Ext4::load(device.clone())?;
        check_writable(&fs)?;
        let mut editor = if fs.superblock.needs_recovery() {
            let replayed = Journal::open(&fs)?.replay(&*device)?;
            if replayed.aborted {
                return Err(Error::corrupt(Place::Journal(0), "the journal was given up after an error"));
            }
            let mut fs = Ext4::load(device.clone())?;
            check_writable(&fs)?;
            fs.recount()?;
            fs.superblock.clear_needs_recovery();
            let mut editor = Self::over(fs, device, options);
            editor.superblock_changed = true;
            let empty = replayed.emptied;
            editor.fs.cache.modify(replayed.superblock, |block| block[..empty.len()].copy_from_slice(&empty))?;
            editor
        } else {
            refuse_stray_log(&fs)?;
            Self::over(fs, device, options)
        };
        check_structure(&editor.fs)?;
        editor.process_orphans()?;
        Ok(editor)
    }

    fn over(fs: Ext4, device: Arc<dyn BlockWrite>, options: EditOptions) -> Self {
        Self {
            fs,
            device,
            options,
            checked: BTreeSet::new(),
            changed_bitmaps: BTreeSet::new(),
            superblock_changed: false,
            cursors: BTreeMap::new(),
            reservations: BTreeMap::new(),
            freed: Vec::new(),
        }
    }

    /// The file system with all changes so far, for reading.
    #[must_use]
    pub fn fs(&self) -> &Ext4 {
        &self.fs
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.options.now
    }

    /// Writes every changed block once, the superblock last, and flushes the device. More edits and commits may follow.
    /// After an error the editor can only be dropped.
    pub fn commit(&mut self) -> Result<()> {
        self.release_all_reservations()?;
        self.seal_bitmaps()?;
        if self.superblock_changed || self.fs.cache.has_changes() {
            self.fs.superblock.set_write_time(self.now().seconds);
            self.fs.cache.write_back(&*self.device)?;
            cache::write(&*self.device, &self.fs.superblock.to_bytes(), SUPERBLOCK_OFFSET)?;
            // A block in the cache may hold the old superblock.
            self.fs.cache.forget(BlockNr(SUPERBLOCK_OFFSET / u64::from(self.fs.block_size())));
            self.superblock_changed = false;
        }
        self.device.flush().map_err(|source| Error::Io { operation: "flush", offset: 0, source })?;
        self.discard_freed()
    }

    fn seal_bitmaps(&mut self) -> Result<()> {
        let Some(seed) = self.fs.checksum_seed() else {
            self.changed_bitmaps.clear();
            return Ok(());
        };
        for (group, kind) in std::mem::take(&mut self.changed_bitmaps) {
            let descriptor = self.fs.group(group)?;
            let block = self.fs.block(kind.place(&descriptor))?;
            let sum = checksum::bitmap(seed, &block[..self.fs.checksummed_len(kind)]);
            self.modify_group(group, |descriptor| match kind {
                BitmapKind::Blocks => descriptor.set_block_bitmap_checksum(sum),
                BitmapKind::Inodes => descriptor.set_inode_bitmap_checksum(sum),
            })?;
        }
        Ok(())
    }

    /// A group's bitmap, checked when it is first used.
    fn bitmap(&mut self, group: GroupNr, kind: BitmapKind) -> Result<Arc<[u8]>> {
        let descriptor = self.fs.group(group)?;
        if self.checked.contains(&(group, kind)) {
            return self.fs.block(kind.place(&descriptor));
        }
        let block = self.fs.bitmap(group, &descriptor, kind)?;
        self.fs.check_bitmap(group, &descriptor, kind, &block)?;
        self.checked.insert((group, kind));
        Ok(block)
    }

    /// Changes a bitmap, which [`bitmap`](Self::bitmap) gave before.
    fn modify_bitmap(&mut self, group: GroupNr, kind: BitmapKind, edit: impl FnOnce(&mut [u8])) -> Result<()> {
        let place = kind.place(&self.fs.group(group)?);
        self.changed_bitmaps.insert((group, kind));
        self.fs.cache.modify(place, edit)
    }

    /// Writes a whole bitmap of a group that had none yet.
    fn put_bitmap(&mut self, group: GroupNr, kind: BitmapKind, bytes: Vec<u8>) -> Result<()> {
        let place = kind.place(&self.fs.group(group)?);
        self.checked.insert((group, kind));
        self.changed_bitmaps.insert((group, kind));
        self.fs.cache.put(place, bytes);
        Ok(())
    }

    fn modify_group(&mut self, group: GroupNr, edit: impl FnOnce(&mut GroupDescriptor)) -> Result<()> {
        let mut descriptor = self.fs.group(group)?;
        edit(&mut descriptor);
        let (block, place) = self.fs.descriptor_place(group);
        let mut bytes = self.fs.block(block)?[place.clone()].to_vec();
        descriptor.store(&mut bytes);
        if let Some(checksum) = self.fs.descriptor_checksum(group, &bytes) {
            descriptor.set_checksum(checksum);
            descriptor.store(&mut bytes);
        }
        self.fs.cache.modify(block, |block| block[place].copy_from_slice(&bytes))
    }

    pub(crate) fn modify_superblock(&mut self, edit: impl FnOnce(&mut Superblock)) {
        edit(&mut self.fs.superblock);
        self.superblock_changed = true;
    }

    /// Replaces a metadata block.
    pub(crate) fn put_metadata(&mut self, place: BlockNr, bytes: Vec<u8>) {
        self.fs.cache.put(place, bytes);
    }

    /// Stores an inode, checksummed.
    pub(crate) fn put_inode(&mut self, inode: &mut Inode) -> Result<()> {
        let bytes = inode.seal(self.fs.checksum_seed());
        let (block, place) = self.fs.inode_place(inode.ino())?;
        self.fs.cache.modify(block, |block| block[place].copy_from_slice(&bytes))
    }
}

/// Refuses a log that the superblock says nothing of: e2fsck would offer to play it, over the edits.
fn refuse_stray_log(fs: &Ext4) -> Result<()> {
    if fs.superblock.journal().is_none() || Journal::open(fs)?.is_empty() {
        return Ok(());
    }
    let problem = "the journal holds changes, but the superblock does not say that they are to be replayed";
    Err(Error::corrupt(Place::Journal(0), problem))
}

/// Refuses damage that any edit could make worse. What lies further down is checked where it is touched.
fn check_structure(fs: &Ext4) -> Result<()> {
    for group in (0..fs.geometry().groups).map(GroupNr) {
        fs.group(group)?;
    }
    fs.directory_inode(Ino::ROOT).map(drop)
}

fn check_writable(fs: &Ext4) -> Result<()> {
    let features = fs.superblock.features();
    features.check_writable()?;
    if features.has_compat(compat::HAS_JOURNAL) && fs.superblock.journal().is_none() {
        return Err(Error::unsupported_for_writing("an external journal"));
    }
    if !features.has_compat(compat::HAS_JOURNAL) && !fs.superblock.was_unmounted() {
        return Err(Error::corrupt(Place::Superblock, "the file system has no journal and was not unmounted"));
    }
    if fs.superblock.has_errors() {
        return Err(Error::corrupt(Place::Superblock, "the file system is marked as damaged"));
    }
    Ok(())
}
