use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use qtk_block::BlockRead;
use qtk_disk::{CheckOptions, CheckReport, Checked, check_file_systems};
use serde_json::{Value, json};

use super::arguments::ImageArguments;
use super::{guest, text};

/// Look for damage in the ext2, ext3 and ext4 file systems of an image, without changing anything
#[derive(Args, Debug)]
#[command(
    after_help = "Exit code 3 where anything is damaged; `e2fsck` repairs it. A journal that was not played to its end is played \
    into memory first, and what the next mount puts right by itself counts as clean."
)]
pub(crate) struct Fsck {
    #[command(flatten)]
    image: ImageArguments,

    /// Check the file system of this partition alone
    #[arg(long, value_name = "NUMBER")]
    partition: Option<u32>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Fsck {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let name = self.image.image.display().to_string();
        let image = guest::open(&self.image.image, &self.image.access.for_reading())?;
        let device: Arc<dyn BlockRead> = Arc::new(image);
        let checked =
            check_file_systems(&device, self.partition, &CheckOptions::default()).with_context(|| name.clone())?;
        if self.json {
            let all: Vec<Value> = checked.iter().map(to_json).collect();
            text::print_json(&json!({ "filename": name, "file-systems": all }))?;
        } else {
            checked.iter().try_for_each(|checked| print(checked, &name))?;
        }
        let damaged =
            checked.iter().filter_map(|checked| checked.outcome.as_ref().ok()).any(|report| !report.is_clean());
        // What could not be checked matters only if nothing worse was found.
        let failure = checked.into_iter().find_map(|checked| checked.outcome.err());
        match failure {
            Some(error) if !damaged => Err(anyhow::Error::new(error).context(name)),
            _ => Ok(if damaged { ExitCode::from(3) } else { ExitCode::SUCCESS }),
        }
    }
}

fn verdict(report: &CheckReport) -> &'static str {
    if report.is_clean() { "clean" } else { "damaged" }
}

fn to_json(checked: &Checked) -> Value {
    let mut object = json!({ "place": checked.place.to_string(), "type": checked.content.to_string() });
    let report = match &checked.outcome {
        Ok(report) => report,
        Err(error) => {
            object["verdict"] = "unknown".into();
            object["error"] = causes(error).into();
            return object;
        }
    };
    let findings = report.findings.iter().map(|finding| {
        json!({
            "kind": finding.kind.name(),
            "place": finding.place.to_string(),
            "text": finding.text,
            "harmless": finding.harmless,
        })
    });
    let facts = json!({
        "verdict": verdict(report),
        "complete": report.is_complete,
        "damages": report.damages,
        "notes": report.notes,
        "findings": findings.collect::<Vec<_>>(),
        "not-covered": report.not_covered,
        "journal-replayed": report.journal_replayed,
        "inodes-in-use": report.inodes_in_use,
        "directories": report.directories,
        "blocks-in-use": report.blocks_in_use,
    });
    if let (Value::Object(object), Value::Object(facts)) = (&mut object, facts) {
        object.extend(facts);
    }
    object
}

fn causes(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn print(checked: &Checked, name: &str) -> io::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let place = text::shown(name).to_string() + ": " + &checked.place.to_string();
    let report = match &checked.outcome {
        Ok(report) => report,
        Err(error) => {
            writeln!(out, "{place}: not checked: {}", text::shown(&causes(error)))?;
            return out.flush();
        }
    };
    for finding in &report.findings {
        let note = if finding.harmless { "note: " } else { "" };
        writeln!(out, "{place}: {note}{}", text::shown(&finding.to_string()))?;
    }
    let listed = report.findings.len() as u64;
    let all = report.damages + report.notes;
    if all > listed {
        writeln!(out, "{place}: ... and {} more", all - listed)?;
    }
    if report.journal_replayed {
        writeln!(
            out,
            "{place}: note: the journal is not empty; this is the state that the next mount will bring about"
        )?;
    }
    for part in &report.not_covered {
        writeln!(out, "{place}: note: {part} is not verified")?;
    }
    if report.is_clean() {
        writeln!(
            out,
            "{place}: {}, clean: {} inodes, {} directories, {} blocks in use",
            checked.content, report.inodes_in_use, report.directories, report.blocks_in_use
        )?;
    } else {
        let rest = if report.is_complete { "" } else { ", and the check could not go on" };
        writeln!(
            out,
            "{place}: {}, damaged: {} things found{rest}; repair it with e2fsck",
            checked.content, report.damages
        )?;
    }
    out.flush()
}
