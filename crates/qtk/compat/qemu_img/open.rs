//! Images as the command line names them: by file name, by `--image-opts`, with a format, a cache mode.

use std::ffi::OsStr;

use qtk_block::Access;
use qtk_image::{ChainLayer, Format, Image, OpenOptions};

use super::getopt::Found;
use super::message::Failure;
use super::object;

/// The options that say how images are opened. Most commands have them.
#[derive(Clone, Debug, Default)]
pub(crate) struct ImageArguments {
    /// `-f`.
    pub(crate) format: Option<String>,
    /// `--image-opts`: what stands for a file name is a list of options.
    pub(crate) image_opts: bool,
    /// `-U`: read without locks.
    pub(crate) share: bool,
}

impl ImageArguments {
    /// Takes note of `-f`, `-U`, `--image-opts` or `--object`.
    pub(crate) fn take(&mut self, found: Found) -> Result<(), Failure> {
        match found.name {
            "f" => self.format = Some(found.text()?),
            "U" => self.share = true,
            "image-opts" => self.image_opts = true,
            "object" => object::define(&found.text()?)?,
            other => return Err(Failure::usage(format!("unrecognized option '{other}'"))),
        }
        Ok(())
    }

    /// Opens an image and everything it lies on.
    pub(crate) fn open(&self, name: &OsStr, access: Access) -> Result<Image, Failure> {
        let open = || Ok(Image::open(name, &self.options(access)?)?);
        open().map_err(|failure: Failure| could_not_open(name, failure))
    }

    /// Opens the topmost file of an image alone.
    pub(crate) fn open_layer(&self, name: &OsStr, access: Access) -> Result<ChainLayer, Failure> {
        let open = || Ok(Image::open_layer(name, &self.options(access)?)?);
        open().map_err(|failure: Failure| could_not_open(name, failure))
    }

    fn options(&self, access: Access) -> Result<OpenOptions, Failure> {
        let format = self.format.as_deref().map(driver).transpose()?;
        Ok(OpenOptions { format, share: self.share, access, ..OpenOptions::default() })
    }
}

fn could_not_open(name: &OsStr, failure: Failure) -> Failure {
    failure.prefix(format_args!("Could not open '{}': ", name.display()))
}

/// The format of that name.
pub(crate) fn driver(name: &str) -> Result<Format, Failure> {
    Format::from_name(name).ok_or_else(|| Failure::new(format!("Unknown driver '{name}'")))
}

/// A cache mode, for `-t`. All of them read and write the same bytes, and qtk syncs what it has done in any case.
pub(crate) fn check_cache(mode: &str) -> Result<(), Failure> {
    check_mode(mode, "Invalid cache option")
}

/// A cache mode, for `-T`.
pub(crate) fn check_source_cache(mode: &str) -> Result<(), Failure> {
    check_mode(mode, "Invalid source cache option")
}

fn check_mode(mode: &str, problem: &str) -> Result<(), Failure> {
    match mode {
        "none" | "off" | "writeback" | "writethrough" | "directsync" | "unsafe" => Ok(()),
        _ => Err(Failure::new(format!("{problem}: {mode}"))),
    }
}
