use std::fmt;
use std::path::{Path, PathBuf};

use qtk_block::Access;

use crate::layer::{LayerOptions, file_id};
use crate::redo::{self, Leftover};
use crate::{Chain, ChainLayer, Error, Format, name};

/// Most layers of a chain.
const MAX_LAYERS: usize = 256;

/// Which backing files may be opened because an image names them.
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

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// The format of the topmost file; guessed from its content if not given.
    ///
    /// A guessed `raw` can be written too, as in QEMU, but not so that it would be guessed differently afterwards.
    pub format: Option<Format>,
    /// Which backing files may be opened.
    pub backing: BackingPolicy,
    /// Read without locks, while others write: what is read may be inconsistent.
    pub share: bool,
    /// Whether the topmost file can be changed. Those beneath are only read.
    pub access: Access,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { format: None, backing: BackingPolicy::Follow, share: false, access: Access::ReadOnly }
    }
}

impl OpenOptions {
    /// For reading and writing, and else by default.
    #[must_use]
    pub fn writable() -> Self {
        Self { access: Access::ReadWrite, ..Self::default() }
    }

    fn layer(&self) -> LayerOptions {
        LayerOptions { format: self.format, access: self.access, share: self.share }
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
        }
    }
}

/// Opens the topmost layer alone.
pub(crate) fn open_layer(path: &Path, options: &OpenOptions) -> Result<ChainLayer, Error> {
    name::refuse_protocol(path)?;
    ChainLayer::open(path, options.layer())
}

/// Opens a file and everything beneath it.
pub(crate) fn open_chain(path: &Path, options: &OpenOptions) -> Result<(Chain, Vec<Warning>), Error> {
    let mut layers = Vec::new();
    push(&mut layers, open_layer(path, options)?, options)?;
    let mut warnings = Vec::new();
    while let Some(last) = layers.last()
        && let Some(name) = last.backing_name()
    {
        if layers.len() == MAX_LAYERS {
            return Err(Error::ChainTooLong { image: last.path().to_owned(), limit: MAX_LAYERS });
        }
        let named = |source| Error::Backing { image: last.path().to_owned(), source: Box::new(source) };
        let path = name::backing_path(last.path(), name).map_err(named)?;
        permit(last, name, &path, &options.backing)?;
        // Before it is opened, as our own lock would be in the way.
        if let Some(above) = layers.iter().find(|above| file_id(&path) == Some(above.id())) {
            return Err(Error::BackingLoop { image: last.path().to_owned(), again: above.path().to_owned() });
        }
        let layer = open_backing(last, &path, options.share, &mut warnings).map_err(named)?;
        push(&mut layers, layer, &OpenOptions { access: Access::ReadOnly, ..options.clone() })?;
    }
    Ok((Chain::new(layers), warnings))
}

/// Puts `layer` beneath the others, and over it the log of an unfinished transaction if there is one.
fn push(layers: &mut Vec<ChainLayer>, layer: ChainLayer, options: &OpenOptions) -> Result<(), Error> {
    if layer.format() == Format::Raw
        && let Leftover::ReadThrough(log) = redo::recover(layer.path(), layer.file(), options.access)?
    {
        layers.push(*log);
    }
    layers.push(layer);
    Ok(())
}

fn open_backing(
    image: &ChainLayer,
    path: &Path,
    share: bool,
    warnings: &mut Vec<Warning>,
) -> Result<ChainLayer, Error> {
    let format = recorded_format(image, path)?;
    let layer = ChainLayer::open(path, LayerOptions { format, access: Access::ReadOnly, share })?;
    if format.is_none() {
        let (image, backing) = (image.path().to_owned(), path.to_owned());
        warnings.push(Warning::BackingFormatGuessed { image, backing, format: layer.format() });
    }
    Ok(layer)
}

fn recorded_format(image: &ChainLayer, backing: &Path) -> Result<Option<Format>, Error> {
    let recorded = image.qcow2().and_then(|layer| layer.header().backing_format());
    let Some(name) = recorded else { return Ok(None) };
    match Format::from_name(&name) {
        Some(format) => Ok(Some(format)),
        None => Err(Error::UnsupportedFormat { path: backing.to_owned(), format: name }),
    }
}

fn permit(image: &ChainLayer, name: &str, path: &Path, policy: &BackingPolicy) -> Result<(), Error> {
    let allowed = match policy {
        BackingPolicy::Follow => true,
        BackingPolicy::Deny => false,
        BackingPolicy::Within(folder) => {
            let folder = folder.canonicalize().map_err(Error::io(folder, "resolve it"))?;
            path.canonicalize().map_err(Error::io(path, "find it"))?.starts_with(folder)
        }
    };
    match allowed {
        true => Ok(()),
        false => Err(Error::BackingDenied { image: image.path().to_owned(), backing: name.to_owned() }),
    }
}
