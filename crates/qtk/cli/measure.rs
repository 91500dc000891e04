use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_image::{MeasureSource, measure};
use serde_json::json;

use super::arguments::AccessArguments;
use super::new_image::NewImageArguments;
use super::{guest, size, text};

/// Tell how large the file of a new image will be
#[derive(Args, Debug)]
#[command(after_help = "Compression is not counted: a compressed image is smaller.")]
pub(crate) struct Measure {
    /// The image that is to be converted
    #[arg(required_unless_present = "size", conflicts_with = "size")]
    image: Option<PathBuf>,

    #[command(flatten)]
    access: AccessArguments,

    /// Measure an empty disk of this size instead
    #[arg(short, long, value_parser = size::parse)]
    size: Option<u64>,

    #[command(flatten)]
    kind: NewImageArguments,

    /// Print JSON, as `qemu-img measure --output=json` does
    #[arg(long)]
    json: bool,
}

impl Measure {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let target = self.kind.alone(None);
        let image = self.image.as_ref().map(|path| guest::open(path, &self.access.for_reading())).transpose()?;
        let source = match &image {
            Some(image) => MeasureSource::Image(image),
            None => MeasureSource::Size(self.size.unwrap_or_default()),
        };
        let measured = measure(source, &target)?;
        if self.json {
            let mut facts = json!({ "required": measured.required, "fully-allocated": measured.fully_allocated });
            if let Some(bitmaps) = measured.bitmaps {
                facts["bitmaps"] = bitmaps.into();
            }
            text::print_json(&facts)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut out = io::stdout().lock();
        writeln!(out, "required size: {}", measured.required)?;
        writeln!(out, "fully allocated size: {}", measured.fully_allocated)?;
        if let Some(bitmaps) = measured.bitmaps {
            writeln!(out, "bitmaps size: {bitmaps}")?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
