use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_image::{Format, Image, NodeSpec, OpenOptions, RebaseMode, RebaseOptions, rebase};
use qtk_qcow2::Backing;

use super::arguments::FormatName;
use crate::progress::Bar;

/// Let an overlay lie on another image, or on none
#[derive(Args, Debug)]
#[command(after_help = "What the image reads as stays the same: it takes up what the two bases differ in.")]
pub(crate) struct Rebase {
    /// The overlay, a qcow2 image
    image: PathBuf,

    /// The new base; a relative name starts at the overlay's folder
    #[arg(short, long, value_name = "IMAGE", required_unless_present = "no_base", requires = "base_format")]
    base: Option<String>,

    /// Format of the base, which is recorded
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "base")]
    base_format: Option<FormatName>,

    /// Let the image stand alone
    #[arg(long, conflicts_with = "base")]
    no_base: bool,

    /// Only change the name in the header. Where the bases differ, so does then what the image reads as
    #[arg(short, long)]
    unsafe_header_only: bool,

    /// Compress what the image takes up
    #[arg(short, long, conflicts_with = "unsafe_header_only")]
    compress: bool,
}

impl Rebase {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let open = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
        let disk = Image::open_layer(&self.image, &open)?.size();
        let base = self.base.clone().map(|name| {
            let format = self.base_format.map(|format| Format::from(format).name().to_owned());
            Backing { name, format }
        });
        let mode = if self.unsafe_header_only { RebaseMode::HeaderOnly } else { RebaseMode::Safe };
        let bar = Bar::new(disk, "rebasing");
        rebase(&NodeSpec::from_path(&self.image), &open, &RebaseOptions { base, mode, compress: self.compress }, &bar)?;
        Ok(ExitCode::SUCCESS)
    }
}
