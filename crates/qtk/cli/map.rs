use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use qtk_block::BlockRead;
use qtk_image::{Image, MapEntry, map};
use serde_json::Value;

use super::arguments::ImageArguments;
use super::{guest, text};

/// Show where an image and the files it lies on store the disk
#[derive(Args, Debug)]
pub(crate) struct Map {
    #[command(flatten)]
    image: ImageArguments,

    /// Print JSON, as `qemu-img map --output=json` does
    #[arg(long)]
    json: bool,
}

impl Map {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let image = guest::open(&self.image.image, &self.image.access.for_reading())?;
        let entries = map(&image, 0..image.size())?;
        if self.json {
            text::print_json(&entries.iter().map(MapEntry::to_json).collect::<Value>())?;
        } else {
            print(&image, &entries)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The runs that hold data, each with its file.
fn print(image: &Image, entries: &[MapEntry]) -> io::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    writeln!(out, "{:<15} {:<15} {:<15} File", "Offset", "Length", "Mapped to")?;
    for entry in entries.iter().filter(|entry| entry.data) {
        let place = match entry.offset {
            Some(offset) => format!("{offset:#x}"),
            None => "compressed".to_owned(),
        };
        let file = image.layers().get(entry.depth).map(|layer| layer.path().to_string_lossy()).unwrap_or_default();
        writeln!(out, "{:<#15x} {:<#15x} {place:<15} {}", entry.start, entry.length, text::shown(&file))?;
    }
    out.flush()
}
