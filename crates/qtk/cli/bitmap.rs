use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Subcommand};
use qtk_image::Image;
use qtk_qcow2::{Bitmap, NewBitmap};
use serde_json::{Value, json};

use super::arguments::{AccessArguments, ImageArguments};
use super::snapshot::change;
use super::{size, text};

/// Keep track of what is written to a disk, in its qcow2 image
#[derive(Args, Debug)]
pub(crate) struct BitmapVerb {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    List(List),
    Add(Add),
    /// Remove a bitmap
    Remove(Named),
    /// Clear a bitmap: nothing counts as written
    Clear(Named),
    /// Record writes in a bitmap from now on
    Enable(Named),
    /// Record no more writes in a bitmap
    Disable(Named),
    Merge(Merge),
}

/// List the bitmaps of an image
#[derive(Args, Debug)]
struct List {
    #[command(flatten)]
    image: ImageArguments,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct Named {
    /// The qcow2 image
    image: PathBuf,
    /// The bitmap's name
    name: String,
}

/// Add an empty bitmap
#[derive(Args, Debug)]
struct Add {
    #[command(flatten)]
    bitmap: Named,

    /// Bytes of the disk that one bit stands for: a power of two
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse)]
    granularity: Option<u64>,

    /// Do not record writes yet
    #[arg(long)]
    disabled: bool,
}

/// Add to a bitmap what another one calls written
#[derive(Args, Debug)]
struct Merge {
    #[command(flatten)]
    bitmap: Named,

    /// The other bitmap
    source: String,

    /// The image that has the other bitmap; the same one where not given
    #[arg(long, value_name = "IMAGE")]
    source_image: Option<PathBuf>,

    #[command(flatten)]
    access: AccessArguments,
}

impl BitmapVerb {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        match &self.verb {
            Verb::List(list) => list.run()?,
            Verb::Add(add) => add.run()?,
            Verb::Remove(Named { image, name }) => change(image, |transaction| transaction.remove_bitmap(name))?,
            Verb::Clear(Named { image, name }) => change(image, |transaction| transaction.clear_bitmap(name))?,
            Verb::Enable(Named { image, name }) => change(image, |transaction| transaction.enable_bitmap(name))?,
            Verb::Disable(Named { image, name }) => change(image, |transaction| transaction.disable_bitmap(name))?,
            Verb::Merge(merge) => merge.run()?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl List {
    fn run(&self) -> anyhow::Result<()> {
        let layer = Image::open_layer(&self.image.image, &self.image.access.for_reading())?;
        let bitmaps = layer.qcow2().map_or_else(|| Ok(Vec::new()), |qcow2| qcow2.bitmaps())?;
        if self.json {
            return text::print_json(&bitmaps.iter().map(to_json).collect::<Value>());
        }
        let mut out = io::stdout().lock();
        for bitmap in &bitmaps {
            let state = match (bitmap.in_use, bitmap.auto) {
                (true, _) => "inconsistent",
                (false, true) => "enabled",
                (false, false) => "disabled",
            };
            writeln!(out, "{}\t{state}\t{}", text::shown(&bitmap.name), size::human(bitmap.granularity))?;
        }
        Ok(())
    }
}

fn to_json(bitmap: &Bitmap) -> Value {
    json!({
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "enabled": bitmap.auto,
        "inconsistent": bitmap.in_use,
    })
}

impl Add {
    fn run(&self) -> anyhow::Result<()> {
        let Named { image, name } = &self.bitmap;
        let new = NewBitmap { name: name.clone(), granularity: self.granularity, enabled: !self.disabled };
        change(image, |transaction| transaction.add_bitmap(&new))
    }
}

impl Merge {
    fn run(&self) -> anyhow::Result<()> {
        let Named { image, name } = &self.bitmap;
        let Some(other) = &self.source_image else {
            return change(image, |transaction| {
                transaction.merge_bitmap(name, &transaction.bitmap_contents(&self.source)?)
            });
        };
        let layer = Image::open_layer(other, &self.access.for_reading())?;
        let Some(qcow2) = layer.qcow2() else { bail!("{}: only qcow2 images have bitmaps", other.display()) };
        let source = qcow2.bitmap_contents(&self.source)?;
        change(image, |transaction| transaction.merge_bitmap(name, &source))
    }
}
