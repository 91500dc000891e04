use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_block::BlockRead;
use qtk_image::{DdOptions, NewImage, dd};

use super::arguments::AccessArguments;
use super::convert::to_json;
use super::new_image::{DurabilityArguments, NewImageArguments};
use super::{guest, size, text};
use crate::progress::Bar;

/// Copy a part of a disk into a new image
#[derive(Args, Debug)]
pub(crate) struct Dd {
    /// The image to copy from
    image: PathBuf,

    #[command(flatten)]
    access: AccessArguments,

    /// The new image; it appears when it is complete
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,

    #[command(flatten)]
    kind: NewImageArguments,

    #[command(flatten)]
    durability: DurabilityArguments,

    /// Replace an image that is there already
    #[arg(long)]
    force: bool,

    /// Bytes of a block
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "512")]
    block_size: u64,

    /// Blocks that are left out at the start
    #[arg(long, value_name = "BLOCKS", default_value_t = 0)]
    skip: u64,

    /// Block at which the copy ends; the disk's end where not given. As in `qemu-img dd`, skipped blocks count
    #[arg(long, value_name = "BLOCKS")]
    count: Option<u64>,

    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

impl Dd {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let image = guest::open(&self.image, &self.access.for_reading())?;
        self.kind.refuse_existing(&self.output, self.force)?;
        let options = DdOptions { block_size: self.block_size, count: self.count, skip: self.skip };
        let bar = Bar::new(image.size(), "copying");
        let new = NewImage { durability: self.durability.into(), ..self.kind.alone(None) };
        let report = dd(&image, &self.output, &new, &options, &bar)?;
        drop(bar);
        if report.skipped_too_far {
            text::warn(&format!("{}: nothing is left after what is skipped", self.image.display()));
        }
        if self.json {
            text::print_json(&to_json(&self.output, &report.copy, None))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
