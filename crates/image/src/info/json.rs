use qtk_qcow2::{Bitmap, Snapshot, Version, features};
use serde_json::{Map, Value, json};

use super::{ImageInfo, Qcow2Info};
use crate::spec::bucket;

const SECOND: u64 = 1_000_000_000;

impl ImageInfo {
    /// The node's object in the output of `qemu-img info --output=json`, its keys in QEMU's order.
    #[must_use]
    pub fn to_json(&self) -> Value {
        in_order(self.object())
    }

    fn object(&self) -> Value {
        let children: Vec<Value> =
            self.file.iter().map(|file| json!({ "name": "file", "info": file.object() })).collect();
        let mut info = json!({
            "children": children,
            "virtual-size": self.virtual_size,
            "filename": self.filename,
            "format": self.driver,
            "actual-size": self.actual_size,
            "dirty-flag": self.qcow2.as_ref().is_some_and(|qcow2| qcow2.has(features::DIRTY)),
        });
        if let Some(qcow2) = &self.qcow2 {
            qcow2.describe(&mut info);
        } else if let Some(cluster_size) = self.cluster_size() {
            info["cluster-size"] = cluster_size.into();
        }
        if let Some(data) = self.format_specific() {
            let kind = if self.qcow2.is_some() { "qcow2" } else { "file" };
            info["format-specific"] = json!({ "type": kind, "data": data });
        }
        info
    }

    pub(super) fn cluster_size(&self) -> Option<u64> {
        self.qcow2.as_ref().map(|qcow2| qcow2.cluster_size)
    }

    /// What only the node's driver knows of, if it knows anything. A file's is empty.
    pub(super) fn format_specific(&self) -> Option<Value> {
        match &self.qcow2 {
            Some(qcow2) => Some(in_order(qcow2.format_specific())),
            None if self.driver == "file" => Some(json!({})),
            None => None,
        }
    }
}

impl Qcow2Info {
    fn describe(&self, info: &mut Value) {
        info["cluster-size"] = self.cluster_size.into();
        if self.encryption.is_some() {
            info["encrypted"] = true.into();
        }
        if !self.snapshots.is_empty() {
            info["snapshots"] = self.snapshots.iter().map(snapshot_json).collect();
        }
        if let Some(name) = &self.backing_name {
            info["backing-filename"] = name.as_str().into();
            info["full-backing-filename"] = self.backing_path.as_deref().unwrap_or(name).into();
            if let Some(format) = &self.backing_format {
                info["backing-filename-format"] = format.as_str().into();
            }
        }
    }

    fn format_specific(&self) -> Value {
        let mut data = json!({ "compression-type": self.compression.name(), "refcount-bits": self.refcount_bits });
        match self.version {
            Version::V2 => data["compat"] = "0.10".into(),
            Version::V3 => {
                data["compat"] = "1.1".into();
                data["lazy-refcounts"] = (self.features.compatible & features::LAZY_REFCOUNTS != 0).into();
                data["corrupt"] = self.has(features::CORRUPT).into();
                data["extended-l2"] = self.has(features::EXTENDED_L2).into();
                if !self.bitmaps.is_empty() {
                    data["bitmaps"] = self.bitmaps.iter().map(bitmap_json).collect();
                }
                if self.has(features::EXTERNAL_DATA_FILE) {
                    data["data-file-raw"] = self.data_file_raw().into();
                    if let Some(name) = &self.data_file {
                        data["data-file"] = name.as_str().into();
                    }
                }
            }
        }
        if let Some(encryption) = self.encryption {
            data["encrypt"] = json!({ "format": encryption.name() });
        }
        data
    }
}

fn bitmap_json(bitmap: &Bitmap) -> Value {
    let flags = [("in-use", bitmap.in_use), ("auto", bitmap.auto)];
    let flags: Vec<&str> = flags.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
    json!({ "flags": flags, "name": bitmap.name, "granularity": bitmap.granularity })
}

fn snapshot_json(snapshot: &Snapshot) -> Value {
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

/// Puts the keys of all objects in the order of QEMU's hash tables.
fn in_order(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let mut members: Vec<(String, Value)> =
                members.into_iter().map(|(key, value)| (key, in_order(value))).collect();
            members.sort_by_key(|(key, _)| bucket(key));
            Value::Object(Map::from_iter(members))
        }
        Value::Array(values) => values.into_iter().map(in_order).collect(),
        other => other,
    }
}
