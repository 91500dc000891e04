use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use qtk_image::{Image, NodeSpec, OpenOptions, edit};
use qtk_qcow2::{NewSnapshot, Snapshot, Transaction};
use serde_json::{Value, json};

use super::arguments::ImageArguments;
use super::{guest, size, text};

/// Keep states of a disk inside its qcow2 image
#[derive(Args, Debug)]
pub(crate) struct SnapshotVerb {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    List(List),
    Create(Create),
    Apply(Apply),
    Delete(Delete),
}

/// List the snapshots of an image
#[derive(Args, Debug)]
struct List {
    #[command(flatten)]
    image: ImageArguments,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Take a snapshot of the disk as it is
#[derive(Args, Debug)]
struct Create {
    /// The qcow2 image
    image: PathBuf,
    /// The snapshot's name
    name: String,
}

/// Give the disk the content and the size that it had in a snapshot. What it holds now is lost
#[derive(Args, Debug)]
struct Apply {
    /// The qcow2 image
    image: PathBuf,
    /// The snapshot's identifier or name
    name: String,
}

/// Delete a snapshot
#[derive(Args, Debug)]
struct Delete {
    /// The qcow2 image
    image: PathBuf,
    /// The snapshot's name
    name: String,
}

impl SnapshotVerb {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        match &self.verb {
            Verb::List(list) => list.run()?,
            Verb::Create(Create { image, name }) => {
                let new = NewSnapshot { name: name.clone(), taken: now()?, icount: None };
                change(image, |transaction| transaction.create_snapshot(&new).map(drop))?;
            }
            Verb::Apply(Apply { image, name }) => change(image, |transaction| transaction.apply_snapshot(name))?,
            Verb::Delete(Delete { image, name }) => change(image, |transaction| transaction.delete_snapshot(name))?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Changes a qcow2 image in one transaction.
pub(crate) fn change<T>(
    image: &std::path::Path,
    work: impl FnOnce(&Transaction) -> Result<T, qtk_qcow2::Error>,
) -> anyhow::Result<T> {
    let options = OpenOptions { format: Some(qtk_image::Format::Qcow2), ..OpenOptions::writable() };
    Ok(edit(&NodeSpec::from_path(image), &options, |transaction, _| Ok(work(transaction)?))?)
}

fn now() -> anyhow::Result<(u32, u32)> {
    let now = guest::now()?;
    Ok((u32::try_from(now.seconds).context("the time cannot be stored")?, now.nanos))
}

impl List {
    fn run(&self) -> anyhow::Result<()> {
        let layer = Image::open_layer(&self.image.image, &self.image.access.for_reading())?;
        let snapshots = layer.qcow2().map_or_else(|| Ok(Vec::new()), |qcow2| qcow2.snapshots())?;
        if self.json {
            return text::print_json(&snapshots.iter().map(to_json).collect::<Value>());
        }
        let mut out = io::stdout().lock();
        for snapshot in &snapshots {
            let taken = jiff::Timestamp::from_second(snapshot.taken.0.into())?;
            let disk = snapshot.disk_size.map_or_else(|| "-".to_owned(), size::human);
            let (id, name) = (text::shown(&snapshot.id), text::shown(&snapshot.name));
            writeln!(out, "{id}\t{name}\t{taken}\tdisk {disk}\tmemory {}", size::human(snapshot.vm_state_size))?;
        }
        Ok(())
    }
}

fn to_json(snapshot: &Snapshot) -> Value {
    json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "date-sec": snapshot.taken.0,
        "date-nsec": snapshot.taken.1,
        "vm-clock-nsec": snapshot.vm_clock_nsec,
        "vm-state-size": snapshot.vm_state_size,
        "disk-size": snapshot.disk_size,
        "icount": snapshot.icount,
    })
}
