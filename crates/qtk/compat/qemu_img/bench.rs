use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use qtk_block::Access;
use qtk_image::{BenchOptions, Error, bench};

use super::getopt::{Found, Options};
use super::message::Failure;
use super::open::{ImageArguments, check_cache};
use super::{Outcome, help, operand, size, words};

const OPTIONS: &str = "h|help c: d: f: i: n o: q s: S: t: w U|force-share flush-interval: pattern: no-drain image-opts";

/// What `-s` and `-S` can be at most.
const MAX_REQUEST: u64 = 0x7fff_ffff;

#[derive(Default)]
struct Request {
    image: ImageArguments,
    requests: BenchOptions,
    /// `-S`.
    step: Option<u64>,
    write: bool,
    pattern: u8,
    /// Requests between two flushes; none at 0. What is written is synced when all is done, and not before.
    flush_interval: u64,
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
    request.run(&name)
}

impl Request {
    fn take(&mut self, found: Found) -> Result<(), Failure> {
        match found.name {
            "c" => self.requests.count = number(&found.text()?, i32::MAX.unsigned_abs().into(), "request count")?,
            "d" => {
                let depth = number(&found.text()?, i32::MAX.unsigned_abs().into(), "queue depth")?;
                self.requests.depth = usize::try_from(depth).unwrap_or(usize::MAX);
            }
            "i" => check_engine(&found.text()?)?,
            "o" => self.requests.offset = size::argument(&found.text()?, "offset")?,
            "s" => self.requests.buffer_size = size::argument_in(&found.text()?, "buffer size", 0..=MAX_REQUEST)?,
            "S" => self.step = Some(size::argument_in(&found.text()?, "step_size", 0..=MAX_REQUEST)?),
            "t" => check_cache(&found.text()?).map_err(|_| Failure::new("Invalid cache mode"))?,
            "w" => self.write = true,
            "pattern" => {
                let pattern = number(&found.text()?, u8::MAX.into(), "pattern byte")?;
                self.pattern = u8::try_from(pattern).unwrap_or_default();
            }
            "flush-interval" => {
                self.flush_interval = number(&found.text()?, i32::MAX.unsigned_abs().into(), "flush interval")?;
            }
            // How the host is asked is qtk's choice; and as in QEMU, nothing becomes quiet.
            "n" | "no-drain" | "q" => {}
            _ => self.image.take(found)?,
        }
        Ok(())
    }

    fn run(mut self, name: &OsString) -> Outcome {
        if !self.write && self.flush_interval > 0 {
            return Err(Failure::new("--flush-interval is only available in write tests"));
        }
        if self.flush_interval > 0 && self.flush_interval < self.requests.depth as u64 {
            return Err(Failure::new("Flush interval can't be smaller than depth"));
        }
        self.requests.step = self.step.filter(|&step| step > 0).unwrap_or(self.requests.buffer_size);
        self.requests.write = self.write.then_some(self.pattern);
        let access = if self.write { Access::ReadWrite } else { Access::ReadOnly };
        let image = self.image.open(name, access)?;
        self.announce()?;
        let taken = bench(image, &self.requests).map_err(|error| match &error {
            // Past the end of the disk.
            Error::Read { source, .. } | Error::Io { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof => {
                Failure::new("Failed request: Input/output error")
            }
            Error::Read { source, .. } | Error::Io { source, .. } => {
                Failure::new(format!("Failed request: {}", words::system(source)))
            }
            _ => error.into(),
        })?;
        writeln!(io::stdout(), "Run completed in {:.3} seconds.", taken.as_secs_f64())?;
        Ok(ExitCode::SUCCESS)
    }

    fn announce(&self) -> io::Result<()> {
        let BenchOptions { count, depth, buffer_size, step, offset, write } = self.requests;
        let kind = if write.is_some() { "write" } else { "read" };
        let mut out = io::stdout().lock();
        writeln!(
            out,
            "Sending {count} {kind} requests, {buffer_size} bytes each, {depth} in parallel (starting at offset {offset}, \
             step size {step})"
        )?;
        if self.flush_interval > 0 {
            writeln!(out, "Sending flush every {} requests", self.flush_interval)?;
        }
        out.flush()
    }
}

/// A number up to `max`, which errors call `what`.
fn number(text: &str, max: u64, what: &str) -> Result<u64, Failure> {
    let number = size::number(text).ok().filter(|&number| number <= max);
    number.ok_or_else(|| Failure::new(format!("Invalid {what} specified")))
}

/// How requests are sent to the host.
fn check_engine(name: &str) -> Result<(), Failure> {
    match name {
        "threads" | "native" | "io_uring" => Ok(()),
        _ => Err(Failure::new(format!("Invalid aio option: {name}"))),
    }
}
