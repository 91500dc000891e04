//! Two inodes whose blocks are not files: the room for more group descriptors, and the list of bad blocks.

use super::Claims;
use crate::error::Result;
use crate::inode::{FLAG_EXTENTS, Inode};
use crate::metadata::FileType;
use crate::{BlockNr, FindingKind, GroupNr, Place};

const DOUBLE_INDIRECT: usize = 13;
const POINTERS: usize = 15;

fn pointers(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|&pointer| u32::from_le_bytes(pointer))
}

/// The resize inode maps the reserved descriptor blocks: through its double indirect block those of the first group, each
/// of which lists its copies in the other groups.
pub(super) fn check(claims: &Claims<'_>, inode: &Inode) -> Result<()> {
    let fs = claims.check.fs;
    let geometry = fs.geometry();
    let superblock = &fs.superblock;
    let reserved = u32::from(superblock.raw().reserved_gdt_blocks.get());
    let bad = |text| claims.findings.inode(inode.ino(), text);
    let map: Vec<u32> = pointers(inode.map()).collect();
    let double = BlockNr(map[DOUBLE_INDIRECT].into());
    let others_empty = (0..POINTERS).all(|at| at == DOUBLE_INDIRECT || map[at] == 0);
    if !inode.is(FileType::Regular) || inode.links() != 1 || inode.has(FLAG_EXTENTS) || !others_empty {
        bad("the resize inode is damaged");
        return Ok(());
    }
    let backups: Vec<GroupNr> =
        (1..geometry.groups).map(GroupNr).filter(|&group| superblock.has_superblock(group)).collect();
    if !geometry.contains(double, 1) {
        bad("the resize inode has no double indirect block");
        return Ok(());
    }
    if let Some(block) = claims.blocks.claim(double, 1) {
        let text = format!("block {block} is claimed by something else too");
        claims.findings.damage(FindingKind::SharedBlock, Place::Inode(inode.ino()), text);
    }
    let mut listed = vec![0; geometry.block_len()];
    fs.read_device(&mut listed, geometry.offset(double))?;
    let listed: Vec<u32> = pointers(&listed).collect();
    let behind = u64::from(superblock.descriptor_blocks());
    let first = superblock.descriptor_block(GroupNr(0)).0 + behind;
    let mut copies = vec![0; geometry.block_len()];
    for (at, block) in (first..first + u64::from(reserved)).enumerate() {
        let slot = (superblock.descriptor_blocks() as usize + at) % listed.len();
        if u64::from(listed[slot]) != block {
            bad("the resize inode does not list a block that is reserved for group descriptors");
            return Ok(());
        }
        fs.read_device(&mut copies, geometry.offset(BlockNr(block)))?;
        let expected = backups.iter().map(|&group| geometry.first_block_of(group).0 + 1 + behind + at as u64);
        if !expected.eq(pointers(&copies).take(backups.len()).map(u64::from)) {
            bad("the resize inode lists other copies of a reserved block than there are");
            return Ok(());
        }
    }
    let blocks = 1 + u64::from(reserved) * (1 + backups.len() as u64);
    let expected = blocks * u64::from(geometry.blocks_per_cluster) * u64::from(geometry.block_size) / 512;
    if inode.stored_blocks(claims.check.fs.has_huge_file()) != expected {
        bad("the resize inode's number of blocks is wrong");
    }
    Ok(())
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
