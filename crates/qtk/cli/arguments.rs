//! Arguments that several verbs share.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};
use qtk_disk::GuestPath;
use qtk_guest::{Accounts, Owner, OwnerIds};
use qtk_image::{Format, OpenOptions};

/// An image format by its name on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum FormatName {
    Qcow2,
    Raw,
}

impl From<FormatName> for Format {
    fn from(name: FormatName) -> Self {
        match name {
            FormatName::Qcow2 => Self::Qcow2,
            FormatName::Raw => Self::Raw,
        }
    }
}

/// The image a verb works on.
#[derive(Args, Debug)]
pub(crate) struct ImageArguments {
    /// The disk image
    pub(crate) image: PathBuf,

    #[command(flatten)]
    pub(crate) access: AccessArguments,
}

/// How images are opened.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct AccessArguments {
    /// Format of the image; found out where it is not given
    #[arg(short = 'f', long, value_name = "FORMAT")]
    image_format: Option<FormatName>,

    /// Read without locking, even while a VM writes the image. What is read may then be inconsistent
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,
}

impl AccessArguments {
    /// Options for reading an image and the files that back it.
    pub(crate) fn for_reading(self) -> OpenOptions {
        OpenOptions { format: self.image_format.map(Format::from), share: self.force_share, ..OpenOptions::default() }
    }
}

/// Whom new files belong to.
#[derive(Args, Debug)]
pub(crate) struct OwnerArguments {
    /// Owner as USER, USER:GROUP, USER: or :GROUP; names are the guest's
    #[arg(long, value_name = "OWNER")]
    owner: Option<Owner>,
}

impl OwnerArguments {
    /// The numbers behind the names, in this guest.
    pub(crate) fn resolve(&self, tree: &qtk_disk::Tree) -> anyhow::Result<OwnerIds> {
        match &self.owner {
            Some(owner) => Ok(owner.resolve(&Accounts::read(tree)?)?),
            None => Ok(OwnerIds::default()),
        }
    }
}

/// Takes a guest's path as the bytes it was given as.
pub(crate) fn guest_path() -> impl TypedValueParser<Value = GuestPath> {
    OsStringValueParser::new().map(|path| guest_path_from(&path))
}

/// A word of the command line as a path in the guest.
pub(crate) fn guest_path_from(word: &OsStr) -> GuestPath {
    GuestPath::from(word.as_bytes())
}
