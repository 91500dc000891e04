use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use qtk_image::{Format, NewImage, create_image};
use qtk_qcow2::{ClusterBits, CreateOptions};

use super::arguments::FormatName;
use super::{size, text};

/// Make an empty image, or an overlay that holds the changes to another
#[derive(Args, Debug)]
pub(crate) struct Create {
    /// The new image
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// The image to lie on; a relative name starts at OUT's folder
    #[arg(short, long)]
    base: Option<PathBuf>,

    /// Format of the base; found out where not given, and recorded
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "base")]
    base_format: Option<FormatName>,

    /// Size of the guest's disk, such as 10G; the base's where not given
    #[arg(short, long, value_parser = size::parse, required_unless_present = "base")]
    size: Option<u64>,

    /// Cluster size; 64K where not given
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    cluster_size: Option<u64>,

    /// Format of the new image
    #[arg(long, value_enum, default_value_t = FormatName::Qcow2)]
    format: FormatName,

    /// Replace an image that is there already
    #[arg(long)]
    force: bool,
}

impl Create {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        if !self.force && self.output.metadata().is_ok_and(|metadata| metadata.len() > 0) {
            bail!("{}: exists already; choose another name, or replace it with --force", self.output.display());
        }
        let format = self.format.into();
        let cluster_bits = match self.cluster_size {
            None => ClusterBits::default(),
            Some(_) if format == Format::Raw => bail!("raw images have no clusters"),
            Some(size) => ClusterBits::from_size(size)
                .context("the cluster size must be a power of two from 512 bytes to 2 MiB")?,
        };
        let new = NewImage {
            format,
            size: self.size,
            base: self.base.clone(),
            base_format: self.base_format.map(|format| Format::from(format).name().to_owned()),
            qcow2: CreateOptions { cluster_bits, ..CreateOptions::default() },
            ..NewImage::default()
        };
        for warning in create_image(&self.output, &new)? {
            text::warn(&warning.to_string());
        }
        Ok(ExitCode::SUCCESS)
    }
}
