use std::fmt;
use std::path::{Path, PathBuf};

use qtk_block::Access;
use qtk_qcow2::Finding;

use crate::layer::{BackingSpec, Depth, LayerOptions};
use crate::redo::{self, Leftover};
use crate::storage::{Host, Part};
use crate::{Chain, ChainLayer, Error, Format, NodeSpec, SnapshotName, SpecError, name};

/// Most layers of a chain.
const MAX_LAYERS: usize = 256;

/// Which backing files and external data files may be opened because an image names them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BackingPolicy {
    /// Any: the image is trusted.
    #[default]
    Follow,
    /// None: an image that names one is refused.
    Deny,
    /// Those in this folder or below, with symbolic links resolved.
    Within(PathBuf),
}

impl BackingPolicy {
    pub(crate) fn allows(&self, path: &Path) -> Result<bool, Error> {
        match self {
            Self::Follow => Ok(true),
            Self::Deny => Ok(false),
            Self::Within(folder) => {
                let folder = folder.canonicalize().map_err(Error::io(folder, "resolve it"))?;
                Ok(path.canonicalize().map_err(Error::io(path, "find it"))?.starts_with(folder))
            }
        }
    }
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The format of the topmost file; guessed from its content if not given.
    ///
    /// A guessed `raw` can be written too, as in QEMU, but not so that it would be guessed differently afterwards.
    pub format: Option<Format>,
    /// Which backing files and external data files may be opened.
    pub backing: BackingPolicy,
    /// Whether a backing file's name may be a description (`json:…`), which can ask for more than a file.
    pub json_names: bool,
    /// Whether the topmost file may be a qcow2 image whose tables are out of bounds: to check and repair it.
    pub damaged: bool,
    /// Read without locks, while others write: what is read may be inconsistent.
    pub share: bool,
    /// Whether the topmost file can be changed. Those beneath are only read.
    pub access: Access,
    /// Show the topmost file's disk as an internal snapshot has it, though in today's size, as QEMU does.
    pub snapshot: Option<SnapshotName>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            format: None,
            backing: BackingPolicy::Follow,
            json_names: false,
            damaged: false,
            share: false,
            access: Access::ReadOnly,
            snapshot: None,
        }
    }
}

impl OpenOptions {
    /// For reading and writing, and else by default.
    #[must_use]
    pub fn writable() -> Self {
        Self { access: Access::ReadWrite, ..Self::default() }
    }
}

/// Something a user should hear about, though the image could be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// A header names a backing file without its format, which was guessed.
    BackingFormatGuessed {
        /// The image that names the backing file.
        image: PathBuf,
        /// The backing file.
        backing: PathBuf,
        /// What it was taken for.
        format: Format,
    },
    /// An empty name was given as backing, which older versions of QEMU took for none.
    EmptyBackingName,
    /// An image that was not closed cleanly was repaired before it is written.
    Repaired {
        /// The image.
        image: PathBuf,
        /// What was found, and what was done about it.
        findings: Vec<Finding>,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BackingFormatGuessed { image, backing, format } => write!(
                f,
                "{}: the header does not name the format of its backing file {}, which was taken for {format}; record it with \
                 `qemu-img rebase -u -b BASE -F {format}`",
                image.display(),
                backing.display()
            ),
            Self::EmptyBackingName => {
                f.write_str("Use of \"backing\": \"\" is deprecated; use \"backing\": null instead")
            }
            Self::Repaired { image, findings } => write!(
                f,
                "{}: it was not closed cleanly, and has been repaired ({} findings)",
                image.display(),
                findings.len()
            ),
        }
    }
}

/// What `path` stands for, as a user of qtk means it: a file, also one whose name looks like a protocol's.
pub(crate) fn spec_of(path: &Path) -> Result<NodeSpec, Error> {
    name::refuse_protocol(path)?;
    Ok(match path.to_str() {
        Some(name) if !path.exists() => NodeSpec::from_filename(name)?,
        _ => NodeSpec::from_path(path),
    })
}

/// Opens the topmost layer alone.
pub(crate) fn open_layer(spec: NodeSpec, options: &OpenOptions, depth: Depth) -> Result<ChainLayer, Error> {
    let host = Host { access: options.access, above: &[] };
    let options = LayerOptions {
        format: options.format,
        damaged: options.damaged,
        share: options.share,
        depth,
        policy: &options.backing,
        host,
    };
    Ok(ChainLayer::open(spec, options)?.0)
}

/// Opens a node and everything beneath it. Besides the topmost layer the one at depth `base` can be written, where that one can.
pub(crate) fn open_chain(
    spec: NodeSpec,
    options: &OpenOptions,
    base: Option<usize>,
) -> Result<(Chain, Vec<Warning>), Error> {
    let mut layers: Vec<ChainLayer> = Vec::new();
    let mut warnings = Vec::new();
    let mut next = Some((spec, options.format, false));
    let mut depth = 0;
    while let Some((spec, format, described)) = next {
        let access = if depth == 0 || Some(depth) == base { options.access } else { Access::ReadOnly };
        // Who describes a chain can let a file occur twice in it. Headers could so for ever.
        let host = Host { access, above: if described { &[] } else { &layers } };
        let layer_options = LayerOptions {
            format,
            damaged: options.damaged && depth == 0,
            share: options.share,
            depth: Depth::Chain,
            policy: &options.backing,
            host,
        };
        let (mut layer, backing) =
            ChainLayer::open(spec, layer_options).map_err(|source| under(layers.last(), source))?;
        if let Some(snapshot) = options.snapshot.as_ref().filter(|_| depth == 0) {
            layer.show_snapshot(snapshot)?;
        }
        if let Some(above) = layers.last()
            && layer.format_probed()
        {
            let (image, backing) = (above.path().to_owned(), layer.path().to_owned());
            warnings.push(Warning::BackingFormatGuessed { image, backing, format: layer.format() });
        }
        if backing.empty {
            warnings.push(Warning::EmptyBackingName);
        }
        if !layer.repairs().is_empty() {
            warnings.push(Warning::Repaired { image: layer.path().to_owned(), findings: layer.repairs().to_vec() });
        }
        push(&mut layers, layer, access)?;
        depth += 1;
        next = match layers.last() {
            Some(last) if layers.len() == MAX_LAYERS && last.backing_name().is_some() => {
                return Err(Error::ChainTooLong { image: last.path().to_owned(), limit: MAX_LAYERS });
            }
            Some(last) => {
                let described = !backing.options.is_empty();
                let spec = backing_of(last, backing, options).map_err(|source| under(Some(last), source))?;
                spec.map(|spec| (spec, None, described))
            }
            None => None,
        };
    }
    Ok((Chain::new(layers), warnings))
}

/// An error about what `image` lies on, if it is not about the topmost layer.
fn under(image: Option<&ChainLayer>, source: Error) -> Error {
    match (image, &source) {
        (None, _) | (_, Error::BackingDenied { .. } | Error::BackingLoop { .. }) => source,
        (Some(image), _) => Error::Backing { image: image.path().to_owned(), source: Box::new(source) },
    }
}

/// What `image` lies on: what its own description says, or else its header.
fn backing_of(image: &ChainLayer, given: BackingSpec, options: &OpenOptions) -> Result<Option<NodeSpec>, Error> {
    if let Some(name) = given.reference {
        return Err(SpecError::UnknownNode(name).into());
    }
    let has_file = given.options.get("file.filename").is_some();
    let name = image.backing_name().filter(|_| !has_file);
    if given.none || (image.backing_name().is_none() && given.options.is_empty()) {
        return Ok(None);
    }
    let mut spec = match name {
        Some(name) => named_backing(image, name, options)?,
        None => NodeSpec::default(),
    };
    spec.options.extend(given.options);
    let recorded = image.qcow2().and_then(|layer| layer.header().backing_format());
    match recorded {
        Some(format) if spec.get("driver").is_none() => {
            if Format::from_name(&format).is_none() {
                let path = name::backing_path(image.path(), name.unwrap_or_default())?;
                return Err(Error::UnsupportedFormat { path, format });
            }
            Ok(Some(spec.with_driver(&format)))
        }
        _ => Ok(Some(spec)),
    }
}

fn named_backing(image: &ChainLayer, name: &str, options: &OpenOptions) -> Result<NodeSpec, Error> {
    let denied = || Error::BackingDenied { image: image.path().to_owned(), backing: name.to_owned() };
    if options.json_names && name.starts_with("json:") {
        // What it describes may lie anywhere.
        return if options.backing == BackingPolicy::Follow {
            Ok(NodeSpec::from_filename(name)?)
        } else {
            Err(denied())
        };
    }
    let path = name::backing_path(image.path(), name)?;
    if options.backing.allows(&path)? { Ok(NodeSpec::from_path(path)) } else { Err(denied()) }
}

/// Puts `layer` beneath the others, and over it the log of an unfinished transaction if there is one.
fn push(layers: &mut Vec<ChainLayer>, layer: ChainLayer, access: Access) -> Result<(), Error> {
    if layer.format() == Format::Raw
        && let Leftover::ReadThrough(log) = redo::recover(layer.path(), layer.file(), access)?
    {
        if layer.part() != Part::default() {
            let problem = "a change to the whole file is unfinished; opening it for writing finishes that".to_owned();
            return Err(Error::Invalid { path: layer.path().to_owned(), problem });
        }
        layers.push(*log);
    }
    layers.push(layer);
    Ok(())
}
