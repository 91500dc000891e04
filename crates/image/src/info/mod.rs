//! What `qemu-img info` says about images.

mod human;
mod json;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use qtk_qcow2::{Bitmap, CompressionType, Encryption, Features, Snapshot, Version, features};

use crate::node::Node;
use crate::{ChainLayer, Error, Format, Image, NodeSpec, OpenOptions, SpecError, name};

pub use human::{LocalTime, human_size, snapshot_table};

/// What `qemu-img info` says about one node: an image, a file, or a part of one.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageInfo {
    /// The name that the file was opened by.
    pub path: PathBuf,
    /// The node's name as QEMU shows it.
    pub filename: String,
    /// The format of what the node shows.
    pub format: Format,
    /// The node's driver: the format's, or `file` or `host_device`.
    pub driver: &'static str,
    /// Size of the guest's disk in bytes.
    pub virtual_size: u64,
    /// Bytes that the file takes on the host.
    pub actual_size: u64,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Info>,
    /// The node beneath, unless this is a file.
    pub file: Option<Box<ImageInfo>>,
}

/// What `qemu-img info` says about a qcow2 file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Info {
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// Version of the format.
    pub version: Version,
    /// Codec of compressed clusters.
    pub compression: CompressionType,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// The header's feature bits.
    pub features: Features,
    /// How the guest's data is encrypted, if it is.
    pub encryption: Option<Encryption>,
    /// The external data file's name, as stored.
    pub data_file: Option<String>,
    /// Name of the backing file, as stored.
    pub backing_name: Option<String>,
    /// What the name stands for, seen from the working directory.
    pub backing_path: Option<String>,
    /// Format of the backing file, as stored.
    pub backing_format: Option<String>,
    /// Internal snapshots, in the table's order.
    pub snapshots: Vec<Snapshot>,
    /// Persistent dirty bitmaps.
    pub bitmaps: Vec<Bitmap>,
}

/// Looks at the file at `path` alone. What it lies on need not exist.
pub fn info(path: &Path, options: &OpenOptions) -> Result<ImageInfo, Error> {
    layer_info(&Image::open_layer(path, options)?)
}

/// Looks at the node that `spec` describes alone. What it lies on need not exist.
pub fn node_info(spec: &NodeSpec, options: &OpenOptions) -> Result<ImageInfo, Error> {
    layer_info(&Image::open_node_layer(spec, options)?)
}

/// Looks at every file of an open chain, topmost first.
pub fn chain_info(image: &Image) -> Result<Vec<ImageInfo>, Error> {
    image.layers().iter().map(layer_info).collect()
}

fn layer_info(layer: &ChainLayer) -> Result<ImageInfo, Error> {
    let metadata = layer.file().file().metadata().map_err(Error::io(layer.path(), "look at it"))?;
    let qcow2 = layer.qcow2().map(|qcow2| Qcow2Info::new(layer.path(), qcow2)).transpose()?;
    let mut info = ImageInfo::of_node(layer.node(), layer.path(), metadata.blocks() * 512);
    info.format = layer.format();
    info.qcow2 = qcow2;
    Ok(info)
}

impl ImageInfo {
    fn of_node(node: &Node, path: &Path, actual_size: u64) -> Self {
        Self {
            path: path.to_owned(),
            filename: node.filename.clone(),
            format: Format::Raw,
            driver: node.driver,
            virtual_size: node.size,
            actual_size,
            qcow2: None,
            file: node.file.as_ref().map(|file| Box::new(Self::of_node(file, path, actual_size))),
        }
    }

    /// What the image lies on by its header: its name, and what that describes.
    #[must_use]
    pub fn beneath(&self) -> Option<(String, Result<NodeSpec, SpecError>)> {
        let qcow2 = self.qcow2.as_ref()?;
        let name = qcow2.backing_path.clone()?;
        let spec = NodeSpec::from_filename(&name).map(|spec| match &qcow2.backing_format {
            Some(format) => spec.with_driver(format),
            None => spec,
        });
        Some((name, spec))
    }
}

impl Qcow2Info {
    fn new(path: &Path, qcow2: &qtk_qcow2::Layer) -> Result<Self, Error> {
        let header = qcow2.header();
        Ok(Self {
            cluster_size: header.cluster_bits.size(),
            version: header.version,
            compression: header.compression,
            refcount_bits: header.refcount_bits(),
            features: header.features,
            encryption: header.encryption,
            data_file: header.data_file_name(),
            backing_name: header.backing_name.clone(),
            backing_path: header.backing_name.as_deref().map(|name| name::full_backing_name(path, name)),
            backing_format: header.backing_format(),
            snapshots: qcow2.snapshots()?,
            bitmaps: qcow2.bitmaps()?,
        })
    }

    fn has(&self, incompatible: u64) -> bool {
        self.features.incompatible & incompatible != 0
    }

    fn data_file_raw(&self) -> bool {
        self.has(features::EXTERNAL_DATA_FILE) && self.features.autoclear & features::DATA_FILE_RAW != 0
    }
}
