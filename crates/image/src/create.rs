use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_block::{
    Access, BlockRead, BlockWrite, Durability, Extent, ExtentKind, HostStorage, ImageLock, OutputFile, RawFile,
};
use qtk_qcow2::{Backing, ClusterBits, CreateOptions, ImageWriter, Preallocation};

use crate::convert::{NewFile, lock_for_writing, refuse_used};
use crate::layer::{SECTOR, file_id};
use crate::open::Warning;
use crate::{Error, Format, Image, NodeSpec, OpenOptions, name};

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
    pub base_format: Option<String>,
    /// Whether to take the base as it is named, though it may not be there. Then a size must be given.
    pub base_unseen: bool,
    /// Cluster size in bytes; that of `qcow2` if not given.
    pub cluster_size: Option<u64>,
    /// What a qcow2 image is to be besides; its size, cluster size and backing come from the fields above. Its preallocation is
    /// a raw image's too.
    pub qcow2: CreateOptions,
    /// How the base is opened.
    pub open: OpenOptions,
    /// When a new file counts as written. A block device always counts when it is synced.
    pub durability: Durability,
}

impl Default for NewImage {
    fn default() -> Self {
        Self {
            format: Format::Qcow2,
            size: None,
            base: None,
            base_format: None,
            base_unseen: false,
            cluster_size: None,
            qcow2: CreateOptions::default(),
            open: OpenOptions::default(),
            durability: Durability::default(),
        }
    }
}

/// A new image whose options were found to go together, and what it is to lie on.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) options: CreateOptions,
    /// None for an image without a base, and for one whose base is not to be looked at.
    pub(crate) base: Option<Image>,
}

impl NewImage {
    /// Opens the base, and completes the options of an image at `path`. `size` takes the place of a size that is not given.
    pub(crate) fn prepare(&self, path: &Path, size: Option<u64>) -> Result<Prepared, Error> {
        let invalid = |problem: &str| Error::Invalid { path: path.to_owned(), problem: problem.to_owned() };
        let seen = self.base.as_deref().filter(|_| !self.base_unseen);
        let base = seen.map(|base| open_base(path, base, self.base_format.as_deref(), &self.open)).transpose()?;
        let size = match (self.size.or(size), &base) {
            (Some(size), _) => size,
            (None, Some(base)) => base.size(),
            (None, None) => return Err(invalid("a new image needs a size or a base")),
        };
        let size = size.checked_next_multiple_of(SECTOR).ok_or_else(|| invalid("the size is too large"))?;
        if self.format == Format::Raw && self.base.is_some() {
            return Err(invalid("a raw image cannot lie on a base"));
        }
        let format = self.base_format.clone().or_else(|| Some(base.as_ref()?.format().name().to_owned()));
        let backing = self.base.as_deref().map(|base| backing(path, base, format)).transpose()?;
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
/// On a block device what was there is overwritten. An external data file is made anew in the same way.
///
/// The base and everything beneath it is opened, to be sure that it can be. Returns what the user should be told.
pub fn create_image(path: &Path, new: &NewImage) -> Result<Vec<Warning>, Error> {
    let Prepared { options, base } = new.prepare(path, None)?;
    match new.format {
        Format::Raw => create_raw(path, &options, new.durability)?,
        Format::Qcow2 => create_qcow2(path, options, base.as_slice(), new.durability)?,
    }
    Ok(base.map_or_else(Vec::new, |base| base.warnings().to_vec()))
}

/// Opens the image that a new one at `path` is to lie on, as its header would name it.
pub fn open_base(path: &Path, base: &Path, format: Option<&str>, options: &OpenOptions) -> Result<Image, Error> {
    let named = base.to_str().filter(|name| name.starts_with("json:") && options.json_names);
    let spec = match named {
        Some(name) => NodeSpec::from_filename(name)?,
        None => NodeSpec::from_path(name::backing_path(path, &base.to_string_lossy())?),
    };
    let spec = format.map_or_else(|| spec.clone(), |format| spec.clone().with_driver(format));
    let image = Image::open_node(&spec, &OpenOptions { format: None, access: Access::ReadOnly, ..options.clone() })
        .map_err(|source| Error::Backing { image: path.to_owned(), source: Box::new(source) })?;
    match image.layers().iter().find(|layer| file_id(path) == Some(layer.id())) {
        Some(layer) => Err(Error::BackingLoop { image: path.to_owned(), again: layer.path().to_owned() }),
        None => Ok(image),
    }
}

fn backing(path: &Path, base: &Path, format: Option<String>) -> Result<Backing, Error> {
    let problem = "the name of its base is not UTF-8; rename the base";
    let name = base.to_str().ok_or_else(|| Error::Invalid { path: path.to_owned(), problem: problem.to_owned() })?;
    Ok(Backing { name: name.to_owned(), format })
}

fn create_raw(path: &Path, options: &CreateOptions, durability: Durability) -> Result<(), Error> {
    let size = options.size;
    if let Some((device, _lock)) = open_device(path)? {
        if size > device.size() {
            let problem = "the device is smaller than the disk".to_owned();
            return Err(Error::Invalid { path: path.to_owned(), problem });
        }
        // So that it does not pass for the image that was there.
        let wiped = device.zero(0..SECTOR.min(device.size())).and_then(|()| device.flush());
        return wiped.map_err(Error::io(path, "write to it"));
    }
    let _lock = refuse_used(path)?;
    let output = OutputFile::create(path, durability).map_err(Error::io(path, "create it"))?;
    extend(path, output.storage(), size, options.preallocation)?;
    write_first_block(path, output.storage())?;
    output.commit().map_err(Error::io(path, "put it in its place"))
}

/// Writes the first block of a new raw image, as QEMU does, which learns from it how the file wants to be read.
pub(crate) fn write_first_block(path: &Path, file: &RawFile) -> Result<(), Error> {
    const BLOCK: [u8; 4096] = [0; 4096];
    let block = match file.size() {
        0 => return Ok(()),
        size if size < BLOCK.len() as u64 => &BLOCK[..512],
        _ => &BLOCK[..],
    };
    file.write_at(block, 0).map_err(Error::io(path, "write to it"))
}

/// Extends a raw image to `size` and takes space for what is new.
pub(crate) fn extend(path: &Path, file: &RawFile, size: u64, preallocation: Preallocation) -> Result<(), Error> {
    static ZEROES: [u8; 1 << 20] = [0; 1 << 20];
    let old_size = file.size();
    match preallocation {
        Preallocation::Off => file.set_size(size).map_err(Error::io(path, "set its size")),
        Preallocation::Metadata => Err(Error::UnsupportedPreallocation { path: path.to_owned(), mode: "metadata" }),
        Preallocation::Falloc => {
            let reserved = HostStorage::reserve(file, old_size..size);
            reserved.map_err(Error::io(path, "reserve space in it"))
        }
        Preallocation::Full => {
            let mut at = old_size;
            while at < size {
                let len = usize::try_from(size - at).unwrap_or(usize::MAX).min(ZEROES.len());
                file.write_at(&ZEROES[..len], at).map_err(Error::io(path, "write to it"))?;
                at += len as u64;
            }
            Ok(())
        }
    }
}

/// `beneath` is what it lies on.
fn create_qcow2(path: &Path, options: CreateOptions, beneath: &[Image], durability: Durability) -> Result<(), Error> {
    let name = path.to_string_lossy();
    let data_path = options.data_file.clone().map(PathBuf::from);
    let data_file = data_path.map(|data| Ok::<_, Error>((new_data_file(path, &data, beneath, durability)?, data)));
    let data_file = data_file.transpose()?;
    let data = data_file.as_ref().map(|(file, _)| file.storage() as Arc<dyn HostStorage>);
    let commit_data = || data_file.map_or(Ok(()), |(file, path)| file.commit(&path));
    if let Some((device, _lock)) = open_device(path)? {
        let draft = tempfile::tempfile().and_then(RawFile::from_file);
        let draft = Arc::new(draft.map_err(Error::io(path, "make room for its draft"))?);
        ImageWriter::new_with(draft.clone(), data, &name, options)?.finish()?;
        commit_data()?;
        return copy_onto(&draft, &device, path);
    }
    let _lock = refuse_used(path)?;
    let output = OutputFile::create(path, durability).map_err(Error::io(path, "create it"))?;
    ImageWriter::new_with(output.storage().clone(), data, &name, options)?.finish()?;
    commit_data()?;
    output.commit().map_err(Error::io(path, "put it in its place"))
}

/// Begins the external data file of a new image, as a name from the working directory.
fn new_data_file(image: &Path, path: &Path, beneath: &[Image], durability: Durability) -> Result<NewFile, Error> {
    if path == image || (file_id(path).is_some() && file_id(path) == file_id(image)) {
        let problem = "an image cannot be its own data file".to_owned();
        return Err(Error::Invalid { path: path.to_owned(), problem });
    }
    NewFile::create(path, beneath, durability)
}

/// The block device at `path`, if it is one, and its lock: that is written in place.
pub(crate) fn open_device(path: &Path) -> Result<Option<(RawFile, Option<ImageLock>)>, Error> {
    if !path.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return Ok(None);
    }
    let device = RawFile::open(path, Access::ReadWrite).map_err(Error::io(path, "open it for writing"))?;
    let lock = lock_for_writing(path, device.file())?;
    Ok(Some((device, lock)))
}

/// Copies a new image onto a device, whose old content must not show through; the header last, as an image half-made is none.
fn copy_onto(draft: &RawFile, device: &RawFile, path: &Path) -> Result<(), Error> {
    const HEADER: u64 = 512;
    let write_error = || Error::io(path, "write to it");
    device.zero(0..HEADER).map_err(write_error())?;
    let mut buf = vec![0; 1 << 20];
    let mut at = HEADER;
    while at < draft.size() {
        let Extent { range, kind } = draft.extent(at..draft.size()).map_err(write_error())?;
        let end = range.end.min(at + buf.len() as u64);
        if kind == ExtentKind::Data {
            let part = &mut buf[..usize::try_from(end - at).unwrap_or(usize::MAX)];
            draft.read_at(part, at).and_then(|()| device.write_at(part, at)).map_err(write_error())?;
            at = end;
        } else {
            device.zero(range.clone()).map_err(write_error())?;
            at = range.end;
        }
    }
    device.flush().map_err(write_error())?;
    let header = &mut buf[..512];
    draft.read_at(header, 0).and_then(|()| device.write_at(header, 0)).map_err(write_error())?;
    device.flush().map_err(write_error())
}
