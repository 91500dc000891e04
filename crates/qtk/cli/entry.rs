//! How a file of the guest is shown.

use qtk_disk::{DisplayPath, FileType, Metadata, Timestamp};
use qtk_guest::{Accounts, Entry};
use serde_json::{Value, json};

use super::text::lossy;

/// What is known of a file, for programs.
pub(crate) fn to_json(entry: &Entry, accounts: &Accounts) -> Value {
    let metadata = &entry.metadata;
    let mut object = json!({
        "path": lossy(entry.path.as_bytes()),
        "type": type_name(metadata.file_type),
        "mode": format!("{:04o}", metadata.permissions),
        "uid": metadata.uid,
        "gid": metadata.gid,
        "user": accounts.user_name(metadata.uid).map(lossy),
        "group": accounts.group_name(metadata.gid).map(lossy),
        "size": metadata.size,
        "allocated": metadata.allocated,
        "links": metadata.links,
        "inode": metadata.number,
        "atime": rfc3339(metadata.atime),
        "mtime": rfc3339(metadata.mtime),
        "ctime": rfc3339(metadata.ctime),
    });
    if let Some(crtime) = metadata.crtime {
        object["crtime"] = rfc3339(crtime).into();
    }
    if is_device(metadata) {
        object["device"] = json!({ "major": metadata.rdev.0, "minor": metadata.rdev.1 });
    }
    if let Some(target) = &entry.target {
        object["target"] = lossy(target).into();
    }
    object
}

/// `drwxr-xr-x`.
pub(crate) fn mode_text(metadata: &Metadata) -> String {
    let mut text = String::from(type_letter(metadata.file_type));
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = metadata.permissions >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (metadata.permissions & special != 0, bits & 1 != 0) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// The size, or a device's numbers.
pub(crate) fn size_text(metadata: &Metadata) -> String {
    if is_device(metadata) { format!("{}, {}", metadata.rdev.0, metadata.rdev.1) } else { metadata.size.to_string() }
}

/// A user's or group's name, or its number where the guest has no name for it.
pub(crate) fn account_text(name: Option<&[u8]>, id: u32) -> String {
    name.map_or_else(|| id.to_string(), |name| DisplayPath(name).to_string())
}

/// In UTC, whatever the host's time zone.
pub(crate) fn rfc3339(time: Timestamp) -> String {
    point(time).map_or_else(|| format!("@{}", time.seconds), |point| point.to_string())
}

/// `2026-11-20 10:37`, in UTC.
pub(crate) fn short_time(time: Timestamp) -> String {
    let text = point(time).map(|point| point.strftime("%Y-%m-%d %H:%M").to_string());
    text.unwrap_or_else(|| format!("@{}", time.seconds))
}

fn point(time: Timestamp) -> Option<jiff::Timestamp> {
    let whole = jiff::Timestamp::from_second(time.seconds).ok()?;
    whole.checked_add(jiff::SignedDuration::from_nanos(time.nanos.into())).ok()
}

fn is_device(metadata: &Metadata) -> bool {
    matches!(metadata.file_type, FileType::CharDevice | FileType::BlockDevice)
}

/// The file's kind as a word.
pub(crate) fn type_name(file_type: FileType) -> &'static str {
    match file_type {
        FileType::Regular => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::CharDevice => "character device",
        FileType::BlockDevice => "block device",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        _ => "unknown",
    }
}

fn type_letter(file_type: FileType) -> &'static str {
    match file_type {
        FileType::Regular => "-",
        FileType::Directory => "d",
        FileType::Symlink => "l",
        FileType::CharDevice => "c",
        FileType::BlockDevice => "b",
        FileType::Fifo => "p",
        FileType::Socket => "s",
        _ => "?",
    }
}
