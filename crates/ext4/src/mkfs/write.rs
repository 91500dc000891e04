//! Writing what was laid out, each block once and the superblock last.

use std::ops::Range;

use qtk_block::BlockWrite;

use super::inodes::Contents;
use super::layout::{GroupLayout, Layout};
use super::{MkfsOptions, superblock};
use crate::checksum::{self, Seed};
use crate::error::{Error, Result};
use crate::features::{incompat, ro_compat};
use crate::group::{BLOCK_UNINIT, GroupDescriptor, INODE_UNINIT, INODE_ZEROED};
use crate::superblock::{RawSuperblock, SUPERBLOCK_OFFSET};
use crate::{BlockNr, GroupNr, Ino, bitmap, cache};

/// Directories that a file system begins with.
const DIRECTORIES: [Ino; 2] = [Ino::ROOT, Ino::new(super::geometry::FIRST_INO).unwrap()];

struct Writer<'a> {
    device: &'a dyn BlockWrite,
    options: &'a MkfsOptions,
    layout: &'a Layout<'a>,
    contents: &'a Contents<'a>,
    seed: Option<Seed>,
}

pub(super) fn write(
    device: &dyn BlockWrite,
    options: &MkfsOptions,
    raw: &RawSuperblock,
    layout: &Layout<'_>,
    contents: &Contents<'_>,
) -> Result<()> {
    let features = layout.plan.features;
    let seed = features.has_ro_compat(ro_compat::METADATA_CSUM).then(|| {
        if features.has_incompat(incompat::CSUM_SEED) {
            Seed::stored(raw.checksum_seed.get())
        } else {
            Seed::of_uuid(&raw.uuid)
        }
    });
    let writer = Writer { device, options, layout, contents, seed };
    if !options.device_is_zero {
        let all = 0..device.size();
        device.zero(all).map_err(|source| Error::Io { operation: "zero", offset: 0, source })?;
    }
    for (place, bytes) in &contents.blocks {
        writer.put(place.0, bytes)?;
    }
    writer.inodes()?;
    let descriptors = writer.groups()?;
    writer.descriptors(&descriptors, raw)?;
    cache::write(device, &raw.seal(), SUPERBLOCK_OFFSET)?;
    device.flush().map_err(|source| Error::Io { operation: "flush", offset: 0, source })
}

impl Writer<'_> {
    fn put(&self, block: u64, bytes: &[u8]) -> Result<()> {
        cache::write(self.device, bytes, block * u64::from(self.layout.plan.block_size))
    }

    /// The inodes of a group that are in use, which are its first ones.
    fn used_inodes(&self, group: u32) -> u32 {
        let per_group = self.layout.plan.inodes_per_group;
        self.contents.last_ino().saturating_sub(group * per_group).min(per_group)
    }

    fn inodes(&self) -> Result<()> {
        let plan = self.layout.plan;
        for (ino, bytes) in &self.contents.inodes {
            let index = ino.get() - 1;
            let group = self.layout.groups.get((index / plan.inodes_per_group) as usize).copied().unwrap_or_default();
            let within = u64::from(index % plan.inodes_per_group) * u64::from(plan.inode_size);
            let offset = group.inode_table * u64::from(plan.block_size) + within;
            cache::write(self.device, bytes, offset)?;
        }
        Ok(())
    }

    /// Writes the bitmaps that must be written, and gives the table of descriptors.
    fn groups(&self) -> Result<Vec<u8>> {
        let len = usize::from(self.layout.plan.desc_size);
        let mut table = vec![0; len * self.layout.groups.len()];
        for ((group, layout), bytes) in (0..).zip(&self.layout.groups).zip(table.chunks_exact_mut(len)) {
            self.group(group, layout)?.store(bytes);
            let sum = match self.seed {
                Some(seed) => Some(checksum::group(seed, GroupNr(group), bytes)),
                None if self.layout.has_group_flags() => {
                    Some(checksum::group_crc16(&self.options.uuid, GroupNr(group), bytes))
                }
                None => None,
            };
            if let Some(sum) = sum {
                let mut descriptor = GroupDescriptor::parse(bytes);
                descriptor.set_checksum(sum);
                descriptor.store(bytes);
            }
        }
        Ok(table)
    }

    fn group(&self, group: u32, place: &GroupLayout) -> Result<GroupDescriptor> {
        let plan = self.layout.plan;
        let flagged = self.layout.has_group_flags();
        let used = self.used_inodes(group);
        let unwritten_blocks = flagged && !place.is_open && used == 0;
        let unwritten_inodes = flagged && used == 0;
        let zeroed = !self.options.lazy_inode_tables;
        let flags = [(unwritten_blocks, BLOCK_UNINIT), (unwritten_inodes, INODE_UNINIT), (zeroed, INODE_ZEROED)];
        let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |all, (_, flag)| all | flag);
        let [blocks, inodes, table] = [place.block_bitmap, place.inode_bitmap, place.inode_table].map(BlockNr);
        let mut descriptor = GroupDescriptor::new(plan.desc_size, blocks, inodes, table, flags);
        let free_blocks = self.layout.free_blocks(group);
        descriptor.set_free_blocks(u32::try_from(free_blocks).unwrap_or(u32::MAX));
        descriptor.set_free_inodes(plan.inodes_per_group - used);
        if flagged {
            descriptor.set_itable_unused(plan.inodes_per_group - used);
        }
        let own = |ino: &&Ino| (ino.get() - 1) / plan.inodes_per_group == group;
        descriptor.set_used_dirs(u32::try_from(DIRECTORIES.iter().filter(own).count()).unwrap_or(0));
        if !unwritten_blocks {
            let sum = self.bitmap(place.block_bitmap, plan.blocks_per_group, &self.taken_bits(group))?;
            descriptor.set_block_bitmap_checksum(sum);
        }
        if !unwritten_inodes {
            let padding = plan.inodes_per_group..plan.block_size * 8;
            let sum = self.bitmap(place.inode_bitmap, plan.inodes_per_group, &[0..used, padding])?;
            descriptor.set_inode_bitmap_checksum(sum);
        }
        Ok(descriptor)
    }

    /// The bits of a group's blocks that are taken, and those behind the group's end.
    fn taken_bits(&self, group: u32) -> Vec<Range<u32>> {
        let own = self.layout.group_blocks(group);
        let bit = |block: u64| u32::try_from(block - own.start).unwrap_or(u32::MAX);
        let taken = self.layout.space.taken_in(own.clone()).map(|run| bit(run.start)..bit(run.end));
        taken.chain(std::iter::once(bit(own.end)..self.layout.plan.block_size * 8)).collect()
    }

    /// Writes a bitmap of `bits` bits that count, and gives its checksum.
    fn bitmap(&self, place: u64, bits: u32, set: &[Range<u32>]) -> Result<u32> {
        let mut bytes = vec![0; self.layout.plan.block_size as usize];
        for range in set {
            bitmap::fill(&mut bytes, range.clone(), true);
        }
        self.put(place, &bytes)?;
        Ok(self.seed.map_or(0, |seed| checksum::bitmap(seed, &bytes[..bits as usize / 8])))
    }

    /// Writes the descriptors and the backups of the superblock.
    fn descriptors(&self, table: &[u8], raw: &RawSuperblock) -> Result<()> {
        let block_len = self.layout.plan.block_size as usize;
        for group in 0..self.layout.plan.groups {
            let front = self.layout.front(group);
            if front.is_empty() {
                continue;
            }
            if self.layout.plan.features.has_incompat(incompat::META_BG) {
                if let Some(place) = self.layout.own_descriptors(group) {
                    let first = group as usize / (block_len / usize::from(self.layout.plan.desc_size));
                    let part = table.chunks(block_len).nth(first).unwrap_or_default();
                    self.put(place.0, part)?;
                }
            } else {
                self.put(front.start + 1, table)?;
            }
            if group > 0 && self.layout.has_superblock(group) {
                self.put(front.start, &superblock::backup(raw, group))?;
            }
        }
        Ok(())
    }
}
