use std::ffi::{OsStr, OsString};
use std::process::ExitCode;

use qtk_block::{Access, BlockRead};
use qtk_image::{Error, Format, RebaseMode, RebaseOptions, rebase};
use qtk_qcow2::Backing;

use super::getopt::{Found, Options};
use super::message::Failure;
use super::open::{self, ImageArguments, check_cache, check_source_cache};
use super::progress::Meter;
use super::{Outcome, help, new_qcow2, operand, words};

const OPTIONS: &str = "h|help f: F: b: u p t: T: q U|force-share object: image-opts c|compress";

#[derive(Default)]
struct Request {
    image: ImageArguments,
    /// `-b`.
    base: Option<String>,
    /// `-F`.
    base_format: Option<String>,
    /// `-t`.
    cache: Option<String>,
    /// `-T`.
    source_cache: Option<String>,
    /// `-u`.
    header_only: bool,
    compress: bool,
    progress: bool,
    quiet: bool,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let mut request = Request::default();
    while let Some(found) = options.next()? {
        if found.name == "h" {
            return help::print();
        }
        request.take(found)?;
    }
    let name = operand(options, "Expecting one image file name")?;
    if !request.header_only && request.base.is_none() {
        return Err(Failure::usage("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    let meter = Meter::begin(request.progress && !request.quiet);
    let outcome = request.run(&name, &meter);
    Ok(meter.end(outcome))
}

impl Request {
    fn take(&mut self, found: Found) -> Result<(), Failure> {
        match found.name {
            "b" => self.base = Some(found.text()?),
            "F" => self.base_format = Some(found.text()?),
            "t" => self.cache = Some(found.text()?),
            "T" => self.source_cache = Some(found.text()?),
            "u" => self.header_only = true,
            "c" => self.compress = true,
            "p" => self.progress = true,
            "q" => self.quiet = true,
            // The image itself is written; its bases are locked for no longer than they are read.
            "U" => {}
            _ => self.image.take(found)?,
        }
        Ok(())
    }

    fn run(&self, name: &OsStr, meter: &Meter) -> Outcome {
        self.cache.as_deref().map_or(Ok(()), check_cache)?;
        self.source_cache.as_deref().map_or(Ok(()), check_source_cache)?;
        // What cannot be opened is told before anything about its bases.
        let spec = self.image.spec(name)?;
        let (format, disk_size) = if self.header_only {
            (self.image.open_node_alone(name, spec.clone(), Access::ReadWrite)?.format(), 0)
        } else {
            let image = self.image.open_node(name, spec.clone(), Access::ReadWrite)?;
            (image.format(), image.size())
        };
        if self.compress && format == Format::Raw {
            return Err(Failure::new("Compression not supported for this file format"));
        }
        if let Some(format) = self.base_format.as_deref().filter(|name| !new_qcow2::is_driver(name)) {
            return Err(Failure::new(format!("Invalid format name: '{format}'")));
        }
        let options = RebaseOptions { base: self.base(), mode: self.mode(), compress: self.compress };
        let opening = open::options(Access::ReadWrite);
        rebase(&spec, &opening, &options, &meter.of(disk_size)).map_err(|error| self.explain(error, meter))?;
        meter.set(100.0);
        Ok(ExitCode::SUCCESS)
    }

    fn base(&self) -> Option<Backing> {
        let name = self.base.clone().filter(|name| !name.is_empty())?;
        Some(Backing { name, format: self.base_format.clone() })
    }

    fn mode(&self) -> RebaseMode {
        if self.header_only { RebaseMode::HeaderOnly } else { RebaseMode::Safe }
    }

    fn explain(&self, error: Error, meter: &Meter) -> Failure {
        let why = match &error {
            Error::NewBacking { name, source, .. } => {
                return Failure::new(format!("Could not open new backing file '{name}': {}", words::image(source)));
            }
            Error::Read { source, .. } => {
                return Failure::new(format!("error while reading from old backing file: {}", words::system(source)));
            }
            Error::Write { source, .. } => {
                return Failure::new(format!("Error while writing to COW image: {}", words::system(source)));
            }
            // Compressed clusters in an image whose data lies elsewhere.
            Error::Qcow2(qtk_qcow2::Error::Unsupported { .. }) if self.compress => {
                return Failure::new("Error while writing to COW image: Operation not supported");
            }
            Error::Qcow2(qtk_qcow2::Error::InvalidOption { .. }) => "Invalid argument".to_owned(),
            Error::NotQcow2 { .. } => "Operation not supported".to_owned(),
            Error::BackingFormatMissing { .. } => "backing format must be specified".to_owned(),
            other => words::image(other),
        };
        // To QEMU the content is done by then.
        meter.set(100.0);
        let base = self.base.as_deref().unwrap_or("(null)");
        Failure::new(format!("Could not change the backing file to '{base}': {why}"))
    }
}
