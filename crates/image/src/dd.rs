use std::path::Path;

use qtk_block::{BlockRead, Progress};

use crate::convert::{CopiedBitmaps, Disk, Listener, hold_still, into_new};
use crate::{ConvertOptions, ConvertReport, Error, Image, NewImage};

/// Which part of a disk [`dd`] copies, in the terms of dd(1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DdOptions {
    /// Bytes of a block.
    pub block_size: u64,
    /// Blocks of the source up to which is copied; all if not given. As in `qemu-img`, skipped ones count.
    pub count: Option<u64>,
    /// Blocks of the source that are left out.
    pub skip: u64,
}

impl Default for DdOptions {
    fn default() -> Self {
        Self { block_size: 512, count: None, skip: 0 }
    }
}

/// What [`dd`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DdReport {
    /// Whether more was to be skipped than there is. The new image is empty then.
    pub skipped_too_far: bool,
    /// What was copied.
    pub copy: ConvertReport,
}

/// Copies a part of a disk into a new image at `path`, which stores every byte of it, as `qemu-img dd` does.
pub fn dd(
    source: &Image,
    path: &Path,
    target: &NewImage,
    options: &DdOptions,
    progress: &dyn Progress,
) -> Result<DdReport, Error> {
    let start = options.skip.saturating_mul(options.block_size);
    let end = options.count.map_or(u64::MAX, |count| count.saturating_mul(options.block_size)).min(source.size());
    let skipped_too_far = start > end;
    let sources = std::slice::from_ref(source);
    let _held = hold_still(sources)?;
    let disk = Disk::window(source, start.min(end)..end);
    let listener = Listener { warn: &mut |_| {}, progress };
    let all = ConvertOptions { sparse_size: 0, ..ConvertOptions::default() };
    // Nothing warns of the source where nothing is salvaged, and the target has no base.
    let copy = into_new((disk, sources, &CopiedBitmaps::default()), (path, target), &all, listener)?;
    Ok(DdReport { skipped_too_far, copy })
}
