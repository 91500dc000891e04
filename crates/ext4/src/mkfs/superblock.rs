//! The superblock of a new file system.

use zerocopy::FromZeros;
use zerocopy::little_endian::U32;

use super::geometry::{FIRST_INO, Plan};
use super::inodes::{Contents, JOURNAL, ORPHAN_FILE};
use super::layout::Layout;
use super::{ErrorBehaviour, MkfsError, MkfsOptions, Result, stable_uuid};
use crate::checksum::Seed;
use crate::features::{compat, incompat, ro_compat};
use crate::superblock::{CHECKSUM_TYPE_CRC32C, FLAG_SIGNED_HASH, MAGIC, RawSuperblock, STATE_CLEAN, SUPERBLOCK_LEN};

const HALF_MD4: u8 = 1;
/// `user_xattr` and `acl`.
const DEFAULT_MOUNT_OPTIONS: u32 = 0x4 | 0x8;
/// Bytes of an inode's fields behind the first 128.
pub(super) const EXTRA_ISIZE: u16 = 32;

/// Everything but the counters, which come last.
pub(super) fn build(options: &MkfsOptions, plan: &Plan) -> Result<RawSuperblock> {
    let features = plan.features;
    let mut raw = RawSuperblock::new_zeroed();
    let log_block_size = plan.block_size.ilog2() - 10;
    (raw.blocks_count_lo, raw.blocks_count_hi) = halves(plan.blocks);
    (raw.reserved_blocks_lo, raw.reserved_blocks_hi) = halves(plan.reserved_blocks);
    raw.inodes_count = (plan.inodes_per_group * plan.groups).into();
    raw.first_data_block = low_half(plan.first_data_block).into();
    raw.log_block_size = log_block_size.into();
    raw.log_cluster_size = log_block_size.into();
    raw.blocks_per_group = plan.blocks_per_group.into();
    raw.clusters_per_group = plan.blocks_per_group.into();
    raw.inodes_per_group = plan.inodes_per_group.into();
    raw.max_mount_count = u16::MAX.into();
    raw.magic = MAGIC.into();
    raw.state = STATE_CLEAN.into();
    raw.errors = match options.errors {
        ErrorBehaviour::Continue => 1,
        ErrorBehaviour::RemountReadOnly => 2,
        ErrorBehaviour::Panic => 3,
    }
    .into();
    raw.rev_level = 1.into();
    raw.first_ino = FIRST_INO.into();
    raw.inode_size = plan.inode_size.into();
    raw.feature_compat = features.compat.into();
    raw.feature_incompat = features.incompat.into();
    raw.feature_ro_compat = features.ro_compat.into();
    raw.uuid = options.uuid;
    text(&mut raw.volume_name, &options.label, "the label is longer than 16 bytes")?;
    text(&mut raw.last_mounted, &options.last_mounted, "the mount point is longer than 64 bytes")?;
    raw.reserved_gdt_blocks = u16::try_from(plan.reserved_gdt_blocks).unwrap_or(u16::MAX).into();
    set_hash(&mut raw, options);
    if features.has_incompat(incompat::SIXTY_FOUR_BIT) {
        raw.desc_size = plan.desc_size.into();
    }
    raw.default_mount_opts = DEFAULT_MOUNT_OPTIONS.into();
    if plan.inode_size > 128 {
        raw.min_extra_isize = EXTRA_ISIZE.into();
        raw.want_extra_isize = EXTRA_ISIZE.into();
    }
    raw.raid_stride = options.stride.into();
    raw.raid_stripe_width = options.stripe_width.into();
    if features.has_incompat(incompat::FLEX_BG) {
        raw.log_groups_per_flex = u8::try_from(plan.groups_per_flex.ilog2()).unwrap_or(u8::MAX);
    }
    if features.has_ro_compat(ro_compat::METADATA_CSUM) {
        raw.checksum_type = CHECKSUM_TYPE_CRC32C;
        if features.has_incompat(incompat::CSUM_SEED) {
            raw.checksum_seed = Seed::of_uuid(&options.uuid).value().into();
        }
    }
    if features.has_compat(compat::SPARSE_SUPER2) {
        raw.backup_groups = backups(options.backups, plan.groups);
    }
    set_times(&mut raw, options.now);
    Ok(raw)
}

/// The copy that a group's backup is: it knows where it lies, and does not claim to be clean.
pub(super) fn backup(raw: &RawSuperblock, group: u32) -> [u8; SUPERBLOCK_LEN] {
    let mut raw = *raw;
    raw.block_group_nr = u16::try_from(group & 0xffff).unwrap_or(0).into();
    raw.state = (raw.state.get() & !STATE_CLEAN).into();
    raw.seal()
}

fn set_times(raw: &mut RawSuperblock, now: i64) {
    let now = u64::try_from(now).unwrap_or(0);
    let (low, high) = halves(now);
    raw.wtime = low;
    raw.mkfs_time = low;
    raw.last_check = low;
    let high = high.get().to_le_bytes()[0];
    // wtime, mtime, mkfs_time, lastcheck.
    for field in [0, 2, 3] {
        raw.times_hi[field] = high;
    }
}

fn set_hash(raw: &mut RawSuperblock, options: &MkfsOptions) {
    let seed = options.hash_seed.unwrap_or_else(|| stable_uuid(&options.uuid));
    let (words, _) = seed.as_chunks::<4>();
    for (word, &bytes) in raw.hash_seed.iter_mut().zip(words) {
        *word = u32::from_le_bytes(bytes).into();
    }
    raw.def_hash_version = HALF_MD4;
    raw.flags = FLAG_SIGNED_HASH.into();
}

/// The groups with backups under `sparse_super2`: the second and the last, or the second alone, which then comes second.
fn backups(wanted: u8, groups: u32) -> [U32; 2] {
    match (wanted, groups) {
        (0, _) | (_, 0 | 1) => [0, 0],
        (1, _) | (_, 2) => [0, 1],
        _ => [1, groups - 1],
    }
    .map(U32::from)
}

fn text(field: &mut [u8], value: &[u8], problem: &str) -> Result<()> {
    let place = field.get_mut(..value.len()).ok_or_else(|| MkfsError::invalid(problem))?;
    place.copy_from_slice(value);
    Ok(())
}

fn halves(value: u64) -> (U32, U32) {
    (low_half(value).into(), low_half(value >> 32).into())
}

fn low_half(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(u32::MAX)
}

/// Adds what is known only after everything has its place: counters, and where the journal and the orphan file are.
pub(super) fn complete(raw: &mut RawSuperblock, layout: &Layout<'_>, contents: &Contents<'_>) {
    (raw.free_blocks_lo, raw.free_blocks_hi) = halves(layout.all_free_blocks());
    raw.free_inodes = (raw.inodes_count.get() - contents.last_ino()).into();
    raw.overhead_blocks = low_half(layout.overhead() + contents.journal_blocks).into();
    if let Some((map, size)) = contents.journal {
        raw.journal_ino = JOURNAL.get().into();
        raw.journal_backup_type = 1;
        let (words, _) = map.as_chunks::<4>();
        let (low, high) = halves(size);
        let values = words.iter().map(|&bytes| u32::from_le_bytes(bytes).into()).chain([high, low]);
        for (field, value) in raw.journal_blocks.iter_mut().zip(values) {
            *field = value;
        }
    }
    if contents.has_large_file() {
        raw.feature_ro_compat |= U32::from(ro_compat::LARGE_FILE);
    }
    if layout.plan.features.has_compat(compat::ORPHAN_FILE) {
        raw.orphan_file_ino = ORPHAN_FILE.get().into();
    }
}
