use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, ValueEnum};
use qtk_block::{Access, BlockRead};
use qtk_image::{Image, OpenOptions, salvage};
use qtk_qcow2::{CheckReport, Repair, RepairReport, repair};
use serde_json::{Value, json};

use super::arguments::ImageArguments;
use super::create::refuse_existing;
use super::text;
use crate::progress::Bar;

/// Look for damage in a qcow2 image, and repair it: references, refcounts, leaks
#[derive(Args, Debug)]
#[command(
    after_help = "Exit code 3 where anything was found and is still there. The files that back the image are not looked at.\n\
    A repair happens whole, or the image stays as it was. A salvage changes nothing but its output."
)]
pub(crate) struct Check {
    #[command(flatten)]
    image: ImageArguments,

    /// Repair what is found: only leaks, which cost space and harm nothing, or all that can be repaired
    #[arg(short, long, value_name = "WHAT")]
    repair: Option<RepairName>,

    /// Copy what can be read of the disk, its backing files included, to a new qcow2 image, and list the ranges that are lost
    #[arg(long, value_name = "OUT", conflicts_with = "repair")]
    salvage: Option<PathBuf>,

    /// Replace a file that is there already with the salvaged image
    #[arg(long, requires = "salvage")]
    force: bool,

    /// Print JSON, as `qemu-img check --output=json` does
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RepairName {
    Leaks,
    All,
}

impl From<RepairName> for Repair {
    fn from(name: RepairName) -> Self {
        match name {
            RepairName::Leaks => Self::Leaks,
            RepairName::All => Self::All,
        }
    }
}

impl Check {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        if let Some(output) = &self.salvage {
            return self.salvage(output);
        }
        let access = if self.repair.is_some() { Access::ReadWrite } else { Access::ReadOnly };
        let options = OpenOptions { access, damaged: true, ..self.image.access.for_reading() };
        let layer = Image::open_layer(&self.image.image, &options)?;
        let name = self.image.image.display();
        let Some(qcow2) = layer.qcow2() else { bail!("{name}: raw images hold nothing that could be checked") };
        let repaired = self.repair.map(|what| repair(qcow2, what.into(), &mut |_| {})).transpose()?;
        let report = match &repaired {
            Some(repaired) => repaired.check.clone(),
            None => qtk_qcow2::check(qcow2)?,
        };
        if self.json {
            text::print_json(&to_json(&report, repaired.as_ref(), &name.to_string()))?;
        } else {
            print(&report, repaired.as_ref(), &name.to_string())?;
        }
        Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(3) })
    }

    /// The exit code is that of a check: something is lost, or all is there.
    fn salvage(&self, output: &Path) -> anyhow::Result<ExitCode> {
        let options = OpenOptions { damaged: true, ..self.image.access.for_reading() };
        refuse_existing(output, self.force)?;
        let image = Image::open(&self.image.image, &options)?;
        let mut ranges = Vec::new();
        let progress = Bar::new(image.size(), "Salvaging");
        let found = salvage(&image, output, &mut |range| ranges.push(range), &progress)?;
        drop(progress);
        if self.json {
            let lost: Vec<Value> =
                ranges.iter().map(|range| json!({ "start": range.start, "length": range.end - range.start })).collect();
            text::print_json(&json!({ "disk-size": found.disk_size, "lost-bytes": found.lost, "lost": lost }))?;
        } else {
            let mut out = io::stdout().lock();
            for range in &ranges {
                writeln!(out, "lost: {} bytes at {:#x}", range.end - range.start, range.start)?;
            }
            writeln!(out, "{}: {} of {} bytes are lost", output.display(), found.lost, found.disk_size)?;
        }
        Ok(if found.lost == 0 { ExitCode::SUCCESS } else { ExitCode::from(3) })
    }
}

fn to_json(report: &CheckReport, repaired: Option<&RepairReport>, filename: &str) -> Value {
    let fixed = |count: fn(&RepairReport) -> u64| repaired.map_or(0, count);
    let mut object = json!({ "filename": filename, "format": "qcow2", "check-errors": report.check_errors });
    let counters = [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
        ("corruptions-fixed", fixed(|repaired| repaired.corruptions_fixed)),
        ("leaks-fixed", fixed(|repaired| repaired.leaks_fixed)),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ];
    // qemu-img leaves out what is zero.
    for (key, value) in counters.into_iter().filter(|&(_, value)| value != 0) {
        object[key] = value.into();
    }
    object
}

fn print(report: &CheckReport, repaired: Option<&RepairReport>, name: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    report.findings.iter().try_for_each(|finding| writeln!(out, "{finding}"))?;
    let listed = u64::try_from(report.findings.len()).unwrap_or(u64::MAX);
    let found = report.corruptions + report.leaks + report.check_errors;
    if found > listed {
        writeln!(out, "... and {} more", found - listed)?;
    }
    if let Some(repaired) = repaired {
        let (corruptions, leaks) = (repaired.corruptions_fixed, repaired.leaks_fixed);
        writeln!(out, "{name}: repaired {corruptions} corruptions, {leaks} leaked clusters")?;
    }
    if let Some(failure) = &report.failure {
        writeln!(out, "{name}: the check could not go on: {failure}")?;
    }
    if report.is_clean() {
        writeln!(out, "{name}: no errors were found")?;
    } else {
        writeln!(
            out,
            "{name}: {} corruptions, {} leaked clusters, {} errors while checking; `qtk check --repair all` repairs what can be \
             repaired",
            report.corruptions, report.leaks, report.check_errors
        )?;
    }
    let percent = (report.allocated_clusters * 100).checked_div(report.total_clusters).unwrap_or(0);
    writeln!(
        out,
        "{} of {} clusters allocated ({percent}%), {} of them compressed, {} fragmented; the image ends at {}",
        report.allocated_clusters,
        report.total_clusters,
        report.compressed_clusters,
        report.fragmented_clusters,
        report.image_end_offset
    )
}
