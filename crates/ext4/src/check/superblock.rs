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
    if !check.has_ro_compat(ro_compat::BIGALLOC) && raw.log_cluster_size.get() != raw.log_block_size.get() {
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

fn features(check: &Check<'_>, raw: &RawSuperblock) {
    let findings = check.findings;
    if raw.rev_level.get() == 0
        && raw.feature_compat.get() | raw.feature_incompat.get() | raw.feature_ro_compat.get() != 0
    {
        findings.superblock("features are on, though the revision is one without features");
    }
    if check.has_ro_compat(ro_compat::METADATA_CSUM) && check.has_ro_compat(ro_compat::GDT_CSUM) {
        findings.superblock("uninit_bg and metadata_csum are both on");
    }
    if check.has_incompat(incompat::SIXTY_FOUR_BIT) && !check.has_incompat(incompat::EXTENTS) {
        findings.superblock("64bit is on, but extent is off");
    }
    if check.has_incompat(incompat::META_BG) && check.has_compat(compat::RESIZE_INODE) {
        findings.superblock("resize_inode and meta_bg are both on");
    }
    if check.has_incompat(incompat::CSUM_SEED) && !check.has_ro_compat(ro_compat::METADATA_CSUM) {
        findings.superblock("metadata_csum_seed is on, but metadata_csum is off");
    }
    if !check.has_compat(compat::RESIZE_INODE) && raw.reserved_gdt_blocks.get() != 0 {
        findings.superblock("blocks are reserved for group descriptors, but resize_inode is off");
    }
    if check.has_incompat(incompat::SIXTY_FOUR_BIT) && raw.desc_size.get() < 64 {
        findings.superblock("64bit is on, but group descriptors are too short for it");
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
