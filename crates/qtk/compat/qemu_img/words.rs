//! Every error of the libraries in QEMU's words.

use std::error::Error as _;
use std::io;

use qtk_image::Error;
use qtk_qcow2::{Corruption, WriteObstacle};

/// What QEMU says of an image that cannot be used as it should be.
pub(crate) fn image(error: &Error) -> String {
    match error {
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
        Error::Read { source, .. } | Error::Compare { source, .. } => system(source),
        other => other.to_string(),
    }
}

/// What QEMU says of a qcow2 file.
pub(crate) fn qcow2(error: &qtk_qcow2::Error) -> String {
    use qtk_qcow2::Error;
    match error {
        Error::Corrupt { what: Corruption::NotQcow2, .. } => "Image is not in qcow2 format".to_owned(),
        Error::NotWritable { obstacle: WriteObstacle::MarkedCorrupt, .. } => {
            "qcow2: Image is corrupt; cannot be opened read/write".to_owned()
        }
        Error::Io { source, .. } | Error::Backing { source, .. } => system(source),
        other => other.to_string(),
    }
}

/// What the system says, or the library whose error a device has passed on.
pub(crate) fn system(error: &io::Error) -> String {
    let inner = error.get_ref().map(|inner| inner as &(dyn std::error::Error + 'static));
    if let Some(inner) = inner.and_then(|inner| inner.downcast_ref::<Error>()) {
        return image(inner);
    }
    if let Some(inner) = inner.and_then(|inner| inner.downcast_ref::<qtk_qcow2::Error>()) {
        return qcow2(inner);
    }
    if let Some(source) = error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        return system(source);
    }
    let text = error.to_string();
    match error.raw_os_error() {
        Some(code) => text.trim_end_matches(&format!(" (os error {code})")).to_owned(),
        None => text,
    }
}
