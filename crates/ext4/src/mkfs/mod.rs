//! New file systems, laid out as mke2fs lays them out.
//!
//! With the same size, options, identity and time, every block is the one that mke2fs 1.47 would write. (Only the superblock's
//! count of bytes ever written stays zero.) The computation has no other input: equal options give equal bytes.

mod features;
mod geometry;
mod inodes;
mod journal;
mod layout;
mod options;
mod space;
mod superblock;
mod write;

use qtk_block::BlockWrite;

use crate::Error;
use crate::checksum::crc32c;
use crate::features::compat;
use crate::superblock::{RawSuperblock, Superblock};
use geometry::Plan;
use inodes::Contents;
use layout::Layout;
pub use options::{ErrorBehaviour, MkfsOptions, Profile, Reserved, Type, Usage};

/// The result of making a file system.
pub type Result<T, E = MkfsError> = std::result::Result<T, E>;

/// Why a file system could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MkfsError {
    /// Options that make no file system, with what to do about it.
    #[error("{0}")]
    Invalid(String),
    /// A feature that nobody knows.
    #[error("there is no file system feature '{0}'")]
    UnknownFeature(String),
    /// Features that exist, but are not made here.
    #[error("cannot make a file system with {0}: leave it out with -O ^NAME")]
    Unsupported(String),
    /// The device has no room for the metadata.
    #[error("the device is too small for such a file system")]
    TooSmall,
    /// The device failed.
    #[error(transparent)]
    Device(#[from] Error),
}

impl MkfsError {
    fn invalid(problem: &str) -> Self {
        Self::Invalid(problem.to_owned())
    }
}

/// What was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Formatted {
    /// Bytes in a block.
    pub block_size: u32,
    /// All blocks.
    pub blocks: u64,
    /// Blocks that files can have.
    pub free_blocks: u64,
    /// Of those, blocks for the superuser.
    pub reserved_blocks: u64,
    /// All inodes.
    pub inodes: u32,
    /// Inodes that files can have.
    pub free_inodes: u32,
    /// Bytes in an inode.
    pub inode_size: u16,
    /// Whether there is a journal.
    pub has_journal: bool,
    /// Whether one was wanted, but a file system of less than 2048 blocks has no room for it.
    pub journal_left_out: bool,
}

/// Makes a file system on all of `device`, whose content is lost. The device is flushed.
///
/// # Errors
/// Before anything is written: [`MkfsError::Invalid`] and its like where the options or the size do not allow it.
pub fn format(device: &dyn BlockWrite, options: &MkfsOptions) -> Result<Formatted> {
    lay_out(device.size(), options, |raw, layout, contents| write::write(device, options, raw, layout, contents))
}

/// What [`format()`] would make on a device of `size` bytes.
pub fn plan(size: u64, options: &MkfsOptions) -> Result<Formatted> {
    lay_out(size, options, |_, _, _| Ok(()))
}

fn lay_out(
    size: u64,
    options: &MkfsOptions,
    then: impl FnOnce(&RawSuperblock, &Layout<'_>, &Contents<'_>) -> Result<(), Error>,
) -> Result<Formatted> {
    let mut plan = Plan::new(options, size)?;
    let wanted_journal = plan.features.has_compat(compat::HAS_JOURNAL);
    if !journal::fits(&plan) {
        plan.features.compat &= !(compat::HAS_JOURNAL | compat::ORPHAN_FILE);
    }
    let mut raw = superblock::build(options, &plan)?;
    let parsed = Superblock::parse(&raw.seal(), size)?;
    let mut layout = Layout::new(&plan, &parsed, options.stride.into())?;
    let contents = Contents::new(options, &mut layout, &parsed)?;
    superblock::complete(&mut raw, &layout, &contents);
    then(&raw, &layout, &contents)?;
    Ok(Formatted {
        block_size: plan.block_size,
        blocks: plan.blocks,
        free_blocks: layout.all_free_blocks(),
        reserved_blocks: plan.reserved_blocks,
        inodes: raw.inodes_count.get(),
        free_inodes: raw.free_inodes.get(),
        inode_size: plan.inode_size,
        has_journal: layout.has_journal(),
        journal_left_out: wanted_journal && !layout.has_journal(),
    })
}

/// An identity, in the form of a random UUID, that is the same whenever it is made of the same bytes.
#[must_use]
pub fn stable_uuid(of: &[u8]) -> [u8; 16] {
    let mut uuid = [0; 16];
    for (at, word) in (0_u8..).zip(uuid.chunks_exact_mut(4)) {
        word.copy_from_slice(&crc32c(crc32c(!0, &[at]), of).to_le_bytes());
    }
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}
