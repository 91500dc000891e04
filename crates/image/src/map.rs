use std::ops::Range;

use qtk_block::BlockRead;
use qtk_qcow2::MappingKind;
use serde_json::{Value, json};

use crate::{ChainLayer, Error, Image, Run};

/// One line of `qemu-img map --output=json`: a run of the disk that is stored in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First byte on the guest's disk.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// The layer that decides what the run reads as, counted from the top.
    pub depth: usize,
    /// Whether that layer says anything about the run.
    pub present: bool,
    /// Whether it reads as zeroes.
    pub zero: bool,
    /// Whether bytes are stored for it.
    pub data: bool,
    /// Whether they are compressed.
    pub compressed: bool,
    /// Where the run begins in the layer's file, if it lies there in one piece.
    pub offset: Option<u64>,
}

impl MapEntry {
    fn new(run: &Run) -> Self {
        let (present, zero, offset) = match run.kind {
            MappingKind::Unallocated => (false, true, None),
            MappingKind::Zero { host } => (true, true, host),
            MappingKind::Data { host } => (true, false, Some(host)),
            MappingKind::Compressed { .. } => (true, false, None),
        };
        Self {
            start: run.range.start,
            length: run.range.end - run.range.start,
            depth: run.depth,
            present,
            zero,
            data: present && !zero,
            compressed: matches!(run.kind, MappingKind::Compressed { .. }),
            offset: offset.map(|offset| offset.0),
        }
    }

    /// Takes in `next` if it goes on in the same way.
    fn join(&mut self, next: &Self) -> bool {
        let offset_goes_on = self.offset.map(|offset| offset + self.length) == next.offset;
        let flags = |entry: &Self| (entry.depth, entry.present, entry.zero, entry.data, entry.compressed);
        let joins = flags(self) == flags(next) && self.start + self.length == next.start && offset_goes_on;
        if joins {
            self.length += next.length;
        }
        joins
    }

    /// The entry as `qemu-img` prints it.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut entry = json!({
            "start": self.start,
            "length": self.length,
            "depth": self.depth,
            "present": self.present,
            "zero": self.zero,
            "data": self.data,
            "compressed": self.compressed,
        });
        if let Some(offset) = self.offset {
            entry["offset"] = offset.into();
        }
        entry
    }
}

/// How a range of an image's disk is stored, as `qemu-img map --output=json` says it. What lies past the disk's end is left out.
pub fn map(image: &Image, range: Range<u64>) -> Result<Vec<MapEntry>, Error> {
    let end = range.end.min(image.size());
    let mut entries: Vec<MapEntry> = Vec::new();
    for run in image.runs(range.start.min(end)..end) {
        let mut rest = run?;
        while !rest.range.is_empty() {
            let entry = first_entry(&image.layers()[rest.depth], &rest)?;
            let length = entry.length;
            if !entries.last_mut().is_some_and(|last| last.join(&entry)) {
                entries.push(entry);
            }
            rest = Run {
                range: rest.range.start + length..rest.range.end,
                depth: rest.depth,
                kind: rest.kind.skip(length),
            };
        }
    }
    Ok(entries)
}

/// The front of a run as `qemu-img` sees it: it tells holes in data, and the places of what is not allocated.
fn first_entry(layer: &ChainLayer, run: &Run) -> Result<MapEntry, Error> {
    let Range { start, end } = run.range;
    let mut entry = MapEntry::new(run);
    match run.kind {
        MappingKind::Data { host } if layer.qcow2().is_some() => {
            let (host_end, is_hole) = layer.hole(host.0..host.0.saturating_add(end - start))?;
            (entry.length, entry.zero) = (host_end - host.0, is_hole);
        }
        MappingKind::Unallocated => {
            let (front, host) = layer.reserved(start..end)?;
            (entry.length, entry.offset) = (front.end - front.start, host.map(|host| host.0));
        }
        _ => {}
    }
    Ok(entry)
}
