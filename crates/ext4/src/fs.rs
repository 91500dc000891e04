use std::sync::Arc;

use qtk_block::{BlockRead, Overlay};

use crate::cache::Cache;
use crate::checksum::{self, Seed};
use crate::error::{Error, Place, Result};
use crate::features::ro_compat;
use crate::group::GroupDescriptor;
use crate::inode::{Inode, Time};
use crate::journal::Journal;
use crate::metadata::{FileType, Metadata};
use crate::superblock::{Geometry, SUPERBLOCK_LEN, SUPERBLOCK_OFFSET, Superblock};
use crate::{BlockNr, GroupNr, Ino};

/// An ext2, ext3 or ext4 file system, open for reading. Any number of threads may read at once.
pub struct Ext4 {
    device: Arc<dyn BlockRead>,
    pub(crate) superblock: Superblock,
    pub(crate) cache: Cache,
    seed: Option<Seed>,
}

impl std::fmt::Debug for Ext4 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ext4").field("superblock", &self.superblock).finish_non_exhaustive()
    }
}

impl Ext4 {
    /// Opens the file system that starts at the front of `device`. A journal that was not played to its end is played into
    /// memory; the device is only read.
    pub fn open(device: Arc<dyn BlockRead>) -> Result<Self> {
        let fs = Self::load(device.clone())?;
        if !fs.superblock.needs_recovery() {
            return Ok(fs);
        }
        let replayed = Arc::new(Overlay::new(device));
        Journal::open(&fs)?.replay(&*replayed)?;
        let mut fs = Self::load(replayed)?;
        fs.recount()?;
        Ok(fs)
    }

    /// Sets the superblock's counters from the groups', which a replay alone brings up to date.
    pub(crate) fn recount(&mut self) -> Result<()> {
        let (mut blocks, mut inodes) = (0, 0);
        for group in (0..self.geometry().groups).map(GroupNr) {
            let descriptor = self.group(group)?;
            blocks += u64::from(descriptor.free_blocks());
            inodes += u64::from(descriptor.free_inodes());
        }
        self.superblock.set_free_blocks(blocks);
        let too_many = |_| Error::corrupt(Place::Superblock, "the groups claim more free inodes than there can be");
        self.superblock.set_free_inodes(u32::try_from(inodes).map_err(too_many)?);
        Ok(())
    }

    /// Opens the file system as it lies on the device, whatever its journal holds.
    pub(crate) fn load(device: Arc<dyn BlockRead>) -> Result<Self> {
        let mut bytes = [0; SUPERBLOCK_LEN];
        if device.size() < SUPERBLOCK_OFFSET + SUPERBLOCK_LEN as u64 {
            return Err(Error::corrupt(Place::Superblock, "the device is too short for a file system"));
        }
        device.read_at(&mut bytes, SUPERBLOCK_OFFSET).map_err(|source| Error::Io {
            operation: "read",
            offset: SUPERBLOCK_OFFSET,
            source,
        })?;
        let superblock = Superblock::parse(&bytes, device.size())?;
        let geometry = superblock.geometry();
        let cache = Cache::new(device.clone(), geometry.block_len(), geometry.blocks);
        let seed = superblock.checksum_seed();
        Ok(Self { device, superblock, cache, seed })
    }

    /// The volume name.
    #[must_use]
    pub fn label(&self) -> &[u8] {
        self.superblock.label()
    }

    /// The file system's UUID.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.superblock.uuid()
    }

    /// Bytes in a block.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.geometry().block_size
    }

    /// All blocks of the file system.
    #[must_use]
    pub fn total_blocks(&self) -> u64 {
        self.geometry().blocks
    }

    /// Blocks that nothing uses.
    #[must_use]
    pub fn free_blocks(&self) -> u64 {
        self.superblock.free_blocks()
    }

    /// All inodes of the file system.
    #[must_use]
    pub fn total_inodes(&self) -> u32 {
        self.geometry().inodes
    }

    /// Inodes that nothing uses.
    #[must_use]
    pub fn free_inodes(&self) -> u32 {
        self.superblock.free_inodes()
    }

    /// What an inode says about itself.
    pub fn metadata(&self, ino: Ino) -> Result<Metadata> {
        let inode = self.inode_in_use(ino)?;
        let file_type = inode.file_type()?;
        let is_device = matches!(file_type, FileType::CharDevice | FileType::BlockDevice);
        Ok(Metadata {
            ino,
            file_type,
            permissions: inode.mode() & 0o7777,
            uid: inode.uid(),
            gid: inode.gid(),
            links: inode.links().into(),
            size: inode.size(),
            allocated: self.allocated(&inode),
            atime: inode.time(Time::Access),
            mtime: inode.time(Time::Modification),
            ctime: inode.time(Time::Change),
            crtime: inode.creation_time(),
            rdev: if is_device { inode.device() } else { (0, 0) },
            flags: inode.flags(),
        })
    }

    /// Whether the journal was not played to its end when the device was last written: a crash, or a machine that sleeps.
    #[must_use]
    pub fn needs_recovery(&self) -> bool {
        self.superblock.needs_recovery()
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        self.superblock.geometry()
    }

    /// The seed of metadata checksums, where the file system has any.
    pub(crate) fn checksum_seed(&self) -> Option<Seed> {
        self.seed
    }

    /// A metadata block as it is now, pending changes included.
    pub(crate) fn block(&self, number: BlockNr) -> Result<Arc<[u8]>> {
        self.cache.read(number)
    }

    pub(crate) fn read_device(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.device.read_at(buf, offset).map_err(|source| Error::Io { operation: "read", offset, source })
    }

    /// What kind of run starts at `range.start` on the device.
    pub(crate) fn extent(&self, range: std::ops::Range<u64>) -> Result<qtk_block::Extent> {
        let offset = range.start;
        self.device.extent(range).map_err(|source| Error::Io { operation: "read", offset, source })
    }

    pub(crate) fn has_huge_file(&self) -> bool {
        self.superblock.features().has_ro_compat(ro_compat::HUGE_FILE)
    }

    pub(crate) fn allocated(&self, inode: &Inode) -> u64 {
        inode.allocated(self.has_huge_file(), self.geometry().block_size)
    }

    /// Where a group's descriptor lies: its block, and the byte range within.
    pub(crate) fn descriptor_place(&self, group: GroupNr) -> (BlockNr, std::ops::Range<usize>) {
        let geometry = self.geometry();
        let len = usize::from(geometry.desc_size);
        let at = (group.0 % geometry.descriptors_per_block()) as usize * len;
        (self.superblock.descriptor_block(group), at..at + len)
    }

    /// The checksum of a group descriptor's bytes, or `None` if descriptors have none.
    pub(crate) fn descriptor_checksum(&self, group: GroupNr, bytes: &[u8]) -> Option<u16> {
        match self.seed {
            Some(seed) => Some(checksum::group(seed, group, bytes)),
            None if self.superblock.features().has_ro_compat(ro_compat::GDT_CSUM) => {
                Some(checksum::group_crc16(&self.uuid(), group, bytes))
            }
            None => None,
        }
    }

    pub(crate) fn group(&self, group: GroupNr) -> Result<GroupDescriptor> {
        let corrupt = |problem| Error::corrupt(Place::Group(group), problem);
        if group.0 >= self.geometry().groups {
            return Err(corrupt("there is no such group"));
        }
        let (block, place) = self.descriptor_place(group);
        let block = self.block(block)?;
        let bytes = block.get(place).ok_or_else(|| corrupt("its descriptor crosses a block"))?;
        let descriptor = GroupDescriptor::parse(bytes);
        if self.descriptor_checksum(group, bytes).is_some_and(|checksum| checksum != descriptor.checksum()) {
            return Err(corrupt("the checksum of its descriptor is wrong"));
        }
        let geometry = self.geometry();
        let table_len = self.inode_table_len();
        if !geometry.contains(descriptor.inode_table(), table_len)
            || !geometry.contains(descriptor.block_bitmap(), 1)
            || !geometry.contains(descriptor.inode_bitmap(), 1)
        {
            return Err(corrupt("its bitmaps or its inode table lie outside the file system"));
        }
        Ok(descriptor)
    }

    /// Blocks of a group's inode table.
    pub(crate) fn inode_table_len(&self) -> u64 {
        let geometry = self.geometry();
        geometry.blocks_for(u64::from(geometry.inodes_per_group) * u64::from(geometry.inode_size))
    }

    /// Where an inode lies: its block, and the byte range within.
    pub(crate) fn inode_place(&self, ino: Ino) -> Result<(BlockNr, std::ops::Range<usize>)> {
        let geometry = self.geometry();
        if ino.get() > geometry.inodes {
            return Err(Error::NoSuchInode(ino));
        }
        let table = self.group(geometry.group_of_inode(ino))?.inode_table();
        let index = (ino.get() - 1) % geometry.inodes_per_group;
        let len = usize::from(geometry.inode_size);
        let per_block = geometry.block_size / u32::from(geometry.inode_size);
        let at = (index % per_block) as usize * len;
        Ok((table.plus((index / per_block).into()), at..at + len))
    }

    /// An inode, in use or not.
    pub(crate) fn inode(&self, ino: Ino) -> Result<Inode> {
        let (block, place) = self.inode_place(ino)?;
        let block = self.block(block)?;
        let inode = Inode::parse(ino, block.get(place).unwrap_or_default())?;
        // An inode that was never used may hold anything.
        if let Some(seed) = self.seed.filter(|_| inode.mode() != 0) {
            inode.verify(seed)?;
        }
        Ok(inode)
    }

    /// An inode that has links and a type.
    pub(crate) fn inode_in_use(&self, ino: Ino) -> Result<Inode> {
        let inode = self.inode(ino)?;
        if inode.links() == 0 || inode.mode() == 0 {
            return Err(Error::NoSuchInode(ino));
        }
        Ok(inode)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn readers_and_editors_cross_threads() {
        fn check<T: Send + Sync>() {}
        check::<super::Ext4>();
        check::<crate::Editor>();
    }
}
