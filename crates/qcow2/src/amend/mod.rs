//! Changing what an image was created with: version, refcount width, features, size.

mod downgrade;

use crate::create::{Backing, MIN_SIZE_FOR_NAMES};
use crate::error::Error;
use crate::extension::{self, Extension};
use crate::features;
use crate::mapping::L2Tables;
use crate::transaction::{State, Transaction};
use crate::types::{HostOffset, Version};
use qtk_block::Preallocation;

/// What to change; `None` keeps what the image has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amend {
    /// Version of the format. What the new one cannot say is converted, or refused.
    pub version: Option<Version>,
    /// Width of a refcount in bits: a power of two up to 64, and 16 in version 2.
    pub refcount_bits: Option<u32>,
    /// Whether writers may postpone refcount updates; version 3 only.
    pub lazy_refcounts: Option<bool>,
    /// Name of the external data file, or none at all; for images that have one.
    pub data_file: Option<Option<String>>,
    /// Whether the data file must stay readable as a raw image, which can only be given up.
    pub data_file_raw: Option<bool>,
    /// The backing file that the image is thought to have; [`Transaction::set_backing`] changes it.
    pub backing: Option<Option<Backing>>,
    /// Size of the guest's disk in bytes, in whole sectors of 512.
    pub size: Option<u64>,
}

/// Why an image cannot be amended as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AmendRefusal {
    /// Not a width that the format has.
    #[error("the width of a refcount must be a power of two up to 64, not {0}")]
    RefcountBits(u32),
    /// Version 2 has refcounts of 16 bits.
    #[error("images of version 2 have refcounts of 16 bits")]
    Version2RefcountBits,
    /// The image is to become one of version 2 but to keep refcounts of another width.
    #[error("an image of version 2 must have refcounts of 16 bits; amend those too")]
    DowngradeRefcountBits,
    /// A refcount does not fit in the new width.
    #[error("the cluster at {offset} has a refcount of {count}, which does not fit in {bits} bits")]
    RefcountTooLarge {
        /// The new width.
        bits: u32,
        /// The first such cluster.
        offset: HostOffset,
        /// Its refcount.
        count: u64,
    },
    /// Version 2 cannot say that refcounts may be stale.
    #[error("lazy refcounts need version 3")]
    Version2LazyRefcounts,
    /// Data files are chosen at creation.
    #[error("the image has no external data file")]
    NoDataFile,
    /// Nobody kept the data file readable so far.
    #[error("that the data file is a raw image must be said at creation")]
    DataFileRaw,
    /// The backing file is not the one that was named.
    #[error("the backing file cannot be amended; rebase the image instead")]
    Backing,
    /// QEMU counts disks in sectors.
    #[error("the size of the disk must be a multiple of 512, not {0}")]
    UnalignedSize(u64),
    /// Version 2 has no data files.
    #[error("an image with an external data file cannot become one of version 2")]
    DowngradeDataFile,
    /// Version 2 cannot say that the image uses these incompatible features.
    #[error("an image with the incompatible features {0:#x} cannot become one of version 2")]
    DowngradeFeatures(u64),
    /// Version 2 has only one codec.
    #[error("an image with clusters compressed as zstd cannot become one of version 2")]
    DowngradeZstd,
    /// Version 2 has no snapshots whose disk or VM state had another size.
    #[error("its snapshots cannot be kept in an image of version 2; delete them first")]
    DowngradeSnapshots,
}

impl Transaction {
    /// Changes what `amend` says, or fails if some of it cannot be had.
    pub fn amend(&self, amend: &Amend) -> Result<(), Error> {
        self.change(|state| state.amend(amend))
    }
}

impl State {
    fn amend(&mut self, amend: &Amend) -> Result<(), Error> {
        let version = amend.version.unwrap_or(self.header().version);
        self.check_amend(amend, version).map_or(Ok(()), |refusal| Err(self.cannot_amend(refusal)))?;
        if version > self.header().version {
            self.upgrade()?;
        }
        if let Some(bits) = amend.refcount_bits.filter(|&bits| bits != self.header().refcount_bits()) {
            self.set_refcount_bits(bits)?;
        }
        if let Some(name) = &amend.data_file {
            self.set_extension(extension::EXTERNAL_DATA_FILE, name.as_deref());
        }
        let autoclear = &mut self.header_mut().features.autoclear;
        if amend.data_file_raw == Some(false) {
            *autoclear &= !features::DATA_FILE_RAW;
        }
        let compatible = &mut self.header_mut().features.compatible;
        match amend.lazy_refcounts {
            Some(true) => *compatible |= features::LAZY_REFCOUNTS,
            Some(false) => *compatible &= !features::LAZY_REFCOUNTS,
            None => {}
        }
        if let Some(size) = amend.size.filter(|&size| size != self.header().size) {
            self.resize(size, Preallocation::Off)?;
        }
        if version < self.header().version { self.downgrade() } else { Ok(()) }
    }

    /// What can be refused before anything changes.
    fn check_amend(&self, amend: &Amend, version: Version) -> Option<AmendRefusal> {
        let header = self.header();
        let bits = amend.refcount_bits.unwrap_or(header.refcount_bits());
        let backing = || {
            let name = header.backing_name.clone();
            name.map(|name| Backing { name, format: header.backing_format() })
        };
        let wider = amend.refcount_bits.is_some_and(|bits| bits != 16);
        let lazy = amend.lazy_refcounts == Some(true) && header.features.compatible & features::LAZY_REFCOUNTS == 0;
        // Where several apply, QEMU names the first of these.
        if amend.data_file.is_some() && !header.has_data_file() {
            Some(AmendRefusal::NoDataFile)
        } else if amend.data_file_raw == Some(true) && !header.data_file_raw() {
            Some(AmendRefusal::DataFileRaw)
        } else if !bits.is_power_of_two() || bits > 64 {
            Some(AmendRefusal::RefcountBits(bits))
        } else if version < Version::V3 && wider {
            Some(AmendRefusal::Version2RefcountBits)
        } else if amend.backing.as_ref().is_some_and(|wanted| *wanted != backing()) {
            Some(AmendRefusal::Backing)
        } else if version < Version::V3 && lazy {
            Some(AmendRefusal::Version2LazyRefcounts)
        } else {
            amend.size.filter(|size| !size.is_multiple_of(512)).map(AmendRefusal::UnalignedSize)
        }
    }

    fn cannot_amend(&self, refusal: AmendRefusal) -> Error {
        Error::Amend { image: self.file().name.to_string(), refusal }
    }

    fn upgrade(&mut self) -> Result<(), Error> {
        let names = self.header().cluster_bits.size() >= MIN_SIZE_FOR_NAMES;
        let header = self.header_mut();
        header.version = Version::V3;
        if names && header.extension(extension::FEATURE_NAMES).is_none() {
            header.extensions.push(Extension::feature_names());
        }
        // Bitmaps of an image that was of version 2 for a while have missed what was written then.
        header.set_bitmaps(None);
        match self.snapshot_table()? {
            entries if entries.is_empty() => Ok(()),
            // Every entry of version 3 says how large the disk was.
            entries => self.set_snapshot_table(entries, ""),
        }
    }

    fn set_refcount_bits(&mut self, bits: u32) -> Result<(), Error> {
        let [.., order] = bits.trailing_zeros().to_be_bytes();
        if let Some((offset, count)) = self.set_refcount_order(order)? {
            return Err(self.cannot_amend(AmendRefusal::RefcountTooLarge { bits, offset, count }));
        }
        Ok(())
    }

    fn set_extension(&mut self, magic: u32, text: Option<&str>) {
        let extensions = &mut self.header_mut().extensions;
        extensions.retain(|extension| extension.magic != magic);
        extensions.extend(text.map(|text| Extension::new(magic, text.as_bytes().to_vec())));
    }
}
