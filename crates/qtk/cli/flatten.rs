use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_block::BlockRead;
use qtk_image::{FlattenOptions, flatten};
use qtk_qcow2::CompressionType;

use super::arguments::{FormatName, ImageArguments};
use super::convert::{print_saving, to_json};
use super::level::LevelArguments;
use super::new_image::{Codec, DurabilityArguments};
use super::sparsify::SparsifyArguments;
use super::{guest, size, text};
use crate::progress::Bar;

/// Merge an image and everything it lies on into one file that stands alone
#[derive(Args, Debug)]
pub(crate) struct Flatten {
    #[command(flatten)]
    image: ImageArguments,

    /// The new image; it appears when it is complete
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,

    /// Compress with this codec; not compressed where not given
    #[arg(short, long = "compress", value_name = "CODEC")]
    codec: Option<Codec>,

    #[command(flatten)]
    level: LevelArguments,

    /// Format of the new image
    #[arg(long, value_enum, default_value_t = FormatName::Qcow2)]
    format: FormatName,

    /// Cluster size of the new image; 64K where not given. With 128K compressed images are smaller; it is the most that Cloud
    /// Hypervisor reads compressed
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    cluster_size: Option<u64>,

    /// Compress anew what could be copied as it is
    #[arg(long)]
    recompress: bool,

    /// Store clusters that are alike once, for images that are only read: bases and golden images. Cloud Hypervisor
    /// overwrites a shared cluster in its place, which changes all that share it; QEMU and qtk do not
    #[arg(long)]
    dedup: bool,

    #[command(flatten)]
    sparsify: SparsifyArguments,

    /// Threads that read and compress; one per processor where not given. The result is the same on any number
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    #[command(flatten)]
    durability: DurabilityArguments,

    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

impl Flatten {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let compression = self.codec.map(CompressionType::from);
        let level = compression.map(|kind| self.level.level(kind));
        let image = guest::open(&self.image.image, &self.image.access.for_reading())?;
        let sparsified = self.sparsify.find(std::slice::from_ref(&image))?;
        let options = FlattenOptions {
            format: self.format.into(),
            compression,
            level,
            cluster_size: self.cluster_size,
            recompress: self.recompress,
            dedup: self.dedup,
            unused: sparsified.ranges(),
            threads: self.threads.map(NonZeroUsize::get),
            durability: self.durability.into(),
        };
        let bar = Bar::new(image.size(), "flattening");
        let report = flatten(&image, &self.output, &options, &bar)?;
        drop(bar);
        if self.json {
            let mut facts = to_json(&self.output, &report, level);
            sparsified.describe(&report, &mut facts);
            text::print_json(&facts)?;
            return Ok(ExitCode::SUCCESS);
        }
        sparsified.print(&report)?;
        if self.dedup {
            print_saving(&report)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
