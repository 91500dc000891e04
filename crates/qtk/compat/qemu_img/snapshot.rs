use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::SystemTime;

use qtk_block::Access;
use qtk_image::{Error, edit_open, snapshot_table};
use qtk_qcow2::{NewSnapshot, SnapshotRefusal, WriteObstacle};

use super::getopt::Options;
use super::info::local_time;
use super::message::Failure;
use super::open::ImageArguments;
use super::{Outcome, help, operand};

const OPTIONS: &str = "l a: c: d: h|help q U|force-share object: image-opts";

/// `qemu-img` cuts longer names off, in bytes.
const MAX_NAME: usize = 255;

enum Action {
    List,
    Apply(String),
    Create(String),
    Delete(String),
}

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let (mut image, mut action) = (ImageArguments::default(), None);
    while let Some(found) = options.next()? {
        let next = match found.name {
            "h" => return help::print(),
            "l" => Action::List,
            "a" => Action::Apply(found.text()?),
            "c" => Action::Create(found.text()?),
            "d" => Action::Delete(found.text()?),
            // There is nothing to be quiet about.
            "q" => continue,
            _ => {
                image.take(found)?;
                continue;
            }
        };
        if action.replace(next).is_some() {
            return Err(Failure::usage("Cannot mix '-l', '-a', '-c', '-d'"));
        }
    }
    let name = operand(options, "Expecting one image file name")?;
    match action {
        // QEMU opens the image and does nothing.
        None => image.open(&name, Access::ReadWrite).map(|_| ExitCode::SUCCESS),
        Some(Action::List) => list(&image, &name),
        Some(change) => edit(&image, &name, &change),
    }
}

fn list(image: &ImageArguments, name: &OsStr) -> Outcome {
    let image = image.open(name, Access::ReadOnly)?;
    let snapshots = image.layers().first().and_then(|layer| layer.qcow2()).map(|layer| layer.snapshots());
    let snapshots = snapshots.transpose()?.unwrap_or_default();
    if !snapshots.is_empty() {
        write!(io::stdout(), "{}", snapshot_table(&snapshots, &local_time))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn edit(image: &ImageArguments, name: &OsStr, change: &Action) -> Outcome {
    let image = image.open(name, Access::ReadWrite)?;
    let result = edit_open(&image, |transaction| {
        match change {
            Action::List => {}
            Action::Apply(snapshot) => transaction.apply_snapshot(snapshot)?,
            Action::Delete(snapshot) => transaction.delete_snapshot(snapshot)?,
            Action::Create(snapshot) => transaction.create_snapshot(&new_snapshot(snapshot)).map(drop)?,
        }
        Ok(())
    });
    result.map_err(|error| change.in_words(error))?;
    Ok(ExitCode::SUCCESS)
}

fn new_snapshot(name: &str) -> NewSnapshot {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // The format's seconds wrap in 2106. QEMU keeps microseconds.
    let seconds = u32::try_from(now.as_secs() & u64::from(u32::MAX)).unwrap_or_default();
    let end = (0..=name.len().min(MAX_NAME)).rev().find(|&end| name.is_char_boundary(end)).unwrap_or_default();
    NewSnapshot { name: name[..end].to_owned(), taken: (seconds, now.subsec_micros() * 1000), icount: Some(0) }
}

impl Action {
    /// What QEMU says where this fails.
    fn in_words(&self, error: Error) -> Failure {
        let refusal = match &error {
            Error::Qcow2(qtk_qcow2::Error::Snapshot { refusal, .. }) => Some(*refusal),
            _ => None,
        };
        let is_raw = matches!(error, Error::NotQcow2 { .. });
        let (action, name, words) = match self {
            Self::List => return error.into(),
            Self::Apply(name) if is_raw => ("apply", name, Some("Block driver does not support snapshots")),
            Self::Apply(name) => ("apply", name, refusal.and_then(apply_refusal)),
            Self::Create(name) if is_raw => ("create", name, Some("Operation not supported")),
            Self::Create(name) if is_full(&error) => ("create", name, Some("Invalid argument")),
            Self::Create(name) => ("create", name, refusal.and_then(create_refusal)),
            Self::Delete(name) if is_raw || refusal.is_some() => ("delete", name, Some("snapshot not found")),
            Self::Delete(name) => ("delete", name, None),
        };
        let failure = words.map_or_else(|| Failure::from(error), Failure::new);
        failure.prefix(format_args!("Could not {action} snapshot '{name}': "))
    }
}

/// Whether a cluster has as many users already as its refcount can say.
fn is_full(error: &Error) -> bool {
    let Error::Qcow2(qtk_qcow2::Error::NotWritable { obstacle, .. }) = error else { return false };
    *obstacle == WriteObstacle::RefcountOverflow
}

fn apply_refusal(refusal: SnapshotRefusal) -> Option<&'static str> {
    match refusal {
        SnapshotRefusal::NotFound => Some("Failed to load snapshot: No such file or directory"),
        SnapshotRefusal::DataFile => Some("Failed to load snapshot: Operation not supported"),
        SnapshotRefusal::Bitmaps => Some("Device has active dirty bitmaps"),
        _ => None,
    }
}

fn create_refusal(refusal: SnapshotRefusal) -> Option<&'static str> {
    match refusal {
        SnapshotRefusal::DataFile => Some("Operation not supported"),
        SnapshotRefusal::TooMany => Some("File too large"),
        _ => None,
    }
}
