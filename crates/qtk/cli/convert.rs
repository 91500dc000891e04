use std::io::{self, Write};
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use qtk_block::BlockRead;
use qtk_image::{
    BitmapCopy, ChainLayer, ConvertOptions, ConvertReport, Image, NewImage, OpenOptions, SnapshotName, Target, convert,
};
use serde_json::{Value, json};

use super::arguments::{AccessArguments, FormatName};
use super::level::LevelArguments;
use super::new_image::{BaseArguments, Codec, DurabilityArguments, NewImageArguments};
use super::sparsify::{Sparsified, SparsifyArguments};
use super::{guest, size, text};
use crate::progress::Bar;

/// Copy disks into an image of another format, with other features, or into one that is there
#[derive(Args, Debug)]
#[command(
    after_help = "Several sources become one disk, one after the other. To merge a chain into one image, use `qtk flatten`."
)]
pub(crate) struct Convert {
    /// The images to copy
    #[arg(required = true, value_name = "SOURCE")]
    sources: Vec<PathBuf>,

    #[command(flatten)]
    access: AccessArguments,

    /// The new image; it appears when it is complete
    #[arg(short, long, value_name = "OUT", required_unless_present = "into")]
    output: Option<PathBuf>,

    #[command(flatten)]
    kind: NewImageArguments,

    #[command(flatten)]
    base: BaseArguments,

    #[command(flatten)]
    durability: DurabilityArguments,

    /// Replace an image that is there already
    #[arg(long, conflicts_with = "into")]
    force: bool,

    /// Copy into this existing image, in one transaction
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["output", "base", "no_sync"])]
    into: Option<PathBuf>,

    /// Format of the existing image, which is never guessed
    #[arg(long, value_name = "FORMAT", requires = "into", default_value = "qcow2")]
    into_format: FormatName,

    /// The existing image reads as zeroes, which then need not be written
    #[arg(long, requires = "into")]
    target_is_zero: bool,

    /// Copy the disk as this internal snapshot holds it, named by identifier or name
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,

    /// Compress with this codec; not compressed where not given
    #[arg(short, long = "compress", value_name = "CODEC")]
    codec: Option<Codec>,

    #[command(flatten)]
    level: LevelArguments,

    /// Compress anew what could be copied as it is
    #[arg(long)]
    recompress: bool,

    /// Store clusters that are alike once, for images that are only read: bases and golden images. Cloud Hypervisor
    /// overwrites a shared cluster in its place, which changes all that share it; QEMU and qtk do not
    #[arg(long, conflicts_with = "into")]
    dedup: bool,

    /// Leave out zeroes from this length on; with 0 everything is stored
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = size::parse, default_value = "4K")]
    sparse_size: u64,

    #[command(flatten)]
    sparsify: SparsifyArguments,

    /// Take what cannot be read for zeroes
    #[arg(long)]
    salvage: bool,

    /// Let the host copy data, without a look at it: zeroes in it stay data
    #[arg(long, conflicts_with_all = ["into", "codec", "dedup", "sparse_size", "salvage"])]
    offload: bool,

    /// Copy the persistent dirty bitmaps too
    #[arg(long)]
    bitmaps: bool,

    /// Leave out bitmaps that are not consistent
    #[arg(long, requires = "bitmaps")]
    skip_broken_bitmaps: bool,

    /// Write at most so many bytes in a second
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse)]
    rate_limit: Option<u64>,

    /// Threads that read and compress; one per processor where not given. The result is the same on any number
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

impl Convert {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let sources = self.sources.iter().map(|path| self.source(path)).collect::<anyhow::Result<Vec<_>>>()?;
        let sparsified = self.sparsify.find(&sources)?;
        let ((report, level), path) = match (&self.into, &self.output) {
            (Some(path), _) => (self.copy_to_existing(&sources, path, &sparsified)?, path),
            (None, Some(path)) => (self.copy_to_new(&sources, path, &sparsified)?, path),
            (None, None) => return Ok(ExitCode::from(2)),
        };
        if self.json {
            let mut facts = to_json(path, &report, level);
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

    fn source(&self, path: &Path) -> anyhow::Result<Image> {
        let snapshot = self.snapshot.clone().map(SnapshotName::Any);
        guest::open(path, &OpenOptions { snapshot, ..self.access.for_reading() })
    }

    fn copy_to_new(
        &self,
        sources: &[Image],
        path: &Path,
        sparsified: &Sparsified,
    ) -> anyhow::Result<(ConvertReport, Option<i32>)> {
        self.kind.refuse_existing(path, self.force)?;
        let image = NewImage { durability: self.durability.into(), ..self.kind.on(&self.base, self.codec) };
        self.copy(sources, Target::New { path, image: &image }, sparsified)
    }

    fn copy_to_existing(
        &self,
        sources: &[Image],
        path: &Path,
        sparsified: &Sparsified,
    ) -> anyhow::Result<(ConvertReport, Option<i32>)> {
        let options = OpenOptions { format: Some(self.into_format.into()), ..OpenOptions::writable() };
        let image = guest::open(path, &options)?;
        self.copy(sources, Target::Existing { image, overlay: false }, sparsified)
    }

    /// Returns the level of the codec too, if there is one.
    fn copy(
        &self,
        sources: &[Image],
        target: Target<'_>,
        sparsified: &Sparsified,
    ) -> anyhow::Result<(ConvertReport, Option<i32>)> {
        let kind = match &target {
            Target::New { image, .. } => Some(image.qcow2.compression),
            Target::Existing { image, .. } => {
                image.layers().first().and_then(ChainLayer::qcow2).map(|layer| layer.compression())
            }
        };
        let level = kind.filter(|_| self.codec.is_some()).map(|kind| self.level.level(kind));
        let options = ConvertOptions {
            compress: self.codec.is_some(),
            level,
            recompress: self.recompress,
            dedup: self.dedup,
            unused: sparsified.ranges(),
            sparse_size: self.sparse_size,
            salvage: self.salvage,
            target_is_zero: self.target_is_zero,
            offload: self.offload,
            rate_limit: self.rate_limit.and_then(NonZeroU64::new),
            bitmaps: match (self.bitmaps, self.skip_broken_bitmaps) {
                (false, _) => BitmapCopy::None,
                (true, false) => BitmapCopy::All,
                (true, true) => BitmapCopy::Consistent,
            },
            threads: self.threads.map(NonZeroUsize::get),
        };
        let bar = Bar::new(sources.iter().map(BlockRead::size).sum(), "converting");
        let mut warn = |warning: qtk_image::ConvertWarning| text::warn(&warning.to_string());
        Ok((convert(sources, target, &options, &mut warn, &bar)?, level))
    }
}

/// What a copy did, for `--json`, and at which level of its codec.
pub(crate) fn to_json(path: &Path, report: &ConvertReport, level: Option<i32>) -> Value {
    json!({
        "filename": path.to_string_lossy(),
        "virtual-size": report.disk_size,
        "file-size": report.file_size,
        "level": level,
        "compressed-clusters": report.compressed,
        "copied-clusters": report.copied,
        "plain-bytes": report.plain_bytes,
        "reflinked-bytes": report.reflinked,
        "shared-clusters": report.shared,
        "saved-bytes": report.saved,
    })
}

/// Says what it saved to store equal clusters once.
pub(crate) fn print_saving(report: &ConvertReport) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout(), "shared {} clusters: {} saved", report.shared, size::human(report.saved))?)
}
