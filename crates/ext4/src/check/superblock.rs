//! The superblock's fields against each other.

use super::Check;
use crate::features::{compat, incompat, ro_compat};
use crate::superblock::RawSuperblock;

const LARGEST_INODE_OF_OLD: u16 = 128;

pub(super) fn check(check: &Check<'_>) {
    let superblock = &check.fs.superblock;
    let raw = superblock.raw();
    sizes(check, raw);
    features(check, raw);
    inode_fields(check, raw);
    if superblock.has_errors() {
        check.findings.superblock_note("the kernel marked the file system as damaged");
    }
}

fn sizes(check: &Check<'_>, raw: &RawSuperblock) {
    let geometry = check.fs.geometry();
    let findings = check.findings;
    let block_size = geometry.block_size;
    let expected_first = u64::from(block_size == 1024 && geometry.blocks_per_cluster == 1);
    if geometry.first_data_block != expected_first {
        findings.superblock("the number of the first data block does not fit the block size");
    }
    if !geometry.blocks_per_group.is_multiple_of(8) {
        findings.superblock("the number of blocks per group is no multiple of eight");
    }
    if raw.rev_level.get() > 1 {
        findings.superblock("the revision of the format is one that does not exist");
    }
    let reserved = u64::from(raw.reserved_blocks_lo.get())
        | if check.has_incompat(incompat::SIXTY_FOUR_BIT) { u64::from(raw.reserved_blocks_hi.get()) << 32 } else { 0 };
    if reserved > geometry.blocks / 2 {
        findings.superblock("more than half of all blocks are reserved");
    }
    if u32::from(raw.reserved_gdt_blocks.get()) > block_size / 4 {
        findings.superblock("more blocks are reserved for group descriptors than can be");
    }
    if geometry.first_ino < 11 || geometry.first_ino > geometry.inodes {
        findings.superblock("the number of the first inode that is not reserved is impossible");
    }
    let differ = raw.log_cluster_size.get() != raw.log_block_size.get()
        || raw.clusters_per_group.get() != raw.blocks_per_group.get();
    if !check.has_ro_compat(ro_compat::BIGALLOC) && differ {
        findings.superblock("clusters differ from blocks in size, though bigalloc is off");
    }
    let inodes_per_block = block_size / u32::from(geometry.inode_size);
    if geometry.inodes_per_group < inodes_per_block {
        findings.superblock("groups have fewer inodes than fit in a block");
    }
    if check.has_incompat(incompat::META_BG) && raw.first_meta_bg.get() > check.fs.superblock.descriptor_blocks() {
        findings.superblock("the first group of meta_bg lies behind the last group");
    }
}

/// Combinations that a mount puts up with, or refuses by name.
fn features(check: &Check<'_>, raw: &RawSuperblock) {
    let any = raw.feature_compat.get() | raw.feature_incompat.get() | raw.feature_ro_compat.get() != 0;
    let with_64bit = check.has_incompat(incompat::SIXTY_FOUR_BIT);
    let oddities = [
        (raw.rev_level.get() == 0 && any, "features are on, though the revision is one without features"),
        (
            check.has_ro_compat(ro_compat::METADATA_CSUM) && check.has_ro_compat(ro_compat::GDT_CSUM),
            "uninit_bg and metadata_csum are both on",
        ),
        (with_64bit && !check.has_incompat(incompat::EXTENTS), "64bit is on, but extent is off"),
        (with_64bit && raw.desc_size.get() < 64, "64bit is on, but group descriptors are too short for it"),
        (
            check.has_incompat(incompat::META_BG) && check.has_compat(compat::RESIZE_INODE),
            "resize_inode and meta_bg are both on",
        ),
        (
            check.has_incompat(incompat::CSUM_SEED) && !check.has_ro_compat(ro_compat::METADATA_CSUM),
            "metadata_csum_seed is on, but metadata_csum is off",
        ),
        (
            !check.has_compat(compat::RESIZE_INODE) && raw.reserved_gdt_blocks.get() != 0,
            "blocks are reserved for group descriptors, but resize_inode is off",
        ),
    ];
    for (_, text) in oddities.into_iter().filter(|(found, _)| *found) {
        check.findings.superblock_note(text);
    }
}

fn inode_fields(check: &Check<'_>, raw: &RawSuperblock) {
    let inode_size = check.fs.geometry().inode_size;
    if inode_size <= LARGEST_INODE_OF_OLD {
        return;
    }
    let room = inode_size - LARGEST_INODE_OF_OLD;
    for (size, what) in [(raw.min_extra_isize.get(), "required"), (raw.want_extra_isize.get(), "desired")] {
        if size > room || size & 3 != 0 {
            check.findings.superblock_note(format!("the {what} size of extra inode fields is impossible"));
        }
    }
}
