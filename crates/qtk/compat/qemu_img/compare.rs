use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use qtk_block::{Access, BlockRead};
use qtk_image::{Comparison, Error, Image, compare};

use super::getopt::Options;
use super::message::Failure;
use super::open::{ImageArguments, check_source_cache};
use super::progress::Meter;
use super::{Outcome, help, operands};

const OPTIONS: &str = "h|help f: F: T: p q s U|force-share object: image-opts";

/// The exit code where the images differ.
const DIFFERENT: u8 = 1;
/// The exit code where an image could not be opened.
const NOT_OPENED: u8 = 2;
/// The exit code where it could not be found out how an image is stored.
const NO_STATUS: u8 = 3;
/// The exit code where an image could not be read.
const NOT_READ: u8 = 4;

/// QEMU compares whole sectors.
const SECTOR: u64 = 512;

#[derive(Default)]
struct Request {
    first: ImageArguments,
    /// `-F`.
    second_format: Option<String>,
    /// `-T`.
    cache: Option<String>,
    strict: bool,
    quiet: bool,
    progress: bool,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let mut request = Request::default();
    while let Some(found) = options.next()? {
        match found.name {
            "h" => return help::print(),
            "F" => request.second_format = Some(found.text()?),
            "T" => request.cache = Some(found.text()?),
            "p" => request.progress = true,
            "q" => request.quiet = true,
            "s" => request.strict = true,
            _ => request.first.take(found)?,
        }
    }
    request.run(&operands(options, "Expecting two image file names")?)
}

impl Request {
    fn run(&self, names: &[OsString; 2]) -> Outcome {
        let opening = |failure: Failure| failure.code(NOT_OPENED);
        self.cache.as_deref().map_or(Ok(()), check_source_cache).map_err(opening)?;
        let second = ImageArguments { format: self.second_format.clone(), ..self.first.clone() };
        let meter = Meter::new(self.progress && !self.quiet);
        let opened = self.first.open(&names[0], Access::ReadOnly).and_then(|first| {
            let second = second.open(&names[1], Access::ReadOnly)?;
            Ok((first, second))
        });
        let outcome = opened.map_err(opening).and_then(|(first, second)| self.compare(&first, &second, &meter));
        Ok(meter.end(outcome))
    }

    fn compare(&self, first: &Image, second: &Image, meter: &Meter) -> Outcome {
        meter.set(0.0);
        let (shorter, longer) = (first.size().min(second.size()), first.size().max(second.size()));
        let comparison = compare(first, second, self.strict, &meter.of(longer));
        let comparison = comparison.map_err(|error| match &error {
            Error::Status { path, .. } => {
                Failure::new(format!("Sector allocation test failed for {}", path.display())).code(NO_STATUS)
            }
            _ => Failure::from(error).code(NOT_READ),
        })?;
        // Of the sizes QEMU only speaks when it comes to the end of the shorter one.
        let past_end = match comparison {
            Comparison::Identical => true,
            Comparison::Different { offset } => offset >= shorter,
            _ => false,
        };
        if past_end && shorter != longer {
            self.say("Warning: Image size mismatch!")?;
        }
        if comparison == Comparison::Identical {
            meter.set(100.0);
        }
        self.say(&match comparison {
            Comparison::Identical => "Images are identical.".to_owned(),
            Comparison::Different { offset } => format!("Content mismatch at offset {}!", offset - offset % SECTOR),
            Comparison::SizesDiffer => "Strict mode: Image size mismatch!".to_owned(),
            Comparison::AllocationDiffers { offset } => format!("Strict mode: Offset {offset} block status mismatch!"),
        })?;
        Ok(if comparison == Comparison::Identical { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) })
    }

    fn say(&self, line: &str) -> io::Result<()> {
        if self.quiet { Ok(()) } else { writeln!(io::stdout(), "{line}") }
    }
}
