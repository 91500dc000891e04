use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::process::ExitCode;

use qtk_image::{Format, MeasureSource, Measurement, SnapshotName, measure};
use serde_json::{Map, Value};

use super::getopt::{Found, Options};
use super::json::{self, Output};
use super::keyval::{self, Values};
use super::message::Failure;
use super::open::ImageArguments;
use super::target::Driver;
use super::{Outcome, help, size, snapshot_param};

const OPTIONS: &str = "h|help f: l: o: O: U|force-share object: image-opts output: size:";

#[derive(Default)]
struct Request {
    source: ImageArguments,
    /// `-O`.
    driver: Option<String>,
    /// `-o`.
    options: Option<String>,
    /// `-l`.
    snapshot: Option<SnapshotName>,
    output: Output,
    /// `--size`.
    size: Option<u64>,
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
    let names = options.operands();
    request.check(&names)?;
    request.run(names.first().map(OsString::as_os_str))
}

impl Request {
    fn take(&mut self, found: Found) -> Result<(), Failure> {
        match found.name {
            "l" => self.snapshot = Some(snapshot_param::parse(&found.text()?)?),
            "o" => keyval::append(&mut self.options, &found.text()?)?,
            "O" => self.driver = Some(found.text()?),
            "output" => self.output = Output::from_name(&found.text()?)?,
            "size" => self.size = Some(size::argument(&found.text()?, "image size")?),
            _ => self.source.take(found)?,
        }
        Ok(())
    }

    fn check(&self, names: &[OsString]) -> Result<(), Failure> {
        let about_a_file = self.source.image_opts || self.source.format.is_some() || self.snapshot.is_some();
        let problems = [
            (names.len() > 1, "At most one filename argument is allowed."),
            (names.is_empty() && about_a_file, "--image-opts, -f, and -l require a filename argument."),
            (names.is_empty() && self.size.is_none(), "Either --size N or one filename must be specified."),
            (!names.is_empty() && self.size.is_some(), "--size N cannot be used together with a filename."),
        ];
        match problems.into_iter().find(|(found, _)| *found) {
            Some((_, problem)) => Err(Failure::new(problem)),
            None => Ok(()),
        }
    }

    fn run(&self, name: Option<&OsStr>) -> Outcome {
        let image = name.map(|name| snapshot_param::open(&self.source, name, self.snapshot.as_ref())).transpose()?;
        let source = match &image {
            Some(image) => MeasureSource::Image(image),
            None => MeasureSource::Size(self.size.unwrap_or_default()),
        };
        let driver = Driver::known(self.driver.as_deref().unwrap_or("raw"))?;
        if driver.name == "file" {
            return Err(Failure::new("Block driver 'file' does not support size measurement"));
        }
        let mut values = Values::new(driver.parameters());
        if let Some(list) = &self.options
            && let Err(failure) = values.set_list(list)
        {
            failure.report();
            return Err(Failure::new(format!("Invalid options for file format '{}'", driver.name)));
        }
        // What raw images are made by does not show in their length.
        let target = match driver.format {
            Format::Raw => driver.new_image(&Values::new(driver.parameters()), None)?,
            Format::Qcow2 => driver.new_image(&values, None)?,
        };
        self.print(measure(source, &target)?)?;
        Ok(ExitCode::SUCCESS)
    }

    fn print(&self, measured: Measurement) -> io::Result<()> {
        let Measurement { required, fully_allocated, bitmaps } = measured;
        match self.output {
            Output::Human => {
                let mut out = io::stdout().lock();
                writeln!(out, "required size: {required}\nfully allocated size: {fully_allocated}")?;
                bitmaps.map_or(Ok(()), |bytes| writeln!(out, "bitmaps size: {bytes}"))
            }
            Output::Json => {
                let mut object = Map::new();
                let numbers =
                    [("bitmaps", bitmaps), ("required", Some(required)), ("fully-allocated", Some(fully_allocated))];
                for (key, number) in numbers {
                    number.map(|number| object.insert(key.to_owned(), Value::from(number)));
                }
                json::print(&Value::Object(object))
            }
        }
    }
}
