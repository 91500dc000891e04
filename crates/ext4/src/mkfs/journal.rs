//! How large the journal and the orphan file are.

use super::geometry::Plan;
use super::{MkfsError, MkfsOptions, Result};

/// The smallest journal that the kernel takes.
const LEAST: u64 = 1024;
/// Below so many blocks a file system has no journal.
const TOO_SMALL: u64 = 2048;

/// Whether the file system is large enough to have a journal.
pub(super) fn fits(plan: &Plan) -> bool {
    plan.blocks >= TOO_SMALL
}

/// Blocks of the journal.
pub(super) fn blocks(options: &MkfsOptions, plan: &Plan) -> Result<u32> {
    let blocks = match options.journal_size {
        Some(bytes) => bytes / u64::from(plan.block_size),
        None => default_blocks(plan.blocks),
    };
    let most = (plan.blocks / 2).min(10_240_000);
    if !(LEAST..=most).contains(&blocks) {
        let message = format!("the journal must have from {LEAST} to {most} blocks of {} bytes", plan.block_size);
        return Err(MkfsError::invalid(&message));
    }
    Ok(u32::try_from(blocks).unwrap_or(u32::MAX))
}

/// By powers of two of the file system's blocks.
fn default_blocks(blocks: u64) -> u64 {
    match blocks >> 10 {
        0..32 => 1024,
        32..256 => 4096,
        256..512 => 8192,
        512..4096 => 16_384,
        4096..8192 => 32_768,
        8192..16_384 => 65_536,
        16_384..32_768 => 131_072,
        _ => 262_144,
    }
}

/// Blocks of the orphan file: one for every 4096, but not too few for a computer with many processors.
pub(super) fn orphan_file_blocks(options: &MkfsOptions, plan: &Plan) -> u64 {
    match options.orphan_file_size {
        Some(bytes) => bytes.div_ceil(plan.block_size.into()).max(1),
        None => (plan.blocks / 4096).clamp(32, 512),
    }
}
