//! Images as the command line names them: by file name, by `--image-opts`, with a format, a cache mode.

use std::ffi::OsStr;

use qtk_block::Access;
use qtk_image::{ChainLayer, Format, Image, NodeSpec, OpenOptions, OptionValue};
use qtk_qcow2::{features, repair_dirty};

use super::getopt::Found;
use super::keyval;
use super::message::{self, Failure};
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

    /// The node that a name stands for.
    pub(crate) fn spec(&self, name: &OsStr) -> Result<NodeSpec, Failure> {
        let spec = if self.image_opts {
            if self.format.is_some() {
                return Err(Failure::new("--image-opts and --format are mutually exclusive"));
            }
            let list = name.to_string_lossy();
            keyval::warn_of_short_forms(&list, Some("file"));
            NodeSpec::from_options(keyval::pairs(&list, Some("file")))
        } else {
            NodeSpec::from_filename(name).map_err(|error| could_not_open(name, error.into()))?
        };
        if spec.get("backing").and_then(OptionValue::as_text) == Some("") {
            message::warn("Use of \"backing\": \"\" is deprecated; use \"backing\": null instead");
        }
        Ok(match &self.format {
            Some(format) => spec.with_driver(format),
            None => spec,
        })
    }

    /// Opens an image and everything it lies on. For writing, an image that was not closed cleanly is repaired first.
    pub(crate) fn open(&self, name: &OsStr, access: Access) -> Result<Image, Failure> {
        self.open_node(name, self.spec(name)?, access)
    }

    /// Opens the [node](Self::spec) that a name stands for.
    pub(crate) fn open_node(&self, name: &OsStr, spec: NodeSpec, access: Access) -> Result<Image, Failure> {
        let image = self.open_once(name, &spec, access)?;
        if access == Access::ReadOnly {
            return Ok(image);
        }
        let repaired = match image.layers().first() {
            Some(layer) => prepare(name, layer)?,
            None => false,
        };
        if !repaired {
            return Ok(image);
        }
        drop(image);
        self.open_once(name, &spec, access)
    }

    fn open_once(&self, name: &OsStr, spec: &NodeSpec, access: Access) -> Result<Image, Failure> {
        let image = Image::open_node(spec, &self.opening(name, access)?).map_err(Failure::from);
        image.and_then(readable).map_err(|failure| could_not_open(name, failure))
    }

    /// How the image and what it lies on is opened. Only what is read can be shared.
    pub(crate) fn opening(&self, name: &OsStr, access: Access) -> Result<OpenOptions, Failure> {
        if self.share && access == Access::ReadWrite {
            let problem = Failure::new("force-share=on can only be used with read-only images");
            return Err(could_not_open(name, problem));
        }
        Ok(OpenOptions { share: self.share, ..options(access) })
    }

    /// As [`open`](Self::open), but the image may be damaged.
    pub(crate) fn open_damaged(&self, name: &OsStr, access: Access) -> Result<Image, Failure> {
        let options = OpenOptions { damaged: true, ..self.opening(name, access)? };
        let image = Image::open_node(&self.spec(name)?, &options).map_err(Failure::from);
        let image = image.and_then(readable).map_err(|failure| could_not_open(name, failure))?;
        if access == Access::ReadWrite {
            image.layers().iter().take(1).for_each(|layer| warn_of_guess(name, layer));
        }
        Ok(image)
    }

    /// Opens an image without what it lies on.
    pub(crate) fn open_alone(&self, name: &OsStr, access: Access) -> Result<ChainLayer, Failure> {
        self.open_node_alone(name, self.spec(name)?, access)
    }

    /// Opens the [node](Self::spec) that a name stands for without what it lies on.
    pub(crate) fn open_node_alone(&self, name: &OsStr, spec: NodeSpec, access: Access) -> Result<ChainLayer, Failure> {
        let options = self.opening(name, access)?;
        let open = || Image::open_node_alone(&spec, &options).map_err(|error| could_not_open(name, error.into()));
        let layer = open()?;
        if access == Access::ReadOnly || !prepare(name, &layer)? {
            return Ok(layer);
        }
        drop(layer);
        open()
    }
}

/// Does what QEMU does before it writes to an image: warns, refuses, or repairs it, after which it must be opened again.
fn prepare(name: &OsStr, layer: &ChainLayer) -> Result<bool, Failure> {
    warn_of_guess(name, layer);
    let Some(qcow2) = layer.qcow2() else { return Ok(false) };
    if qcow2.header().features.incompatible & features::CORRUPT != 0 {
        return Err(could_not_open(name, Failure::new("qcow2: Image is corrupt; cannot be opened read/write")));
    }
    repair_dirty(qcow2, &mut |finding| {
        if !finding.is_silent() {
            message::say(&finding.to_string());
        }
    })
    .map_err(|error| could_not_open(name, Failure::from(error).prefix("Could not repair dirty image: ")))
}

/// Fails for an image that only a passphrase would make readable.
fn readable(image: Image) -> Result<Image, Failure> {
    let encrypted = |layer: &ChainLayer| layer.qcow2().is_some_and(|layer| layer.header().encryption.is_some());
    match image.layers().iter().position(encrypted) {
        None => Ok(image),
        Some(depth) => Err(Failure::new("Parameter 'encrypt.key-secret' is required for cipher")
            .prefix("Could not open backing file: ".repeat(depth))),
    }
}

/// Names of backing files may be `json:` descriptions, as in QEMU.
pub(crate) fn options(access: Access) -> OpenOptions {
    OpenOptions { access, json_names: true, ..OpenOptions::default() }
}

pub(crate) fn could_not_open(name: &OsStr, failure: Failure) -> Failure {
    failure.prefix(format_args!("Could not open '{}': ", name.display()))
}

/// A raw image whose format was guessed can be made to look like another format's by its guest.
fn warn_of_guess(name: &OsStr, layer: &ChainLayer) {
    if layer.format() == Format::Raw && layer.format_probed() {
        message::say(&format!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
             Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
             Specify the 'raw' format explicitly to remove the restrictions.",
            name.display()
        ));
    }
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
