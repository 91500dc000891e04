use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use qtk_image::{NewImage, create_image};

use super::new_image::{BaseArguments, Codec, DurabilityArguments, NewImageArguments};
use super::{size, text};

/// Make an empty image, or an overlay that holds the changes to another
#[derive(Args, Debug)]
pub(crate) struct Create {
    /// The new image
    #[arg(value_name = "OUT")]
    output: PathBuf,

    #[command(flatten)]
    base: BaseArguments,

    /// Size of the guest's disk, such as 10G; the base's where not given
    #[arg(short, long, value_parser = size::parse, required_unless_present = "base")]
    size: Option<u64>,

    #[command(flatten)]
    kind: NewImageArguments,

    #[command(flatten)]
    durability: DurabilityArguments,

    /// How clusters will be compressed where a writer compresses them
    #[arg(long, value_name = "CODEC")]
    compression: Option<Codec>,

    /// Replace an image that is there already
    #[arg(long)]
    force: bool,
}

impl Create {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        self.kind.refuse_existing(&self.output, self.force)?;
        let kind = self.kind.on(&self.base, self.compression);
        let new = NewImage { size: self.size, durability: self.durability.into(), ..kind };
        for warning in create_image(&self.output, &new)? {
            text::warn(&warning.to_string());
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Refuses to replace what is there, unless that was asked for.
pub(crate) fn refuse_existing(output: &Path, force: bool) -> anyhow::Result<()> {
    if !force && output.metadata().is_ok_and(|metadata| metadata.len() > 0) {
        bail!("{}: exists already; choose another name, or replace it with --force", output.display());
    }
    Ok(())
}
