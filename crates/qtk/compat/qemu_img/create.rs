use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use qtk_block::{Access, BlockRead};
use qtk_image::{Format, Image, NewImage, OpenOptions, create_image, open_base};
use qtk_qcow2::OptionProblem;

use super::getopt::Options;
use super::keyval::{self, Values};
use super::message::Failure;
use super::target::{self, Driver};
use super::{Outcome, help, new_qcow2, object, open, size};

const OPTIONS: &str = "F: b: f: h|help o: q u object:";

#[derive(Default)]
struct Request {
    format: Option<String>,
    base: Option<String>,
    base_format: Option<String>,
    options: Option<String>,
    quiet: bool,
    /// `-u`: the base is named, and not opened.
    unsafe_base: bool,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let mut request = Request::default();
    while let Some(found) = options.next()? {
        match found.name {
            "F" => request.base_format = Some(found.text()?),
            "b" => request.base = Some(found.text()?),
            "f" => request.format = Some(found.text()?),
            "h" => return help::print(),
            "o" => keyval::append(&mut request.options, &found.text()?)?,
            "q" => request.quiet = true,
            "u" => request.unsafe_base = true,
            _ => object::define(&found.text()?)?,
        }
    }
    let mut operands = options.operands().into_iter();
    let name = operands.next();
    if request.options.as_deref().is_some_and(keyval::asks_for_help) {
        return request.help(name.as_deref());
    }
    let Some(name) = name else { return Err(Failure::usage("Expecting image file name")) };
    let size = operands.next().map(|size| size::argument(&size.to_string_lossy(), "image size")).transpose()?;
    if let Some(more) = operands.next() {
        return Err(Failure::usage(format!("Unexpected argument: {}", more.display())));
    }
    request.create(&name, size).map_err(|failure| failure.prefix(format_args!("{}: ", name.display())))
}

impl Request {
    fn driver(&self) -> Result<Driver, Failure> {
        Driver::known(self.format.as_deref().unwrap_or("raw"))
    }

    fn help(&self, name: Option<&OsStr>) -> Outcome {
        let driver = self.driver()?;
        name.map_or(Ok(()), |name| target::file(name).map(drop))?;
        driver.print_help(name.is_some())
    }

    fn create(&self, name: &OsStr, size: Option<u64>) -> Outcome {
        let driver = self.driver()?;
        let path = target::file(name)?;
        let mut values = self.values(driver, size)?;
        let base = self.base(name, &path, &values)?;
        if let Some(base) = &base
            && values.number("size").is_none()
        {
            values.set("size", &base.size().to_string())?;
        }
        let Some(size) = values.number("size") else {
            return Err(Failure::new("Image creation needs a size parameter"));
        };
        if !self.quiet {
            writeln!(io::stdout(), "Formatting '{}', fmt={}{}", name.display(), driver.name, values.summary())?;
        }
        // Its locks would be in the way of an image that takes its data file.
        drop(base);
        if driver.format == Format::Qcow2 {
            new_qcow2::check_encryption_aliases(&values)?;
        }
        target::check_place(&path)?;
        check_size(driver, size)?;
        if values.number("extent_size_hint").is_some_and(|hint| u32::try_from(hint).is_err()) {
            return Err(Failure::new("Extent size hint is too large"));
        }
        values.text("data_file").map_or(Ok(()), |file| target::file(OsStr::new(file)).map(drop))?;
        let image = NewImage { base_unseen: true, ..driver.new_image(&values, Some(size))? };
        create_image(&path, &image).map_err(|error| in_words(error, driver, &values))?;
        Ok(ExitCode::SUCCESS)
    }

    /// The options of `-o`, and what other options say in their place.
    fn values(&self, driver: Driver, size: Option<u64>) -> Result<Values, Failure> {
        let mut values = Values::new(driver.parameters());
        values.set_list(self.options.as_deref().unwrap_or_default())?;
        if let Some(size) = size {
            if values.is_set("size") {
                return Err(Failure::new("The image size must be specified only once"));
            }
            values.set("size", &size.to_string())?;
        }
        let unsupported = |what: &str| Failure::new(format!("{what} not supported for file format '{}'", driver.name));
        if let Some(base) = &self.base {
            values.set("backing_file", base).map_err(|_| unsupported("Backing file"))?;
        }
        if let Some(base_format) = &self.base_format {
            values.set("backing_fmt", base_format).map_err(|_| unsupported("Backing file format"))?;
        }
        Ok(values)
    }

    /// Opens the base, unless it was asked not to.
    fn base(&self, name: &OsStr, path: &Path, values: &Values) -> Result<Option<Image>, Failure> {
        let Some(base) = values.text("backing_file") else { return Ok(None) };
        if base.is_empty() {
            return Err(Failure::new("Expected backing file name, got empty string"));
        }
        if name == base {
            return Err(Failure::new("Error: Trying to create an image with the same filename as the backing file"));
        }
        let format = values.text("backing_fmt");
        let unnamed = || Failure::new("Backing file specified without backing format");
        if self.unsafe_base {
            return if format.is_some() { Ok(None) } else { Err(unnamed()) };
        }
        // Only its size and format are looked at, so that others may go on writing it.
        let options = OpenOptions { share: true, ..open::options(Access::ReadOnly) };
        let image = open_base(path, Path::new(base), format, &options);
        let image = image.map_err(|error| Failure::from(beneath(error)).hint("Could not open backing image."))?;
        match format {
            Some(_) => Ok(Some(image)),
            None => Err(unnamed().hint(format!("Detected format of {}.", image.format()))),
        }
    }
}

/// What is wrong with the base itself.
fn beneath(error: qtk_image::Error) -> qtk_image::Error {
    match error {
        qtk_image::Error::Backing { source, .. } => *source,
        other => other,
    }
}

/// Fails for a disk that would have 2^63 bytes in whole sectors, or more.
fn check_size(driver: Driver, size: u64) -> Result<(), Failure> {
    match size.checked_next_multiple_of(512).is_some_and(|size| i64::try_from(size).is_ok()) {
        true => Ok(()),
        false => Err(Failure::new(match driver.format {
            Format::Raw => "Could not resize file: Invalid argument",
            Format::Qcow2 => "Could not resize image: Image size cannot be negative",
        })),
    }
}

fn in_words(error: qtk_image::Error, driver: Driver, values: &Values) -> Failure {
    match &error {
        qtk_image::Error::Io { source, .. } if source.kind() == io::ErrorKind::FileTooLarge => {
            Failure::new(format!("The image size is too large for file format '{}'", driver.name))
        }
        qtk_image::Error::Qcow2(qtk_qcow2::Error::ImpossibleOptions { problem, .. }) => {
            let why = match problem {
                OptionProblem::BackingName => "Invalid argument",
                OptionProblem::HeaderTooLarge => "No space left on device",
                _ => return error.into(),
            };
            let text = |name| values.text(name).unwrap_or_default();
            let (name, format) = (text("backing_file"), text("backing_fmt"));
            Failure::new(format!("Could not assign backing file '{name}' with format '{format}': {why}"))
        }
        _ => error.into(),
    }
}
