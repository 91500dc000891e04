//! What lies beneath a format: a file on the host, and raw nodes that show a part of it.

use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_block::{Access, BlockRead, BlockWrite, Extent, HostStorage, RawFile};

use crate::layer::{FileId, SECTOR, file_id};
use crate::name;
use crate::node::Node;
use crate::spec::{Filename, NodeSpec, OptionValue, Options, SpecError, known};
use crate::{ChainLayer, Error};

/// An open file, and the part of it that an image lies in.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) path: PathBuf,
    pub(crate) id: FileId,
    pub(crate) file: Arc<RawFile>,
    pub(crate) part: Part,
    pub(crate) node: Node,
    pub(crate) locking: bool,
}

/// How files of the host are opened.
#[derive(Clone, Copy)]
pub(crate) struct Host<'a> {
    pub(crate) access: Access,
    /// What is open already, and must not be opened again.
    pub(crate) above: &'a [ChainLayer],
}

impl Host<'_> {
    /// Fails for a file that belongs to the chain already, whose lock would be in our own way.
    fn refuse_loop(self, path: &Path) -> Result<(), Error> {
        let Some(image) = self.above.last() else { return Ok(()) };
        match self.above.iter().find(|above| file_id(path) == Some(above.id())) {
            Some(above) => Err(Error::BackingLoop { image: image.path().to_owned(), again: above.path().to_owned() }),
            None => Ok(()),
        }
    }
}

/// A part of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) start: u64,
    /// To the end of the file if not given.
    pub(crate) len: Option<u64>,
}

impl Part {
    fn len_in(self, file_size: u64) -> u64 {
        self.len.unwrap_or_else(|| file_size.saturating_sub(self.start))
    }
}

impl Storage {
    /// Opens what `spec` describes, which is a file unless it names the driver raw.
    pub(crate) fn open(mut spec: NodeSpec, host: Host<'_>) -> Result<Self, Error> {
        match spec.options.take_text("driver").as_deref() {
            Some("raw") => {
                let file = file_child(&mut spec)?.ok_or(SpecError::NoChild("file"))?;
                let storage = Self::open(file, host)?.raw(&mut spec.options)?;
                known::take_common(&mut spec.options)?.check(host.access)?;
                refuse_leftover(&spec.options, "raw")?;
                Ok(storage)
            }
            Some("qcow2") => Err(SpecError::Stacking("qcow2".to_owned()).into()),
            driver => Self::file(spec, driver, host),
        }
    }

    /// A file on the host, by the driver `file`, `host_device` or, if none is named, the one that fits.
    pub(crate) fn file(spec: NodeSpec, driver: Option<&str>, host: Host<'_>) -> Result<Self, Error> {
        let NodeSpec { filename, mut options } = spec;
        if let Some(other) = driver.filter(|driver| !["file", "host_device"].contains(driver)) {
            return Err(SpecError::UnknownDriver(other.to_owned()).into());
        }
        let given = options.take_text("filename");
        let path = match (filename, given) {
            (Some(filename), _) => local_path(filename)?,
            (None, Some(name)) => PathBuf::from(name),
            (None, None) if driver.is_none() => return Err(SpecError::NoDriver.into()),
            (None, None) => PathBuf::new(),
        };
        let name = driver.unwrap_or("file");
        if path.as_os_str().is_empty() {
            return Err(SpecError::NoFilename(name.to_owned()).into());
        }
        known::take_common(&mut options)?.check(host.access)?;
        let locking = take_file_options(&mut options)?;
        refuse_leftover_of_protocol(&options, name)?;
        host.refuse_loop(&path)?;
        Self::open_file(path, driver, host.access, locking)
    }

    fn open_file(path: PathBuf, driver: Option<&str>, access: Access, locking: bool) -> Result<Self, Error> {
        let action = if access == Access::ReadWrite { "open it for writing" } else { "open it" };
        let is_device = path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
        let wrong_type = |driver: &str| SpecError::WrongFileType {
            driver: driver.to_owned(),
            name: path.to_string_lossy().into_owned(),
        };
        match driver {
            Some("host_device") if !is_device && path.exists() => return Err(wrong_type("host_device").into()),
            Some("file") if is_device => return Err(wrong_type("file").into()),
            _ if access == Access::ReadOnly && path.is_dir() => return Err(wrong_type("file").into()),
            _ => {}
        }
        let file = RawFile::open(&path, access).map_err(Error::io(&path, action))?.with_early_writeback();
        let metadata = file.file().metadata().map_err(Error::io(&path, "look at it"))?;
        let driver = if is_device { "host_device" } else { "file" };
        let node = Node::of_file(driver, path.to_string_lossy(), file.size().next_multiple_of(SECTOR));
        let id = (metadata.dev(), metadata.ino());
        Ok(Self { path, id, file: Arc::new(file), part: Part::default(), node, locking })
    }

    /// A regular file that is open already.
    pub(crate) fn of_file(path: PathBuf, file: Arc<RawFile>) -> Result<Self, Error> {
        let metadata = file.file().metadata().map_err(Error::io(&path, "look at it"))?;
        let node = Node::of_file("file", path.to_string_lossy(), file.size().next_multiple_of(SECTOR));
        let id = (metadata.dev(), metadata.ino());
        Ok(Self { path, id, file, part: Part::default(), node, locking: true })
    }

    /// The same with its size found out anew, as others could change it until it was locked.
    pub(crate) fn measured(self) -> Result<Self, Error> {
        let clone = self.file.file().try_clone().and_then(RawFile::from_file);
        let file = Arc::new(clone.map_err(Error::io(&self.path, "look at it"))?.with_early_writeback());
        Ok(Self { file, ..self })
    }

    /// A raw node on this one, with the options that only raw has.
    pub(crate) fn raw(self, options: &mut Options) -> Result<Self, Error> {
        let given = ["offset", "size"].into_iter().filter_map(|key| Some((key, options.get(key)?.clone()))).collect();
        let (offset, size) = (options.take_size("offset")?.unwrap_or_default(), options.take_size("size")?);
        self.window(offset, size, given)
    }

    fn window(self, offset: u64, size: Option<u64>, given: Vec<(&'static str, OptionValue)>) -> Result<Self, Error> {
        let actual = self.len().next_multiple_of(SECTOR);
        if offset > actual {
            return Err(SpecError::OffsetPastEnd { offset, actual }.into());
        }
        match size {
            Some(size) if size > actual - offset => {
                return Err(SpecError::WindowPastEnd { offset, size, actual }.into());
            }
            Some(size) if size % SECTOR != 0 => return Err(SpecError::UnalignedSize.into()),
            _ => {}
        }
        let len = size.or_else(|| self.part.len.map(|len| len - offset));
        let part = Part { start: self.part.start + offset, len };
        let shown = part.len_in(self.file.size()).next_multiple_of(SECTOR);
        Ok(Self { part, node: Node::on("raw", self.node, shown, given), ..self })
    }

    /// Bytes that the image can use.
    pub(crate) fn len(&self) -> u64 {
        self.part.len_in(self.file.size())
    }

    /// The part as a device. Whoever has a whole file gets that.
    pub(crate) fn device(&self) -> Arc<dyn HostStorage> {
        match self.part {
            Part { start: 0, len: None } => self.file.clone(),
            part => Arc::new(FilePart { file: self.file.clone(), part }),
        }
    }
}

/// The node that a format's node lies on, from its options and its name. None if there is nothing that would describe it.
pub(crate) fn file_child(spec: &mut NodeSpec) -> Result<Option<NodeSpec>, SpecError> {
    let options = spec.options.take_child("file");
    let filename = spec.filename.take();
    match spec.options.take_text("file") {
        Some(_) if !options.is_empty() || filename.is_some() => Err(SpecError::ReferenceWithOptions),
        Some(name) => Err(SpecError::UnknownNode(name)),
        None if options.is_empty() && filename.is_none() => Ok(None),
        None => Ok(Some(NodeSpec { filename, options })),
    }
}

fn local_path(filename: Filename) -> Result<PathBuf, Error> {
    match filename.path.to_str() {
        Some(name) if !filename.literal => Ok(PathBuf::from(name::local_name(name)?)),
        _ => Ok(filename.path),
    }
}

/// Takes the options of the drivers for files, and tells whether the file is to be locked.
fn take_file_options(options: &mut Options) -> Result<bool, SpecError> {
    let locking = known::take_one_of(options, "locking", &["auto", "on", "off"])?;
    known::take_one_of(options, "aio", &["threads", "native", "io_uring"])?;
    for key in ["drop-cache", "x-check-cache-dropped"] {
        options.take_bool(key)?;
    }
    options.take_size("aio-max-batch")?;
    Ok(locking.as_deref() != Some("off"))
}

pub(crate) fn refuse_leftover(options: &Options, driver: &str) -> Result<(), SpecError> {
    let refuse = |option: &str| SpecError::FormatOption { driver: driver.to_owned(), option: option.to_owned() };
    options.leftover().map_or(Ok(()), |option| Err(refuse(option)))
}

pub(crate) fn refuse_leftover_of_protocol(options: &Options, driver: &str) -> Result<(), SpecError> {
    let refuse = |option: &str| SpecError::ProtocolOption { driver: driver.to_owned(), option: option.to_owned() };
    options.leftover().map_or(Ok(()), |option| Err(refuse(option)))
}

/// A part of a file as a device of its own. One without an end grows with the file.
#[derive(Debug)]
struct FilePart {
    file: Arc<RawFile>,
    part: Part,
}

impl FilePart {
    fn place(&self, offset: u64, len: u64) -> io::Result<u64> {
        let limit = self.part.len.unwrap_or(u64::MAX);
        let end = offset.checked_add(len).filter(|&end| end <= limit);
        end.and_then(|_| self.part.start.checked_add(offset)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn range(&self, range: &Range<u64>) -> io::Result<Range<u64>> {
        let start = self.place(range.start, range.end.saturating_sub(range.start))?;
        Ok(start..start + (range.end - range.start))
    }
}

impl BlockRead for FilePart {
    fn size(&self) -> u64 {
        self.part.len_in(self.file.size())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, self.place(offset, buf.len() as u64)?)
    }

    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        let found = self.file.extent(self.range(&range)?)?;
        Ok(Extent { range: range.start..found.range.end - self.part.start, ..found })
    }
}

impl BlockWrite for FilePart {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(buf, self.place(offset, buf.len() as u64)?)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.file.zero(self.range(&range)?)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.file.discard(self.range(&range)?)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }
}

impl HostStorage for FilePart {
    fn set_size(&self, size: u64) -> io::Result<()> {
        match self.part.len {
            None => self.file.set_size(self.place(size, 0)?),
            Some(len) if size <= len => Ok(()),
            Some(_) => Err(io::Error::new(io::ErrorKind::StorageFull, "the part of the file cannot grow")),
        }
    }
}
