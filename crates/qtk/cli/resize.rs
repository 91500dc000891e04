use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_image::{NewSize, NodeSpec, OpenOptions, ResizeOptions, resize};
use serde_json::json;

use super::arguments::FormatName;
use super::new_image::PreallocationName;
use super::{size, text};

/// Give an image's disk another size
#[derive(Args, Debug)]
#[command(after_help = "Partitions and file systems in the guest stay as they are.")]
pub(crate) struct Resize {
    /// The disk image
    image: PathBuf,

    /// The new size, such as 20G; +5G grows the disk by so much, -5G shrinks it
    #[arg(allow_hyphen_values = true, value_parser = new_size)]
    size: NewSize,

    /// Format of the image; needed for raw images, whose format is never guessed for writing
    #[arg(short = 'f', long, value_name = "FORMAT", default_value = "qcow2")]
    image_format: FormatName,

    /// Let the disk get smaller: what lies past its new end is lost
    #[arg(long)]
    shrink: bool,

    /// How much of what the disk grows by gets its place on the host at once
    #[arg(long, value_enum, default_value_t = PreallocationName::Off)]
    preallocation: PreallocationName,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Resize {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let options = ResizeOptions { size: self.size, shrink: self.shrink, preallocation: self.preallocation.into() };
        let open = OpenOptions { format: Some(self.image_format.into()), ..OpenOptions::writable() };
        let resized = resize(&NodeSpec::from_path(&self.image), &open, &options)?;
        if self.json {
            text::print_json(
                &json!({ "filename": self.image.to_string_lossy(), "old-size": resized.old, "new-size": resized.new }),
            )?;
        } else {
            let (old, new) = (size::human(resized.old), size::human(resized.new));
            writeln!(io::stdout(), "{}: {old} before, {new} now", self.image.display())?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn new_size(text: &str) -> Result<NewSize, String> {
    match text.as_bytes().first() {
        Some(b'+') => size::parse(&text[1..]).map(NewSize::Grow),
        Some(b'-') => size::parse(&text[1..]).map(NewSize::Shrink),
        _ => size::parse(text).map(NewSize::To),
    }
}
