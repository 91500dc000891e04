//! `-l`: the internal snapshot that a command reads instead of the disk.

use std::ffi::OsStr;

use qtk_block::Access;
use qtk_image::{Error, Image, OpenOptions, SnapshotName};

use super::keyval::{Kind, Parameter, Values};
use super::message::Failure;
use super::open::{ImageArguments, could_not_open};

const ID: &str = "snapshot.id";
const NAME: &str = "snapshot.name";

/// The snapshot that a text stands for: options, or an id or name.
pub(crate) fn parse(text: &str) -> Result<SnapshotName, Failure> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotName::Any(text.to_owned()));
    }
    let parameters = [ID, NAME].map(|name| Parameter { name, kind: Kind::Text, help: "", default: None });
    let mut values = Values::new(parameters);
    if let Err(failure) = values.set_list(text) {
        failure.report();
        return Err(Failure::new(format!("Failed in parsing snapshot param '{text}'")));
    }
    let value = |name| values.text(name).map(str::to_owned);
    Ok(SnapshotName::Exact { id: value(ID), name: value(NAME) })
}

/// Opens an image to read it, as a snapshot has it if one is given.
pub(crate) fn open(
    arguments: &ImageArguments,
    name: &OsStr,
    snapshot: Option<&SnapshotName>,
) -> Result<Image, Failure> {
    let Some(snapshot) = snapshot else { return arguments.open(name, Access::ReadOnly) };
    let options = OpenOptions { snapshot: Some(snapshot.clone()), ..arguments.opening(name, Access::ReadOnly)? };
    Image::open_node(&arguments.spec(name)?, &options).map_err(|error| match error {
        Error::NoSnapshots { format, .. } => Failure::new(format!(
            "Failed to load snapshot: Block format '{format}' used by device '' does not support temporarily loading \
             internal snapshots"
        )),
        Error::SnapshotNotFound { .. } => Failure::new("Failed to load snapshot: Can't find snapshot"),
        other => could_not_open(name, other.into()),
    })
}
