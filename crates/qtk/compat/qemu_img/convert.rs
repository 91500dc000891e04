use std::ffi::{OsStr, OsString};
use std::num::NonZeroU64;
use std::process::ExitCode;

use qtk_block::{Access, BlockRead, Durability};
use qtk_image::{
    BitmapCopy, ChainLayer, ConvertOptions, ConvertWarning, Error, Format, Image, NewImage, SnapshotName, Target,
    convert,
};
use qtk_qcow2::{BitmapRefusal, Version};

use super::getopt::{Found, Options};
use super::keyval::{self, Values};
use super::message::{self, Failure};
use super::open::{ImageArguments, check_cache, check_source_cache, could_not_open};
use super::progress::Meter;
use super::target::{self, Driver};
use super::{Outcome, bitmap, help, size, snapshot_param, words};

const OPTIONS: &str = "h|help f: O: B: F: C c o: l: S: p t: T: q n U|force-share m: W r: object: image-opts \
    target-image-opts salvage target-is-zero bitmaps skip-broken-bitmaps";

/// What `-S` can be at most.
const MAX_SPARSE_SIZE: u64 = 16 << 20;
/// What `-m` can be. How many threads there are, qtk knows better.
const COROUTINES: std::ops::RangeInclusive<u64> = 1..=16;

#[derive(Default)]
struct Request {
    source: ImageArguments,
    /// `-O`.
    driver: Option<String>,
    /// `-o`.
    options: Option<String>,
    /// `-B`.
    backing: Option<String>,
    /// `-F`.
    backing_format: Option<String>,
    /// `-l`.
    snapshot: Option<SnapshotName>,
    /// `-S`.
    sparse_size: Option<u64>,
    /// `-r`.
    rate_limit: Option<NonZeroU64>,
    /// `-t`.
    cache: Option<String>,
    /// `-T`.
    source_cache: Option<String>,
    /// `-C`.
    offload: bool,
    compress: bool,
    /// `-n`.
    target_exists: bool,
    target_image_opts: bool,
    target_is_zero: bool,
    salvage: bool,
    bitmaps: bool,
    skip_broken_bitmaps: bool,
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
    request.check()?;
    let mut names = options.operands();
    if request.options.as_deref().is_some_and(keyval::asks_for_help) {
        return Driver::known(request.driver())?.print_help(!names.is_empty());
    }
    let Some(output) = names.pop().filter(|_| !names.is_empty()) else {
        return Err(Failure::new("Must specify image file name"));
    };
    request.source_cache.as_deref().map_or(Ok(()), check_source_cache)?;
    let meter = Meter::begin(request.progress && !request.quiet);
    let outcome = request.run(&names, &output, &meter);
    Ok(meter.end(outcome))
}

impl Request {
    fn take(&mut self, found: Found) -> Result<(), Failure> {
        match found.name {
            "O" => self.driver = Some(found.text()?),
            "o" => keyval::append(&mut self.options, &found.text()?)?,
            "B" => self.backing = Some(found.text()?),
            "F" => self.backing_format = Some(found.text()?),
            "l" => self.snapshot = Some(snapshot_param::parse(&found.text()?)?),
            "S" => self.sparse_size = Some(sparse_size(&found.text()?)?),
            "r" => self.rate_limit = NonZeroU64::new(size::argument(&found.text()?, "rate limit")?),
            "m" => check_coroutines(&found.text()?)?,
            // The order in which a target is written shows in nothing but its layout.
            "W" => {}
            "t" => self.cache = Some(found.text()?),
            "T" => self.source_cache = Some(found.text()?),
            "C" => self.offload = true,
            "c" => self.compress = true,
            "n" => self.target_exists = true,
            "p" => self.progress = true,
            "q" => self.quiet = true,
            "salvage" => self.salvage = true,
            "bitmaps" => self.bitmaps = true,
            "skip-broken-bitmaps" => self.skip_broken_bitmaps = true,
            "target-image-opts" => self.target_image_opts = true,
            "target-is-zero" => self.target_is_zero = true,
            _ => self.source.take(found)?,
        }
        Ok(())
    }

    /// The name of the target's format.
    fn driver(&self) -> &str {
        self.driver.as_deref().unwrap_or("raw")
    }

    /// What does not go together.
    fn check(&self) -> Result<(), Failure> {
        let problems = [
            (self.skip_broken_bitmaps && !self.bitmaps, "Use of --skip-broken-bitmaps requires --bitmaps"),
            (self.offload && self.compress, "Cannot enable copy offloading when -c is used"),
            (self.offload && self.sparse_size.is_some(), "Cannot enable copy offloading when -S is used"),
            (self.offload && self.salvage, "Cannot use copy offloading in salvaging mode"),
            (self.target_exists && self.options.is_some(), "-o has no effect when skipping image creation"),
            (self.target_image_opts && !self.target_exists, "--target-image-opts requires use of -n flag"),
            (self.target_is_zero && !self.target_exists, "--target-is-zero requires use of -n flag"),
        ];
        match problems.into_iter().find(|(found, _)| *found) {
            Some((_, problem)) => Err(Failure::new(problem)),
            None => Ok(()),
        }
    }

    fn run(&self, names: &[OsString], output: &OsStr, meter: &Meter) -> Outcome {
        let sources = self.open_sources(names)?;
        if self.target_exists {
            self.copy_to_existing(&sources, output, meter)
        } else {
            self.copy_to_new(&sources, output, meter)
        }
    }

    fn open_sources(&self, names: &[OsString]) -> Result<Vec<Image>, Failure> {
        let open = |name: &OsString| match names.len() {
            1 => snapshot_param::open(&self.source, name, self.snapshot.as_ref()),
            _ => self.source.open(name, Access::ReadOnly),
        };
        let sources: Vec<Image> = names.iter().map(open).collect::<Result<_, _>>()?;
        match &self.snapshot {
            Some(_) if sources.len() > 1 => Err(Failure::new("No support for concatenating multiple snapshot")),
            _ => Ok(sources),
        }
    }

    fn copy_to_new(&self, sources: &[Image], output: &OsStr, meter: &Meter) -> Outcome {
        let driver = Driver::known(self.driver())?;
        let path = target::file(output)?;
        let values = self.values(driver)?;
        self.check_values(driver, &values, sources)?;
        self.check_source_bitmaps(sources)?;
        let in_target = |failure: Failure| {
            failure.prefix(format_args!("{}: error while converting {}: ", output.display(), driver.name))
        };
        target::check_place(&path).map_err(in_target)?;
        let image = driver.new_image(&values, None).map_err(in_target)?;
        self.check_cache()?;
        let image = NewImage { durability: self.durability(), ..image };
        self.check_target_bitmaps(driver.format, image.qcow2.version)?;
        let target = Target::New { path: &path, image: &image };
        self.copy(sources, target, meter).map_err(|error| match error {
            error @ Error::Backing { .. } => could_not_open(output, error.into()),
            error @ Error::Io { action: "create it", .. } => {
                in_target(Failure::new(words::image(&error).replacen("Could not open", "Could not create", 1)))
            }
            error @ (Error::Busy { .. } | Error::TargetInChain { .. } | Error::Invalid { .. }) => {
                in_target(error.into())
            }
            error => while_copying(error),
        })
    }

    /// The options of a new image.
    fn values(&self, driver: Driver) -> Result<Values, Failure> {
        let mut values = Values::new(driver.parameters());
        self.options.as_deref().map_or(Ok(()), |list| values.set_list(list))?;
        let unsupported = |what: &'static str| {
            move |_| Failure::new(format!("{what} not supported for file format '{}'", driver.name))
        };
        if let Some(backing) = &self.backing {
            values.set("backing_file", backing).map_err(unsupported("Backing file"))?;
        }
        if let Some(format) = &self.backing_format {
            values.set("backing_fmt", format).map_err(unsupported("Backing file format"))?;
        }
        Ok(values)
    }

    /// What does not go together in a new image.
    fn check_values(&self, driver: Driver, values: &Values, sources: &[Image]) -> Result<(), Failure> {
        let has_backing = values.text("backing_file").is_some();
        if has_backing && sources.len() > 1 {
            return Err(makes_no_sense());
        }
        if has_backing && values.text("backing_fmt").is_none() {
            return Err(Failure::new("Use of backing file requires explicit backing format"));
        }
        self.check_compression(driver.format)?;
        match values.text("preallocation") {
            Some(mode) if self.compress && mode != "off" => {
                Err(Failure::new("Compression and preallocation not supported at the same time"))
            }
            _ => Ok(()),
        }
    }

    fn check_compression(&self, format: Format) -> Result<(), Failure> {
        match format {
            Format::Raw if self.compress => Err(Failure::new("Compression not supported for this file format")),
            _ => Ok(()),
        }
    }

    /// Whoever asks for an unsafe target gets one; nobody else does.
    fn durability(&self) -> Durability {
        if self.cache.as_deref() == Some("unsafe") { Durability::InCache } else { Durability::OnDisk }
    }

    fn check_cache(&self) -> Result<(), Failure> {
        self.cache.as_deref().map_or(Ok(()), check_cache)
    }

    fn check_source_bitmaps(&self, sources: &[Image]) -> Result<(), Failure> {
        if !self.bitmaps {
            return Ok(());
        }
        let [source] = sources else { return Err(Failure::new("Copying bitmaps only possible with single source")) };
        match top(source) {
            Some(layer) if layer.header().version >= Version::V3 => Ok(()),
            _ => Err(Failure::new("Source lacks bitmap support")),
        }
    }

    fn check_target_bitmaps(&self, format: Format, version: Version) -> Result<(), Failure> {
        match format {
            Format::Qcow2 if version >= Version::V3 => Ok(()),
            _ if !self.bitmaps => Ok(()),
            _ => Err(Failure::new(format!("Format driver '{format}' does not support bitmaps"))),
        }
    }

    fn copy_to_existing(&self, sources: &[Image], output: &OsStr, meter: &Meter) -> Outcome {
        if self.backing.is_some() && sources.len() > 1 {
            return Err(makes_no_sense());
        }
        self.check_source_bitmaps(sources)?;
        self.check_cache()?;
        let format = if self.target_image_opts { self.driver.clone() } else { Some(self.driver().to_owned()) };
        let arguments = ImageArguments { format, image_opts: self.target_image_opts, share: false };
        let image = arguments.open(output, Access::ReadWrite)?;
        self.check_compression(image.format())?;
        self.check_target_bitmaps(image.format(), top(&image).map_or(Version::V3, |layer| layer.header().version))?;
        if self.target_is_zero && self.backing.is_some() {
            // QEMU stops here, and calls it success.
            message::error("Cannot use --target-is-zero when the destination image has a backing file");
            return Ok(ExitCode::SUCCESS);
        }
        if image.size() < sources.iter().map(Image::size).sum() {
            return Err(Failure::new("output file is smaller than input file"));
        }
        let target = Target::Existing { image, overlay: self.backing.is_some() };
        self.copy(sources, target, meter).map_err(while_copying)
    }

    fn copy(&self, sources: &[Image], target: Target<'_>, meter: &Meter) -> Result<ExitCode, Error> {
        let options = ConvertOptions {
            compress: self.compress,
            salvage: self.salvage,
            target_is_zero: self.target_is_zero,
            offload: self.offload,
            rate_limit: self.rate_limit,
            bitmaps: match (self.bitmaps, self.skip_broken_bitmaps) {
                (false, _) => BitmapCopy::None,
                (true, false) => BitmapCopy::All,
                (true, true) => BitmapCopy::Consistent,
            },
            ..ConvertOptions::default()
        };
        let options = ConvertOptions { sparse_size: self.sparse_size.unwrap_or(options.sparse_size), ..options };
        let progress = meter.of(sources.iter().map(Image::size).sum());
        convert(sources, target, &options, &mut |warning| self.warn(&warning), &progress)?;
        meter.set(100.0);
        Ok(ExitCode::SUCCESS)
    }

    fn warn(&self, warning: &ConvertWarning) {
        match warning {
            ConvertWarning::Unreadable { offset, source } if !self.quiet => {
                message::warn(&format!("error while reading offset {offset}: {}", words::access(source)));
            }
            ConvertWarning::NoStatus { offset, source } if !self.quiet => {
                message::warn(&format!(
                    "error while reading block status at offset {offset}: {}",
                    words::access(source)
                ));
            }
            ConvertWarning::BrokenBitmap { name } => {
                message::warn(&format!("Skipping inconsistent bitmap '{name}'"));
            }
            _ => {}
        }
    }
}

/// The layer that an image's name leads to, if it is qcow2.
fn top(image: &Image) -> Option<&qtk_qcow2::Layer> {
    image.layers().first().and_then(ChainLayer::qcow2).map(AsRef::as_ref)
}

fn makes_no_sense() -> Failure {
    Failure::new("Having a backing file for the target makes no sense when concatenating multiple input images")
}

/// What QEMU says where the copy itself fails.
fn while_copying(error: Error) -> Failure {
    match &error {
        Error::Read { offset, source, .. } => {
            Failure::new(format!("error while reading at byte {offset}: {}", words::system(source)))
        }
        Error::Write { offset, source, .. } => {
            Failure::new(format!("error while writing at byte {offset}: {}", words::system(source)))
        }
        Error::Status { offset, source, .. } => {
            Failure::new(format!("error while reading block status at offset {offset}: {}", words::access(source)))
        }
        Error::BrokenBitmap { name, .. } => Failure::new(format!("Cannot copy inconsistent bitmap '{name}'"))
            .hint("Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"),
        Error::Qcow2(qtk_qcow2::Error::Bitmap { bitmap, refusal, .. }) => {
            let step = if matches!(refusal, BitmapRefusal::DifferentSizes { .. }) { "populate" } else { "create" };
            bitmap::refused(bitmap, refusal).prefix(format_args!("Failed to {step} bitmap {bitmap}: "))
        }
        _ => error.into(),
    }
}

fn sparse_size(text: &str) -> Result<u64, Failure> {
    let bytes = size::argument(text, "buffer size for sparse output")?;
    if bytes % 512 != 0 || bytes > MAX_SPARSE_SIZE {
        return Err(Failure::new(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {MAX_SPARSE_SIZE}. \
             Select 0 to disable sparse detection (fully allocates output)."
        )));
    }
    Ok(bytes)
}

fn check_coroutines(text: &str) -> Result<(), Failure> {
    match size::number(text) {
        Ok(number) if COROUTINES.contains(&number) => Ok(()),
        _ => Err(Failure::new(format!(
            "Invalid number of coroutines. Allowed number of coroutines is between {} and {}",
            COROUTINES.start(),
            COROUTINES.end()
        ))),
    }
}
