use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::process::ExitCode;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use qtk_block::Access;
use qtk_image::{ImageInfo, NodeSpec, node_info};

use super::getopt::Options;
use super::json::{self, Output};
use super::message::Failure;
use super::open::{ImageArguments, could_not_open};
use super::{Outcome, help, operand};

const OPTIONS: &str = "h|help f|format: U|force-share output: backing-chain object: image-opts";

pub(crate) fn run(arguments: Vec<OsString>) -> Outcome {
    let mut options = Options::new(arguments, OPTIONS);
    let (mut image, mut output, mut chain) = (ImageArguments::default(), None, false);
    while let Some(found) = options.next()? {
        match found.name {
            "h" => return help::print(),
            "output" => output = Some(found.text()?),
            "backing-chain" => chain = true,
            _ => image.take(found)?,
        }
    }
    let name = operand(options, "Expecting one image file name")?;
    let output = Output::from_argument(output.as_deref())?;
    let infos = infos(&image, name, chain)?;
    match output {
        Output::Human => print(&infos)?,
        Output::Json if chain => json::print(&infos.iter().map(ImageInfo::to_json).collect())?,
        Output::Json => infos.iter().try_for_each(|info| json::print(&info.to_json()))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The image, and if asked for everything it lies on.
fn infos(image: &ImageArguments, name: OsString, chain: bool) -> Result<Vec<ImageInfo>, Failure> {
    let mut infos = vec![look(image, &name, &image.spec(&name)?)?];
    let mut names = HashSet::from([name]);
    while chain && let Some((name, spec)) = infos.last().and_then(ImageInfo::beneath) {
        let name = OsString::from(name);
        let spec = spec.map_err(|error| could_not_open(&name, error.into()))?;
        if !names.insert(name.clone()) {
            return Err(Failure::new(format!("Backing file '{}' creates an infinite loop.", name.display())));
        }
        infos.push(look(image, &name, &spec)?);
    }
    Ok(infos)
}

fn look(image: &ImageArguments, name: &OsStr, spec: &NodeSpec) -> Result<ImageInfo, Failure> {
    let info = node_info(spec, &image.opening(name, Access::ReadOnly)?);
    info.map_err(|error| could_not_open(name, error.into()))
}

fn print(infos: &[ImageInfo]) -> io::Result<()> {
    let texts: Vec<String> = infos.iter().map(|info| info.to_text(&local_time)).collect();
    write!(io::stdout(), "{}", texts.join("\n"))
}

/// A time by the user's clock.
pub(crate) fn local_time(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    match time {
        Some(time) => time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        None => seconds.to_string(),
    }
}
