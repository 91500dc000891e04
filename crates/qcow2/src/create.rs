use std::ops::RangeInclusive;
use std::sync::Arc;

use qtk_block::{HostStorage, Preallocation};

use crate::entry::L2Format;
use crate::error::Error;
use crate::extension::{BACKING_FORMAT, Extension};
use crate::features::{self, Features};
use crate::file::{ImageFile, table_bytes};
use crate::header::{Header, MAX_BACKING_NAME, MAX_L1_SIZE, MAX_REFCOUNT_TABLE_SIZE};
use crate::refcount::RefcountWidth;
use crate::types::{ClusterBits, CompressionType, HostOffset, Version, in_memory};

/// Smaller clusters keep their room for the backing file's name, as in QEMU.
const MIN_SIZE_FOR_NAMES: u64 = 8192;

/// What a new image is to be. The defaults are `qemu-img create`'s.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Version of the format.
    pub version: Version,
    /// Width of a refcount in bits: a power of two up to 64, and 16 in version 2.
    pub refcount_bits: u32,
    /// How compressed clusters will be compressed; only deflate in version 2.
    pub compression: CompressionType,
    /// The backing file, if there is one. It is named, not opened.
    pub backing: Option<Backing>,
    /// Whether QEMU may postpone refcount updates; not in version 2.
    pub lazy_refcounts: bool,
    /// Whether clusters are divided into 32 subclusters; not in version 2, nor for clusters smaller than 16 KiB.
    pub extended_l2: bool,
    /// Name of the file that is to hold the guest's data, if it is another one; not in version 2.
    pub data_file: Option<String>,
    /// Whether the data file is to be a raw image of the guest's disk at any time; then nothing can lie beneath.
    pub data_file_raw: bool,
    /// How much of the disk gets its place in the file at once.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    pub(crate) fn l2_format(&self) -> L2Format {
        L2Format {
            cluster_bits: self.cluster_bits,
            zero_flag: self.version >= Version::V3,
            extended: self.extended_l2,
            data_file: self.data_file.is_some(),
        }
    }

    fn l1_entries(&self) -> u64 {
        self.size.div_ceil(self.cluster_bits.size()).div_ceil(self.l2_format().entries())
    }
}

/// A backing file as a header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name, relative to the image's folder if it is a relative path.
    pub name: String,
    /// Its format, such as `qcow2` or `raw`. Without one, readers guess.
    pub format: Option<String>,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            cluster_bits: ClusterBits::default(),
            version: Version::default(),
            refcount_bits: 16,
            compression: CompressionType::default(),
            backing: None,
            lazy_refcounts: false,
            extended_l2: false,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }
}

/// Where the metadata of an empty image lies, in clusters: header, refcount table, refcount blocks, L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    refcount_table: u64,
    refcount_blocks: u64,
    l1_entries: u64,
    l1_table: u64,
}

impl Layout {
    fn new(bits: ClusterBits, width: RefcountWidth, l1_entries: u64) -> Self {
        let l1_table = bits.clusters_for(l1_entries * 8);
        let mut layout = Self { refcount_table: 1, refcount_blocks: 1, l1_entries, l1_table };
        // Each step only grows the layout, and blocks cover far more clusters than they take.
        loop {
            let refcount_blocks = layout.clusters().div_ceil(width.per_block(bits));
            let refcount_table = bits.clusters_for(refcount_blocks * 8);
            let next = Self { refcount_table, refcount_blocks, ..layout };
            if next == layout {
                return layout;
            }
            layout = next;
        }
    }

    fn clusters(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.l1_table
    }
}

/// Makes an empty image in `storage`, whose content is lost; errors call it `name`. The storage is flushed at the end.
///
/// Everything reads as zeroes, or as the backing file where there is one.
pub fn create(storage: Arc<dyn HostStorage>, name: &str, options: &CreateOptions) -> Result<(), Error> {
    create_with(storage, None, name, options)
}

/// The same with the external data file, which [`CreateOptions::data_file`] names.
pub fn create_with(
    storage: Arc<dyn HostStorage>,
    data: Option<Arc<dyn HostStorage>>,
    name: &str,
    options: &CreateOptions,
) -> Result<(), Error> {
    let file = ImageFile { storage, name: name.into() };
    if data.is_some()
        || options.extended_l2
        || options.data_file.is_some()
        || options.preallocation != Preallocation::Off
    {
        return Err(file.unsupported("creating it so"));
    }
    check_options(&file, options)?;
    let bits = options.cluster_bits;
    let width = RefcountWidth::new(order_of(options));
    let layout = Layout::new(bits, width, options.l1_entries());
    let place = |cluster: u64| HostOffset(cluster << bits.bits());
    let first_block = 1 + layout.refcount_table;
    let l1_table = place(first_block + layout.refcount_blocks);

    let header = header(options, &layout, l1_table);
    let encoded = header.encode().ok_or_else(|| {
        let len = options.backing.as_ref().map_or(0, |backing| backing.name.len() as u64);
        invalid(&file, "the backing name's length at this cluster size", len, 0..=bits.size() / 2)
    })?;
    let mut blocks = vec![0; in_memory(layout.refcount_blocks << bits.bits())];
    for (index, block) in (0..).zip(blocks.chunks_mut(bits.buffer_len())) {
        let first = index * width.per_block(bits);
        for cluster in first..layout.clusters().min(first + width.per_block(bits)) {
            width.set(block, cluster - first, 1);
        }
    }

    file.set_size(0)?;
    file.set_size(l1_table.0 + layout.l1_entries * 8)?;
    let table = (0..layout.refcount_blocks).map(|index| place(first_block + index).0);
    file.write(&table_bytes(table), place(1))?;
    file.write(&blocks, place(first_block))?;
    // Last, so that a file left behind half-made is no image.
    file.write(&encoded, HostOffset(0))?;
    file.sync()
}

fn header(options: &CreateOptions, layout: &Layout, l1_table: HostOffset) -> Header {
    let mut extensions = Vec::new();
    if let Some(format) = options.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
        extensions.push(Extension::new(BACKING_FORMAT, format.clone().into_bytes()));
    }
    if options.version >= Version::V3 && options.cluster_bits.size() >= MIN_SIZE_FOR_NAMES {
        extensions.push(Extension::feature_names());
    }
    Header {
        version: options.version,
        size: options.size,
        cluster_bits: options.cluster_bits,
        backing_name: options.backing.as_ref().map(|backing| backing.name.clone()),
        l1_table: if layout.l1_entries == 0 { HostOffset(0) } else { l1_table },
        l1_size: u32::try_from(layout.l1_entries).unwrap_or(u32::MAX),
        refcount_table: HostOffset(options.cluster_bits.size()),
        refcount_table_clusters: u32::try_from(layout.refcount_table).unwrap_or(u32::MAX),
        refcount_order: order_of(options),
        snapshots: 0,
        snapshot_table: HostOffset(0),
        features: Features {
            incompatible: if options.compression == CompressionType::Zlib { 0 } else { features::COMPRESSION_TYPE },
            compatible: if options.lazy_refcounts { features::LAZY_REFCOUNTS } else { 0 },
            autoclear: 0,
        },
        compression: options.compression,
        encryption: None,
        header_length: 0,
        unknown_fields: Vec::new(),
        extensions,
    }
}

/// The logarithm of the refcount width, which is a power of two up to 64.
fn order_of(options: &CreateOptions) -> u8 {
    options.refcount_bits.trailing_zeros().to_be_bytes()[3]
}

fn check_options(file: &ImageFile, options: &CreateOptions) -> Result<(), Error> {
    let bits = options.cluster_bits;
    let max_size = MAX_L1_SIZE / 8 * options.l2_format().entries() * bits.size();
    let within = |option, value: u64, allowed: RangeInclusive<u64>| match allowed.contains(&value) {
        true => Ok(()),
        false => Err(invalid(file, option, value, allowed)),
    };
    within("the size", options.size, 0..=max_size)?;
    let v2 = options.version == Version::V2;
    let widths = if v2 { 16..=16 } else { 1..=64 };
    within("the refcount width", options.refcount_bits.into(), widths)?;
    if !options.refcount_bits.is_power_of_two() {
        return Err(invalid(file, "the refcount width (a power of two)", options.refcount_bits.into(), 1..=64));
    }
    if v2 && (options.lazy_refcounts || options.compression != CompressionType::Zlib) {
        return Err(invalid(file, "the version, for lazy refcounts or zstd,", 2, 3..=3));
    }
    if let Some(backing) = &options.backing {
        within("the backing name's length", backing.name.len() as u64, 1..=MAX_BACKING_NAME)?;
    }
    let layout = Layout::new(bits, RefcountWidth::new(order_of(options)), options.l1_entries());
    within("the refcount table", layout.refcount_table << bits.bits(), 1..=MAX_REFCOUNT_TABLE_SIZE)
}

fn invalid(file: &ImageFile, option: &'static str, value: u64, allowed: RangeInclusive<u64>) -> Error {
    Error::InvalidOption { image: file.name.to_string(), option, value, allowed }
}
