use qtk_block::{Access, BlockRead, BlockWrite, HostStorage};
use qtk_qcow2::Preallocation;

use crate::create::extend;
use crate::edit::edit_open;
use crate::layer::SECTOR;
use crate::{ChainLayer, Error, Format, Image, NodeSpec, OpenOptions, SpecError};

/// A disk's new size, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So much.
    To(u64),
    /// So much more.
    Grow(u64),
    /// So much less.
    Shrink(u64),
}

impl NewSize {
    /// The size of a disk that has `old` bytes; `None` if that would not be positive, or is too large for any disk.
    fn of(self, old: u64) -> Option<u64> {
        let new = match self {
            Self::To(size) => Some(size),
            Self::Grow(more) => old.checked_add(more),
            Self::Shrink(less) => old.checked_sub(less),
        };
        new.filter(|&size| size > 0 && i64::try_from(size).is_ok())
    }
}

/// How an image is resized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeOptions {
    /// The new size.
    pub size: NewSize,
    /// Whether the disk may get smaller, and so lose what lies past its new end.
    pub shrink: bool,
    /// What becomes of the space that a disk grows by.
    pub preallocation: Preallocation,
}

/// What [`resize`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resized {
    /// Size of the disk before, in bytes.
    pub old: u64,
    /// Size of the disk now, in bytes.
    pub new: u64,
    /// Whether the image was taken for raw because it looks like nothing else.
    pub raw_guessed: bool,
}

/// Gives the disk of an image another size. What it grows by reads as zeroes.
pub fn resize(spec: &NodeSpec, open: &OpenOptions, options: &ResizeOptions) -> Result<Resized, Error> {
    resize_open(&Image::open_node(spec, &OpenOptions { access: Access::ReadWrite, ..open.clone() })?, options)
}

/// The same for an image that is open for writing already.
pub fn resize_open(image: &Image, options: &ResizeOptions) -> Result<Resized, Error> {
    let path = || image.path().to_owned();
    let old = image.size();
    let new = options.size.of(old).ok_or_else(|| Error::SizeNotPositive { path: path() })?;
    if new <= old && options.preallocation != Preallocation::Off {
        return Err(Error::PreallocatedShrink { path: path() });
    }
    if new < old && !options.shrink {
        return Err(Error::WouldShrink { path: path(), old, new });
    }
    if image.format() != Format::Raw && new % SECTOR != 0 {
        return Err(Error::UnalignedSize { path: path(), size: new });
    }
    let mut raw_guessed = false;
    match image.chain().named() {
        Some(layer) if layer.format() == Format::Raw => {
            raw_guessed = layer.format_probed();
            resize_raw(layer, new, options.preallocation)?;
        }
        _ => edit_open(image, |transaction| Ok(transaction.resize(new, options.preallocation)?))?,
    }
    Ok(Resized { old, new, raw_guessed })
}

/// A raw image is as long as its disk, to the byte.
fn resize_raw(layer: &ChainLayer, new: u64, preallocation: Preallocation) -> Result<(), Error> {
    let part = layer.part();
    if part.len.is_some() {
        return Err(SpecError::FixedSize.into());
    }
    let (file, path) = (layer.file(), layer.path());
    let old_len = file.size();
    let too_large = || Error::SizeNotPositive { path: path.to_owned() };
    let new_len = part.start.checked_add(new).ok_or_else(too_large)?;
    let resized = match new_len <= old_len {
        true if preallocation != Preallocation::Metadata => {
            file.set_size(new_len).map_err(Error::io(path, "set its size"))
        }
        _ => extend(path, file, new_len, preallocation),
    };
    resized.and_then(|()| file.flush().map_err(Error::io(path, "sync it"))).inspect_err(|_| {
        if new_len > old_len {
            // The disk is what it was; if the rest cannot be given back, it is zeroes past its end.
            let _ = file.set_size(old_len);
        }
    })
}
