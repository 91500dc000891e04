use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use qtk_block::BlockRead;
use qtk_qcow2::{Bitmap, CompressionType, Features, Snapshot, Version, features};
use serde_json::{Value, json};

use crate::layer::SECTOR;
use crate::{ChainLayer, Error, Format, Image, OpenOptions, name};

/// What `qemu-img info` says about one file of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    /// The name that the file was opened by.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the guest's disk in bytes.
    pub virtual_size: u64,
    /// Bytes that the file takes on the host.
    pub actual_size: u64,
    /// Length of the file in bytes, in whole sectors.
    pub file_length: u64,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Info>,
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
    /// Name of the backing file, as stored.
    pub backing_name: Option<String>,
    /// The file that the name stands for, unless it is not a file.
    pub backing_path: Option<PathBuf>,
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

/// Looks at every file of an open chain, topmost first.
pub fn chain_info(image: &Image) -> Result<Vec<ImageInfo>, Error> {
    image.layers().iter().map(layer_info).collect()
}

fn layer_info(layer: &ChainLayer) -> Result<ImageInfo, Error> {
    let metadata = layer.file().file().metadata().map_err(Error::io(layer.path(), "look at it"))?;
    let qcow2 = layer.qcow2().map(|qcow2| {
        let header = qcow2.header();
        Ok::<_, Error>(Qcow2Info {
            cluster_size: header.cluster_bits.size(),
            version: header.version,
            compression: header.compression,
            refcount_bits: header.refcount_bits(),
            features: header.features,
            backing_name: header.backing_name.clone(),
            backing_path: header.backing_name.as_deref().and_then(|name| name::backing_path(layer.path(), name).ok()),
            backing_format: header.backing_format(),
            snapshots: qcow2.snapshots()?,
            bitmaps: qcow2.bitmaps()?,
        })
    });
    Ok(ImageInfo {
        path: layer.path().to_owned(),
        format: layer.format(),
        virtual_size: layer.size(),
        actual_size: metadata.blocks() * 512,
        file_length: layer.file().size().next_multiple_of(SECTOR),
        qcow2: qcow2.transpose()?,
    })
}

impl Qcow2Info {
    fn has(&self, incompatible: u64) -> bool {
        self.features.incompatible & incompatible != 0
    }

    fn format_specific(&self) -> Value {
        let compression = self.compression.name();
        let mut data = match self.version {
            Version::V2 => json!({
                "compat": "0.10",
                "compression-type": compression,
                "refcount-bits": self.refcount_bits,
            }),
            Version::V3 => json!({
                "compat": "1.1",
                "compression-type": compression,
                "lazy-refcounts": self.features.compatible & features::LAZY_REFCOUNTS != 0,
                "refcount-bits": self.refcount_bits,
                "corrupt": self.has(features::CORRUPT),
                "extended-l2": self.has(features::EXTENDED_L2),
            }),
        };
        if !self.bitmaps.is_empty() {
            data["bitmaps"] = self.bitmaps.iter().map(bitmap_json).collect();
        }
        json!({ "type": "qcow2", "data": data })
    }
}

fn bitmap_json(bitmap: &Bitmap) -> Value {
    let flags = [("in-use", bitmap.in_use), ("auto", bitmap.auto)];
    let flags: Vec<&str> = flags.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
    json!({ "flags": flags, "name": bitmap.name, "granularity": bitmap.granularity })
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
    const SECOND: u64 = 1_000_000_000;
    let mut object = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.taken.0,
        "date-nsec": snapshot.taken.1,
        "vm-clock-sec": snapshot.vm_clock_nsec / SECOND,
        "vm-clock-nsec": snapshot.vm_clock_nsec % SECOND,
    });
    if let Some(icount) = snapshot.icount {
        object["icount"] = icount.into();
    }
    object
}

impl ImageInfo {
    /// The file's object in the output of `qemu-img info --output=json`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let file = json!({
            "children": [],
            "virtual-size": self.file_length,
            "filename": self.path.to_string_lossy(),
            "format": "file",
            "actual-size": self.actual_size,
            "format-specific": { "type": "file", "data": {} },
            "dirty-flag": false,
        });
        let mut info = json!({ "children": [{ "name": "file", "info": file }] });
        let qcow2 = self.qcow2.as_ref();
        if let Some(format) = qcow2.and_then(|qcow2| qcow2.backing_format.as_ref()) {
            info["backing-filename-format"] = format.as_str().into();
        }
        info["virtual-size"] = self.virtual_size.into();
        info["filename"] = self.path.to_string_lossy().into();
        if let Some(qcow2) = qcow2 {
            info["cluster-size"] = qcow2.cluster_size.into();
        }
        info["format"] = self.format.name().into();
        info["actual-size"] = self.actual_size.into();
        if let Some(qcow2) = qcow2 {
            if !qcow2.snapshots.is_empty() {
                info["snapshots"] = qcow2.snapshots.iter().map(snapshot_json).collect();
            }
            info["format-specific"] = qcow2.format_specific();
            if let Some(name) = &qcow2.backing_name {
                let path = qcow2.backing_path.as_ref();
                let full = path.map_or_else(|| name.clone().into(), |path| path.to_string_lossy());
                info["full-backing-filename"] = full.into();
                info["backing-filename"] = name.as_str().into();
            }
        }
        info["dirty-flag"] = qcow2.is_some_and(|qcow2| qcow2.has(features::DIRTY)).into();
        info
    }
}
