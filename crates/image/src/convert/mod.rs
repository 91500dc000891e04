//! Copying what disks hold into another image: a new one, or one that is there.

mod copy;
mod disk;
mod fill;
mod plan;
mod sink;
mod unit;
mod zeroes;

use std::fmt;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;

use qtk_block::{Access, BlockRead, HostStorage, ImageLock, LockMode, OutputFile, Progress, RawFile};
use qtk_qcow2::{CreateOptions, ImageWriter};

use crate::create::Prepared;
use crate::layer::{SECTOR, acquire, file_id};
use crate::{ChainLayer, Error, Format, Image, NewImage, redo};

pub(crate) use copy::{Copy, Shape};
pub(crate) use disk::Disk;
pub(crate) use fill::{Grain, Packing};
pub(crate) use plan::Zeroes;
pub(crate) use sink::Sink;
pub(crate) use zeroes::Detection;

/// How disks are copied. The default is `qemu-img convert`'s.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// Store the clusters compressed; only in qcow2.
    pub compress: bool,
    /// The codec's level; see [`levels`](qtk_qcow2::codec::levels).
    pub level: Option<i32>,
    /// Whether to compress clusters again that could be copied as they are.
    pub recompress: bool,
    /// Zeroes that are stored in the source are left out where so many bytes of them follow each other. With 0 the target
    /// stores all bytes of the disk, whatever they are and whether or not the source does.
    pub sparse_size: u64,
    /// Take sectors that cannot be read for zeroes, with a warning each.
    pub salvage: bool,
    /// Whether an existing target is known to read as zeroes, so that zeroes need not be written.
    pub target_is_zero: bool,
    /// Most bytes to write in a second.
    pub rate_limit: Option<NonZeroU64>,
    /// Which persistent dirty bitmaps of the source the target gets.
    pub bitmaps: BitmapCopy,
    /// Threads that read and compress; as many as there are processors if not given. The result does not depend on it.
    pub threads: Option<usize>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            compress: false,
            level: None,
            recompress: false,
            sparse_size: 4096,
            salvage: false,
            target_is_zero: false,
            rate_limit: None,
            bitmaps: BitmapCopy::None,
            threads: None,
        }
    }
}

/// Which persistent dirty bitmaps of the source's topmost file are copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BitmapCopy {
    /// None.
    #[default]
    None,
    /// All; one that is not consistent is an error.
    All,
    /// Those that are consistent, with a warning for each of the others.
    Consistent,
}

/// Where the copy goes.
#[derive(Debug)]
pub enum Target<'a> {
    /// A new image, which appears when it is complete; what was there is replaced. Where it has a base, what the topmost
    /// files of the sources do not store is left to that. Its size is that of the sources.
    New {
        /// Its name.
        path: &'a Path,
        /// What it is to be.
        image: &'a NewImage,
    },
    /// An image that is there, opened for writing and at least as large as the sources. It changes in one transaction.
    Existing {
        /// The image.
        image: Image,
        /// Whether what the topmost files of the sources do not store is left to what the image lies on.
        overlay: bool,
    },
}

/// Something a user should hear about, though the copy goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum ConvertWarning {
    /// A sector could not be read, and is zero in the copy.
    Unreadable {
        /// Where it begins, in bytes of the disk.
        offset: u64,
        /// Why.
        source: Error,
    },
    /// How the source stores a sector could not be found out.
    NoStatus {
        /// Where it begins, in bytes of the disk.
        offset: u64,
        /// Why.
        source: Error,
    },
    /// A bitmap was not copied because it misses changes.
    BrokenBitmap {
        /// Its name.
        name: String,
    },
    /// Said while the target was made.
    Create(crate::Warning),
}

impl fmt::Display for ConvertWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { offset, source } => {
                write!(f, "the sector at offset {offset} cannot be read and is zero in the copy: {source}")
            }
            Self::NoStatus { offset, source } => {
                write!(f, "it cannot be told how the sector at offset {offset} is stored: {source}")
            }
            Self::BrokenBitmap { name } => write!(f, "bitmap {name} misses changes and is left out"),
            Self::Create(warning) => warning.fmt(f),
        }
    }
}

/// What [`convert`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvertReport {
    /// Size of the disk in bytes.
    pub disk_size: u64,
    /// Size of a new file in bytes; 0 where the target was there.
    pub file_size: u64,
    /// Clusters compressed anew.
    pub compressed: u64,
    /// Compressed clusters copied as they were.
    pub copied: u64,
    /// Bytes stored plain.
    pub plain_bytes: u64,
}

/// Copies the disks of `sources`, one after the other, into `target`.
///
/// Meanwhile nobody may write any file of the sources, unless they were opened to be shared. `warn` is called in the order of
/// the disk; progress is in bytes of it.
pub fn convert(
    sources: &[Image],
    target: Target<'_>,
    options: &ConvertOptions,
    warn: &mut dyn FnMut(ConvertWarning),
    progress: &dyn Progress,
) -> Result<ConvertReport, Error> {
    let _held = hold_still(sources)?;
    match target {
        Target::New { path, image } => {
            let disk = Disk::new(sources, image.base.is_some());
            into_new((&disk, sources), (path, image), options, warn, progress)
        }
        Target::Existing { image, overlay } => {
            into_existing(&Disk::new(sources, overlay), image, options, warn, progress)
        }
    }
}

/// Locks that keep the sources as they are.
pub(crate) fn hold_still(sources: &[Image]) -> Result<Vec<Option<ImageLock>>, Error> {
    sources.iter().flat_map(Image::layers).map(ChainLayer::hold_still).collect()
}

/// A second handle on a new file, for whoever writes an image into it.
pub(crate) fn storage_of(path: &Path, file: &OutputFile) -> Result<Arc<RawFile>, Error> {
    let clone = file.storage().file().try_clone().and_then(RawFile::from_file);
    clone.map(Arc::new).map_err(Error::io(path, "create it"))
}

/// Copies `disk`, which comes from `sources`, into a new image.
pub(crate) fn into_new(
    (disk, sources): (&Disk, &[Image]),
    (path, new): (&Path, &NewImage),
    options: &ConvertOptions,
    warn: &mut dyn FnMut(ConvertWarning),
    progress: &dyn Progress,
) -> Result<ConvertReport, Error> {
    let Prepared { options: create, base } = new.prepare(path, Some(disk.size()))?;
    base.iter().flat_map(Image::warnings).for_each(|warning| warn(ConvertWarning::Create(warning.clone())));
    let _lock = guard_target(sources, path)?;
    let file = OutputFile::create(path).map_err(Error::io(path, "create it"))?;
    let (sink, shape) = prepare(storage_of(path, &file)?, path, new.format, create, base.as_ref(), options)?;
    let report = Copy { disk, path, shape, options }.run(sink, warn, progress)?;
    file.commit().map_err(Error::io(path, "put it in its place"))?;
    Ok(report)
}

fn prepare(
    storage: Arc<RawFile>,
    path: &Path,
    format: Format,
    create: CreateOptions,
    base: Option<&Image>,
    options: &ConvertOptions,
) -> Result<(Sink, Shape), Error> {
    let zeroes = match (options.sparse_size, base) {
        (0, _) => Zeroes::Data,
        (_, Some(_)) => Zeroes::Zero,
        (_, None) => Zeroes::Skip,
    };
    let shape = |grain, packing, hole| Shape {
        grain,
        packing,
        zeroes,
        detection: Detection::sparse(options.sparse_size, hole),
        beneath: base.map(|base| base.chain().clone()),
    };
    match format {
        Format::Raw if options.compress => {
            let problem = "raw images cannot be compressed; use qcow2".to_owned();
            Err(Error::Invalid { path: path.to_owned(), problem })
        }
        Format::Raw => {
            storage.set_size(create.size).map_err(Error::io(path, "set its size"))?;
            Ok((Sink::raw(path, storage), shape(Grain::Sectors, None, SECTOR)))
        }
        Format::Qcow2 => {
            let grain = create.cluster_bits.size();
            let packing = options.compress.then_some(Packing {
                cluster_bits: create.cluster_bits,
                compression: create.compression,
                level: options.level,
                copies: !options.recompress,
            });
            let writer = ImageWriter::new(storage, &path.to_string_lossy(), create)?;
            Ok((Sink::qcow2(path, writer), shape(Grain::Whole(grain), packing, grain)))
        }
    }
}

fn into_existing(
    disk: &Disk,
    image: Image,
    options: &ConvertOptions,
    warn: &mut dyn FnMut(ConvertWarning),
    progress: &dyn Progress,
) -> Result<ConvertReport, Error> {
    let path = image.path().to_owned();
    let invalid = |problem: &str| Err(Error::Invalid { path: path.clone(), problem: problem.to_owned() });
    if image.size() < disk.size() {
        return invalid("it is smaller than what is to be copied into it");
    }
    let (cluster, beneath) = match image.layers().first().and_then(ChainLayer::qcow2) {
        Some(layer) => (layer.cluster_size(), image.chain().beneath()),
        None => (SECTOR, None),
    };
    if options.compress {
        return invalid("compressing into an image that is there is not supported yet");
    }
    let zeroes = match options {
        ConvertOptions { sparse_size: 0, .. } => Zeroes::Data,
        ConvertOptions { target_is_zero: true, .. } => Zeroes::Skip,
        _ => Zeroes::Zero,
    };
    let detection = Detection::sparse(options.sparse_size, cluster);
    let shape = Shape { grain: Grain::Sectors, packing: None, zeroes, detection, beneath };
    let sink = Sink::existing(&path, image.begin()?);
    Copy { disk, path: &path, shape, options }.run(sink, warn, progress)
}

/// Refuses a target that is a part of a source or that somebody uses.
pub(crate) fn guard_target(sources: &[Image], output: &Path) -> Result<Option<ImageLock>, Error> {
    let id = file_id(output);
    let mut layers = sources.iter().flat_map(Image::layers);
    if let Some(layer) = layers.find(|layer| Some(layer.id()) == id) {
        return Err(Error::TargetInChain { path: output.to_owned(), source_image: layer.path().to_owned() });
    }
    refuse_used(output)
}

/// Refuses a target that somebody uses, or that a log beside it would change. The lock is to be held until the target is
/// replaced.
pub(crate) fn refuse_used(output: &Path) -> Result<Option<ImageLock>, Error> {
    let lock = match RawFile::open(output, Access::ReadOnly) {
        Ok(existing) => match acquire(output, existing.file(), LockMode::Write) {
            // Where there are no locks, nobody holds one.
            Err(Error::Io { .. }) => None,
            result => Some(result?),
        },
        // Whatever is no file is refused where the output is made.
        Err(_) => None,
    };
    redo::clear_place(output)?;
    Ok(lock)
}
