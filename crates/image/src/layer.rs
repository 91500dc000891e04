use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use qtk_block::{Access, BlockRead, ExtentKind, HostStorage, ImageLock, LockError, LockMode, RawFile, read_padded};
use qtk_qcow2::{Finding, Header, HostOffset, Mapping, MappingKind};

use crate::format::{Probe, probe};
use crate::node::Node;
use crate::spec::{NodeSpec, OptionValue, Options, SpecError, known};
use crate::storage::{Host, Part, Storage, file_child, refuse_leftover};
use crate::{BackingPolicy, Error, Format, SnapshotName};

/// QEMU sees disks in whole sectors: a raw file of any other length reads as zeroes to the end of its last one.
pub(crate) const SECTOR: u64 = 512;

/// One file of a chain, without what lies beneath it.
#[derive(Debug)]
pub struct ChainLayer {
    storage: Storage,
    data: Option<DataFile>,
    node: Node,
    content: Content,
    format_probed: bool,
    /// Whether data may lie in holes of the file; found out when first asked.
    hollow: OnceLock<bool>,
    repairs: Vec<Finding>,
    /// Whether it is the log of an unfinished transaction, which no name leads to.
    is_log: bool,
    lock_mode: Option<LockMode>,
    _lock: Option<ImageLock>,
}

/// A file on the host, whatever name it goes by.
pub(crate) type FileId = (u64, u64);

/// The file that `path` leads to, if there is one.
pub(crate) fn file_id(path: &Path) -> Option<FileId> {
    path.metadata().ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Most findings that are kept of the repair of one image.
const MAX_REPAIRS: usize = 1 << 16;

/// An external data file, with the same locks as the image.
#[derive(Debug)]
struct DataFile {
    storage: Storage,
    _lock: Option<ImageLock>,
}

#[derive(Debug)]
enum Content {
    Raw,
    Qcow2(Arc<qtk_qcow2::Layer>),
}

/// What a node is to lie on, by its own options.
#[derive(Clone, Debug, Default)]
pub(crate) struct BackingSpec {
    /// `null`: nothing, whatever the header says.
    pub(crate) none: bool,
    /// Whether that was said by an empty name.
    pub(crate) empty: bool,
    /// Another node by its name.
    pub(crate) reference: Option<String>,
    /// What is said of it besides what the header says.
    pub(crate) options: Options,
}

/// How much of what belongs to an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// Its file alone.
    Metadata,
    /// Its external data file too.
    Image,
    /// And what it lies on.
    Chain,
}

/// How a layer is to be opened.
#[derive(Clone, Copy)]
pub(crate) struct LayerOptions<'a> {
    /// Takes the place of the driver that is named.
    pub(crate) format: Option<Format>,
    /// Whether tables may be out of bounds.
    pub(crate) damaged: bool,
    pub(crate) share: bool,
    pub(crate) depth: Depth,
    /// Which data files are followed.
    pub(crate) policy: &'a BackingPolicy,
    pub(crate) host: Host<'a>,
}

impl ChainLayer {
    /// Opens the node that `spec` describes, and tells what it is to lie on.
    pub(crate) fn open(mut spec: NodeSpec, options: LayerOptions<'_>) -> Result<(Self, BackingSpec), Error> {
        let named = spec.options.take_text("driver");
        let driver = options.format.map(Format::name).or(named.as_deref());
        let child = match driver {
            Some("file" | "host_device") => {
                let storage = Storage::file(spec, driver, options.host)?;
                return Ok((Self::raw(storage, options)?, BackingSpec::default()));
            }
            None | Some("raw" | "qcow2") => file_child(&mut spec)?,
            Some(other) => return Err(SpecError::UnknownDriver(other.to_owned()).into()),
        };
        let absent = if driver.is_some() { SpecError::NoChild("file") } else { SpecError::NoDriver };
        let storage = Storage::open(child.ok_or(absent)?, options.host)?;
        let format = match driver.and_then(Format::from_name) {
            Some(format) => format,
            None => probed(&storage)?,
        };
        let mut rest = spec.options;
        let common = known::take_common(&mut rest)?;
        let options = LayerOptions { share: options.share || common.share, ..options };
        let mut layer = match format {
            Format::Raw => Self::raw(storage.raw(&mut rest)?, options)?,
            Format::Qcow2 => Self::qcow2_on(storage, &mut rest, options)?,
        };
        layer.format_probed = driver.is_none();
        let backing = take_backing(&mut rest, format, options.depth)?;
        refuse_leftover(&rest, format.name())?;
        common.check(options.host.access)?;
        Ok((layer, backing))
    }

    /// Shows an internal snapshot from now on.
    pub(crate) fn show_snapshot(&mut self, name: &SnapshotName) -> Result<(), Error> {
        let Content::Qcow2(layer) = &self.content else {
            return Err(Error::NoSnapshots { path: self.path().to_owned(), format: self.format() });
        };
        let snapshots = layer.snapshots()?;
        let index = name.find(&snapshots).ok_or_else(|| Error::SnapshotNotFound { path: self.path().to_owned() })?;
        self.content = Content::Qcow2(Arc::new(layer.at_snapshot(index)?.with_size(layer.header().size)));
        Ok(())
    }

    fn raw(storage: Storage, options: LayerOptions<'_>) -> Result<Self, Error> {
        let (storage, lock_mode, _lock) = locked(storage, Format::Raw, options)?;
        let node = storage.node.clone();
        Ok(Self {
            storage,
            data: None,
            node,
            content: Content::Raw,
            format_probed: false,
            hollow: OnceLock::new(),
            repairs: Vec::new(),
            is_log: false,
            lock_mode,
            _lock,
        })
    }

    fn qcow2_on(storage: Storage, rest: &mut Options, options: LayerOptions<'_>) -> Result<Self, Error> {
        let (storage, lock_mode, _lock) = locked(storage, Format::Qcow2, options)?;
        let name = storage.path.to_string_lossy().into_owned();
        let open = |data: Option<&DataFile>| {
            let data = data.map(|data| data.storage.device());
            match options.damaged {
                true => qtk_qcow2::Layer::open_damaged(storage.device(), &*name, data),
                false => qtk_qcow2::Layer::open_with(storage.device(), &*name, data),
            }
        };
        let metadata = open(None)?;
        known::take_qcow2_tuning(rest, metadata.header())?;
        let data = open_data_file(&storage.path, metadata.header(), rest, options)?;
        let mut layer = match &data {
            Some(data) => open(Some(data))?,
            None => metadata,
        };
        let mut repairs = Vec::new();
        if options.host.access == Access::ReadWrite && options.depth != Depth::Metadata && !options.damaged {
            let mut note = |finding: &Finding| {
                if repairs.len() < MAX_REPAIRS {
                    repairs.push(finding.clone());
                }
            };
            if qtk_qcow2::repair_dirty(&layer, &mut note)? {
                layer = open(data.as_ref())?;
            }
        }
        let node = Node::on("qcow2", storage.node.clone(), layer.size(), Vec::new());
        let content = Content::Qcow2(Arc::new(layer));
        Ok(Self {
            storage,
            data,
            node,
            content,
            format_probed: false,
            hollow: OnceLock::new(),
            repairs,
            is_log: false,
            lock_mode,
            _lock,
        })
    }

    /// An open qcow2 file that nobody changes any more, such as the log of a finished transaction.
    pub(crate) fn of_log(path: &Path, file: Arc<RawFile>, log: qtk_qcow2::Layer) -> Result<Self, Error> {
        let storage = Storage::of_file(path.to_owned(), file)?;
        Ok(Self {
            node: Node::on("qcow2", storage.node.clone(), log.size(), Vec::new()),
            storage,
            data: None,
            content: Content::Qcow2(Arc::new(log)),
            format_probed: false,
            hollow: OnceLock::new(),
            repairs: Vec::new(),
            is_log: true,
            lock_mode: None,
            _lock: None,
        })
    }

    /// The name that the file was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.storage.path
    }

    /// The layer's name as QEMU shows it: that of the file, or a `json:` name where that would not say everything.
    #[must_use]
    pub fn filename(&self) -> &str {
        &self.node.filename
    }

    /// The name of what the offsets of [mappings](Self::mapping) lie in, as QEMU shows it.
    #[must_use]
    pub fn data_filename(&self) -> Cow<'_, str> {
        match self.content {
            Content::Raw => self.path().to_string_lossy(),
            Content::Qcow2(_) => Cow::Borrowed(&self.data_storage().node.filename),
        }
    }

    /// What the image lies in, as a device of its own.
    pub(crate) fn storage(&self) -> Arc<dyn HostStorage> {
        self.storage.device()
    }

    /// The part of the file that the image lies in.
    pub(crate) fn part(&self) -> Part {
        self.storage.part
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
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
        &self.storage.file
    }

    /// The file that the guest's data lies in: the external data file, or the file itself where there is none.
    #[must_use]
    pub fn data_file(&self) -> &Arc<RawFile> {
        &self.data_storage().file
    }

    fn data_storage(&self) -> &Storage {
        self.data.as_ref().map_or(&self.storage, |data| &data.storage)
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
        match &self.content {
            // A raw file can grow while it is open.
            Content::Raw => self.storage.len().next_multiple_of(SECTOR),
            Content::Qcow2(layer) => layer.size(),
        }
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
        let file = File::open(self.path()).map_err(Error::io(self.path(), "open it"))?;
        acquire(self.path(), &file, LockMode::Read).map(Some)
    }

    /// What was found and repaired when the image was opened for writing, because it had not been closed cleanly.
    #[must_use]
    pub fn repairs(&self) -> &[Finding] {
        &self.repairs
    }

    /// Whether the format was guessed from the content.
    #[must_use]
    pub fn format_probed(&self) -> bool {
        self.format_probed
    }

    /// Whether it is the log of an unfinished transaction on the layer beneath.
    pub(crate) fn is_log(&self) -> bool {
        self.is_log
    }

    pub(crate) fn id(&self) -> FileId {
        self.storage.id
    }

    /// The longest run from `range.start` that the layer stores in one way. `range` must not be empty and must lie on it.
    /// Host offsets are those of the [data file](Self::data_file).
    pub fn mapping(&self, range: Range<u64>) -> Result<Mapping, Error> {
        let start = self.data_storage().part.start;
        match &self.content {
            Content::Qcow2(layer) => {
                let mapping = layer.mapping(range)?;
                Ok(Mapping { kind: moved(mapping.kind, start), ..mapping })
            }
            Content::Raw => {
                let end = range.end.min(self.storage.len());
                if range.start >= end {
                    return Ok(Mapping {
                        kind: MappingKind::Zero { host: Some(HostOffset(start + range.start)) },
                        range,
                    });
                }
                let extent = self.file().extent(start + range.start..start + end);
                let extent = extent.map_err(Error::io(self.path(), "find its holes"))?;
                let host = HostOffset(extent.range.start);
                let kind = match extent.kind {
                    ExtentKind::Data => MappingKind::Data { host },
                    ExtentKind::Zero | ExtentKind::Unallocated => MappingKind::Zero { host: Some(host) },
                };
                Ok(Mapping { range: range.start..extent.range.end - start, kind })
            }
        }
    }

    /// The same for a reader of a few blocks: holes of a raw file are not looked for, since to read them takes less.
    pub(crate) fn place(&self, range: Range<u64>) -> Result<Mapping, Error> {
        match self.content {
            Content::Raw if range.end <= self.storage.len() => {
                let host = HostOffset(self.storage.part.start + range.start);
                Ok(Mapping { range, kind: MappingKind::Data { host } })
            }
            _ => self.mapping(range),
        }
    }

    /// The front of an unallocated run, and where the file keeps a place for it, if it does. Past the layer's end it does not.
    pub(crate) fn reserved(&self, range: Range<u64>) -> Result<(Range<u64>, Option<HostOffset>), Error> {
        let start = self.data_storage().part.start;
        match self.qcow2() {
            Some(qcow2) if range.start < qcow2.size() => {
                let (front, host) = qcow2.reserved(range.start..range.end.min(qcow2.size()))?;
                Ok((front, host.map(|host| HostOffset(host.0.saturating_add(start)))))
            }
            _ => Ok((range, None)),
        }
    }

    /// Whether so many of a qcow2 file's clusters take no space that QEMU looks for holes in data, as after preallocating them.
    fn is_hollow(&self) -> Result<bool, Error> {
        let Some(qcow2) = self.qcow2() else { return Ok(false) };
        let metadata = self.file().file().metadata().map_err(Error::io(self.path(), "look at it"))?;
        let real = metadata.blocks() * 512 / qcow2.cluster_size();
        let threshold = (real * 10 / 9).max(real + 2);
        if self.file().size().div_ceil(qcow2.cluster_size()) < threshold {
            return Ok(false);
        }
        Ok(qcow2.used_clusters(threshold)? >= threshold)
    }

    /// Whether QEMU would tell holes in the layer's data.
    pub(crate) fn tells_holes(&self) -> Result<bool, Error> {
        if let Some(&hollow) = self.hollow.get() {
            return Ok(hollow);
        }
        let found = self.is_hollow()?;
        Ok(*self.hollow.get_or_init(|| found))
    }

    /// The front of a piece of the [data file](Self::data_file), and whether that is a hole, where QEMU would tell.
    pub(crate) fn hole(&self, host: Range<u64>) -> Result<(u64, bool), Error> {
        let hollow = self.tells_holes()?;
        let (file_end, end) = (self.data_file().size(), host.end);
        if !hollow || host.start >= file_end {
            return Ok((end, hollow));
        }
        let extent = self.data_file().extent(host.start..end.min(file_end));
        let extent = extent.map_err(Error::io(self.path(), "find its holes"))?;
        let is_hole = extent.kind != ExtentKind::Data;
        // Past the file's end there is no more to tell.
        let end = if is_hole && extent.range.end == file_end { end } else { extent.range.end };
        Ok((end, is_hole))
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
                Content::Raw => self.read_host(buf, HostOffset(self.storage.part.start + at)),
            },
        }
    }

    /// Reads the data file itself; past its end lie zeroes.
    pub(crate) fn read_host(&self, buf: &mut [u8], host: HostOffset) -> io::Result<()> {
        read_padded(&**self.data_file(), buf, host.0)
    }
}

fn probed(storage: &Storage) -> Result<Format, Error> {
    match probe(&storage.device()).map_err(Error::io(&storage.path, "read its first bytes"))? {
        Probe::Known(format) => Ok(format),
        Probe::Foreign(name) => Err(Error::UnsupportedFormat { path: storage.path.clone(), format: name.to_owned() }),
    }
}

/// The same run, of a part of a file that begins at `start`.
fn moved(kind: MappingKind, start: u64) -> MappingKind {
    let moved = |host: HostOffset| HostOffset(host.0.saturating_add(start));
    match kind {
        MappingKind::Zero { host: Some(host) } => MappingKind::Zero { host: Some(moved(host)) },
        MappingKind::Data { host } => MappingKind::Data { host: moved(host) },
        MappingKind::Compressed { host, len } => MappingKind::Compressed { host: moved(host), len },
        other => other,
    }
}

/// Takes what a node is to lie on, where that counts.
fn take_backing(rest: &mut Options, format: Format, depth: Depth) -> Result<BackingSpec, SpecError> {
    let none = matches!(rest.get("backing"), Some(OptionValue::Null))
        || rest.get("backing").and_then(OptionValue::as_text).is_some_and(str::is_empty);
    let empty = none.then(|| rest.take("backing")).flatten().is_some_and(|value| value != OptionValue::Null);
    if depth != Depth::Chain || none {
        return Ok(BackingSpec { none, empty, ..BackingSpec::default() });
    }
    let options = rest.take_child("backing");
    let reference = rest.take_text("backing");
    match reference {
        Some(_) if !options.is_empty() => Err(SpecError::ReferenceWithOptions),
        None if options.is_empty() => Ok(BackingSpec::default()),
        _ if format == Format::Raw => Err(SpecError::NoBackingSupport),
        reference => Ok(BackingSpec { none, empty, reference, options }),
    }
}

/// Opens the external data file, by the node's options or else by its name in the header.
fn open_data_file(
    image: &Path,
    header: &Header,
    rest: &mut Options,
    options: LayerOptions<'_>,
) -> Result<Option<DataFile>, Error> {
    let (child, reference) = (rest.take_child("data-file"), rest.take_text("data-file"));
    if options.depth == Depth::Metadata {
        return Ok(None);
    }
    let spec = match reference {
        Some(_) if !child.is_empty() => return Err(SpecError::ReferenceWithOptions.into()),
        Some(name) => return Err(SpecError::UnknownNode(name).into()),
        None if child.is_empty() && !header.has_data_file() => return Ok(None),
        None if child.is_empty() => {
            // As in QEMU, a relative name starts at the working directory, and not at the image's folder.
            let data_file = header.data_file_name().ok_or(SpecError::NoDataFile)?;
            if !options.policy.allows(Path::new(&data_file))? {
                return Err(Error::DataFileDenied { image: image.to_owned(), data_file });
            }
            NodeSpec::from_path(data_file)
        }
        None => NodeSpec { filename: None, options: child },
    };
    let storage = Storage::open(spec, options.host)?;
    if !header.has_data_file() {
        return Err(SpecError::UnexpectedDataFile.into());
    }
    let (storage, _, _lock) = locked(storage, Format::Raw, options)?;
    Ok(Some(DataFile { storage, _lock }))
}

/// Locks a file as its format and use demand, and looks at its size anew: others could change that until now.
fn locked(
    storage: Storage,
    format: Format,
    options: LayerOptions<'_>,
) -> Result<(Storage, Option<LockMode>, Option<ImageLock>), Error> {
    let mode = if storage.locking { lock_mode(format, options) } else { None };
    let lock = mode.map(|mode| acquire(&storage.path, storage.file.file(), mode)).transpose()?;
    if options.host.access == Access::ReadWrite && file_id(&storage.path) != Some(storage.id) {
        let problem = "another file took its place while it was being opened; try again".to_owned();
        return Err(Error::Invalid { path: storage.path, problem });
    }
    Ok((storage.measured()?, mode, lock))
}

/// The locks that QEMU takes: those who read raw data let others write, but the metadata of a qcow2 file must hold still.
fn lock_mode(format: Format, options: LayerOptions<'_>) -> Option<LockMode> {
    match (options.host.access, format) {
        (Access::ReadWrite, _) => Some(LockMode::Write),
        (Access::ReadOnly, _) if options.share => None,
        (Access::ReadOnly, Format::Raw) => Some(LockMode::ReadShared),
        (Access::ReadOnly, Format::Qcow2) => Some(LockMode::Read),
    }
}

pub(crate) fn acquire(path: &Path, file: &File, mode: LockMode) -> Result<ImageLock, Error> {
    ImageLock::acquire(file, mode).map_err(|error| match error {
        LockError::Busy { permission, shared } => {
            Error::Busy { path: path.to_owned(), permission, shared, shareable: mode != LockMode::Write }
        }
        LockError::Io(source) => Error::io(path, "lock it")(source),
        other => Error::io(path, "lock it")(io::Error::other(other)),
    })
}
