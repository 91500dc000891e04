//! The images that commands make: their format, their options, their file.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use qtk_block::Preallocation;
use qtk_image::{Format, NewImage};

use super::create_options::{FILE, QCOW2, RAW, with_file};
use super::keyval::{self, Parameter, Values};
use super::message::Failure;
use super::{Outcome, new_qcow2, words};

/// What new images are made by: a format, or plain files.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver {
    /// Its name.
    pub(crate) name: &'static str,
    /// The format of what it makes.
    pub(crate) format: Format,
    /// Its own options.
    own: &'static [Parameter],
}

const DRIVERS: &[Driver] = &[
    Driver { name: "raw", format: Format::Raw, own: RAW },
    Driver { name: "qcow2", format: Format::Qcow2, own: QCOW2 },
    Driver { name: "file", format: Format::Raw, own: FILE },
];

impl Driver {
    /// The driver of that name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        DRIVERS.iter().copied().find(|driver| driver.name == name)
    }

    /// As [`named`](Self::named), or QEMU's word for there being none.
    pub(crate) fn known(name: &str) -> Result<Self, Failure> {
        Self::named(name).ok_or_else(|| Failure::new(format!("Unknown file format '{name}'")))
    }

    /// What can be set for an image in a file.
    pub(crate) fn parameters(self) -> Vec<Parameter> {
        with_file(self.own)
    }

    /// Prints what can be set: for an image in a file, or of the format alone.
    pub(crate) fn print_help(self, in_file: bool) -> Outcome {
        let mut out = io::stdout().lock();
        if in_file {
            write!(out, "Supported options:\n{}", keyval::help(self.parameters()))?;
        } else {
            write!(
                out,
                "Supported {} options:\n{}\nThe protocol level may support further options.\n\
                 Specify the target filename to include those options.\n",
                self.name,
                keyval::help(self.own.iter().copied())
            )?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The image that `values` describe, of `size` bytes, or else as large as what goes into it.
    pub(crate) fn new_image(self, values: &Values, size: Option<u64>) -> Result<NewImage, Failure> {
        let mut image = NewImage { format: self.format, size, ..NewImage::default() };
        match self.format {
            Format::Raw => image.qcow2.preallocation = raw_preallocation(values)?,
            Format::Qcow2 => {
                new_qcow2::check_encryption_aliases(values)?;
                let options = new_qcow2::options(values, size.unwrap_or_default())?;
                if let Some(backing) = &options.backing {
                    image.base = Some(PathBuf::from(&backing.name));
                    image.base_format.clone_from(&backing.format);
                }
                image.qcow2 = options;
            }
        }
        Ok(image)
    }
}

fn raw_preallocation(values: &Values) -> Result<Preallocation, Failure> {
    let name = values.text("preallocation").unwrap_or("off");
    match new_qcow2::preallocation_mode(name) {
        Some(Preallocation::Metadata) => Err(Failure::new(format!("Unsupported preallocation mode: {name}"))),
        Some(mode) => Ok(mode),
        None => Err(Failure::new(format!("invalid parameter value: {name}"))),
    }
}

/// The file that the name of a new image stands for.
pub(crate) fn file(name: &OsStr) -> Result<PathBuf, Failure> {
    let text = name.to_string_lossy();
    match text.split_once(':') {
        Some(("file", path)) => Ok(PathBuf::from(path)),
        Some((protocol, _)) if !protocol.contains('/') => Err(Failure::new(format!("Unknown protocol '{protocol}'"))),
        _ => Ok(PathBuf::from(name)),
    }
}

/// Why a file cannot be made at `path`, as far as that can be told without making one.
pub(crate) fn check_place(path: &Path) -> Result<(), Failure> {
    let possible = match path.metadata() {
        // What is neither may wait for somebody to read it.
        Ok(there) if there.is_file() || there.is_dir() => OpenOptions::new().write(true).open(path).map(drop),
        Ok(_) => Ok(()),
        Err(_) => match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.metadata().map(drop),
            Some(_) => Ok(()),
            None => path.metadata().map(drop),
        },
    };
    possible.map_err(|error| Failure::new(format!("Could not create '{}': {}", path.display(), words::system(&error))))
}
