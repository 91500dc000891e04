//! Options that every node has, and those of qcow2 nodes.

use qtk_block::Access;
use qtk_qcow2::Header;

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
    let unmaps = match options.take_text("discard").as_deref() {
        None | Some("ignore" | "off") => false,
        Some("unmap" | "on") => true,
        Some(_) => return Err(SpecError::Discard),
    };
    let detection = take_one_of(options, "detect-zeroes", &["off", "on", "unmap"])?;
    if detection.as_deref() == Some("unmap") && !unmaps {
        return Err(SpecError::UnmapWithoutDiscard);
    }
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
pub(crate) fn take_qcow2_tuning(options: &mut Options, header: &Header) -> Result<(), SpecError> {
    let cluster_size = header.cluster_bits.size();
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
    take_cache_sizes(options, cluster_size)?;
    for key in SWITCHES {
        options.take_bool(key)?;
    }
    for key in ["overlap-check", "overlap-check.template"] {
        if let Some(value) = options.take_text(key)
            && !["none", "constant", "cached", "all"].contains(&value.as_str())
        {
            return Err(SpecError::OverlapCheck(value));
        }
    }
    options.take_text("encrypt.key-secret");
    match (options.take_text("encrypt.format"), header.encryption) {
        (Some(format), None) => Err(SpecError::NotEncrypted(format)),
        _ => Ok(()),
    }
}

fn take_cache_sizes(options: &mut Options, cluster_size: u64) -> Result<(), SpecError> {
    let [all, l2, refcounts] = ["cache-size", "l2-cache-size", "refcount-cache-size"].map(|key| options.take_size(key));
    let (all, l2, refcounts) = (all?, l2?, refcounts?);
    options.take_size("cache-clean-interval")?;
    let exceeds = |part: Option<u64>| part.is_some_and(|part| all.is_some_and(|all| part > all));
    if all.is_some() && l2.is_some() && refcounts.is_some() {
        return Err(SpecError::AllCacheSizes);
    }
    if exceeds(l2) || exceeds(refcounts) {
        return Err(SpecError::CacheSize(if exceeds(l2) { "l2-cache-size" } else { "refcount-cache-size" }));
    }
    match options.take_size("l2-cache-entry-size")? {
        Some(size) if !size.is_power_of_two() || !(512..=cluster_size).contains(&size) => {
            Err(SpecError::CacheEntrySize { cluster_size })
        }
        _ => Ok(()),
    }
}
