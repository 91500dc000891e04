//! Every error of the libraries in QEMU's words.

use std::error::Error as _;
use std::io;

use qtk_image::Error;
use qtk_qcow2::{Corruption, OptionProblem, Place, WriteObstacle};

/// What QEMU says of an image that cannot be used as it should be.
pub(crate) fn image(error: &Error) -> String {
    match error {
        Error::Io { path, action: "create it" | "put it in its place", source } => {
            format!("Could not create '{}': {}", path.display(), system(source))
        }
        Error::Io { path, source, .. } => format!("Could not open '{}': {}", path.display(), system(source)),
        Error::Qcow2(error) => qcow2(error),
        Error::Protocol { protocol, .. } => format!("Unknown protocol '{protocol}'"),
        Error::UnsupportedFormat { format, .. } => format!("Unknown driver '{format}'"),
        Error::Backing { source, .. } => format!("Could not open backing file: {}", image(source)),
        Error::Busy { path, permission, shared, .. } => {
            let shared = if *shared { "shared " } else { "" };
            format!(
                "Failed to get {shared}\"{permission}\" lock\nIs another process using the image [{}]?",
                path.display()
            )
        }
        Error::DiskTooLarge { .. } => "The image size is too large (try using a larger cluster size)".to_owned(),
        Error::TargetInChain { path, .. } => {
            format!("Failed to get \"write\" lock\nIs another process using the image [{}]?", path.display())
        }
        Error::UnalignedSize { .. } => "The new size must be a multiple of 512".to_owned(),
        Error::UnsupportedPreallocation { mode, .. } => format!("Unsupported preallocation mode: {mode}"),
        Error::NoBacking { .. } => "Image does not have a backing file".to_owned(),
        Error::NotInChain { image, wanted } => {
            format!("Did not find '{wanted}' in the backing chain of '{}'", image.display())
        }
        Error::Compare { path, offset, source } => {
            format!("Error while reading offset {offset} of {}: {}", path.display(), system(source))
        }
        Error::Read { source, .. } | Error::Write { source, .. } => system(source),
        Error::Status { source, .. } => access(source),
        other => other.to_string(),
    }
}

/// What QEMU says of a qcow2 file.
pub(crate) fn qcow2(error: &qtk_qcow2::Error) -> String {
    use qtk_qcow2::Error;
    match error {
        Error::Corrupt { what, .. } => corruption(what).unwrap_or_else(|| error.to_string()),
        Error::Unsupported { feature, .. } => unsupported(feature),
        Error::ImpossibleOptions { problem: OptionProblem::SizeTooLarge, .. } => {
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)".to_owned()
        }
        Error::NotWritable { obstacle: WriteObstacle::HeaderFull | WriteObstacle::HeaderOutOfReach, .. } => {
            "No space left in the file header".to_owned()
        }
        Error::InvalidOption { option: "the size", .. } => "Failed to grow the L1 table: File too large".to_owned(),
        Error::NotWritable { obstacle: WriteObstacle::SnapshotsInVersion2, .. } => {
            "Can't resize a v2 image which has snapshots".to_owned()
        }
        Error::NotWritable { obstacle: WriteObstacle::MarkedCorrupt, .. } => {
            "qcow2: Image is corrupt; cannot be opened read/write".to_owned()
        }
        Error::Io { source, .. } | Error::Backing { source, .. } => system(source),
        other => other.to_string(),
    }
}

/// What QEMU says where it looks for the same damage when it opens an image.
fn corruption(what: &Corruption) -> Option<String> {
    let words = match what {
        Corruption::NotQcow2 => "Image is not in qcow2 format",
        Corruption::OutOfBounds { place: Place::Header, field, value, allowed } => {
            return header_field(field, *value, (*allowed.start(), *allowed.end()));
        }
        Corruption::OutOfBounds { place: Place::Extension(_), .. } => "Header extension too large",
        Corruption::Misaligned { place, .. } | Corruption::PastEnd { place, .. } => match place {
            Place::Header => "qcow2 header too short",
            Place::L1Table => "Active L1 table offset invalid",
            Place::RefcountTable => "Reference count table offset invalid",
            Place::SnapshotTable => "Snapshot table offset invalid",
            _ => return None,
        },
        _ => return None,
    };
    Some(words.to_owned())
}

fn header_field(field: &str, value: u64, allowed: (u64, u64)) -> Option<String> {
    let words = match field {
        "cluster_bits" => return Some(format!("Unsupported cluster size: 2^{value}")),
        "crypt_method" => return Some(format!("Unsupported encryption method {value}")),
        "l1_size" if allowed.0 > allowed.1 => "Image is too big",
        "l1_size" if value > allowed.1 => "Active L1 table too large",
        "l1_size" => "L1 table is too small",
        "refcount_table_clusters" if value == 0 => "Image does not contain a reference count table",
        "refcount_table_clusters" => "Reference count table too large",
        "nb_snapshots" => "Snapshot table too large",
        "refcount_order" => "Reference count entry width too large; may not exceed 64 bits",
        "header_length" if value < allowed.0 => "qcow2 header too short",
        "header_length" => "qcow2 header exceeds cluster size",
        "backing_file_size" => "Backing file name too long",
        "backing_file_offset" => "Invalid backing file offset",
        _ => return None,
    };
    Some(words.to_owned())
}

/// Features are named by the image's table of names; QEMU puts the bits without a name into one number.
fn unsupported(feature: &str) -> String {
    if let Some(version) = feature.strip_prefix("qcow2 version ") {
        return format!("Unsupported qcow2 version {version}");
    }
    if let Some(kind) = feature.strip_prefix("compression type ") {
        return format!("qcow2: unknown compression type: {kind}");
    }
    let bit = |name: &str| name.strip_prefix("unknown feature bit ")?.parse::<u32>().ok();
    let (unnamed, mut names): (Vec<&str>, Vec<&str>) = feature.split(", ").partition(|name| bit(name).is_some());
    let mask = unnamed.into_iter().filter_map(bit).fold(0_u64, |mask, bit| mask | 1_u64.wrapping_shl(bit));
    let unknown = format!("Unknown incompatible feature: {mask:x}");
    if mask != 0 {
        names.push(&unknown);
    }
    format!("Unsupported qcow2 feature(s): {}", names.join(", "))
}

/// What QEMU says where guest data cannot be reached: damage is an error of input to it.
pub(crate) fn access(error: &Error) -> String {
    if error.is_corruption() { INPUT_OUTPUT.to_owned() } else { image(error) }
}

const INPUT_OUTPUT: &str = "Input/output error";

/// What the system says, or the library whose error a device has passed on.
pub(crate) fn system(error: &io::Error) -> String {
    let inner = error.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static));
    if let Some(inner) = inner.and_then(|inner| inner.downcast_ref::<Error>()) {
        return access(inner);
    }
    if error.kind() == io::ErrorKind::InvalidData && inner.is_some() {
        return INPUT_OUTPUT.to_owned();
    }
    if let Some(inner) = inner.and_then(|inner| inner.downcast_ref::<qtk_qcow2::Error>()) {
        return qcow2(inner);
    }
    if let Some(source) = error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        return system(source);
    }
    if inner.is_none() && error.raw_os_error().is_none() && error.kind() == io::ErrorKind::Unsupported {
        return "Operation not supported".to_owned();
    }
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => text.trim_end_matches(&format!(" (os error {code})")).to_owned(),
        None => text,
    }
}
