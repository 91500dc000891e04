use std::fs::{self, File, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use qtk_disk::NodeKind;

use crate::error::{Error, OnHost, Result};

/// A file on the host that is to be put into the guest.
pub(super) struct Planned {
    /// The position in the plan of the directory that it is in; `None` for the named source.
    pub(super) parent: Option<usize>,
    /// Its name in that directory.
    pub(super) name: Vec<u8>,
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    pub(super) metadata: Metadata,
}

pub(super) enum Kind {
    Directory,
    File,
    /// To be read to its end, whatever it is.
    Stream,
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
    Socket,
}

impl Kind {
    pub(super) fn node(&self) -> NodeKind<'_> {
        match self {
            Self::Directory => NodeKind::Directory,
            Self::File | Self::Stream => NodeKind::File,
            Self::Symlink(target) => NodeKind::Symlink(target),
            Self::CharDevice(major, minor) => NodeKind::CharDevice(*major, *minor),
            Self::BlockDevice(major, minor) => NodeKind::BlockDevice(*major, *minor),
            Self::Fifo => NodeKind::Fifo,
            Self::Socket => NodeKind::Socket,
        }
    }
}

/// Everything that a named source consists of, directories before what is in them, names in order. Fails where something
/// cannot be read.
pub(super) fn plan(source: &Path, keep_links: bool) -> Result<Vec<Planned>> {
    let metadata = if keep_links { fs::symlink_metadata(source) } else { fs::metadata(source) };
    let metadata = metadata.on_host("read", source)?;
    let kind = named_kind(source, &metadata)?;
    let mut plan = vec![Planned { parent: None, name: Vec::new(), path: source.to_owned(), kind, metadata }];
    let mut next = 0;
    while let Some(Planned { path, kind, .. }) = plan.get(next) {
        match kind {
            Kind::File => drop(File::open(path).on_host("read", path)?),
            Kind::Directory => {
                let path = path.clone();
                plan.append(&mut entries(&path, next)?);
            }
            _ => {}
        }
        next += 1;
    }
    Ok(plan)
}

fn entries(dir: &Path, parent: usize) -> Result<Vec<Planned>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).on_host("read", dir)? {
        let entry = entry.on_host("read", dir)?;
        let path = entry.path();
        let metadata = fs::symlink_metadata(&path).on_host("read", &path)?;
        let kind = kind(&path, &metadata)?;
        entries.push(Planned { parent: Some(parent), name: entry.file_name().into_vec(), path, kind, metadata });
    }
    entries.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(entries)
}

/// A source that is named stands for its content, where it has any.
fn named_kind(source: &Path, metadata: &Metadata) -> Result<Kind> {
    match kind(source, metadata)? {
        Kind::Fifo | Kind::CharDevice(..) => Ok(Kind::Stream),
        Kind::BlockDevice(..) => Ok(Kind::File),
        Kind::Socket => Err(Error::Source { path: source.to_owned(), problem: "a socket has no content" }),
        kind => Ok(kind),
    }
}

fn kind(path: &Path, metadata: &Metadata) -> Result<Kind> {
    let file_type = metadata.file_type();
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    Ok(if file_type.is_dir() {
        Kind::Directory
    } else if file_type.is_symlink() {
        Kind::Symlink(fs::read_link(path).on_host("read", path)?.as_os_str().as_bytes().to_vec())
    } else if file_type.is_char_device() {
        Kind::CharDevice(major, minor)
    } else if file_type.is_block_device() {
        Kind::BlockDevice(major, minor)
    } else if file_type.is_fifo() {
        Kind::Fifo
    } else if file_type.is_socket() {
        Kind::Socket
    } else {
        Kind::File
    })
}
