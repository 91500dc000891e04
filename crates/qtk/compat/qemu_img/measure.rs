use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use qtk_image::{Format, MeasureSource, Measurement, NewImage, SnapshotName, measure};
use qtk_qcow2::{CreateOptions, Version};
use serde_json::{Map, Value};

use super::getopt::{Found, Options};
use super::json::{self, Output};
use super::keyval::{self, Values};
use super::message::Failure;
use super::open::ImageArguments;
use super::target::Driver;
use super::{Outcome, help, new_qcow2, size, snapshot_param};

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
        let mut target = NewImage { format: driver.format, ..NewImage::default() };
        // What raw images are made by does not show in their length.
        if driver.format == Format::Qcow2 {
            target.qcow2 = qcow2_options(&values)?;
            target.base = values.text("backing_file").map(PathBuf::from);
        }
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

/// Those options of a qcow2 image that its size depends on. QEMU looks at no others here, and at these in its own way.
fn qcow2_options(values: &Values) -> Result<CreateOptions, Failure> {
    let options = CreateOptions {
        cluster_bits: new_qcow2::cluster_bits(values, Version::V3)?,
        version: match values.text("compat") {
            None | Some("1.1") => Version::V3,
            Some("0.10") => Version::V2,
            Some(other) => return Err(Failure::new(format!("Invalid compatibility level: '{other}'"))),
        },
        refcount_bits: u32::try_from(values.number("refcount_bits").unwrap_or(16)).unwrap_or(u32::MAX),
        extended_l2: values.boolean("extended_l2").unwrap_or(false),
        ..CreateOptions::default()
    };
    new_qcow2::check_refcount_bits(&options, "compat=1.1")?;
    if values.text("encrypt.format") == Some("luks") {
        return Err(Failure::new(match values.is_set("encrypt.key-secret") {
            true => "Encrypted images cannot be measured",
            false => "Parameter 'encrypt.key-secret' is required for cipher",
        }));
    }
    let preallocation = values.text("preallocation").unwrap_or("off");
    let preallocation = new_qcow2::preallocation_mode(preallocation)
        .ok_or_else(|| Failure::new(format!("invalid parameter value: {preallocation}")))?;
    Ok(CreateOptions { preallocation, ..options })
}
