use std::path::{Path, PathBuf};

use qtk_block::{BlockRead, HostStorage, OutputFile};
use qtk_qcow2::{Backing, ClusterBits, CreateOptions};

use crate::convert::{refuse_used, storage_of};
use crate::layer::{SECTOR, file_id};
use crate::open::Warning;
use crate::{BackingPolicy, Error, Format, Image, OpenOptions, name};

/// What a new image is to be. At least a base or a size must be given.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Format of the new image.
    pub format: Format,
    /// Size of the guest's disk in bytes; the base's if not given. Rounded up to whole sectors.
    pub size: Option<u64>,
    /// The image to lie on, as the header is to name it: a relative name starts at the new image's folder.
    pub base: Option<PathBuf>,
    /// Format of the base; found out and recorded if not given.
    pub base_format: Option<Format>,
    /// Cluster size in bytes; that of `qcow2` if not given.
    pub cluster_size: Option<u64>,
    /// What a qcow2 image is to be besides; its size, cluster size and backing come from the fields above. Its preallocation is
    /// a raw image's too.
    pub qcow2: CreateOptions,
    /// Which files may be opened because the base names them.
    pub backing: BackingPolicy,
}

impl Default for NewImage {
    fn default() -> Self {
        Self {
            format: Format::Qcow2,
            size: None,
            base: None,
            base_format: None,
            cluster_size: None,
            qcow2: CreateOptions::default(),
            backing: BackingPolicy::Follow,
        }
    }
}

/// A new image whose options were found to go together, and what it is to lie on.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) options: CreateOptions,
    pub(crate) base: Option<Image>,
}

impl NewImage {
    /// Opens the base, and completes the options of an image at `path`. `size` takes the place of a size that is not given.
    pub(crate) fn prepare(&self, path: &Path, size: Option<u64>) -> Result<Prepared, Error> {
        let invalid = |problem: &str| Error::Invalid { path: path.to_owned(), problem: problem.to_owned() };
        let base = self.base.as_deref().map(|base| open_base(path, base, self)).transpose()?;
        let size = match (self.size.or(size), &base) {
            (Some(size), _) => size,
            (None, Some(base)) => base.size(),
            (None, None) => return Err(invalid("a new image needs a size or a base")),
        };
        let size = size.checked_next_multiple_of(SECTOR).ok_or_else(|| invalid("the size is too large"))?;
        if self.format == Format::Raw && base.is_some() {
            return Err(invalid("a raw image cannot lie on a base"));
        }
        let backing =
            base.as_ref().zip(self.base.as_deref()).map(|(image, base)| backing(path, base, image)).transpose()?;
        Ok(Prepared { options: CreateOptions { size, backing, ..self.create_options(path)? }, base })
    }

    /// The options of a qcow2 image, without size and base.
    pub(crate) fn create_options(&self, path: &Path) -> Result<CreateOptions, Error> {
        let invalid = |problem: &str| Error::Invalid { path: path.to_owned(), problem: problem.to_owned() };
        let cluster_bits = match self.cluster_size {
            None => self.qcow2.cluster_bits,
            Some(_) if self.format == Format::Raw => return Err(invalid("raw images have no clusters")),
            Some(size) => ClusterBits::from_size(size)
                .ok_or_else(|| invalid("the cluster size must be a power of two from 512 bytes to 2 MiB"))?,
        };
        Ok(CreateOptions { cluster_bits, ..self.qcow2.clone() })
    }
}

/// Makes an empty image, or an overlay on a base, at `path`. It appears when it is complete; what was there is replaced.
///
/// The base and everything beneath it is opened, to be sure that it can be. Returns what the user should be told.
pub fn create_image(path: &Path, new: &NewImage) -> Result<Vec<Warning>, Error> {
    let Prepared { options, base } = new.prepare(path, None)?;
    let _lock = refuse_used(path)?;
    let output = OutputFile::create(path).map_err(Error::io(path, "create it"))?;
    match new.format {
        Format::Raw => output.storage().set_size(options.size).map_err(Error::io(path, "set its size"))?,
        Format::Qcow2 => qtk_qcow2::create(storage_of(path, &output)?, &path.to_string_lossy(), &options)?,
    }
    output.commit().map_err(Error::io(path, "put it in its place"))?;
    Ok(base.map_or_else(Vec::new, |base| base.warnings().to_vec()))
}

fn open_base(path: &Path, base: &Path, new: &NewImage) -> Result<Image, Error> {
    let location = name::backing_path(path, &base.to_string_lossy())?;
    let options = OpenOptions { format: new.base_format, backing: new.backing.clone(), ..OpenOptions::default() };
    let image = Image::open(&location, &options)
        .map_err(|source| Error::Backing { image: path.to_owned(), source: Box::new(source) })?;
    match image.layers().iter().find(|layer| file_id(path) == Some(layer.id())) {
        Some(layer) => Err(Error::BackingLoop { image: path.to_owned(), again: layer.path().to_owned() }),
        None => Ok(image),
    }
}

fn backing(path: &Path, base: &Path, image: &Image) -> Result<Backing, Error> {
    let problem = "the name of its base is not UTF-8; rename the base";
    let name = base.to_str().ok_or_else(|| Error::Invalid { path: path.to_owned(), problem: problem.to_owned() })?;
    Ok(Backing { name: name.to_owned(), format: Some(image.format().name().to_owned()) })
}
