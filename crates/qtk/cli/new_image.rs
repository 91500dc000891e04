//! What a new image is to be, as the verbs that make one take it.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use qtk_block::Durability;
use qtk_image::{Format, NewImage};
use qtk_qcow2::{CompressionType, CreateOptions, Preallocation, Version};

use super::arguments::FormatName;
use super::create::refuse_existing;
use super::size;

/// Format and features of a new image.
#[derive(Args, Debug)]
pub(crate) struct NewImageArguments {
    /// Format of the new image
    #[arg(short = 'O', long, value_enum, default_value_t = FormatName::Qcow2)]
    format: FormatName,

    /// Cluster size; 64K where not given
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    cluster_size: Option<u64>,

    /// Version of qcow2: v2 is read by QEMU before 1.1 too
    #[arg(long, value_enum, default_value_t = Compat::V3)]
    compat: Compat,

    /// Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, value_name = "BITS", default_value_t = 16)]
    refcount_bits: u32,

    /// Let QEMU postpone refcount updates
    #[arg(long)]
    lazy_refcounts: bool,

    /// Divide clusters into 32 subclusters. Not every hypervisor reads such images
    #[arg(long)]
    extended_l2: bool,

    /// Store the guest's data in this file, and only metadata in the image
    #[arg(long, value_name = "FILE")]
    data_file: Option<String>,

    /// Keep the data file a raw image of the guest's disk
    #[arg(long, requires = "data_file")]
    data_file_raw: bool,

    /// How much of the disk gets its place on the host at once
    #[arg(long, value_enum, default_value_t = PreallocationName::Off)]
    preallocation: PreallocationName,
}

/// When a new file counts as written.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct DurabilityArguments {
    /// Do not wait until it is on disk: faster, but a power cut may lose the new file and the one in its place
    #[arg(long)]
    no_sync: bool,
}

impl From<DurabilityArguments> for Durability {
    fn from(arguments: DurabilityArguments) -> Self {
        if arguments.no_sync { Self::InCache } else { Self::OnDisk }
    }
}

/// A version of qcow2 by its name on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Compat {
    V2,
    V3,
}

impl From<Compat> for Version {
    fn from(name: Compat) -> Self {
        match name {
            Compat::V2 => Self::V2,
            Compat::V3 => Self::V3,
        }
    }
}

/// A preallocation by its name on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum PreallocationName {
    /// Nothing
    Off,
    /// Only the metadata that maps it
    Metadata,
    /// All of it, without writing
    Falloc,
    /// All of it, written with zeroes
    Full,
}

impl From<PreallocationName> for Preallocation {
    fn from(name: PreallocationName) -> Self {
        match name {
            PreallocationName::Off => Self::Off,
            PreallocationName::Metadata => Self::Metadata,
            PreallocationName::Falloc => Self::Falloc,
            PreallocationName::Full => Self::Full,
        }
    }
}

/// A codec by its name on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Codec {
    Zlib,
    Zstd,
}

impl From<Codec> for CompressionType {
    fn from(codec: Codec) -> Self {
        match codec {
            Codec::Zlib => Self::Zlib,
            Codec::Zstd => Self::Zstd,
        }
    }
}

/// What a new image lies on.
#[derive(Args, Debug)]
pub(crate) struct BaseArguments {
    /// The image to lie on; a relative name starts at the new image's folder
    #[arg(short, long, value_name = "IMAGE")]
    base: Option<PathBuf>,

    /// Format of the base; found out where not given, and recorded
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "base")]
    base_format: Option<FormatName>,
}

impl NewImageArguments {
    /// Refuses to replace an image or its data file, unless that was asked for.
    pub(crate) fn refuse_existing(&self, output: &Path, force: bool) -> anyhow::Result<()> {
        refuse_existing(output, force)?;
        self.data_file.as_ref().map_or(Ok(()), |file| refuse_existing(Path::new(file), force))
    }

    /// An image of this kind on `base`, whose compressed clusters `codec` makes.
    pub(crate) fn on(&self, base: &BaseArguments, codec: Option<Codec>) -> NewImage {
        NewImage {
            base: base.base.clone(),
            base_format: base.base_format.map(|format| Format::from(format).name().to_owned()),
            ..self.alone(codec)
        }
    }

    /// An image of this kind that stands alone.
    pub(crate) fn alone(&self, codec: Option<Codec>) -> NewImage {
        NewImage {
            format: self.format.into(),
            cluster_size: self.cluster_size,
            qcow2: CreateOptions {
                version: self.compat.into(),
                refcount_bits: self.refcount_bits,
                compression: codec.map(Into::into).unwrap_or_default(),
                lazy_refcounts: self.lazy_refcounts,
                extended_l2: self.extended_l2,
                data_file: self.data_file.clone(),
                data_file_raw: self.data_file_raw,
                preallocation: self.preallocation.into(),
                ..CreateOptions::default()
            },
            ..NewImage::default()
        }
    }
}
