use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::Error;

/// What stands before the colon of a name such as `nbd://host/disk`: QEMU takes any `word:` before the first slash so.
fn protocol(name: &str) -> Option<&str> {
    let (word, _) = name.split_once(':')?;
    (!word.contains('/')).then_some(word)
}

pub(crate) fn local_name(name: &str) -> Result<&str, Error> {
    match protocol(name) {
        None => Ok(name),
        Some("file") => Ok(&name["file:".len()..]),
        Some(protocol) => Err(Error::Protocol { name: name.to_owned(), protocol: protocol.to_owned() }),
    }
}

/// The file that `name` stands for in the header of `image`.
///
/// As in QEMU, a relative name starts at the folder of the name that `image` was opened by, and one that begins with
/// `file:` at the working directory.
pub(crate) fn backing_path(image: &Path, name: &str) -> Result<PathBuf, Error> {
    let local = local_name(name)?;
    Ok(if protocol(name).is_none() { beside(image, local) } else { PathBuf::from(local) })
}

/// What `name`, in the header of `image`, is called from the working directory. It need not be a file's name.
pub(crate) fn full_backing_name(image: &Path, name: &str) -> String {
    match protocol(name) {
        Some(_) => name.to_owned(),
        None => beside(image, name).to_string_lossy().into_owned(),
    }
}

/// `name` as seen from the folder of `image`. Slashes stay as they are, for what is shown to users.
fn beside(image: &Path, name: &str) -> PathBuf {
    let bytes = image.as_os_str().as_bytes();
    let folder = bytes.iter().rposition(|&byte| byte == b'/').map_or(0, |at| at + 1);
    let folder = if name.starts_with('/') { &[] } else { &bytes[..folder] };
    PathBuf::from(OsString::from_vec([folder, name.as_bytes()].concat()))
}

/// Fails for a path that is no file but would be a network name in QEMU.
pub(crate) fn refuse_protocol(path: &Path) -> Result<(), Error> {
    match path.to_str() {
        Some(name) if !path.exists() => local_name(name).map(drop),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_resolve_as_in_qemu() {
        for (image, name, expected) in [
            ("dir/top.qcow2", "base.raw", Some("dir/base.raw")),
            ("top.qcow2", "../base.raw", Some("../base.raw")),
            ("dir/top.qcow2", "/abs/base.raw", Some("/abs/base.raw")),
            ("dir/top.qcow2", "file:base.raw", Some("base.raw")),
            ("dir/top.qcow2", "./a:b", Some("dir/./a:b")),
            ("dir/top.qcow2", "json:{\"driver\":\"qcow2\"}", None),
            ("dir/top.qcow2", "nbd://host/export", None),
            ("dir/top.qcow2", "http://host/base", None),
        ] {
            assert_eq!(backing_path(Path::new(image), name).ok(), expected.map(PathBuf::from), "{name}");
        }
    }
}
