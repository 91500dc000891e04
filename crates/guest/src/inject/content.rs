use std::fs::File;
use std::os::unix::fs::MetadataExt;

use qtk_block::{BlockRead, ExtentKind, RawFile};
use qtk_disk::{GuestPath, Node, Tree, Xattr};

use super::plan::{Kind, Planned};
use crate::copy::BUFFER;
use crate::error::{InGuest, OnHost, Result};
use crate::files::pour;
use crate::xattr::host_xattrs;

/// Copies a host file's content into an empty file of the guest, holes as holes. Returns the file's size.
pub(super) fn copy(tree: &mut Tree, item: &Planned, node: Node, path: &GuestPath) -> Result<u64> {
    let mut file = File::open(&item.path).on_host("read", &item.path)?;
    // Files of /proc have content, but no size.
    if matches!(item.kind, Kind::Stream) || item.metadata.len() == 0 && item.metadata.is_file() {
        return pour(tree, node, &mut file, 0, path, &item.path);
    }
    let source = RawFile::from_file(file).on_host("read", &item.path)?;
    let size = source.size();
    let is_sparse = item.metadata.is_file() && item.metadata.blocks() * 512 < size;
    if !is_sparse {
        tree.reserve(node, size).in_guest("write", path)?;
    }
    let mut buffer = vec![0; usize::try_from(size).unwrap_or(BUFFER).min(BUFFER)];
    let mut at = 0;
    while at < size {
        let extent = source.extent(at..size).on_host("read", &item.path)?;
        if extent.kind == ExtentKind::Data {
            while at < extent.range.end {
                let len = usize::try_from(extent.range.end - at).unwrap_or(BUFFER).min(BUFFER);
                source.read_at(&mut buffer[..len], at).on_host("read", &item.path)?;
                tree.write_at(node, &buffer[..len], at).in_guest("write", path)?;
                at += len as u64;
            }
        }
        at = extent.range.end;
    }
    // A hole at the end has not been written.
    tree.truncate(node, size).in_guest("write", path)?;
    Ok(size)
}

/// The extended attributes that mean the same in a guest. One that cannot be read is left out.
pub(super) fn xattrs(item: &Planned) -> Vec<Xattr> {
    host_xattrs(&item.path, matches!(item.kind, Kind::Symlink(_)))
}
