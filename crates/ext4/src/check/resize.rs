//! Two inodes whose blocks are not files: the room for more group descriptors, and the list of bad blocks.

use super::Claims;
use super::map::MapWalk;
use crate::error::Result;
use crate::inode::{FLAG_EXTENTS, Inode};
use crate::metadata::FileType;
use crate::{BlockNr, FindingKind, GroupNr, Place};

const DOUBLE_INDIRECT: usize = 13;

fn pointers(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|&pointer| u32::from_le_bytes(pointer))
}

/// The resize inode maps the reserved descriptor blocks: through its double indirect block those of the first group, each
/// of which lists its copies in the other groups. Where it lists others, the file system cannot grow while it is mounted.
pub(super) fn check(claims: &Claims<'_>, inode: &Inode) -> Result<()> {
    let facts = MapWalk::resize(claims, inode)?;
    let geometry = claims.check.fs.geometry();
    let bytes = facts.clusters * u64::from(geometry.blocks_per_cluster) * u64::from(geometry.block_size);
    if !facts.damaged && inode.stored_blocks(claims.check.fs.has_huge_file()) != bytes / 512 {
        claims.findings.inode(inode.ino(), "the resize inode's number of blocks is wrong");
    }
    if !inode.is(FileType::Regular) || inode.links() != 1 || inode.has(FLAG_EXTENTS) || !lists_copies(claims, inode)? {
        let text = "the resize inode does not list the blocks reserved for group descriptors";
        claims.findings.note(FindingKind::Inode, Place::Inode(inode.ino()), text);
    }
    Ok(())
}

fn lists_copies(claims: &Claims<'_>, inode: &Inode) -> Result<bool> {
    let fs = claims.check.fs;
    let geometry = fs.geometry();
    let superblock = &fs.superblock;
    let reserved = u64::from(superblock.raw().reserved_gdt_blocks.get());
    let double = BlockNr(pointers(inode.map()).nth(DOUBLE_INDIRECT).unwrap_or_default().into());
    if !geometry.contains(double, 1) {
        return Ok(false);
    }
    let backups: Vec<GroupNr> =
        (1..geometry.groups).map(GroupNr).filter(|&group| superblock.has_superblock(group)).collect();
    let mut listed = vec![0; geometry.block_len()];
    fs.read_device(&mut listed, geometry.offset(double))?;
    let listed: Vec<u32> = pointers(&listed).collect();
    let behind = u64::from(superblock.descriptor_blocks());
    let first = superblock.descriptor_block(GroupNr(0)).0 + behind;
    let mut copies = vec![0; geometry.block_len()];
    for (at, block) in (first..first + reserved).enumerate() {
        let slot = (superblock.descriptor_blocks() as usize + at) % listed.len();
        if u64::from(listed[slot]) != block || !geometry.contains(BlockNr(block), 1) {
            return Ok(false);
        }
        fs.read_device(&mut copies, geometry.offset(BlockNr(block)))?;
        let expected = backups.iter().map(|&group| geometry.first_block_of(group).0 + 1 + behind + at as u64);
        if !expected.eq(pointers(&copies).take(backups.len()).map(u64::from)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Bad blocks may lie anywhere, in structures at fixed places too.
pub(super) fn bad_blocks(claims: &Claims<'_>, inode: &Inode) -> Result<()> {
    let fs = claims.check.fs;
    let Ok(map) = crate::map::FileMap::load(fs, inode) else {
        claims.findings.map(inode.ino(), "the list of bad blocks is damaged");
        return Ok(());
    };
    for run in map.runs() {
        claims.blocks.claim_fixed(run.start, run.len);
    }
    for &node in &map.nodes {
        claims.blocks.claim_fixed(node, 1);
    }
    Ok(())
}
