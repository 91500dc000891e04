use std::path::Path;

use qtk_block::{BlockRead, ExtentKind, Preallocation};
use qtk_qcow2::{Bitmap, CreateOptions, MAX_L1_SIZE, Version};

use crate::layer::SECTOR;
use crate::status::{Status, Statuses};
use crate::{ChainLayer, Error, Format, Image, NewImage};

/// How much space an image will need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// Bytes of its file after a conversion of the source.
    pub required: u64,
    /// Bytes of its file when all of the disk is written.
    pub fully_allocated: u64,
    /// Bytes that the source's bitmaps take besides, where both sides can have bitmaps.
    pub bitmaps: Option<u64>,
}

/// What an image is to be made of.
#[derive(Clone, Copy, Debug)]
pub enum MeasureSource<'a> {
    /// An empty disk of so many bytes.
    Size(u64),
    /// A copy of what an image holds.
    Image(&'a Image),
}

/// Measures what `target` will need, as `qemu-img measure` does. Of its base it only counts whether there is one.
pub fn measure(source: MeasureSource<'_>, target: &NewImage) -> Result<Measurement, Error> {
    let image = match source {
        MeasureSource::Size(_) => None,
        MeasureSource::Image(image) => Some(image),
    };
    let size = match source {
        MeasureSource::Size(size) => size,
        MeasureSource::Image(image) => image.size(),
    };
    let Some(size) = size.checked_next_multiple_of(SECTOR) else { return Err(Error::DiskTooLarge { size }) };
    match target.format {
        Format::Raw => Ok(Measurement { required: size, fully_allocated: size, bitmaps: None }),
        Format::Qcow2 => measure_qcow2(size, image, &target.create_options(Path::new(""))?, target.base.is_some()),
    }
}

fn measure_qcow2(
    size: u64,
    image: Option<&Image>,
    options: &CreateOptions,
    has_base: bool,
) -> Result<Measurement, Error> {
    let clusters = options.cluster_bits.clusters_for(size);
    let entry_len = if options.extended_l2 { 16 } else { 8 };
    let l2_tables = clusters.div_ceil(options.cluster_bits.size() / entry_len);
    if l2_tables > MAX_L1_SIZE / 8 {
        return Err(Error::DiskTooLarge { size });
    }
    let writes_all = matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full);
    let stored = match image {
        _ if writes_all => clusters,
        None => 0,
        // Nobody knows what the base has of it.
        Some(_) if has_base => clusters,
        Some(image) => stored_clusters(image, options)?,
    };
    let metadata = metadata_clusters(clusters, l2_tables, options);
    let bytes = |clusters: u64| clusters << options.cluster_bits.bits();
    Ok(Measurement {
        required: bytes(metadata + stored),
        fully_allocated: bytes(metadata + clusters),
        bitmaps: image.and_then(|image| bitmap_bytes(image, options).transpose()).transpose()?,
    })
}

/// Clusters of the metadata of an image that stores `data` clusters: all of them, even where `data` is sparse.
fn metadata_clusters(data: u64, l2_tables: u64, options: &CreateOptions) -> u64 {
    let bits = options.cluster_bits;
    let fixed = 1 + bits.clusters_for(l2_tables * 8) + l2_tables;
    let counts_per_block = bits.size() * 8 / u64::from(options.refcount_bits.max(1));
    let (mut blocks, mut table) = (0, 0);
    loop {
        // Refcounts count themselves.
        let needed = (data + fixed + blocks + table).div_ceil(counts_per_block);
        let needed_table = bits.clusters_for(needed * 8);
        if (needed, needed_table) == (blocks, table) {
            return fixed + blocks + table;
        }
        (blocks, table) = (needed, needed_table);
    }
}

/// Clusters of the new image that hold data of the source.
fn stored_clusters(image: &Image, options: &CreateOptions) -> Result<u64, Error> {
    let bits = options.cluster_bits.bits();
    let (mut count, mut counted_to) = (0, 0);
    for status in Statuses::new(image.chain(), 0..image.size()) {
        let Status { run, is_hole, .. } = status?;
        if run.kind.extent_kind() == ExtentKind::Data && !is_hole {
            let end = ((run.range.end - 1) >> bits) + 1;
            count += end - (run.range.start >> bits).max(counted_to);
            counted_to = end;
        }
    }
    Ok(count)
}

/// What the image's bitmaps will take in a new image, if both can have any.
fn bitmap_bytes(image: &Image, options: &CreateOptions) -> Result<Option<u64>, Error> {
    let Some(layer) = image.layers().iter().find(|layer| !layer.is_log()).and_then(ChainLayer::qcow2) else {
        return Ok(None);
    };
    if options.version < Version::V3 || layer.header().version < Version::V3 {
        return Ok(None);
    }
    let bits = options.cluster_bits;
    let whole = |bytes: u64| bits.clusters_for(bytes) << bits.bits();
    let bitmaps = layer.bitmaps()?;
    let consistent = bitmaps.iter().filter(|bitmap| !bitmap.in_use);
    let (mut contents, mut directory) = (0, 0);
    for bitmap in consistent {
        let data = bitmap_data(bitmap, image.size());
        contents += whole(data) + whole(bits.clusters_for(data) * 8);
        directory += directory_entry(bitmap);
    }
    Ok(Some(contents + whole(directory)))
}

/// Bytes of a bitmap's bits.
fn bitmap_data(bitmap: &Bitmap, disk_size: u64) -> u64 {
    disk_size.div_ceil(bitmap.granularity).div_ceil(8)
}

/// Bytes of its entry in the directory.
fn directory_entry(bitmap: &Bitmap) -> u64 {
    (24 + bitmap.name.len() as u64).next_multiple_of(8)
}
