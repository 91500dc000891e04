use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::process::ExitCode;

use qtk_block::{Access, BlockRead};
use qtk_image::{CommitOptions, NodeSpec, commit};

use super::getopt::{Found, Options};
use super::message::Failure;
use super::open::{ImageArguments, check_cache, options};
use super::progress::Meter;
use super::{Outcome, help, operand, size};

const OPTIONS: &str = "h|help f: t: b: d p q r: object: image-opts";

#[derive(Default)]
struct Request {
    image: ImageArguments,
    /// `-t`.
    cache: Option<String>,
    commit: CommitOptions,
    progress: bool,
    quiet: bool,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let commit = CommitOptions { guess_base: true, ..CommitOptions::default() };
    let mut request = Request { commit, ..Request::default() };
    while let Some(found) = options.next()? {
        if found.name == "h" {
            return help::print();
        }
        request.take(found)?;
    }
    let name = operand(options, "Expecting one image file name")?;
    request.run(&name)
}

impl Request {
    fn take(&mut self, found: Found) -> Result<(), Failure> {
        match found.name {
            "t" => self.cache = Some(found.text()?),
            "b" => self.commit.base = Some(found.text()?),
            "d" => self.commit.keep_overlay = true,
            "r" => self.commit.rate_limit = NonZeroU64::new(size::argument(&found.text()?, "rate limit")?),
            "p" => self.progress = true,
            "q" => self.quiet = true,
            _ => self.image.take(found)?,
        }
        Ok(())
    }

    fn run(&self, name: &OsStr) -> Outcome {
        self.cache.as_deref().map_or(Ok(()), check_cache)?;
        // What cannot be opened is told before any progress.
        let spec = self.image.spec(name)?;
        let disk_size = self.image.open_node(name, spec.clone(), Access::ReadWrite)?.size();
        let meter = Meter::begin(self.progress && !self.quiet);
        let outcome = self.commit(&spec, disk_size, &meter);
        let done = outcome.is_ok();
        let code = meter.end(outcome);
        if done && !self.quiet {
            writeln!(io::stdout(), "Image committed.")?;
        }
        Ok(code)
    }

    fn commit(&self, spec: &NodeSpec, disk_size: u64, meter: &Meter) -> Outcome {
        commit(spec, &options(Access::ReadWrite), &self.commit, &meter.of(disk_size))?;
        meter.set(100.0);
        Ok(ExitCode::SUCCESS)
    }
}
