use std::sync::Arc;

use qtk_block::{HostStorage, Preallocation};

use crate::entry::L2Format;
use crate::error::{Error, OptionProblem};
use crate::extension::{BACKING_FORMAT, EXTERNAL_DATA_FILE, Extension};
use crate::features::{self, Features};
use crate::file::ImageFile;
use crate::header::{Header, MAX_BACKING_FORMAT, MAX_BACKING_NAME, MAX_L1_SIZE, MIN_EXTENDED_CLUSTER_BITS};
use crate::types::{ClusterBits, CompressionType, HostOffset, Version};
use crate::writer::ImageWriter;

/// Smaller clusters keep their room for the backing file's name, as in QEMU.
pub(crate) const MIN_SIZE_FOR_NAMES: u64 = 8192;

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
    /// Whether the data file is to be a raw image of the guest's disk at any time; then nothing can lie beneath, and
    /// [`Preallocation::Off`] means [`Preallocation::Metadata`].
    pub data_file_raw: bool,
    /// How much of the disk gets its place in the file at once. On a backing file, only subclusters can have one.
    pub preallocation: Preallocation,
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

impl CreateOptions {
    /// Bytes of the disk that are stored, or not, together: a subcluster, or a cluster where it has none.
    #[must_use]
    pub fn subcluster_size(&self) -> u64 {
        1 << self.l2_format().grain_bits()
    }

    pub(crate) fn l2_format(&self) -> L2Format {
        L2Format {
            cluster_bits: self.cluster_bits,
            zero_flag: self.version >= Version::V3,
            extended: self.extended_l2,
            data_file: self.data_file.is_some(),
        }
    }

    /// What is wrong with the options, the first thing first, as QEMU sees it.
    fn problem(&self) -> Option<OptionProblem> {
        let v2 = self.version == Version::V2;
        let width = self.refcount_bits;
        let fits = |name: &str, limit: u64| !name.is_empty() && name.len() as u64 <= limit;
        let problems = [
            (v2 && self.extended_l2, OptionProblem::ExtendedL2InVersion2),
            (
                self.extended_l2 && self.cluster_bits.bits() < MIN_EXTENDED_CLUSTER_BITS,
                OptionProblem::ExtendedL2ClusterSize,
            ),
            (
                self.backing.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2,
                OptionProblem::PreallocationOnBacking,
            ),
            (v2 && self.lazy_refcounts, OptionProblem::LazyRefcountsInVersion2),
            (!width.is_power_of_two() || width > 64, OptionProblem::RefcountWidth),
            (v2 && width != 16, OptionProblem::RefcountWidthInVersion2),
            (self.data_file_raw && self.data_file.is_none(), OptionProblem::RawWithoutDataFile),
            (self.data_file_raw && self.backing.is_some(), OptionProblem::RawDataFileOnBacking),
            (v2 && self.data_file.is_some(), OptionProblem::DataFileInVersion2),
            (v2 && self.compression != CompressionType::Zlib, OptionProblem::CompressionInVersion2),
            (self.size > self.largest_size(), OptionProblem::SizeTooLarge),
            (
                self.backing.as_ref().is_some_and(|backing| {
                    let format = backing.format.as_deref().unwrap_or("raw");
                    !fits(&backing.name, MAX_BACKING_NAME) || !fits(format, MAX_BACKING_FORMAT)
                }),
                OptionProblem::BackingName,
            ),
        ];
        problems.into_iter().find(|(applies, _)| *applies).map(|(_, problem)| problem)
    }

    /// The largest disk whose L1 table QEMU opens.
    fn largest_size(&self) -> u64 {
        (MAX_L1_SIZE / 8).saturating_mul(self.l2_format().entries()).saturating_mul(self.cluster_bits.size())
    }

    /// L1 entries that the disk needs.
    pub(crate) fn l1_entries(&self) -> u64 {
        self.cluster_bits.clusters_for(self.size).div_ceil(self.l2_format().entries())
    }

    /// The options, if there can be an image like that.
    pub(crate) fn checked(mut self, file: &ImageFile) -> Result<Self, Error> {
        if let Some(problem) = self.problem() {
            return Err(Error::ImpossibleOptions { image: file.name.to_string(), problem });
        }
        // A raw image must not depend on metadata that says what is zero.
        if self.data_file_raw && self.preallocation == Preallocation::Off {
            self.preallocation = Preallocation::Metadata;
        }
        Ok(self)
    }

    /// The logarithm of the refcount width, which is a power of two up to 64.
    pub(crate) fn refcount_order(&self) -> u8 {
        self.refcount_bits.trailing_zeros().to_be_bytes()[3]
    }

    /// The header but for where the tables lie.
    pub(crate) fn header(&self) -> Header {
        let flag = |applies: bool, bit: u64| if applies { bit } else { 0 };
        let features = Features {
            incompatible: flag(self.compression != CompressionType::Zlib, features::COMPRESSION_TYPE)
                | flag(self.data_file.is_some(), features::EXTERNAL_DATA_FILE)
                | flag(self.extended_l2, features::EXTENDED_L2),
            compatible: flag(self.lazy_refcounts, features::LAZY_REFCOUNTS),
            autoclear: flag(self.data_file_raw, features::DATA_FILE_RAW),
        };
        let text = |magic, text: &String| Extension::new(magic, text.clone().into_bytes());
        let format = self.backing.as_ref().and_then(|backing| backing.format.as_ref());
        let names = self.version >= Version::V3 && self.cluster_bits.size() >= MIN_SIZE_FOR_NAMES;
        let extensions = [
            format.map(|format| text(BACKING_FORMAT, format)),
            self.data_file.as_ref().map(|name| text(EXTERNAL_DATA_FILE, name)),
            names.then(Extension::feature_names),
        ];
        Header {
            version: self.version,
            size: self.size,
            cluster_bits: self.cluster_bits,
            backing_name: self.backing.as_ref().map(|backing| backing.name.clone()),
            l1_table: HostOffset(0),
            l1_size: u32::try_from(self.l1_entries()).unwrap_or(u32::MAX),
            refcount_table: HostOffset(0),
            refcount_table_clusters: 0,
            refcount_order: self.refcount_order(),
            snapshots: 0,
            snapshot_table: HostOffset(0),
            features,
            compression: self.compression,
            encryption: None,
            header_length: 0,
            unknown_fields: Vec::new(),
            extensions: extensions.into_iter().flatten().collect(),
        }
    }
}

/// Makes an empty image in `storage`, whose content is lost; errors call it `name`. The storage is flushed at the end.
///
/// Everything reads as zeroes, or as the backing file where there is one.
pub fn create(storage: Arc<dyn HostStorage>, name: &str, options: &CreateOptions) -> Result<(), Error> {
    create_with(storage, None, name, options)
}

/// The same with the external data file, which [`CreateOptions::data_file`] names. Its content is lost too.
pub fn create_with(
    storage: Arc<dyn HostStorage>,
    data: Option<Arc<dyn HostStorage>>,
    name: &str,
    options: &CreateOptions,
) -> Result<(), Error> {
    let file = ImageFile { storage: storage.clone(), name: name.into() };
    let options = options.clone().checked(&file)?;
    for emptied in [Some(&storage), data.as_ref()].into_iter().flatten() {
        ImageFile { storage: emptied.clone(), ..file.clone() }.set_size(0)?;
    }
    ImageWriter::new_with(storage, data.clone(), name, options)?.finish()?;
    if let Some(data) = data {
        ImageFile { storage: data, ..file.clone() }.sync()?;
    }
    file.sync()
}
