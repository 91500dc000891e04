//! The superblock: kept as read, so that fields nobody knows survive an edit.

use std::ops::Range;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::checksum::{self, Seed};
use crate::error::{Error, Place, Result};
use crate::features::{Features, compat, incompat, ro_compat};
use crate::{BlockNr, GroupNr, Ino};

/// Byte offset of the primary superblock on the device.
pub(crate) const SUPERBLOCK_OFFSET: u64 = 1024;
pub(crate) const SUPERBLOCK_LEN: usize = 1024;
pub(crate) const MAGIC: u16 = 0xef53;
pub(crate) const STATE_CLEAN: u16 = 0x1;
const STATE_ERRORS: u16 = 0x2;
pub(crate) const CHECKSUM_TYPE_CRC32C: u8 = 1;
pub(crate) const FLAG_SIGNED_HASH: u32 = 1;
const FLAG_UNSIGNED_HASH: u32 = 2;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(crate) struct RawSuperblock {
    pub(crate) inodes_count: U32,
    pub(crate) blocks_count_lo: U32,
    pub(crate) reserved_blocks_lo: U32,
    pub(crate) free_blocks_lo: U32,
    pub(crate) free_inodes: U32,
    pub(crate) first_data_block: U32,
    pub(crate) log_block_size: U32,
    pub(crate) log_cluster_size: U32,
    pub(crate) blocks_per_group: U32,
    pub(crate) clusters_per_group: U32,
    pub(crate) inodes_per_group: U32,
    pub(crate) mtime: U32,
    pub(crate) wtime: U32,
    pub(crate) mount_count: U16,
    pub(crate) max_mount_count: U16,
    pub(crate) magic: U16,
    pub(crate) state: U16,
    pub(crate) errors: U16,
    pub(crate) minor_rev: U16,
    pub(crate) last_check: U32,
    pub(crate) check_interval: U32,
    pub(crate) creator_os: U32,
    pub(crate) rev_level: U32,
    pub(crate) def_resuid: U16,
    pub(crate) def_resgid: U16,
    pub(crate) first_ino: U32,
    pub(crate) inode_size: U16,
    pub(crate) block_group_nr: U16,
    pub(crate) feature_compat: U32,
    pub(crate) feature_incompat: U32,
    pub(crate) feature_ro_compat: U32,
    pub(crate) uuid: [u8; 16],
    pub(crate) volume_name: [u8; 16],
    pub(crate) last_mounted: [u8; 64],
    pub(crate) algorithm_usage: U32,
    pub(crate) prealloc_blocks: u8,
    pub(crate) prealloc_dir_blocks: u8,
    pub(crate) reserved_gdt_blocks: U16,
    pub(crate) journal_uuid: [u8; 16],
    pub(crate) journal_ino: U32,
    pub(crate) journal_dev: U32,
    pub(crate) last_orphan: U32,
    pub(crate) hash_seed: [U32; 4],
    pub(crate) def_hash_version: u8,
    pub(crate) journal_backup_type: u8,
    pub(crate) desc_size: U16,
    pub(crate) default_mount_opts: U32,
    pub(crate) first_meta_bg: U32,
    pub(crate) mkfs_time: U32,
    pub(crate) journal_blocks: [U32; 17],
    pub(crate) blocks_count_hi: U32,
    pub(crate) reserved_blocks_hi: U32,
    pub(crate) free_blocks_hi: U32,
    pub(crate) min_extra_isize: U16,
    pub(crate) want_extra_isize: U16,
    pub(crate) flags: U32,
    pub(crate) raid_stride: U16,
    pub(crate) mmp_interval: U16,
    pub(crate) mmp_block: U64,
    pub(crate) raid_stripe_width: U32,
    pub(crate) log_groups_per_flex: u8,
    pub(crate) checksum_type: u8,
    pub(crate) reserved_pad: U16,
    pub(crate) kbytes_written: U64,
    pub(crate) snapshots_and_errors: [u8; 192],
    pub(crate) usr_quota_ino: U32,
    pub(crate) grp_quota_ino: U32,
    pub(crate) overhead_blocks: U32,
    pub(crate) backup_groups: [U32; 2],
    pub(crate) encrypt_algos: [u8; 4],
    pub(crate) encrypt_salt: [u8; 16],
    pub(crate) lost_found_ino: U32,
    pub(crate) project_quota_ino: U32,
    pub(crate) checksum_seed: U32,
    pub(crate) times_hi: [u8; 6],
    pub(crate) error_codes: [u8; 2],
    pub(crate) encoding: U16,
    pub(crate) encoding_flags: U16,
    pub(crate) orphan_file_ino: U32,
    pub(crate) reserved: [U32; 94],
    pub(crate) checksum: U32,
}

const _: () = assert!(size_of::<RawSuperblock>() == SUPERBLOCK_LEN);
const CHECKSUM_OFFSET: usize = std::mem::offset_of!(RawSuperblock, checksum);
/// Where `times_hi` keeps the high byte of `wtime`.
const WTIME_HI: usize = 0;

impl RawSuperblock {
    /// The bytes to store, checksummed where the file system has checksums.
    pub(crate) fn seal(mut self) -> [u8; SUPERBLOCK_LEN] {
        if features_of(&self).has_ro_compat(ro_compat::METADATA_CSUM) {
            self.checksum = checksum::superblock(&self.as_bytes()[..CHECKSUM_OFFSET]).into();
        }
        let mut bytes = [0; SUPERBLOCK_LEN];
        bytes.copy_from_slice(self.as_bytes());
        bytes
    }
}

/// How the default directory hash is computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HashParameters {
    pub(crate) seed: [u32; 4],
    /// `s_def_hash_version`: 0 legacy, 1 half MD4, 2 TEA.
    pub(crate) version: u8,
    /// Whether names are hashed as unsigned bytes.
    pub(crate) unsigned: bool,
}

/// The sizes that everything else is computed from, checked against each other and against the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub(crate) block_size: u32,
    pub(crate) blocks: u64,
    pub(crate) first_data_block: u64,
    pub(crate) blocks_per_group: u32,
    pub(crate) inodes_per_group: u32,
    pub(crate) inodes: u32,
    pub(crate) first_ino: u32,
    pub(crate) groups: u32,
    pub(crate) inode_size: u16,
    pub(crate) desc_size: u16,
    /// Block groups whose bitmaps and inode tables lie together; 1 without `flex_bg`.
    pub(crate) groups_per_flex: u32,
    /// Blocks that a bit of a block bitmap stands for; 1 without `bigalloc`.
    pub(crate) blocks_per_cluster: u32,
}

impl Geometry {
    fn of(raw: &RawSuperblock, features: Features, device_size: u64) -> Result<Self> {
        let corrupt = |problem| Error::corrupt(Place::Superblock, problem);
        let block_size = match raw.log_block_size.get() {
            log @ 0..=6 => 1024_u32 << log,
            _ => return Err(corrupt("the block size is larger than 64 KiB")),
        };
        let dynamic = raw.rev_level.get() > 0;
        let inode_size = if dynamic { raw.inode_size.get() } else { 128 };
        if !inode_size.is_power_of_two() || inode_size < 128 || u32::from(inode_size) > block_size {
            return Err(corrupt("the inode size is not a power of two from 128 up to the block size"));
        }
        let desc_size = if features.has_incompat(incompat::SIXTY_FOUR_BIT) { raw.desc_size.get() } else { 32 };
        if !desc_size.is_power_of_two() || !(32..=1024).contains(&desc_size) {
            return Err(corrupt("the group descriptor size is not a power of two from 32 up to 1024"));
        }
        let blocks = u64::from(raw.blocks_count_lo.get()) | high(raw.blocks_count_hi, features) << 32;
        let first_data_block = u64::from(raw.first_data_block.get());
        if first_data_block > 1 || blocks <= first_data_block {
            return Err(corrupt("the number of blocks or of the first data block is impossible"));
        }
        if blocks.checked_mul(block_size.into()).is_none_or(|bytes| bytes > device_size) {
            return Err(corrupt("the file system is larger than its device, which may have been truncated"));
        }
        let blocks_per_group = raw.blocks_per_group.get();
        let inodes_per_group = raw.inodes_per_group.get();
        let bitmap_bits = block_size * 8;
        let blocks_per_cluster = Self::blocks_per_cluster(raw, features)?;
        let clusters_per_group = blocks_per_group / blocks_per_cluster;
        if clusters_per_group == 0
            || clusters_per_group > bitmap_bits
            || !blocks_per_group.is_multiple_of(blocks_per_cluster)
        {
            return Err(corrupt("the number of blocks per group is impossible"));
        }
        if inodes_per_group == 0 || inodes_per_group > bitmap_bits {
            return Err(corrupt("the number of inodes per group is impossible"));
        }
        let groups = u32::try_from((blocks - first_data_block).div_ceil(blocks_per_group.into()))
            .map_err(|_| corrupt("there are more than 2^32 block groups"))?;
        let inodes = raw.inodes_count.get();
        if u64::from(groups) * u64::from(inodes_per_group) != u64::from(inodes) {
            return Err(corrupt("the number of inodes does not fit the number of block groups"));
        }
        let groups_per_flex = match raw.log_groups_per_flex {
            log @ 0..=31 if features.has_incompat(incompat::FLEX_BG) => 1 << log,
            _ => 1,
        };
        let first_ino = if dynamic { raw.first_ino.get() } else { 11 };
        Ok(Self {
            block_size,
            blocks,
            first_data_block,
            blocks_per_group,
            inodes_per_group,
            inodes,
            first_ino,
            groups,
            inode_size,
            desc_size,
            groups_per_flex,
            blocks_per_cluster,
        })
    }

    fn blocks_per_cluster(raw: &RawSuperblock, features: Features) -> Result<u32> {
        if !features.has_ro_compat(ro_compat::BIGALLOC) {
            return Ok(1);
        }
        let impossible = || Error::corrupt(Place::Superblock, "the cluster size is impossible");
        let log = raw.log_cluster_size.get().checked_sub(raw.log_block_size.get()).filter(|&log| log <= 20);
        let blocks = 1_u32 << log.ok_or_else(impossible)?;
        let fits = raw.clusters_per_group.get().checked_mul(blocks) == Some(raw.blocks_per_group.get());
        if fits { Ok(blocks) } else { Err(impossible()) }
    }

    /// The block size as the length of a buffer.
    pub(crate) fn block_len(&self) -> usize {
        self.block_size as usize
    }

    /// Byte offset of a block on the device.
    pub(crate) fn offset(&self, block: BlockNr) -> u64 {
        block.0.saturating_mul(self.block_size.into())
    }

    /// Bytes rounded up to blocks.
    pub(crate) fn blocks_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.block_size.into())
    }

    /// Whether `len` blocks from `start` on are blocks of the file system behind its first superblock.
    pub(crate) fn contains(&self, start: BlockNr, len: u64) -> bool {
        start.0 > self.first_data_block && start.0.checked_add(len).is_some_and(|end| end <= self.blocks)
    }

    pub(crate) fn group_of_block(&self, block: BlockNr) -> GroupNr {
        let group = block.0.saturating_sub(self.first_data_block) / u64::from(self.blocks_per_group);
        GroupNr(u32::try_from(group).unwrap_or(u32::MAX))
    }

    pub(crate) fn group_of_inode(&self, ino: Ino) -> GroupNr {
        GroupNr((ino.get() - 1) / self.inodes_per_group)
    }

    pub(crate) fn first_block_of(&self, group: GroupNr) -> BlockNr {
        BlockNr(self.first_data_block + u64::from(group.0) * u64::from(self.blocks_per_group))
    }

    /// The blocks of a group; the last group may be a short one.
    pub(crate) fn group_blocks(&self, group: GroupNr) -> Range<u64> {
        let start = self.first_block_of(group).0;
        start..self.blocks.min(start + u64::from(self.blocks_per_group))
    }

    pub(crate) fn descriptors_per_block(&self) -> u32 {
        self.block_size / u32::from(self.desc_size)
    }

    /// What a group's block bitmap has a bit for: clusters with `bigalloc`, else blocks.
    pub(crate) fn clusters_per_group(&self) -> u32 {
        self.blocks_per_group / self.blocks_per_cluster
    }

    /// Clusters of a group; the last group may be a short one.
    pub(crate) fn clusters_in(&self, group: GroupNr) -> u32 {
        let blocks = self.group_blocks(group);
        let clusters = blocks.end.saturating_sub(blocks.start).div_ceil(self.blocks_per_cluster.into());
        u32::try_from(clusters).unwrap_or(u32::MAX)
    }

    /// The bits of a group's block bitmap that stand for what of `blocks` lies in the group.
    pub(crate) fn bits_of(&self, group: GroupNr, blocks: &Range<u64>) -> Range<u32> {
        let own = self.group_blocks(group);
        let ratio = u64::from(self.blocks_per_cluster);
        let bit = |block: u64| u32::try_from(block).unwrap_or(u32::MAX);
        let within = |block: u64| block.clamp(own.start, own.end) - own.start;
        let (start, end) = (within(blocks.start), within(blocks.end));
        if start < end { bit(start / ratio)..bit(end.div_ceil(ratio)) } else { 0..0 }
    }

    /// The blocks that a run of bits of a group's block bitmap stands for.
    pub(crate) fn blocks_of(&self, group: GroupNr, bits: &Range<u32>) -> Range<u64> {
        let own = self.group_blocks(group);
        let block = |bit: u32| own.start + u64::from(bit) * u64::from(self.blocks_per_cluster);
        block(bits.start)..block(bits.end).min(own.end)
    }
}

fn high(field: U32, features: Features) -> u64 {
    if features.has_incompat(incompat::SIXTY_FOUR_BIT) { field.get().into() } else { 0 }
}

/// A checked superblock.
#[derive(Clone, Debug)]
pub(crate) struct Superblock {
    raw: RawSuperblock,
    geometry: Geometry,
}

impl Superblock {
    /// Checks the 1024 bytes of a superblock that lies on a device of `device_size` bytes.
    pub(crate) fn parse(bytes: &[u8], device_size: u64) -> Result<Self> {
        let corrupt = |problem| Error::corrupt(Place::Superblock, problem);
        let (raw, _) =
            RawSuperblock::read_from_prefix(bytes).map_err(|_| corrupt("the device is too short for a file system"))?;
        if raw.magic.get() != MAGIC {
            return Err(corrupt("this is no ext2, ext3 or ext4 file system"));
        }
        let features = features_of(&raw);
        features.check_readable()?;
        if features.has_ro_compat(ro_compat::METADATA_CSUM) {
            if raw.checksum_type != CHECKSUM_TYPE_CRC32C {
                return Err(Error::unsupported(format!("metadata checksum type {}", raw.checksum_type)));
            }
            if checksum::superblock(&raw.as_bytes()[..CHECKSUM_OFFSET]) != raw.checksum.get() {
                return Err(corrupt("the checksum is wrong"));
            }
        }
        let geometry = Geometry::of(&raw, features, device_size)?;
        Ok(Self { raw, geometry })
    }

    /// The bytes to store, checksummed.
    pub(crate) fn to_bytes(&self) -> [u8; SUPERBLOCK_LEN] {
        self.raw.seal()
    }

    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Every field, for the checker.
    pub(crate) fn raw(&self) -> &RawSuperblock {
        &self.raw
    }

    pub(crate) fn features(&self) -> Features {
        features_of(&self.raw)
    }

    pub(crate) fn label(&self) -> &[u8] {
        let name = &self.raw.volume_name;
        &name[..name.iter().position(|&byte| byte == 0).unwrap_or(name.len())]
    }

    pub(crate) fn uuid(&self) -> [u8; 16] {
        self.raw.uuid
    }

    /// The seed of metadata checksums, if the file system has any.
    pub(crate) fn checksum_seed(&self) -> Option<Seed> {
        let features = self.features();
        features.has_ro_compat(ro_compat::METADATA_CSUM).then(|| {
            if features.has_incompat(incompat::CSUM_SEED) {
                Seed::stored(self.raw.checksum_seed.get())
            } else {
                Seed::of_uuid(&self.raw.uuid)
            }
        })
    }

    pub(crate) fn hash_parameters(&self) -> HashParameters {
        let flags = self.raw.flags.get();
        HashParameters {
            seed: self.raw.hash_seed.map(U32::get),
            version: self.raw.def_hash_version,
            // An unmarked file system was made on x86, where char is signed.
            unsigned: flags & FLAG_UNSIGNED_HASH != 0 && flags & FLAG_SIGNED_HASH == 0,
        }
    }

    pub(crate) fn has_errors(&self) -> bool {
        self.raw.state.get() & STATE_ERRORS != 0
    }

    /// Whether the last mount ended properly; a file system with a journal is always marked so.
    pub(crate) fn was_unmounted(&self) -> bool {
        self.raw.state.get() & STATE_CLEAN != 0
    }

    pub(crate) fn want_extra_isize(&self) -> u16 {
        self.raw.want_extra_isize.get()
    }

    pub(crate) fn journal(&self) -> Option<Ino> {
        Ino::new(self.raw.journal_ino.get()).filter(|_| self.features().has_compat(compat::HAS_JOURNAL))
    }

    pub(crate) fn needs_recovery(&self) -> bool {
        self.features().has_incompat(incompat::RECOVER)
    }

    pub(crate) fn clear_needs_recovery(&mut self) {
        self.raw.feature_incompat = (self.raw.feature_incompat.get() & !incompat::RECOVER).into();
    }

    /// Head of the list of inodes that were open or being truncated at a crash.
    pub(crate) fn last_orphan(&self) -> Option<Ino> {
        Ino::new(self.raw.last_orphan.get())
    }

    pub(crate) fn clear_last_orphan(&mut self) {
        self.raw.last_orphan = U32::ZERO;
    }

    /// The orphan file, if it may hold entries.
    pub(crate) fn present_orphan_file(&self) -> Option<Ino> {
        let features = self.features();
        let present = features.has_compat(compat::ORPHAN_FILE) && features.has_ro_compat(ro_compat::ORPHAN_PRESENT);
        Ino::new(self.raw.orphan_file_ino.get()).filter(|_| present)
    }

    pub(crate) fn clear_orphan_present(&mut self) {
        self.raw.feature_ro_compat = (self.raw.feature_ro_compat.get() & !ro_compat::ORPHAN_PRESENT).into();
    }

    /// Says that inodes may have extended attributes. False where the file system is too old for features.
    pub(crate) fn set_ext_attr(&mut self) -> bool {
        let possible = self.raw.rev_level.get() > 0;
        if possible {
            self.raw.feature_compat |= U32::from(compat::EXT_ATTR);
        }
        possible
    }

    pub(crate) fn set_large_file(&mut self) {
        self.raw.feature_ro_compat |= U32::from(ro_compat::LARGE_FILE);
    }

    pub(crate) fn free_blocks(&self) -> u64 {
        u64::from(self.raw.free_blocks_lo.get()) | high(self.raw.free_blocks_hi, self.features()) << 32
    }

    pub(crate) fn set_free_blocks(&mut self, count: u64) {
        self.raw.free_blocks_lo = low_half(count).into();
        if self.features().has_incompat(incompat::SIXTY_FOUR_BIT) {
            self.raw.free_blocks_hi = low_half(count >> 32).into();
        }
    }

    pub(crate) fn free_inodes(&self) -> u32 {
        self.raw.free_inodes.get()
    }

    pub(crate) fn set_free_inodes(&mut self, count: u32) {
        self.raw.free_inodes = count.into();
    }

    /// Sets the time of the last write, in seconds since 1970.
    pub(crate) fn set_write_time(&mut self, seconds: i64) {
        let seconds = u64::try_from(seconds).unwrap_or(0);
        self.raw.wtime = low_half(seconds).into();
        self.raw.times_hi[WTIME_HI] = u8::try_from(seconds >> 32 & 0xff).unwrap_or(0);
    }

    /// Blocks that hold group descriptors, at the front of every group with a copy of the superblock.
    pub(crate) fn descriptor_blocks(&self) -> u32 {
        self.geometry.groups.div_ceil(self.geometry.descriptors_per_block())
    }

    /// The block that holds a group's descriptor.
    pub(crate) fn descriptor_block(&self, group: GroupNr) -> BlockNr {
        let geometry = &self.geometry;
        let meta_group = group.0 / geometry.descriptors_per_block();
        if !self.has_meta_group(group) {
            return self.front_of(GroupNr(0)).plus(1 + u64::from(meta_group));
        }
        let first = GroupNr(meta_group * geometry.descriptors_per_block());
        self.front_of(first).plus(self.has_superblock(first).into())
    }

    /// Whether a group's descriptor lies in a group of its own meta group (`meta_bg`).
    fn has_meta_group(&self, group: GroupNr) -> bool {
        let meta_group = group.0 / self.geometry.descriptors_per_block();
        self.features().has_incompat(incompat::META_BG) && meta_group >= self.raw.first_meta_bg.get()
    }

    /// Where a group's copies of superblock and descriptors begin: at its start, except that block 0 is never a superblock where
    /// blocks have 1 KiB.
    fn front_of(&self, group: GroupNr) -> BlockNr {
        let primary = SUPERBLOCK_OFFSET / u64::from(self.geometry.block_size);
        BlockNr(self.geometry.first_block_of(group).0.max(primary))
    }

    /// Whether a group starts with a copy of the superblock.
    pub(crate) fn has_superblock(&self, group: GroupNr) -> bool {
        let features = self.features();
        if group.0 == 0 {
            true
        } else if features.has_compat(compat::SPARSE_SUPER2) {
            self.raw.backup_groups.iter().any(|backup| backup.get() == group.0)
        } else if features.has_ro_compat(ro_compat::SPARSE_SUPER) {
            group.0 == 1 || [3, 5, 7].into_iter().any(|base| is_power_of(group.0, base))
        } else {
            true
        }
    }

    /// The blocks at the front of a group that hold copies of the superblock and of descriptors.
    pub(crate) fn copies(&self, group: GroupNr) -> Range<u64> {
        let has_superblock = self.has_superblock(group);
        let descriptors = if self.has_meta_group(group) {
            let last = self.geometry.descriptors_per_block() - 1;
            u32::from([0, 1, last].contains(&(group.0 & last)))
        } else if !has_superblock {
            0
        } else if self.features().has_incompat(incompat::META_BG) {
            self.raw.first_meta_bg.get()
        } else {
            self.descriptor_blocks()
        };
        let start = self.front_of(group).0;
        start..start + u64::from(has_superblock) + u64::from(descriptors)
    }

    /// The same from the group's start, with the room that is left for more descriptors.
    pub(crate) fn front(&self, group: GroupNr) -> Range<u64> {
        let copies = self.copies(group);
        let has_room = self.has_superblock(group) && !self.has_meta_group(group);
        let room = if has_room { self.raw.reserved_gdt_blocks.get().into() } else { 0 };
        self.geometry.first_block_of(group).0..copies.end + room
    }
}

fn features_of(raw: &RawSuperblock) -> Features {
    Features {
        compat: raw.feature_compat.get(),
        incompat: raw.feature_incompat.get(),
        ro_compat: raw.feature_ro_compat.get(),
    }
}

fn is_power_of(mut value: u32, base: u32) -> bool {
    while value > 1 && value.is_multiple_of(base) {
        value /= base;
    }
    value == 1
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
fn low_half(value: u64) -> u32 {
    value as u32
}

#[cfg(test)]
mod tests {
    use super::is_power_of;

    #[test]
    fn powers() {
        let powers: Vec<u32> = (1..60).filter(|&n| [3, 5, 7].into_iter().any(|base| is_power_of(n, base))).collect();
        assert_eq!(powers, [1, 3, 5, 7, 9, 25, 27, 49]);
    }
}
