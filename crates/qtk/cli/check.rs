use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use qtk_image::Image;
use qtk_qcow2::CheckReport;
use serde_json::{Value, json};

use super::arguments::ImageArguments;
use super::text;

/// Look for damage in a qcow2 image: references, refcounts, leaks
#[derive(Args, Debug)]
#[command(after_help = "Exit code 3 where anything was found. The files that back the image are not looked at.")]
pub(crate) struct Check {
    #[command(flatten)]
    image: ImageArguments,

    /// Print JSON, as `qemu-img check --output=json` does
    #[arg(long)]
    json: bool,
}

impl Check {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let layer = Image::open_layer(&self.image.image, &self.image.access.for_reading())?;
        let name = self.image.image.display();
        let Some(qcow2) = layer.qcow2() else { bail!("{name}: raw images hold nothing that could be checked") };
        let report = qtk_qcow2::check(qcow2)?;
        if self.json {
            text::print_json(&to_json(&report, &name.to_string()))?;
        } else {
            print(&report, &name.to_string())?;
        }
        Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(3) })
    }
}

fn to_json(report: &CheckReport, filename: &str) -> Value {
    let mut object = json!({ "filename": filename, "format": "qcow2", "check-errors": report.check_errors });
    let counters = [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("leaks", report.leaks),
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

fn print(report: &CheckReport, name: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    report.findings.iter().try_for_each(|finding| writeln!(out, "{finding}"))?;
    let listed = u64::try_from(report.findings.len()).unwrap_or(u64::MAX);
    let found = report.corruptions + report.leaks + report.check_errors;
    if found > listed {
        writeln!(out, "... and {} more", found - listed)?;
    }
    if report.is_clean() {
        writeln!(out, "{name}: no errors were found")?;
    } else {
        writeln!(
            out,
            "{name}: {} corruptions, {} leaked clusters, {} errors while checking; `qemu-img check -r all` repairs what can be \
             repaired, on a copy",
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
