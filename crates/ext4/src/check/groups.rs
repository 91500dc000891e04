//! Group descriptors, and what lies at fixed places: superblocks, descriptors, bitmaps, inode tables.

use super::{Check, Claims};
use crate::error::Result;
use crate::features::incompat;
use crate::group::{BLOCK_UNINIT, GroupDescriptor, INODE_UNINIT};
use crate::{BlockNr, FindingKind, GroupNr, Place};

/// After so many descriptors that lead nowhere, the rest is not worth reading.
const HOPELESS: u32 = 1000;

/// Reads and checks every descriptor. `None` if some cannot be used, so that nothing else can be looked at.
pub(super) fn read(check: &Check<'_>) -> Result<Option<Vec<GroupDescriptor>>> {
    let geometry = check.fs.geometry();
    let smallest = (check.fs.inode_table_len() + 2).saturating_mul(geometry.groups.into());
    if smallest > geometry.blocks {
        check.findings.superblock("the groups' inode tables need more blocks than there are");
        return Ok(None);
    }
    let mut groups = Vec::new();
    let mut unusable = 0;
    let mut block_bytes = vec![0; geometry.block_len()];
    let mut loaded = None;
    for group in (0..geometry.groups).map(GroupNr) {
        let (block, place) = check.fs.descriptor_place(group);
        if block.0 >= geometry.blocks {
            check.findings.group(group, "its descriptor lies outside the file system");
            return Ok(None);
        }
        if loaded != Some(block) {
            check.fs.read_device(&mut block_bytes, geometry.offset(block))?;
            loaded = Some(block);
        }
        let Some(bytes) = block_bytes.get(place) else { return Ok(None) };
        let mut descriptor = GroupDescriptor::parse(bytes);
        let stored = descriptor.checksum();
        if check.fs.descriptor_checksum(group, bytes).is_some_and(|checksum| checksum != stored) {
            check.findings.group(group, "the checksum of its descriptor is wrong");
            // What it leaves out cannot be relied on.
            descriptor.clear(INODE_UNINIT | BLOCK_UNINIT);
            descriptor.set_itable_unused(0);
        }
        if !is_usable(check, group, &descriptor) {
            unusable += 1;
            if unusable >= HOPELESS {
                break;
            }
        }
        counters(check, group, &descriptor);
        groups.push(descriptor);
    }
    Ok((unusable == 0).then_some(groups))
}

fn is_usable(check: &Check<'_>, group: GroupNr, descriptor: &GroupDescriptor) -> bool {
    let geometry = check.fs.geometry();
    let own = geometry.group_blocks(group);
    let flexible = check.has_incompat(incompat::FLEX_BG);
    let within = |start: BlockNr, len: u64| {
        geometry.contains(start, len) && (flexible || own.start <= start.0 && start.0 + len <= own.end)
    };
    let table_len = check.fs.inode_table_len();
    let places = [
        (descriptor.block_bitmap(), 1, "its block bitmap lies outside it"),
        (descriptor.inode_bitmap(), 1, "its inode bitmap lies outside it"),
        (descriptor.inode_table(), table_len, "its inode table lies outside it"),
    ];
    let mut usable = true;
    for (start, len, problem) in places {
        if !within(start, len) {
            check.findings.group(group, problem);
            usable = false;
        }
    }
    usable
}

fn counters(check: &Check<'_>, group: GroupNr, descriptor: &GroupDescriptor) {
    let geometry = check.fs.geometry();
    let clusters = geometry.blocks_per_group / geometry.blocks_per_cluster;
    let inodes = geometry.inodes_per_group;
    let limits = [
        (descriptor.free_blocks(), clusters, "it claims more free blocks than it has"),
        (descriptor.free_inodes(), inodes, "it claims more free inodes than it has"),
        (descriptor.used_dirs(), inodes, "it claims more directories than it has inodes"),
    ];
    for (count, limit, problem) in limits {
        if count > limit {
            check.findings.group(group, problem);
        }
    }
    let flagged = descriptor.has(INODE_UNINIT) || descriptor.has(BLOCK_UNINIT);
    let note = |text: &'static str| check.findings.note(FindingKind::Group, Place::Group(group), text);
    if !check.has_group_flags() && flagged {
        check.findings.group(group, "it is marked as never written, but the file system keeps no such marks");
    }
    if descriptor.itable_unused() > inodes {
        note("it claims more unused inodes than it has");
    }
    if check.has_group_flags() && descriptor.has(BLOCK_UNINIT) && group.0 + 1 == geometry.groups {
        check.findings.group(group, "its block bitmap was never written, though it is the last group");
    }
}

/// Claims everything at fixed places.
pub(super) fn claim(check: &Check<'_>, claims: &Claims<'_>) {
    let geometry = check.fs.geometry();
    for group in (0..geometry.groups).map(GroupNr) {
        let own = geometry.group_blocks(group);
        let front = front_len(check, group).min(own.end - own.start);
        fixed(claims, BlockNr(own.start), front);
        if let Some(block) = meta_block(check, group) {
            fixed(claims, block, 1);
        }
    }
    if geometry.first_data_block == 0 && geometry.block_size == 1024 {
        // The boot block lies before the superblock, which block 1 holds then.
        fixed(claims, BlockNr(1), 1);
    }
    let raw = check.fs.superblock.raw();
    let mmp = BlockNr(raw.mmp_block.get());
    if check.has_incompat(incompat::MMP) && geometry.contains(mmp, 1) {
        fixed(claims, mmp, 1);
    }
    for descriptor in claims.groups {
        fixed(claims, descriptor.block_bitmap(), 1);
        fixed(claims, descriptor.inode_bitmap(), 1);
        fixed(claims, descriptor.inode_table(), check.fs.inode_table_len());
    }
}

fn fixed(claims: &Claims<'_>, start: BlockNr, len: u64) {
    claims.fixed.claim_fixed(start, len);
    if let Some(block) = claims.blocks.claim_fixed(start, len) {
        claims.findings.block(FindingKind::SharedBlock, block, "two structures at fixed places overlap here");
    }
}

/// Blocks at a group's front: the superblock's copy, the descriptors, and room for more of these.
fn front_len(check: &Check<'_>, group: GroupNr) -> u64 {
    let superblock = &check.fs.superblock;
    if !superblock.has_superblock(group) {
        return 0;
    }
    let raw = superblock.raw();
    let descriptors = if check.has_incompat(incompat::META_BG) {
        raw.first_meta_bg.get()
    } else {
        superblock.descriptor_blocks() + u32::from(raw.reserved_gdt_blocks.get())
    };
    1 + u64::from(descriptors)
}

/// The block of descriptors that a group holds under `meta_bg`: the first two groups of a meta group and its last.
fn meta_block(check: &Check<'_>, group: GroupNr) -> Option<BlockNr> {
    let geometry = check.fs.geometry();
    let superblock = &check.fs.superblock;
    let per_block = geometry.descriptors_per_block();
    let (meta_group, position) = (group.0 / per_block, group.0 % per_block);
    let first = superblock.raw().first_meta_bg.get();
    if !check.has_incompat(incompat::META_BG) || meta_group < first {
        return None;
    }
    let holds = position == 0 || position == 1 || position == per_block - 1;
    holds.then(|| geometry.first_block_of(group).plus(superblock.has_superblock(group).into()))
}
