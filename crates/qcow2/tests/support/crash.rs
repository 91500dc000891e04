//! Power cuts: what a file may hold when one happens in the midst of a change, and what an image must be then.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use qtk_block::{BlockRead, BlockWrite, MemoryDisk, WriteEvent, WriteRecorder};
use qtk_qcow2::{Error, Layer, Transaction, check, extension};

use super::{assert_clean, memory, mixed_disk, noise, qemu_img, qemu_io, qemu_read, read_all};

/// A file as the crash left it.
#[derive(Clone)]
pub(crate) struct Remains(pub(crate) Vec<u8>);

impl Remains {
    pub(crate) fn apply(&mut self, event: &WriteEvent) {
        match event {
            WriteEvent::Write { offset, bytes } => {
                let start = usize::try_from(*offset).unwrap();
                let end = start + bytes.len();
                if end > self.0.len() {
                    self.0.resize(end, 0);
                }
                self.0[start..end].copy_from_slice(bytes);
            }
            WriteEvent::Zero(range) => {
                let end = usize::try_from(range.end).unwrap().min(self.0.len());
                let start = usize::try_from(range.start).unwrap().min(end);
                self.0[start..end].fill(0);
            }
            WriteEvent::SetSize(size) => self.0.resize(usize::try_from(*size).unwrap(), 0),
            WriteEvent::Flush => {}
        }
    }

    fn with(mut self, events: &[&WriteEvent]) -> Self {
        events.iter().for_each(|event| self.apply(event));
        self
    }
}

/// What unsynced events may leave behind: any selection of them, the last write perhaps torn.
fn selections(unsynced: &[WriteEvent], seed: u64) -> Vec<Vec<WriteEvent>> {
    let mut selections = vec![Vec::new(), unsynced.to_vec()];
    if let Some((WriteEvent::Write { offset, bytes }, before)) = unsynced.split_last()
        && bytes.len() > 512
    {
        let torn = WriteEvent::Write { offset: *offset, bytes: bytes[..(bytes.len() / 2) & !511].to_vec() };
        selections.push([before, &[torn]].concat());
    }
    for round in 0..3 {
        let picks = noise(seed * 3 + round, unsynced.len());
        let picked = unsynced.iter().zip(picks).filter(|(_, pick)| pick % 2 == 0).map(|(event, _)| event.clone());
        // Writes between two flushes may reach the disk in any order.
        selections.push(picked.rev().collect());
    }
    selections
}

/// What an image says, wherever it says it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) disk: Vec<u8>,
    header: String,
    snapshots: Vec<(String, u64, (usize, u64))>,
    bitmaps: Vec<(String, bool, Vec<Range<u64>>)>,
}

impl State {
    fn of(image: &[u8]) -> Self {
        let layer = Layer::open(Arc::new(memory(image)), "image").unwrap();
        let header = layer.header();
        // What only reaches past an extension, and where the bitmaps are, changes while a commit settles.
        let said = |magic| magic != extension::BITMAPS && magic != u32::from_be_bytes(*b"SKIP");
        let mut extensions: Vec<_> =
            header.extensions.iter().map(|extension| (extension.magic, &extension.data)).collect();
        extensions.retain(|&(magic, _)| said(magic));
        let features = (header.features.incompatible, header.features.compatible, header.features.autoclear);
        let fixed = (header.version, header.refcount_order, &header.backing_name, features);
        let snapshots = layer.snapshots().unwrap().into_iter().enumerate().map(|(index, snapshot)| {
            let content = digest(&read_all(&layer.at_snapshot(index).unwrap()));
            (format!("{} {}", snapshot.id, snapshot.name), snapshot.vm_state_size, content)
        });
        let bitmaps = layer.bitmaps().unwrap().into_iter().map(|bitmap| {
            let ranges = layer.bitmap_contents(&bitmap.name).unwrap().ranges().collect();
            (bitmap.name, bitmap.auto, ranges)
        });
        Self {
            disk: read_all(&layer),
            header: format!("{fixed:?} {extensions:?}"),
            snapshots: snapshots.collect(),
            bitmaps: bitmaps.collect(),
        }
    }
}

/// How a change ends.
pub(crate) type Finish = fn(&Transaction) -> Result<(), Error>;

/// What a scenario does to an image, and what it leaves.
pub(crate) struct Scenario {
    pub(crate) before: Vec<u8>,
    pub(crate) old: State,
    pub(crate) new: State,
    pub(crate) events: Vec<WriteEvent>,
}

impl Scenario {
    /// Records a change that `finish` commits, or that is rolled back.
    pub(crate) fn record(before: Vec<u8>, change: impl Fn(&Transaction), finish: Option<Finish>) -> Self {
        let recorder = Arc::new(WriteRecorder::new(memory(&before)));
        let layer = Arc::new(Layer::open(recorder.clone(), "image").unwrap());
        let backing = layer.header().backing_name.as_ref().map(|_| Arc::new(MemoryDisk::new(0)) as Arc<dyn BlockRead>);
        let transaction = Transaction::begin(layer, backing).unwrap();
        change(&transaction);
        let disk = read_all(&transaction);
        if let Some(finish) = finish {
            finish(&transaction).unwrap();
        }
        drop(transaction);
        let events = recorder.events();
        let old = State::of(&before);
        let new = State::of(&after(&before, &events));
        assert!(new.disk == if finish.is_some() { disk } else { old.disk.clone() }, "the commit changed the disk");
        Self { before, old, new, events }
    }

    /// The file when all is done.
    pub(crate) fn after(&self) -> Vec<u8> {
        after(&self.before, &self.events)
    }

    /// Crashes everywhere and judges what is left.
    pub(crate) fn crash(&self) {
        let folder = tempfile::tempdir().unwrap();
        let header_write = header_write(&self.events).unwrap_or(usize::MAX);
        let mut seen = 0;
        each_remains(&self.before, &self.events, |stop, remains, replaced| {
            let expected = if replaced { &self.new } else { &self.old };
            assert_state(remains, expected, stop);
            // Every state is judged by our own check, and by QEMU's near the commit and now and then.
            seen += 1;
            if stop.abs_diff(header_write) <= 2 || seen % 16 == 0 {
                assert_state_for_qemu(folder.path(), remains, &expected.disk);
            }
        });
        assert_state_for_qemu(folder.path(), &self.after(), &self.new.disk);
    }
}

fn after(before: &[u8], events: &[WriteEvent]) -> Vec<u8> {
    let mut after = Remains(before.to_vec());
    events.iter().for_each(|event| after.apply(event));
    after.0
}

fn header_write(events: &[WriteEvent]) -> Option<usize> {
    events.iter().position(|event| matches!(event, WriteEvent::Write { offset: 0, .. }))
}

/// Calls `judge` with every file that a power cut may leave of a change: after how many events it came, the file, and whether
/// the header was replaced by then.
pub(crate) fn each_remains(before: &[u8], events: &[WriteEvent], mut judge: impl FnMut(usize, &[u8], bool)) {
    let header_write = header_write(events).unwrap_or(usize::MAX);
    let mut seen = BTreeSet::new();
    let mut synced = Remains(before.to_vec());
    let mut unsynced_from = 0;
    for stop in 0..=events.len() {
        let unsynced = &events[unsynced_from..stop];
        for selection in selections(unsynced, stop as u64) {
            let remains = synced.clone().with(&selection.iter().collect::<Vec<_>>());
            let replaced = header_write < unsynced_from
                || selection.iter().any(|event| matches!(event, WriteEvent::Write { offset: 0, .. }));
            if seen.insert(digest(&remains.0)) {
                judge(stop, &remains.0, replaced);
            }
        }
        if let Some(WriteEvent::Flush) = events.get(stop) {
            unsynced.iter().for_each(|event| synced.apply(event));
            unsynced_from = stop + 1;
        }
    }
}

fn digest(bytes: &[u8]) -> (usize, u64) {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    (bytes.len(), bytes.iter().fold(0xcbf2_9ce4_8422_2325, fold))
}

fn assert_state(remains: &[u8], expected: &State, stop: usize) {
    let layer = Layer::open(Arc::new(memory(remains)), "remains").unwrap();
    let state = State::of(remains);
    assert!(state.disk == expected.disk, "the disk is neither old nor new after event {stop}");
    let said = |state: &State| format!("{} {:?} {:?}", state.header, state.snapshots, state.bitmaps);
    assert_eq!(said(&state), said(expected), "after event {stop}");
    let report = check(&layer).unwrap();
    assert!(report.is_clean(), "after event {stop}: {report:#?}");
}

pub(crate) fn assert_state_for_qemu(folder: &Path, remains: &[u8], expected: &[u8]) {
    let image = folder.join("remains.qcow2");
    std::fs::write(&image, remains).unwrap();
    // What a change may name as the backing.
    std::fs::write(folder.join("base.raw"), []).unwrap();
    assert_clean(&image);
    assert!(qemu_read(&image) == expected, "QEMU reads something else");
}

/// A compressed image with a snapshot and plain and zero clusters.
pub(crate) fn rich_image(cluster: usize, refcount_bits: u32) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    mixed_disk(&folder.path().join("source.raw"), cluster * 40, cluster * 2 / 3);
    let options = format!("cluster_size={cluster},refcount_bits={refcount_bits}");
    qemu_img(folder.path(), &format!("convert -c -f raw -O qcow2 -o {options} source.raw image.qcow2"));
    qemu_io(folder.path(), "image.qcow2", &[&format!("write -P 1 0 {}", cluster * 5)]);
    qemu_img(folder.path(), "snapshot -c one image.qcow2");
    qemu_io(folder.path(), "image.qcow2", &[&format!("write -P 2 {} {}", cluster * 2, cluster * 2)]);
    std::fs::read(folder.path().join("image.qcow2")).unwrap()
}

/// Partial, whole, repeated and zeroing writes over a disk of at least 40 clusters.
pub(crate) fn change(cluster: u64) -> impl Fn(&Transaction) {
    move |transaction| {
        let write = |seed, len: u64, at: u64| {
            transaction.write_at(&noise(seed, usize::try_from(len).unwrap()), at).unwrap();
        };
        write(1, 100, cluster + 7);
        write(2, cluster * 3, cluster * 3 - 50);
        write(3, 200, cluster + 50);
        transaction.zero(cluster * 10..cluster * 12 + 9).unwrap();
        transaction.discard(cluster * 20..cluster * 22).unwrap();
        write(4, cluster * 4, cluster * 30);
        transaction.zero(cluster * 31..cluster * 32).unwrap();
    }
}
