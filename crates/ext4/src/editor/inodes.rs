//! Allocating and freeing inodes.

use super::Editor;
use crate::error::{Error, Place, Result};
use crate::group::{GroupDescriptor, INODE_UNINIT};
use crate::group_bitmap::BitmapKind;
use crate::inode::{Inode, Time};
use crate::metadata::FileType;
use crate::{GroupNr, Ino, bitmap};

impl Editor {
    /// Takes a free inode near `parent`, with one link, an empty block map and all times set to now. The caller stores it.
    pub(crate) fn allocate_inode(&mut self, parent: Ino, file_type: FileType, permissions: u16) -> Result<Inode> {
        let group = self.group_with_free_inode(parent)?;
        let (ino, used_before) = self.take_inode(group, file_type == FileType::Directory)?;
        let generation = if used_before { self.fs.inode(ino)?.generation().wrapping_add(1) } else { 0 };
        let geometry = self.fs.geometry();
        let want_extra = self.fs.superblock.want_extra_isize();
        let mut inode = Inode::fresh(ino, geometry.inode_size, want_extra, file_type.mode() | permissions & 0o7777);
        inode.set_generation(generation);
        inode.set_creation_time(self.now());
        for time in [Time::Access, Time::Change, Time::Modification] {
            inode.set_time(time, self.now());
        }
        if matches!(file_type, FileType::Regular | FileType::Directory) {
            self.clear_map(&mut inode);
        }
        Ok(inode)
    }

    /// The parent's group or the nearest behind it; a group whose inode table was never used only if no other is left.
    fn group_with_free_inode(&self, parent: Ino) -> Result<GroupNr> {
        let groups = self.fs.geometry().groups;
        let first = self.fs.geometry().group_of_inode(parent).0.min(groups - 1);
        let mut unused = None;
        for group in (first..groups).chain(0..first).map(GroupNr) {
            let descriptor = self.fs.group(group)?;
            if descriptor.free_inodes() == 0 {
                continue;
            }
            if !self.is_unused(&descriptor) {
                return Ok(group);
            }
            unused = unused.or(Some(group));
        }
        unused.ok_or(Error::NoSpace("inodes"))
    }

    fn is_unused(&self, descriptor: &GroupDescriptor) -> bool {
        self.fs.has_group_flags() && descriptor.has(INODE_UNINIT)
    }

    /// Marks the group's first free inode as used, and says whether it may have been used before.
    fn take_inode(&mut self, group: GroupNr, is_dir: bool) -> Result<(Ino, bool)> {
        let corrupt = |problem| Error::corrupt(Place::Group(group), problem);
        let geometry = *self.fs.geometry();
        if self.is_unused(&self.fs.group(group)?) {
            let mut bytes = vec![0; geometry.block_len()];
            bitmap::fill(&mut bytes, geometry.inodes_per_group..geometry.block_size * 8, true);
            self.put_bitmap(group, BitmapKind::Inodes, bytes)?;
            self.modify_group(group, |descriptor| descriptor.clear(INODE_UNINIT))?;
        }
        let reserved = if group.0 == 0 { geometry.first_ino.saturating_sub(1) } else { 0 };
        let bytes = self.bitmap(group, BitmapKind::Inodes)?;
        let bit = bitmap::find(&bytes, reserved..geometry.inodes_per_group, false);
        let ino = Ino::new(group.0 * geometry.inodes_per_group + bit + 1)
            .filter(|_| bit < geometry.inodes_per_group)
            .ok_or_else(|| corrupt("its number of free inodes does not fit its bitmap"))?;
        let descriptor = self.fs.group(group)?;
        let never_used = if self.fs.has_group_flags() { descriptor.itable_unused() } else { 0 };
        let used_before = bit.saturating_add(never_used) < geometry.inodes_per_group;
        self.modify_bitmap(group, BitmapKind::Inodes, |bytes| bitmap::fill(bytes, bit..bit + 1, true))?;
        self.modify_group(group, |descriptor| {
            descriptor.set_free_inodes(descriptor.free_inodes().saturating_sub(1));
            descriptor.set_itable_unused(never_used.min(geometry.inodes_per_group - bit - 1));
            if is_dir {
                descriptor.set_used_dirs(descriptor.used_dirs().saturating_add(1));
            }
        })?;
        let left = self.fs.free_inodes().saturating_sub(1);
        self.modify_superblock(|superblock| superblock.set_free_inodes(left));
        Ok((ino, used_before))
    }

    /// Frees an inode that has no names left, with its blocks and attributes.
    pub(crate) fn free_inode(&mut self, inode: &mut Inode) -> Result<()> {
        let ino = inode.ino();
        self.release_reservation(ino)?;
        if self.has_blocks(inode) {
            self.free_content(inode)?;
        }
        self.release_xattr_block(inode)?;
        let geometry = *self.fs.geometry();
        let group = geometry.group_of_inode(ino);
        let bit = (ino.get() - 1) % geometry.inodes_per_group;
        let bytes = self.bitmap(group, BitmapKind::Inodes)?;
        if bitmap::find(&bytes, bit..bit + 1, true) != bit {
            return Err(Error::corrupt(Place::Inode(ino), "the inode is in use, but marked as free"));
        }
        let is_dir = inode.is(FileType::Directory);
        self.modify_bitmap(group, BitmapKind::Inodes, |bytes| bitmap::fill(bytes, bit..bit + 1, false))?;
        self.modify_group(group, |descriptor| {
            descriptor.set_free_inodes(descriptor.free_inodes().saturating_add(1));
            if is_dir {
                descriptor.set_used_dirs(descriptor.used_dirs().saturating_sub(1));
            }
        })?;
        let left = self.fs.free_inodes().saturating_add(1);
        self.modify_superblock(|superblock| superblock.set_free_inodes(left));
        // Nothing of a removed file stays behind but the generation, by which its number can be used again.
        let mut empty = Inode::fresh(ino, geometry.inode_size, 0, 0);
        empty.set_links(0);
        empty.set_generation(inode.generation());
        self.put_inode(&mut empty)
    }

    /// Takes the inode's block of extended attributes away, which goes on serving other inodes that share it.
    pub(crate) fn release_xattr_block(&mut self, inode: &mut Inode) -> Result<()> {
        let Some(place) = inode.xattr_block() else { return Ok(()) };
        let mut block = self.fs.xattr_block(place)?;
        match block.references() {
            0 | 1 => self.free_metadata_block(place)?,
            references => {
                block.set_references(references - 1);
                let sealed = block.seal(place, self.fs.checksum_seed());
                self.put_metadata(place, sealed);
            }
        }
        inode.set_xattr_block(None);
        let block_size = self.fs.block_size();
        let allocated = self.fs.allocated(inode).saturating_sub(block_size.into());
        inode.set_allocated(allocated, self.fs.has_huge_file(), block_size)
    }

    /// Whether the inode has a block map, rather than a device number or a short link's target.
    fn has_blocks(&self, inode: &Inode) -> bool {
        inode.is(FileType::Regular)
            || inode.is(FileType::Directory)
            || inode.is(FileType::Symlink) && !self.fs.is_fast_symlink(inode)
    }
}
