//! Options that every node has, and those of qcow2 nodes.

use qtk_block::Access;

use super::{OptionValue, Options, SpecError};

/// What a node's common options ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common {
    read_only: bool,
    pub(crate) share: bool,
}

impl Common {
    pub(crate) fn check(self, access: Access) -> Result<(), SpecError> {
        match access {
            Access::ReadWrite if self.share => Err(SpecError::SharedWriting),
            Access::ReadWrite if self.read_only => Err(SpecError::ReadOnly),
            _ => Ok(()),
        }
    }
}

/// Takes the options that nodes of every driver have.
pub(crate) fn take_common(options: &mut Options) -> Result<Common, SpecError> {
    let read_only = options.take_bool("read-only")?.unwrap_or_default();
    let share = options.take_bool("force-share")?.unwrap_or_default();
    if let Some(name) = options.take_text("node-name")
        && !is_node_name(&name)
    {
        return Err(SpecError::NodeName(name));
    }
    for key in ["auto-read-only", "cache.direct", "cache.no-flush"] {
        options.take_bool(key)?;
    }
    if let Some(discard) = options.take_text("discard")
        && !["ignore", "off", "unmap", "on"].contains(&discard.as_str())
    {
        return Err(SpecError::Discard);
    }
    take_one_of(options, "detect-zeroes", &["off", "on", "unmap"])?;
    Ok(Common { read_only, share })
}

/// Whether QEMU lets nodes be called so.
fn is_node_name(name: &str) -> bool {
    let belongs = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    name.starts_with(|c: char| c.is_ascii_alphabetic()) && name.chars().all(belongs) && name.len() < 32
}

/// Takes an option that must have one of some values.
pub(crate) fn take_one_of(options: &mut Options, key: &str, allowed: &[&str]) -> Result<Option<String>, SpecError> {
    match options.take(key) {
        None => Ok(None),
        Some(OptionValue::Text(value)) if allowed.contains(&value.as_str()) => Ok(Some(value)),
        Some(other) => Err(SpecError::InvalidValue(other.to_string())),
    }
}

/// Takes the options of qcow2 nodes that tune QEMU and mean nothing here, but must make sense.
pub(crate) fn take_qcow2_tuning(options: &mut Options) -> Result<(), SpecError> {
    const SWITCHES: [&str; 14] = [
        "lazy-refcounts",
        "pass-discard-request",
        "pass-discard-snapshot",
        "pass-discard-other",
        "discard-no-unref",
        "overlap-check.main-header",
        "overlap-check.active-l1",
        "overlap-check.active-l2",
        "overlap-check.refcount-table",
        "overlap-check.refcount-block",
        "overlap-check.snapshot-table",
        "overlap-check.inactive-l1",
        "overlap-check.inactive-l2",
        "overlap-check.bitmap-directory",
    ];
    const SIZES: [&str; 5] =
        ["cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval"];
    for key in SIZES {
        options.take_size(key)?;
    }
    for key in SWITCHES {
        options.take_bool(key)?;
    }
    for option in ["overlap-check", "overlap-check.template"] {
        if let Some(value) = options.take_text(option)
            && !["none", "constant", "cached", "all"].contains(&value.as_str())
        {
            return Err(SpecError::OverlapCheck { option, value });
        }
    }
    for key in ["encrypt.format", "encrypt.key-secret"] {
        options.take_text(key);
    }
    Ok(())
}
