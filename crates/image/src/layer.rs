use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_block::{Access, BlockRead, ExtentKind, HostStorage, ImageLock, LockError, LockMode, RawFile, read_padded};
use qtk_qcow2::{HostOffset, Mapping, MappingKind};

use crate::format::{Probe, probe};
use crate::{Error, Format};

/// QEMU sees disks in whole sectors: a raw file of any other length reads as zeroes to the end of its last one.
pub(crate) const SECTOR: u64 = 512;

/// A file on the host, whatever name it goes by.
pub(crate) type FileId = (u64, u64);

/// The file that `path` leads to, if there is one.
pub(crate) fn file_id(path: &Path) -> Option<FileId> {
    path.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// How a layer is to be opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerOptions {
    pub(crate) format: Option<Format>,
    pub(crate) access: Access,
    pub(crate) share: bool,
}

/// One file of a chain, without what lies beneath it.
#[derive(Debug)]
pub struct ChainLayer {
    path: PathBuf,
    id: FileId,
    file: Arc<RawFile>,
    content: Content,
    size: u64,
    format_probed: bool,
    lock_mode: Option<LockMode>,
    _lock: Option<ImageLock>,
}

#[derive(Debug)]
enum Content {
    Raw,
    Qcow2(Arc<qtk_qcow2::Layer>),
}

impl ChainLayer {
    pub(crate) fn open(path: &Path, options: LayerOptions) -> Result<Self, Error> {
        let action = if options.access == Access::ReadWrite { "open it for writing" } else { "open it" };
        let file = RawFile::open(path, options.access).map_err(Error::io(path, action))?;
        let metadata = file.file().metadata().map_err(Error::io(path, "look at it"))?;
        let format = match options.format {
            Some(format) => format,
            None => match probe(&file).map_err(Error::io(path, "read its first bytes"))? {
                Probe::Known(format) => format,
                Probe::Foreign(name) => {
                    return Err(Error::UnsupportedFormat { path: path.to_owned(), format: name.to_owned() });
                }
            },
        };
        let lock_mode = lock_mode(format, options);
        let _lock = lock_mode.map(|mode| acquire(path, file.file(), mode)).transpose()?;
        let id = (metadata.dev(), metadata.ino());
        if options.access == Access::ReadWrite && file_id(path) != Some(id) {
            let problem = "another file took its place while it was being opened; try again".to_owned();
            return Err(Error::Invalid { path: path.to_owned(), problem });
        }
        // Anew, as others could change the size until the file was locked.
        let file = Arc::new(RawFile::from_file(file.into_file()).map_err(Error::io(path, action))?);
        let content = match format {
            Format::Raw => Content::Raw,
            Format::Qcow2 => {
                let storage: Arc<dyn HostStorage> = file.clone();
                Content::Qcow2(Arc::new(qtk_qcow2::Layer::open(storage, path.to_string_lossy())?))
            }
        };
        let size = match &content {
            Content::Raw => file.size().next_multiple_of(SECTOR),
            Content::Qcow2(layer) => layer.size(),
        };
        let format_probed = options.format.is_none();
        Ok(Self { path: path.to_owned(), id, file, content, size, format_probed, lock_mode, _lock })
    }

    /// An open qcow2 file that nobody changes any more, such as the log of a finished transaction.
    pub(crate) fn of_log(path: &Path, file: Arc<RawFile>, log: qtk_qcow2::Layer) -> Result<Self, Error> {
        let metadata = file.file().metadata().map_err(Error::io(path, "look at it"))?;
        Ok(Self {
            path: path.to_owned(),
            id: (metadata.dev(), metadata.ino()),
            file,
            size: log.size(),
            content: Content::Qcow2(Arc::new(log)),
            format_probed: false,
            lock_mode: None,
            _lock: None,
        })
    }

    /// The name that the file was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    #[must_use]
    pub fn format(&self) -> Format {
        match self.content {
            Content::Raw => Format::Raw,
            Content::Qcow2(_) => Format::Qcow2,
        }
    }

    /// The file itself.
    #[must_use]
    pub fn file(&self) -> &Arc<RawFile> {
        &self.file
    }

    /// The qcow2 layer, if it is one.
    #[must_use]
    pub fn qcow2(&self) -> Option<&Arc<qtk_qcow2::Layer>> {
        match &self.content {
            Content::Raw => None,
            Content::Qcow2(layer) => Some(layer),
        }
    }

    /// Size of the disk in bytes, in whole sectors.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Name of the backing file, as stored.
    #[must_use]
    pub fn backing_name(&self) -> Option<&str> {
        self.qcow2()?.header().backing_name.as_deref()
    }

    /// Keeps others from writing the file until the result is dropped, if the layer's own lock does not: QEMU lets raw files
    /// be written while they are read. A file that was opened to be shared is left alone.
    pub(crate) fn hold_still(&self) -> Result<Option<ImageLock>, Error> {
        if self.lock_mode != Some(LockMode::ReadShared) {
            return Ok(None);
        }
        // Its own opening, as locks of one opening are taken and released together.
        let file = File::open(&self.path).map_err(Error::io(&self.path, "open it"))?;
        acquire(&self.path, &file, LockMode::Read).map(Some)
    }

    /// Whether the format was guessed from the content.
    pub(crate) fn format_probed(&self) -> bool {
        self.format_probed
    }

    pub(crate) fn id(&self) -> FileId {
        self.id
    }

    /// The longest run from `range.start` that the layer stores in one way. `range` must not be empty and must lie on it.
    pub fn mapping(&self, range: Range<u64>) -> Result<Mapping, Error> {
        match &self.content {
            Content::Qcow2(layer) => Ok(layer.mapping(range)?),
            Content::Raw => {
                let at = range.start;
                let extent = self.file.extent(range).map_err(Error::io(&self.path, "find its holes"))?;
                let host = HostOffset(at);
                let kind = match extent.kind {
                    ExtentKind::Data => MappingKind::Data { host },
                    ExtentKind::Zero | ExtentKind::Unallocated => MappingKind::Zero { host: Some(host) },
                };
                Ok(Mapping { range: extent.range, kind })
            }
        }
    }

    /// Fills `buf` with the content of the run of a [mapping](Self::mapping) of this layer that begins at guest offset `at`.
    pub(crate) fn read_run(&self, buf: &mut [u8], at: u64, kind: MappingKind) -> io::Result<()> {
        match kind {
            MappingKind::Unallocated | MappingKind::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            MappingKind::Data { host } => self.read_host(buf, host),
            MappingKind::Compressed { .. } => match &self.content {
                Content::Qcow2(layer) => layer.read_at(buf, at),
                Content::Raw => self.read_host(buf, HostOffset(at)),
            },
        }
    }

    /// Reads the file itself; past its end lie zeroes.
    pub(crate) fn read_host(&self, buf: &mut [u8], host: HostOffset) -> io::Result<()> {
        read_padded(&*self.file, buf, host.0)
    }
}

/// The locks that QEMU takes: those who read raw data let others write, but the metadata of a qcow2 file must hold still.
fn lock_mode(format: Format, options: LayerOptions) -> Option<LockMode> {
    match (options.access, format) {
        (Access::ReadWrite, _) => Some(LockMode::Write),
        (Access::ReadOnly, _) if options.share => None,
        (Access::ReadOnly, Format::Raw) => Some(LockMode::ReadShared),
        (Access::ReadOnly, Format::Qcow2) => Some(LockMode::Read),
    }
}

pub(crate) fn acquire(path: &Path, file: &File, mode: LockMode) -> Result<ImageLock, Error> {
    ImageLock::acquire(file, mode).map_err(|error| match error {
        LockError::Busy { permission } => {
            Error::Busy { path: path.to_owned(), permission, shareable: mode != LockMode::Write }
        }
        LockError::Io(source) => Error::io(path, "lock it")(source),
        other => Error::io(path, "lock it")(io::Error::other(other)),
    })
}
