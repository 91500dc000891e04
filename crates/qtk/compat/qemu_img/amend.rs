use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::process::ExitCode;

use qtk_block::Access;
use qtk_image::{Error, Format, edit_open};
use qtk_qcow2::{Amend, AmendRefusal, Backing, Version};

use super::create_options::{AMEND_QCOW2, QCOW2};
use super::getopt::Options;
use super::keyval::{self, Values};
use super::message::Failure;
use super::open::{ImageArguments, check_cache};
use super::progress::Meter;
use super::{Outcome, help};

const OPTIONS: &str = "h|help o: f: t: p q object: image-opts force";

#[derive(Default)]
struct Request {
    image: ImageArguments,
    options: Option<String>,
    cache: Option<String>,
    progress: bool,
    quiet: bool,
}

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let mut request = Request::default();
    while let Some(found) = options.next()? {
        match found.name {
            "h" => return help::print(),
            "o" => keyval::append(&mut request.options, &found.text()?)?,
            "t" => request.cache = Some(found.text()?),
            "p" => request.progress = true,
            "q" => request.quiet = true,
            // For encrypted images only.
            "force" => {}
            _ => request.image.take(found)?,
        }
    }
    let Some(list) = request.options.clone() else { return Err(Failure::usage("Must specify options (-o)")) };
    let meter = Meter::new(request.progress && !request.quiet);
    let outcome = request.run(&list, &options.operands(), &meter);
    Ok(meter.end(outcome))
}

impl Request {
    fn run(&self, list: &str, operands: &[OsString], meter: &Meter) -> Outcome {
        let asks_for_help = keyval::asks_for_help(list);
        if let Some(format) = self.image.format.as_deref().filter(|_| asks_for_help) {
            return print_help(format);
        }
        let [name] = operands else { return Err(Failure::new("Expecting one image file name")) };
        self.cache.as_deref().map_or(Ok(()), check_cache)?;
        self.amend(name, list, asks_for_help, meter)
    }

    fn amend(&self, name: &OsStr, list: &str, asks_for_help: bool, meter: &Meter) -> Outcome {
        let image = self.image.open(name, Access::ReadWrite)?;
        if image.format() != Format::Qcow2 || asks_for_help {
            return print_help(image.format().name());
        }
        let mut values = Values::new(AMEND_QCOW2.iter().copied());
        values.set_list(list).map_err(only_at_creation)?;
        meter.set(0.0);
        let result = amendment(&values)
            .and_then(|amend| edit_open(&image, |transaction| Ok(transaction.amend(&amend)?)).map_err(in_words));
        meter.set(100.0);
        result.map(|()| ExitCode::SUCCESS)
    }
}

/// The options that images of a format can be amended by.
fn print_help(format: &str) -> Outcome {
    match Format::from_name(format) {
        Some(Format::Qcow2) => {
            write!(io::stdout(), "Amend options for 'qcow2':\n{}", keyval::help(AMEND_QCOW2.iter().copied()))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Format::Raw) => Err(Failure::new(format!("Format driver '{format}' does not support option amendment"))),
        None => Err(Failure::new(format!("Unknown file format '{format}'"))),
    }
}

/// Some options are only unknown here.
fn only_at_creation(failure: Failure) -> Failure {
    let text = failure.to_string();
    match QCOW2.iter().any(|parameter| text == format!("Invalid parameter '{}'", parameter.name)) {
        true => failure.hint("This option is only supported for image creation"),
        false => failure,
    }
}

fn amendment(values: &Values) -> Result<Amend, Failure> {
    let given = |name: &str| values.text(name).map(str::to_owned);
    let text = |name: &str| given(name).map(|text| Some(text).filter(|text| !text.is_empty()));
    // QEMU takes no other backing file than the image has, by its name and its format.
    let backing = Backing { name: given("backing_file").unwrap_or_default(), format: given("backing_fmt") };
    let names_backing = values.is_set("backing_file") || values.is_set("backing_fmt");
    let version = match values.text("compat") {
        None => None,
        Some("0.10" | "v2") => Some(Version::V2),
        Some("1.1" | "v3") => Some(Version::V3),
        Some(other) => return Err(Failure::new(format!("Unknown compatibility level {other}"))),
    };
    if values.names().any(|name| name.starts_with("encrypt.")) {
        return Err(Failure::new("Can't amend encryption options - encryption not present"));
    }
    Ok(Amend {
        version,
        refcount_bits: values.number("refcount_bits").map(|bits| u32::try_from(bits).unwrap_or(u32::MAX)),
        lazy_refcounts: values.boolean("lazy_refcounts"),
        data_file: text("data_file"),
        data_file_raw: values.boolean("data_file_raw"),
        backing: names_backing.then_some(Some(backing)),
        // A size of zero is none.
        size: values.number("size").filter(|&size| size > 0),
    })
}

fn in_words(error: Error) -> Failure {
    match error {
        Error::Qcow2(qtk_qcow2::Error::Amend { refusal, .. }) => refused(&refusal),
        other => other.into(),
    }
}

fn refused(refusal: &AmendRefusal) -> Failure {
    let words = match refusal {
        AmendRefusal::RefcountBits(_) => "Refcount width must be a power of two and may not exceed 64 bits",
        AmendRefusal::Version2RefcountBits => {
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
        }
        AmendRefusal::DowngradeRefcountBits => "compat=0.10 requires refcount_bits=16",
        AmendRefusal::RefcountTooLarge { bits, offset, count } => {
            return Failure::new(format!(
                "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {offset} has a refcount of {count}"
            ));
        }
        AmendRefusal::Version2LazyRefcounts => {
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        }
        AmendRefusal::NoDataFile => "data-file can only be set for images that use an external data file",
        AmendRefusal::DataFileRaw => "data-file-raw cannot be set on existing images",
        AmendRefusal::Backing => {
            return Failure::new("Cannot amend the backing file").hint("You can use 'qemu-img rebase' instead.");
        }
        AmendRefusal::DowngradeFeatures(bits) => {
            return Failure::new(format!("Cannot downgrade an image with incompatible features {bits:#x} set"));
        }
        AmendRefusal::DowngradeZstd => {
            "Cannot downgrade an image with zstd compression type and existing compressed clusters"
        }
        AmendRefusal::DowngradeSnapshots => "Internal snapshots prevent downgrade of image",
        AmendRefusal::UnalignedSize(_) => "The new size must be a multiple of 512",
        AmendRefusal::DowngradeDataFile => "Cannot downgrade an image with a data file",
        other => return Failure::new(other.to_string()),
    };
    Failure::new(words)
}
