use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::process::ExitCode;

use qtk_block::{Access, NoProgress};
use qtk_image::{DdOptions, Error, dd};

use super::getopt::Options;
use super::keyval::Values;
use super::message::{self, Failure};
use super::open::ImageArguments;
use super::target::{self, Driver};
use super::{Outcome, help, size};

const OPTIONS: &str = "h|help f: O: U|force-share object: image-opts";

/// What `bs` can be.
const BLOCK_SIZES: RangeInclusive<u64> = 1..=0x7fff_ffff;

#[derive(Default)]
struct Request {
    source: ImageArguments,
    /// `-O`.
    driver: Option<String>,
    /// `if`.
    input: Option<OsString>,
    /// `of`.
    output: Option<OsString>,
    blocks: DdOptions,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let mut request = Request::default();
    while let Some(found) = options.next()? {
        match found.name {
            "h" => return help::print(),
            "O" => request.driver = Some(found.text()?),
            _ => request.source.take(found)?,
        }
    }
    options.operands().iter().try_for_each(|operand| request.take(&operand.to_string_lossy()))?;
    request.run()
}

impl Request {
    /// Takes note of an operand such as `bs=4k`.
    fn take(&mut self, operand: &str) -> Result<(), Failure> {
        let (name, value) = operand.split_once('=').unwrap_or((operand, ""));
        match name {
            "if" => self.input = Some(value.into()),
            "of" => self.output = Some(value.into()),
            "bs" => self.blocks.block_size = size::argument_in(value, "bs", BLOCK_SIZES)?,
            "count" => self.blocks.count = Some(size::argument(value, "count")?),
            "skip" => self.blocks.skip = size::argument(value, "skip")?,
            _ => return Err(Failure::new(format!("unrecognized operand {name}"))),
        }
        Ok(())
    }

    fn run(&self) -> Outcome {
        let (Some(input), Some(output)) = (&self.input, &self.output) else {
            return Err(Failure::new("Must specify both input and output files"));
        };
        let source = self.source.open(input, Access::ReadOnly)?;
        let driver = Driver::named(self.driver.as_deref().unwrap_or("raw"));
        let driver = driver.ok_or_else(|| Failure::new("Unknown file format"))?;
        let path = target::file(output)?;
        let in_output = |failure: Failure| {
            failure.prefix(format_args!("{}: error while creating output image: ", output.display()))
        };
        target::check_place(&path).map_err(in_output)?;
        let image = driver.new_image(&Values::new(driver.parameters()), None).map_err(in_output)?;
        let report = dd(&source, &path, &image, &self.blocks, &NoProgress).map_err(|error| match error {
            Error::Read { .. } => Failure::from(error).prefix("error while reading from input image file: "),
            other => in_output(other.into()),
        })?;
        if report.skipped_too_far {
            message::error(&format!("{}: cannot skip to specified offset", input.display()));
        }
        Ok(ExitCode::SUCCESS)
    }
}
