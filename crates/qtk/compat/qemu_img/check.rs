use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::process::ExitCode;

use qtk_block::Access;
use qtk_qcow2::{CheckReport, Finding, Layer, Repair, RepairReport, check_each, repair};
use serde_json::{Map, Value};

use super::getopt::Options;
use super::json::{self, Output};
use super::message::{self, Failure};
use super::open::{ImageArguments, check_source_cache};
use super::{Outcome, help, operand};

const OPTIONS: &str = "h|help f|format: r|repair: T: q U|force-share output: object: image-opts";

/// The exit codes that tell what was found.
const FAILED: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
/// The exit code where the format cannot be checked.
const UNSUPPORTED: u8 = 63;

#[derive(Default)]
struct Request {
    image: ImageArguments,
    output: Option<String>,
    repair: Option<Repair>,
    cache: Option<String>,
    quiet: bool,
}

/// What was found, and what was repaired before.
#[derive(Default)]
struct Found {
    report: CheckReport,
    leaks_fixed: u64,
    corruptions_fixed: u64,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let mut request = Request::default();
    while let Some(found) = options.next()? {
        match found.name {
            "h" => return help::print(),
            "output" => request.output = Some(found.text()?),
            "r" => request.repair = Some(repair_argument(&found.text()?)?),
            "T" => request.cache = Some(found.text()?),
            "q" => request.quiet = true,
            _ => request.image.take(found)?,
        }
    }
    let name = operand(options, "Expecting one image file name")?;
    request.run(&name)
}

fn repair_argument(name: &str) -> Result<Repair, Failure> {
    match name {
        "leaks" => Ok(Repair::Leaks),
        "all" => Ok(Repair::All),
        _ => Err(Failure::usage(format!("Unknown option value for -r (expecting 'leaks' or 'all'): {name}"))),
    }
}

impl Request {
    fn run(&self, name: &OsStr) -> Outcome {
        let output = Output::from_argument(self.output.as_deref())?;
        self.cache.as_deref().map_or(Ok(()), check_source_cache)?;
        let found = self.check(name, output)?;
        match output {
            _ if self.quiet => {}
            Output::Json => json::print(&found.to_json(name))?,
            Output::Human => found.print()?,
        }
        if found.report.check_errors > 0 {
            message::error("Check failed");
        }
        Ok(found.exit_code())
    }

    /// Checks the image, and repairs it first if asked to.
    fn check(&self, name: &OsStr, output: Output) -> Result<Found, Failure> {
        let image = self.image.open_damaged(name, self.repair.map_or(Access::ReadOnly, |_| Access::ReadWrite))?;
        let qcow2 = image.layers().first().and_then(|layer| layer.qcow2());
        let Some(layer) = qcow2 else {
            return Err(Failure::new("This image format does not support checks").code(UNSUPPORTED));
        };
        let Some(what) = self.repair else {
            return Ok(Found { report: completed(check_each(layer, &mut tell)?)?, ..Found::default() });
        };
        let RepairReport { check, leaks_fixed, corruptions_fixed } = repair(layer, what, &mut tell)?;
        let report = completed(check)?;
        if leaks_fixed + corruptions_fixed == 0 {
            return Ok(Found { report, leaks_fixed, corruptions_fixed });
        }
        if output == Output::Human && !self.quiet {
            print_repaired(leaks_fixed, corruptions_fixed)?;
        }
        let data = layer.data_storage().ok().cloned();
        let repaired = Layer::open_damaged(layer.storage().clone(), layer.name(), data)?;
        let report = completed(check_each(&repaired, &mut tell)?)?;
        Ok(Found { report, leaks_fixed, corruptions_fixed })
    }
}

/// Tells of a finding when it comes up.
fn tell(finding: &Finding) {
    if finding.is_error_report() {
        message::error(&finding.to_string());
    } else if !finding.is_silent() {
        message::say(&finding.to_string());
    }
}

fn completed(report: CheckReport) -> Result<CheckReport, Failure> {
    match report.failure {
        None => Ok(report),
        Some(failure) => Err(Failure::new(format!("Check failed: {failure}")).code(FAILED)),
    }
}

fn print_repaired(leaks: u64, corruptions: u64) -> io::Result<()> {
    writeln!(
        io::stdout(),
        "The following inconsistencies were found and repaired:\n\n    {leaks} leaked clusters\n    {corruptions} corruptions\n\n\
         Double checking the fixed image now..."
    )
}

impl Found {
    fn exit_code(&self) -> ExitCode {
        let CheckReport { check_errors, corruptions, leaks, .. } = self.report;
        match () {
            () if check_errors > 0 => ExitCode::from(FAILED),
            () if corruptions > 0 => ExitCode::from(CORRUPT),
            () if leaks > 0 => ExitCode::from(LEAKS),
            () => ExitCode::SUCCESS,
        }
    }

    fn print(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let report = &self.report;
        if report.corruptions + report.leaks + report.check_errors == 0 {
            writeln!(out, "No errors were found on the image.")?;
        }
        if report.corruptions > 0 {
            writeln!(
                out,
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
                report.corruptions
            )?;
        }
        if report.leaks > 0 {
            writeln!(
                out,
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
                report.leaks
            )?;
        }
        if report.check_errors > 0 {
            writeln!(out, "\n{} internal errors have occurred during the check.", report.check_errors)?;
        }
        if report.total_clusters > 0 && report.allocated_clusters > 0 {
            writeln!(
                out,
                "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
                report.allocated_clusters,
                report.total_clusters,
                percent(report.allocated_clusters, report.total_clusters),
                percent(report.fragmented_clusters, report.allocated_clusters),
                percent(report.compressed_clusters, report.allocated_clusters)
            )?;
        }
        if report.image_end_offset > 0 {
            writeln!(out, "Image end offset: {}", report.image_end_offset)?;
        }
        Ok(())
    }

    /// Without what is zero, in QEMU's order.
    fn to_json(&self, name: &OsStr) -> Value {
        let report = &self.report;
        let mut object = Map::new();
        let mut count = |key: &str, value: u64| {
            if value > 0 || key == "check-errors" {
                object.insert(key.to_owned(), value.into());
            }
        };
        count("image-end-offset", report.image_end_offset);
        count("compressed-clusters", report.compressed_clusters);
        count("total-clusters", report.total_clusters);
        count("corruptions", report.corruptions);
        count("corruptions-fixed", self.corruptions_fixed);
        count("check-errors", report.check_errors);
        count("leaks", report.leaks);
        count("leaks-fixed", self.leaks_fixed);
        count("allocated-clusters", report.allocated_clusters);
        object.insert("filename".to_owned(), name.to_string_lossy().into());
        object.insert("format".to_owned(), "qcow2".into());
        if report.fragmented_clusters > 0 {
            object.insert("fragmented-clusters".to_owned(), report.fragmented_clusters.into());
        }
        Value::Object(object)
    }
}

#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole as f64
}
