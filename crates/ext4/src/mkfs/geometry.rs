//! The numbers of a new file system, as mke2fs computes them.

use super::{MkfsError, MkfsOptions, Reserved, Result, Usage, features};
use crate::features::{Features, compat, incompat, ro_compat};

/// The first inode that files can have.
pub(super) const FIRST_INO: u32 = 11;
/// A last group with fewer free blocks than this is left off.
const LEAST_FREE: u64 = 50;
/// A descriptor counts a group's free blocks in 16 bits, or in 32 that are kept to as much.
const MAX_BLOCKS_PER_GROUP: u32 = 65_528;
const DEFAULT_GROUPS_PER_FLEX: u32 = 16;
/// The table of descriptors leaves room for a file system this many times as large.
const GROWTH: u64 = 1024;

/// Sizes and counts, consistent with each other.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) features: Features,
    pub(super) block_size: u32,
    pub(super) blocks: u64,
    pub(super) first_data_block: u64,
    pub(super) blocks_per_group: u32,
    pub(super) groups: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_size: u16,
    pub(super) desc_size: u16,
    /// Blocks that the table of all descriptors takes.
    pub(super) desc_blocks: u64,
    pub(super) reserved_gdt_blocks: u64,
    pub(super) groups_per_flex: u32,
    pub(super) reserved_blocks: u64,
}

impl Plan {
    /// For a device of `size` bytes.
    pub(super) fn new(options: &MkfsOptions, size: u64) -> Result<Self> {
        let features = features::choose(options.kind, options.profile, &options.features)?;
        let usage = options.usage.unwrap_or_else(|| Usage::of_size(size));
        let block_size = options.block_size.unwrap_or_else(|| usage.block_size());
        if !block_size.is_power_of_two() || !(1024..=65536).contains(&block_size) {
            return Err(MkfsError::invalid("the block size must be a power of two from 1024 to 65536"));
        }
        let inode_size = options.inode_size.unwrap_or(256);
        if !inode_size.is_power_of_two() || inode_size < 128 || u32::from(inode_size) > block_size {
            return Err(MkfsError::invalid("the inode size must be a power of two from 128 to the block size"));
        }
        let wide = features.has_incompat(incompat::SIXTY_FOUR_BIT);
        let mut plan = Self {
            features,
            block_size,
            blocks: size / u64::from(block_size),
            first_data_block: u64::from(block_size == 1024),
            blocks_per_group: blocks_per_group(options, block_size)?,
            groups: 0,
            inodes_per_group: 0,
            inode_size,
            desc_size: if wide { 64 } else { 32 },
            desc_blocks: 0,
            reserved_gdt_blocks: 0,
            groups_per_flex: groups_per_flex(options, features)?,
            reserved_blocks: 0,
        };
        // Memory pages hold several blocks; mke2fs ends at a page's end.
        plan.blocks -= plan.blocks % u64::from(4096_u32.div_ceil(block_size));
        if plan.blocks > u64::from(u32::MAX) {
            if !wide {
                return Err(MkfsError::invalid("more than 2^32 blocks need the feature 64bit, or larger blocks"));
            }
            plan.features.compat &= !compat::RESIZE_INODE;
        }
        plan.fit(options, inodes_wanted(options, usage, size, &plan)?)?;
        plan.reserved_blocks = reserved_blocks(options, &plan)?;
        Ok(plan)
    }

    /// Finds the number of groups and what each of them holds, leaving off a last group that would be too short.
    fn fit(&mut self, options: &MkfsOptions, inodes_wanted: u64) -> Result<()> {
        let all_blocks = self.blocks;
        loop {
            if self.blocks <= self.first_data_block {
                return Err(MkfsError::TooSmall);
            }
            let in_groups = self.blocks - self.first_data_block;
            let groups = in_groups.div_ceil(self.blocks_per_group.into());
            self.groups = u32::try_from(groups).map_err(|_| MkfsError::invalid("there would be too many groups"))?;
            self.desc_blocks = groups.div_ceil(u64::from(self.block_size / u32::from(self.desc_size)));
            let per_group = inodes_wanted.max(u64::from(FIRST_INO) + 1).div_ceil(groups);
            if per_group > u64::from(self.block_size) * 8 && self.blocks_per_group >= 256 {
                self.blocks_per_group -= 8;
                self.blocks = all_blocks;
                continue;
            }
            self.set_inodes_per_group(per_group)?;
            self.set_reserved_gdt_blocks(options)?;
            let overhead = self.overhead_of_last_group();
            if overhead > self.blocks_per_group.into() {
                return Err(MkfsError::invalid("there are too many inodes for the groups: lower -N or raise -i"));
            }
            let rest = in_groups % u64::from(self.blocks_per_group);
            if rest == 0 || rest >= overhead + LEAST_FREE {
                return Ok(());
            }
            if self.groups == 1 {
                return if rest < overhead { Err(MkfsError::TooSmall) } else { Ok(()) };
            }
            self.blocks -= rest;
        }
    }

    /// As many as wanted, and what fills the last block of the table; a multiple of 8, for the bitmap.
    fn set_inodes_per_group(&mut self, wanted: u64) -> Result<()> {
        let inodes_per_block = u64::from(self.block_size / u32::from(self.inode_size));
        let mut wanted = wanted.min(u64::from(self.block_size) * 8).min(65_536 - inodes_per_block);
        loop {
            let filled = wanted.next_multiple_of(inodes_per_block).max(8) & !7;
            if filled * u64::from(self.groups) <= u32::MAX.into() {
                self.inodes_per_group = u32::try_from(filled).unwrap_or(u32::MAX);
                return Ok(());
            }
            wanted = wanted.checked_sub(1).filter(|&wanted| wanted > 0).ok_or_else(|| {
                MkfsError::invalid("there would be more than 2^32 inodes: raise -i, or the blocks per group")
            })?;
        }
    }

    fn set_reserved_gdt_blocks(&mut self, options: &MkfsOptions) -> Result<()> {
        self.reserved_gdt_blocks = 0;
        if !self.features.has_compat(compat::RESIZE_INODE) {
            if options.resize.is_some() {
                return Err(MkfsError::invalid("resize= needs the feature resize_inode"));
            }
        } else {
            let most = match options.resize {
                Some(blocks) if blocks <= self.blocks => {
                    return Err(MkfsError::invalid("resize= must be more than the file system's own size in blocks"));
                }
                Some(blocks) => blocks,
                None => self.blocks.saturating_mul(GROWTH),
            };
            let most = most.min(u32::MAX.into());
            let groups = (most - self.first_data_block).div_ceil(self.blocks_per_group.into());
            let table = groups.div_ceil(u64::from(self.block_size / u32::from(self.desc_size)));
            self.reserved_gdt_blocks = table.saturating_sub(self.desc_blocks).min(u64::from(self.block_size) / 4);
        }
        // Descriptors in one place would take most of a group.
        if self.desc_blocks + self.reserved_gdt_blocks > u64::from(self.blocks_per_group) * 3 / 4 {
            self.features.incompat |= incompat::META_BG;
            self.features.compat &= !compat::RESIZE_INODE;
            self.reserved_gdt_blocks = 0;
        }
        Ok(())
    }

    /// Blocks of a group's inode table.
    pub(super) fn inode_table_len(&self) -> u64 {
        (u64::from(self.inodes_per_group) * u64::from(self.inode_size)).div_ceil(self.block_size.into())
    }

    fn overhead_of_last_group(&self) -> u64 {
        let front =
            if self.has_superblock(self.groups - 1) { 1 + self.desc_blocks + self.reserved_gdt_blocks } else { 0 };
        2 + self.inode_table_len() + front
    }

    /// Whether a group would have a copy of the superblock. With `sparse_super2` the last one counts as if it had, since it
    /// is where the backup will be.
    fn has_superblock(&self, group: u32) -> bool {
        let power_of = |base: u32| {
            let mut power = base;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        group <= 1
            || !self.features.has_ro_compat(ro_compat::SPARSE_SUPER)
            || [3, 5, 7].into_iter().any(power_of)
            || self.features.has_compat(compat::SPARSE_SUPER2)
    }
}

fn blocks_per_group(options: &MkfsOptions, block_size: u32) -> Result<u32> {
    let most = (block_size * 8).min(MAX_BLOCKS_PER_GROUP);
    match options.blocks_per_group {
        None => Ok(most),
        Some(blocks) if blocks.is_multiple_of(8) && (256..=most).contains(&blocks) => Ok(blocks),
        Some(_) => {
            let message = format!("the blocks per group must be a multiple of 8 from 256 to {most}");
            Err(MkfsError::invalid(&message))
        }
    }
}

fn groups_per_flex(options: &MkfsOptions, features: Features) -> Result<u32> {
    let flexible = features.has_incompat(incompat::FLEX_BG);
    match options.groups_per_flex {
        None => Ok(if flexible { DEFAULT_GROUPS_PER_FLEX } else { 1 }),
        Some(_) if !flexible => Err(MkfsError::invalid("-G needs the feature flex_bg")),
        Some(groups) if groups.is_power_of_two() => Ok(groups),
        Some(_) => Err(MkfsError::invalid("the groups per flex group must be a power of two")),
    }
}

fn inodes_wanted(options: &MkfsOptions, usage: Usage, size: u64, plan: &Plan) -> Result<u64> {
    if let Some(inodes) = options.inodes {
        return Ok(inodes.into());
    }
    let ratio = options.bytes_per_inode.unwrap_or_else(|| usage.bytes_per_inode().max(plan.block_size.into()));
    if !(1024..=64 << 20).contains(&ratio) {
        return Err(MkfsError::invalid("the bytes per inode must be from 1024 to 64 MiB"));
    }
    let inodes = size.min(plan.blocks * u64::from(plan.block_size)) / ratio;
    Ok(inodes.min(u32::MAX.into()))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "a percentage"
)]
fn reserved_blocks(options: &MkfsOptions, plan: &Plan) -> Result<u64> {
    let blocks = plan.blocks;
    match options.reserved {
        Reserved::Percent(percent) if (0.0..=50.0).contains(&percent) => Ok((percent * blocks as f64 / 100.0) as u64),
        Reserved::Bytes(bytes) if bytes.div_ceil(plan.block_size.into()) <= blocks / 2 => {
            Ok(bytes.div_ceil(plan.block_size.into()))
        }
        _ => Err(MkfsError::invalid("no more than half of the blocks can be reserved")),
    }
}
