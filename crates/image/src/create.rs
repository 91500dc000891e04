use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_block::{BlockRead, HostStorage, OutputFile, RawFile};
use qtk_qcow2::{Backing, ClusterBits, CreateOptions};

use crate::flatten::refuse_used;
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
    /// Cluster size in bytes; 64 KiB if not given.
    pub cluster_size: Option<u64>,
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
            backing: BackingPolicy::Follow,
        }
    }
}

/// Makes an empty image, or an overlay on a base, at `path`. It appears when it is complete; what was there is replaced.
///
/// The base and everything beneath it is opened, to be sure that it can be. Returns what the user should be told.
pub fn create_image(path: &Path, new: &NewImage) -> Result<Vec<Warning>, Error> {
    let invalid = |problem: &str| Error::Invalid { path: path.to_owned(), problem: problem.to_owned() };
    let base = new.base.as_deref().map(|base| open_base(path, base, new)).transpose()?;
    let size = match (new.size, &base) {
        (Some(size), _) => size,
        (None, Some(base)) => base.size(),
        (None, None) => return Err(invalid("a new image needs a size or a base")),
    };
    let size = size.checked_next_multiple_of(SECTOR).ok_or_else(|| invalid("the size is too large"))?;
    let cluster_bits = match new.cluster_size {
        None => ClusterBits::default(),
        Some(_) if new.format == Format::Raw => return Err(invalid("raw images have no clusters")),
        Some(size) => ClusterBits::from_size(size)
            .ok_or_else(|| invalid("the cluster size must be a power of two from 512 bytes to 2 MiB"))?,
    };
    let _lock = refuse_used(path)?;
    let output = OutputFile::create(path).map_err(Error::io(path, "create it"))?;
    match new.format {
        Format::Raw if base.is_some() => return Err(invalid("a raw image cannot lie on a base")),
        Format::Raw => output.storage().set_size(size).map_err(Error::io(path, "set its size"))?,
        Format::Qcow2 => {
            let clone = output.storage().file().try_clone().and_then(RawFile::from_file);
            let storage = Arc::new(clone.map_err(Error::io(path, "create it"))?);
            let backing = base.as_ref().zip(new.base.as_deref()).map(|(image, base)| backing(path, base, image));
            let options =
                CreateOptions { size, cluster_bits, backing: backing.transpose()?, ..CreateOptions::default() };
            qtk_qcow2::create(storage, &path.to_string_lossy(), &options)?;
        }
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
