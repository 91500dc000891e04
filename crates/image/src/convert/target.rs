use std::path::Path;
use std::sync::Arc;

use qtk_block::{BlockRead, BlockWrite, Durability, HostStorage, ImageLock, OutputFile, Progress, RawFile};
use qtk_qcow2::codec::Compressor;
use qtk_qcow2::{CompressionType, CreateOptions, ImageWriter, Preallocation};

use crate::create::{Prepared, extend, open_device, write_first_block};
use crate::layer::{SECTOR, file_id};
use crate::{ChainLayer, Error, Format, Image, NewImage};

use super::bitmaps::CopiedBitmaps;
use super::copy::{LARGE_UNIT, UNIT};
use super::once;
use super::{
    ConvertOptions, ConvertReport, ConvertWarning, Copy, Detection, Disk, Grain, Packing, Shape, Sink, Zeroes,
};

/// Who hears of the copy.
pub(crate) struct Listener<'a> {
    pub(crate) warn: &'a mut dyn FnMut(ConvertWarning),
    pub(crate) progress: &'a dyn Progress,
}

/// A file that appears when it is complete, or the block device that is written in its place.
#[derive(Debug)]
pub(crate) enum NewFile {
    File(OutputFile, Option<ImageLock>),
    Device(Arc<RawFile>, Option<ImageLock>),
}

impl NewFile {
    /// Begins a file at `path`, which must be no part of `sources`.
    pub(crate) fn create(path: &Path, sources: &[Image], durability: Durability) -> Result<Self, Error> {
        refuse_source(path, sources)?;
        if let Some((device, lock)) = open_device(path)? {
            return Ok(Self::Device(Arc::new(device), lock));
        }
        let lock = super::refuse_used(path)?;
        Ok(Self::File(OutputFile::create(path, durability).map_err(Error::io(path, "create it"))?, lock))
    }

    /// For whoever writes an image into it.
    pub(crate) fn storage(&self) -> Arc<RawFile> {
        match self {
            Self::File(file, _) => file.storage().clone(),
            Self::Device(device, _) => device.clone(),
        }
    }

    fn is_device(&self) -> bool {
        matches!(self, Self::Device(..))
    }

    pub(crate) fn commit(self, path: &Path) -> Result<(), Error> {
        match self {
            Self::File(file, _lock) => file.commit().map_err(Error::io(path, "put it in its place")),
            Self::Device(device, _lock) => device.flush().map_err(Error::io(path, "write to it")),
        }
    }
}

/// Refuses a target that is a part of a source.
pub(crate) fn refuse_source(output: &Path, sources: &[Image]) -> Result<(), Error> {
    let Some(id) = file_id(output) else { return Ok(()) };
    match sources.iter().flat_map(Image::layers).find(|layer| layer.id() == id) {
        None => Ok(()),
        Some(layer) => Err(Error::TargetInChain { path: output.to_owned(), source_image: layer.path().to_owned() }),
    }
}

/// Refuses a level that the codec has not, before a target is touched.
fn check_level(path: &Path, codec: CompressionType, options: &ConvertOptions) -> Result<(), Error> {
    if options.compress {
        let failed = |source| Error::Codec { path: path.to_owned(), source };
        Compressor::new(codec, options.level).map_err(failed)?;
    }
    Ok(())
}

/// Copies a disk, which comes from `sources`, and bitmaps into a new image.
pub(crate) fn into_new(
    (mut disk, sources, bitmaps): (Disk, &[Image], &CopiedBitmaps),
    (path, new): (&Path, &NewImage),
    options: &ConvertOptions,
    listener: Listener<'_>,
) -> Result<ConvertReport, Error> {
    let Prepared { options: create, base } = new.prepare(path, Some(disk.size()))?;
    base.iter().flat_map(Image::warnings).for_each(|warning| (listener.warn)(ConvertWarning::Create(warning.clone())));
    disk.lies_on(base.as_ref().map(BlockRead::size));
    check_level(path, create.compression, options)?;
    let file = NewFile::create(path, sources, new.durability)?;
    let data_name = create.data_file.clone().filter(|_| new.format == Format::Qcow2);
    let data_path = data_name.as_ref().map(Path::new);
    let data = data_path.map(|path| NewFile::create(path, sources, new.durability)).transpose()?;
    let target = NewTarget { path, file: &file, data: data.as_ref().zip(data_path), base: base.as_ref(), options };
    let (mut sink, shape) = match new.format {
        Format::Raw => target.raw(&create)?,
        Format::Qcow2 => target.qcow2(create)?,
    };
    let base = target.base.map(Image::chain);
    Copy { disk: &disk, path, shape, options }.run(&mut sink, listener)?;
    let report = ConvertReport { disk_size: disk.size(), ..sink.finish()? };
    let files = (file.storage(), data.as_ref().map(NewFile::storage));
    bitmaps.add_to_new(path, files, base)?;
    if let Some((data, path)) = data.zip(data_path) {
        data.commit(path)?;
    }
    file.commit(path)?;
    Ok(report)
}

struct NewTarget<'a> {
    path: &'a Path,
    file: &'a NewFile,
    /// The external data file and its name.
    data: Option<(&'a NewFile, &'a Path)>,
    base: Option<&'a Image>,
    options: &'a ConvertOptions,
}

impl NewTarget<'_> {
    fn invalid<T>(&self, problem: &str) -> Result<T, Error> {
        Err(Error::Invalid { path: self.path.to_owned(), problem: problem.to_owned() })
    }

    fn zeroes(&self, reads_as_zeroes: bool) -> Zeroes {
        match self.options.sparse_size {
            0 => Zeroes::Data,
            _ if reads_as_zeroes => Zeroes::Skip,
            _ => Zeroes::Zero,
        }
    }

    fn raw(&self, create: &CreateOptions) -> Result<(Sink, Shape), Error> {
        if self.options.compress {
            return self.invalid("raw images cannot be compressed; use qcow2");
        }
        if self.options.dedup {
            return self.invalid("raw images cannot share clusters; use qcow2");
        }
        let storage = self.file.storage();
        match self.file {
            NewFile::File(..) => {
                extend(self.path, &storage, create.size, create.preallocation)?;
                write_first_block(self.path, &storage)?;
            }
            NewFile::Device(device, _) if device.size() < create.size => {
                return self.invalid("the device is smaller than the disk");
            }
            NewFile::Device(..) => {}
        }
        let shape = Shape {
            grain: Grain::Sectors,
            packing: None,
            zeroes: self.zeroes(!self.file.is_device()),
            detection: Detection::sparse(self.options.sparse_size),
            beneath: None,
            unit: UNIT,
            contents: None,
        };
        Ok((Sink::raw(self.path, storage), shape))
    }

    fn qcow2(&self, create: CreateOptions) -> Result<(Sink, Shape), Error> {
        if let Some(problem) = once::obstacle(&create).filter(|_| self.options.dedup) {
            return self.invalid(problem);
        }
        let storage = self.file.storage();
        if let NewFile::Device(device, _) = self.file {
            // An image half made is none.
            device.zero(0..SECTOR).map_err(Error::io(self.path, "write to it"))?;
        }
        let data = self.data.map(|(file, _)| file.storage());
        let packing = self.options.compress.then_some(Packing {
            cluster_bits: create.cluster_bits,
            compression: create.compression,
            level: self.options.level,
            copies: !self.options.recompress,
        });
        let grain = create.subcluster_size();
        let in_place = self.file.is_device() || self.data.is_some_and(|(file, _)| file.is_device());
        let places_all = create.data_file.is_some() || create.preallocation != Preallocation::Off;
        let shape = Shape {
            grain: match () {
                () if self.base.is_some() || in_place || self.options.dedup => Grain::Whole(grain),
                // What a piece leaves out of a cluster of a new file is zero anyway.
                () if places_all || create.extended_l2 => Grain::Sectors,
                () => Grain::Padded(grain),
            },
            packing,
            zeroes: self.zeroes(self.base.is_none()),
            detection: Detection::sparse(self.options.sparse_size),
            beneath: self.base.map(|base| base.chain().clone()),
            unit: if packing.is_some() { UNIT } else { LARGE_UNIT },
            contents: None,
        };
        let data = data.map(|data| data as Arc<dyn HostStorage>);
        let compressible = data.is_none();
        let mut writer = ImageWriter::new_with(storage, data, &self.path.to_string_lossy(), create)?;
        if packing.is_some() {
            writer.end_with_a_sector();
        }
        let shape = Shape { contents: self.options.dedup.then(|| writer.contents()), ..shape };
        Ok((Sink::qcow2(self.path, writer, compressible || packing.is_none()), shape))
    }
}

/// Copies a disk and bitmaps into an image that is there.
pub(crate) fn into_existing(
    (mut disk, bitmaps): (Disk, &CopiedBitmaps),
    (image, overlay): (Image, bool),
    options: &ConvertOptions,
    listener: Listener<'_>,
) -> Result<ConvertReport, Error> {
    let path = image.path().to_owned();
    let invalid = |problem: &str| Err(Error::Invalid { path: path.clone(), problem: problem.to_owned() });
    if image.size() < disk.size() {
        return invalid("it is smaller than what is to be copied into it");
    }
    if options.dedup {
        return invalid("clusters can be shared in new images only; write a new one");
    }
    disk.lies_on(image.chain().beneath().filter(|_| overlay).map(|beneath| beneath.size()));
    let layer = image.layers().first().and_then(ChainLayer::qcow2);
    let packing = match layer {
        _ if !options.compress => None,
        None => return invalid("raw images cannot be compressed"),
        Some(layer) => Some(Packing {
            cluster_bits: layer.header().cluster_bits,
            compression: layer.compression(),
            level: options.level,
            copies: !options.recompress,
        }),
    };
    if let Some(layer) = layer {
        check_level(&path, layer.compression(), options)?;
    }
    let zeroes = match options {
        ConvertOptions { sparse_size: 0, .. } => Zeroes::Data,
        ConvertOptions { target_is_zero: true, .. } if !overlay => Zeroes::Skip,
        _ => Zeroes::Zero,
    };
    let detection = Detection::sparse(options.sparse_size);
    let shape = Shape { grain: Grain::Sectors, packing, zeroes, detection, beneath: None, unit: UNIT, contents: None };
    let compressible = layer.is_none_or(|layer| !layer.header().has_data_file());
    let able = compressible || packing.is_none();
    let device = image.in_place()?;
    let mut sink = match &device {
        Some(device) => Sink::raw(&path, device.clone()),
        None => Sink::existing(&path, image.begin()?, able),
    };
    Copy { disk: &disk, path: &path, shape, options }.run(&mut sink, listener)?;
    sink.add_bitmaps(bitmaps)?;
    let report = sink.finish()?;
    if let Some(device) = device {
        device.flush().map_err(Error::io(&path, "sync it"))?;
    }
    Ok(ConvertReport { disk_size: disk.size(), file_size: 0, ..report })
}
