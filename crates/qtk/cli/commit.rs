use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_image::{CommitOptions, Format, Image, NodeSpec, OpenOptions, commit};

use super::size;
use crate::progress::Bar;

/// Write what an overlay holds into the image it lies on, and empty the overlay
#[derive(Args, Debug)]
#[command(after_help = "The base changes in one transaction, and the overlay is emptied only after that.")]
pub(crate) struct Commit {
    /// The overlay, a qcow2 image
    image: PathBuf,

    /// The file of the chain to commit into, by its name; the overlay is kept then
    #[arg(short, long, value_name = "IMAGE")]
    base: Option<String>,

    /// Keep the overlay's content
    #[arg(short, long)]
    keep: bool,

    /// Write at most so many bytes in a second
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse)]
    rate_limit: Option<u64>,
}

impl Commit {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let open = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
        let disk = Image::open_layer(&self.image, &open)?.size();
        let options = CommitOptions {
            base: self.base.clone(),
            keep_overlay: self.keep,
            guess_base: false,
            rate_limit: self.rate_limit.and_then(NonZeroU64::new),
        };
        let bar = Bar::new(disk, "committing");
        commit(&NodeSpec::from_path(&self.image), &open, &options, &bar)?;
        Ok(ExitCode::SUCCESS)
    }
}
