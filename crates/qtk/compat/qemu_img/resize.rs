use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::process::ExitCode;

use qtk_block::Access;
use qtk_image::{Error, NewSize, ResizeOptions, resize_open};
use qtk_qcow2::Preallocation;

use super::getopt::Options;
use super::message::Failure;
use super::new_qcow2::preallocation_mode;
use super::open::ImageArguments;
use super::{NAME, Outcome, help, keyval, operands, words};

const OPTIONS: &str = "f: h|help q object: image-opts preallocation: shrink";

struct Request {
    image: ImageArguments,
    quiet: bool,
    options: ResizeOptions,
}

/// The size is the last argument, whatever it looks like, so that it can begin with a minus.
pub(crate) fn run(mut arguments: Vec<OsString>) -> Outcome {
    let Some(size) = arguments.pop().filter(|_| arguments.len() > 1) else {
        return Err(Failure::usage("Not enough arguments"));
    };
    let mut options = Options::new(arguments, OPTIONS);
    let resize = ResizeOptions { size: NewSize::To(0), shrink: false, preallocation: Preallocation::Off };
    let mut request = Request { image: ImageArguments::default(), quiet: false, options: resize };
    while let Some(found) = options.next()? {
        match found.name {
            "h" => return help::print(),
            "q" => request.quiet = true,
            "preallocation" => request.options.preallocation = preallocation(&found.text()?)?,
            "shrink" => request.options.shrink = true,
            _ => request.image.take(found)?,
        }
    }
    let [name] = operands(options, "Expecting image file name and size")?;
    request.options.size = new_size(&size.to_string_lossy())?;
    request.run(&name)
}

fn preallocation(name: &str) -> Result<Preallocation, Failure> {
    preallocation_mode(name).ok_or_else(|| Failure::new(format!("Invalid preallocation mode '{name}'")))
}

fn new_size(text: &str) -> Result<NewSize, Failure> {
    let size = |text| keyval::size_value("size", text);
    match text.as_bytes().first() {
        Some(b'+') => Ok(NewSize::Grow(size(&text[1..])?)),
        Some(b'-') => Ok(NewSize::Shrink(size(&text[1..])?)),
        _ => Ok(NewSize::To(size(text)?)),
    }
}

impl Request {
    fn run(&self, name: &OsStr) -> Outcome {
        let image = self.image.open(name, Access::ReadWrite)?;
        resize_open(&image, &self.options).map_err(in_words)?;
        if !self.quiet {
            writeln!(io::stdout(), "Image resized.")?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn in_words(error: Error) -> Failure {
    match error {
        Error::SizeNotPositive { .. } => Failure::new("New image size must be positive"),
        Error::PreallocatedShrink { .. } => Failure::new("Preallocation can only be used for growing images"),
        Error::WouldShrink { .. } => Failure::new("Use the --shrink option to perform a shrink operation.").hint(format!(
            "{NAME}: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing \
             such an operation, make sure there is no important data there."
        )),
        Error::Io { action: "set its size" | "reserve space in it", source, .. } => {
            Failure::new(format!("Could not resize file: {}", words::system(&source)))
        }
        other => other.into(),
    }
}
