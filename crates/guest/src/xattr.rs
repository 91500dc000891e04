//! Extended attributes of the host's files.

use std::path::Path;

/// What the kernel allows for a list of names, and for a value.
const LIMIT: usize = 1 << 16;
/// Enough for nearly all lists and values.
const FIRST_TRY: usize = 512;

/// The namespaces that mean the same in a guest.
const KINDS: [&[u8]; 5] = [b"user.", b"trusted.", b"security.capability", b"security.selinux", b"system.posix_acl_"];

/// Whether an attribute of this name means the same in a guest.
pub(crate) fn is_portable(name: &[u8]) -> bool {
    KINDS.iter().any(|kind| name.starts_with(kind))
}

/// The extended attributes of a file that mean the same in a guest. One that cannot be read is left out. `is_link` says that
/// the file is a link, which is not followed.
pub(crate) fn host_xattrs(path: &Path, is_link: bool) -> Vec<(Vec<u8>, Vec<u8>)> {
    let list = |buf: &mut [u8]| {
        if is_link { rustix::fs::llistxattr(path, buf) } else { rustix::fs::listxattr(path, buf) }
    };
    let get = |name: &[u8], buf: &mut [u8]| {
        if is_link { rustix::fs::lgetxattr(path, name, buf) } else { rustix::fs::getxattr(path, name, buf) }
    };
    let names = read(list).unwrap_or_default();
    let names = names.split(|&byte| byte == 0).filter(|name| is_portable(name));
    names.filter_map(|name| Some((name.to_vec(), read(|buf| get(name, buf))?))).collect()
}

/// What `fill` puts into a buffer that is large enough.
fn read(fill: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> Option<Vec<u8>> {
    let mut buffer = vec![0; FIRST_TRY];
    let len = match fill(&mut buffer) {
        Err(rustix::io::Errno::RANGE) => {
            buffer.resize(LIMIT, 0);
            fill(&mut buffer)
        }
        result => result,
    };
    buffer.truncate(len.ok()?);
    Some(buffer)
}
