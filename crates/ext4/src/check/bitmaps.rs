//! The bitmaps and counters on disk against what was found in use.

use std::num::NonZeroUsize;

use super::state::{InodeState, InodeStates, Role};
use super::{Check, Claims, parallel};
use crate::bitmap;
use crate::checksum;
use crate::error::Result;
use crate::group::{BLOCK_UNINIT, GroupDescriptor, INODE_UNINIT};
use crate::{BlockNr, FindingKind, GroupNr, Place};

/// What is free and in use.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    pub(super) free_clusters: u64,
    pub(super) free_inodes: u64,
}

pub(super) fn check(claims: &Claims<'_>, states: &InodeStates, threads: NonZeroUsize) -> Result<Totals> {
    let scratch = || vec![0; claims.check.fs.geometry().block_len()];
    let groups = parallel::map(threads, claims.groups.len(), scratch, |buffer, group| {
        let group = GroupNr(u32::try_from(group).unwrap_or(u32::MAX));
        let descriptor = &claims.groups[group.0 as usize];
        let free_clusters = blocks(claims, group, descriptor, buffer)?;
        let free_inodes = inodes(claims, group, descriptor, states.of_group(group), buffer)?;
        Ok(Totals { free_clusters: free_clusters.into(), free_inodes: free_inodes.into() })
    })?;
    let totals = groups.iter().fold(Totals::default(), |sum, group| Totals {
        free_clusters: sum.free_clusters + group.free_clusters,
        free_inodes: sum.free_inodes + group.free_inodes,
    });
    superblock_counts(claims.check, totals);
    Ok(totals)
}

/// The kernel does not keep these up while a file system is mounted.
fn superblock_counts(check: &Check<'_>, totals: Totals) {
    let fs = check.fs;
    let note = |text: String| check.findings.note(FindingKind::Count, Place::Superblock, text);
    let free_blocks = totals.free_clusters * u64::from(fs.geometry().blocks_per_cluster);
    if fs.free_blocks() != free_blocks {
        note(format!("{free_blocks} blocks are free, but {} are counted", fs.free_blocks()));
    }
    if u64::from(fs.free_inodes()) != totals.free_inodes {
        note(format!("{} inodes are free, but {} are counted", totals.free_inodes, fs.free_inodes()));
    }
}

fn compare(claims: &Claims<'_>, group: GroupNr, name: &str, computed: &[u8], stored: &[u8], bits: u32) {
    let at = |bit: u32| computed[bit as usize / 8] ^ stored[bit as usize / 8];
    let differs = |bit: u32| at(bit) >> (bit % 8) & 1 != 0;
    let whole = bits as usize / 8;
    if computed[..whole] == stored[..whole] && (bits.is_multiple_of(8) || !(bits / 8 * 8..bits).any(differs)) {
        return;
    }
    let wrong: Vec<u32> = (0..bits).filter(|&bit| differs(bit)).collect();
    let in_use = wrong.iter().filter(|&&bit| computed[bit as usize / 8] >> (bit % 8) & 1 != 0).count();
    let text = format!(
        "its {name} bitmap is wrong in {} places, the first at {}: {in_use} in use are marked as free, {} free as in use",
        wrong.len(),
        wrong.first().copied().unwrap_or_default(),
        wrong.len() - in_use
    );
    claims.findings.damage(FindingKind::Bitmap, Place::Group(group), text);
}

fn read(claims: &Claims<'_>, place: BlockNr, buffer: &mut [u8]) -> Result<()> {
    claims.check.fs.read_device(buffer, claims.check.fs.geometry().offset(place))
}

/// Whether all bits behind those that mean something are set.
fn is_padded(stored: &[u8], bits: u32) -> bool {
    let all = u32::try_from(stored.len() * 8).unwrap_or(u32::MAX);
    bitmap::find(stored, bits..all, false) >= all
}

/// Checks a bitmap's checksum against the descriptor's.
fn checksum(claims: &Claims<'_>, group: GroupNr, name: &str, bytes: &[u8], stored: u32, is_wide: bool) {
    let Some(seed) = claims.check.fs.checksum_seed() else { return };
    let mask = if is_wide { u32::MAX } else { 0xffff };
    if checksum::bitmap(seed, bytes) & mask != stored {
        let text = format!("the checksum of its {name} bitmap is wrong");
        claims.findings.damage(FindingKind::Bitmap, Place::Group(group), text);
    }
}

fn counter(claims: &Claims<'_>, group: GroupNr, what: &str, found: u32, stored: u32) {
    if found != stored {
        let text = format!("it has {found} {what}, but {stored} are counted");
        claims.findings.damage(FindingKind::Count, Place::Group(group), text);
    }
}

fn blocks(claims: &Claims<'_>, group: GroupNr, descriptor: &GroupDescriptor, buffer: &mut [u8]) -> Result<u32> {
    let geometry = claims.check.fs.geometry();
    let own = geometry.group_blocks(group);
    let bits = u32::try_from((own.end - own.start).div_ceil(geometry.blocks_per_cluster.into())).unwrap_or(u32::MAX);
    let mut computed = claims.blocks.bitmap(group);
    computed.resize(buffer.len().max(computed.len()), 0);
    let free = bitmap::count_clear(&computed, 0..bits);
    if claims.check.has_group_flags() && descriptor.has(BLOCK_UNINIT) {
        let mut fixed = claims.fixed.bitmap(group);
        fixed.resize(computed.len(), 0);
        compare(claims, group, "unwritten block", &computed, &fixed, bits);
    } else {
        read(claims, descriptor.block_bitmap(), buffer)?;
        let summed = (geometry.blocks_per_group / geometry.blocks_per_cluster / 8) as usize;
        let stored = descriptor.block_bitmap_checksum();
        checksum(claims, group, "block", &buffer[..summed.min(buffer.len())], stored, descriptor.is_wide());
        compare(claims, group, "block", &computed, buffer, bits);
        let is_last = group.0 + 1 == geometry.groups;
        if is_last && !is_padded(buffer, bits) {
            claims.findings.damage(
                FindingKind::Bitmap,
                Place::Group(group),
                "the end of its block bitmap is not padded",
            );
        }
    }
    counter(claims, group, "free blocks", free, descriptor.free_blocks());
    Ok(free)
}

fn inodes(
    claims: &Claims<'_>,
    group: GroupNr,
    descriptor: &GroupDescriptor,
    states: &[InodeState],
    buffer: &mut [u8],
) -> Result<u32> {
    let geometry = claims.check.fs.geometry();
    let bits = geometry.inodes_per_group;
    let first = group.0 * bits + 1;
    let mut computed = vec![0; buffer.len()];
    let reserved = geometry.first_ino.saturating_sub(first).min(bits);
    bitmap::fill(&mut computed, 0..reserved, true);
    for (bit, state) in (0..).zip(states) {
        if state.role != Role::Unused {
            bitmap::fill(&mut computed, bit..bit + 1, true);
        }
    }
    let free = bitmap::count_clear(&computed, 0..bits);
    if claims.check.has_group_flags() && descriptor.has(INODE_UNINIT) {
        let clear = vec![0; buffer.len()];
        compare(claims, group, "unwritten inode", &computed, &clear, bits);
    } else {
        read(claims, descriptor.inode_bitmap(), buffer)?;
        let stored = descriptor.inode_bitmap_checksum();
        let summed = (bits as usize / 8).min(buffer.len());
        checksum(claims, group, "inode", &buffer[..summed], stored, descriptor.is_wide());
        compare(claims, group, "inode", &computed, buffer, bits);
        if group.0 + 1 == geometry.groups && !is_padded(buffer, bits) {
            claims.findings.damage(
                FindingKind::Bitmap,
                Place::Group(group),
                "the end of its inode bitmap is not padded",
            );
        }
    }
    let dirs = states.iter().filter(|state| state.role.is_dir()).count();
    let dirs = u32::try_from(dirs).unwrap_or(u32::MAX);
    counter(claims, group, "free inodes", free, descriptor.free_inodes());
    counter(claims, group, "directories", dirs, descriptor.used_dirs());
    Ok(free)
}
