use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use qtk_image::{ImageInfo, chain_info, info};
use serde_json::Value;

use super::arguments::ImageArguments;
use super::{guest, size, text};

/// Show what an image is: format, sizes, features, what it lies on
#[derive(Args, Debug)]
pub(crate) struct Info {
    #[command(flatten)]
    image: ImageArguments,

    /// Every file that the image lies on too
    #[arg(long)]
    chain: bool,

    /// Print JSON, as `qemu-img info --output=json` does
    #[arg(long)]
    json: bool,
}

impl Info {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let options = self.image.access.for_reading();
        if self.chain {
            let infos = chain_info(&guest::open(&self.image.image, &options)?)?;
            if self.json {
                text::print_json(&infos.iter().map(ImageInfo::to_json).collect::<Value>())?;
            } else {
                print(&infos)?;
            }
        } else {
            let info = info(&self.image.image, &options)?;
            if self.json {
                text::print_json(&info.to_json())?;
            } else {
                print(&[info])?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print(infos: &[ImageInfo]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for (depth, info) in infos.iter().enumerate() {
        if depth > 0 {
            writeln!(out)?;
        }
        print_one(&mut out, info)?;
    }
    Ok(())
}

fn print_one(out: &mut impl Write, info: &ImageInfo) -> io::Result<()> {
    writeln!(out, "image: {}", text::shown(&info.path.to_string_lossy()))?;
    writeln!(out, "file format: {}", info.format.name())?;
    writeln!(out, "virtual size: {} ({} bytes)", size::human(info.virtual_size), info.virtual_size)?;
    writeln!(out, "disk size: {}", size::human(info.actual_size))?;
    let Some(qcow2) = &info.qcow2 else { return Ok(()) };
    writeln!(out, "cluster size: {}", size::human(qcow2.cluster_size))?;
    if let Some(name) = &qcow2.backing_name {
        let format = qcow2.backing_format.as_deref().unwrap_or("not recorded");
        writeln!(out, "backing file: {} (format: {})", text::shown(name), text::shown(format))?;
    }
    let Value::Object(data) = info.to_json()["format-specific"]["data"].take() else { return Ok(()) };
    for (key, value) in data.iter().filter(|(_, value)| !value.is_array()) {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        writeln!(out, "{}: {}", key.replace('-', " "), text::shown(&text))?;
    }
    for snapshot in &qcow2.snapshots {
        writeln!(out, "snapshot: {} {}", text::shown(&snapshot.id), text::shown(&snapshot.name))?;
    }
    qcow2.bitmaps.iter().try_for_each(|bitmap| writeln!(out, "bitmap: {}", text::shown(&bitmap.name)))
}
