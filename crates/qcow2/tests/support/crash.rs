//! Power cuts: what a file may hold when one happens in the midst of a change, and what an image must be then.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use qtk_block::{WriteEvent, WriteRecorder};
use qtk_qcow2::{Error, Layer, Snapshot, Transaction, check};

use super::{assert_clean, memory, noise, qemu_read, read_all};

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

/// How a change ends.
pub(crate) type Finish = fn(&Transaction) -> Result<(), Error>;

/// What a scenario does to an image, and what it leaves.
pub(crate) struct Scenario {
    pub(crate) before: Vec<u8>,
    pub(crate) old: Vec<u8>,
    pub(crate) new: Vec<u8>,
    pub(crate) events: Vec<WriteEvent>,
}

impl Scenario {
    /// Records a change that `finish` commits, or that is rolled back.
    pub(crate) fn record(before: Vec<u8>, change: impl Fn(&Transaction), finish: Option<Finish>) -> Self {
        let recorder = Arc::new(WriteRecorder::new(memory(&before)));
        let layer = Arc::new(Layer::open(recorder.clone(), "image").unwrap());
        let old = read_all(&*layer);
        let transaction = Transaction::begin(layer, None).unwrap();
        change(&transaction);
        let new = if finish.is_some() { read_all(&transaction) } else { old.clone() };
        if let Some(finish) = finish {
            finish(&transaction).unwrap();
        }
        drop(transaction);
        Self { before, old, new, events: recorder.events() }
    }

    /// The file when all is done.
    pub(crate) fn after(&self) -> Vec<u8> {
        let mut after = Remains(self.before.clone());
        self.events.iter().for_each(|event| after.apply(event));
        after.0
    }

    /// The snapshot called `one`, where there is one, holds what it held.
    fn assert_snapshot(&self, remains: &[u8], stop: usize) {
        if let (Some(before), Some(now)) = (snapshot_one(&self.before), snapshot_one(remains)) {
            assert!(before == now, "the snapshot has changed after event {stop}");
        }
    }

    /// Crashes everywhere and judges what is left.
    pub(crate) fn crash(&self) {
        let folder = tempfile::tempdir().unwrap();
        let header_write = header_write(&self.events).unwrap_or(usize::MAX);
        let mut seen = 0;
        each_remains(&self.before, &self.events, |stop, remains, replaced| {
            let expected = if replaced { &self.new } else { &self.old };
            assert_state(remains, expected, stop);
            self.assert_snapshot(remains, stop);
            // Every state is judged by our own check, and by QEMU's near the commit and now and then.
            seen += 1;
            if stop.abs_diff(header_write) <= 2 || seen % 16 == 0 {
                assert_state_for_qemu(folder.path(), remains, expected);
            }
        });
        assert_state_for_qemu(folder.path(), &self.after(), &self.new);
    }
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

fn snapshot_one(image: &[u8]) -> Option<Vec<u8>> {
    let layer = Layer::open(Arc::new(memory(image)), "image").unwrap();
    let index = Snapshot::find_by_name(&layer.snapshots().unwrap(), "one")?;
    Some(read_all(&layer.at_snapshot(index).unwrap()))
}

fn assert_state(remains: &[u8], expected: &[u8], stop: usize) {
    let layer = Layer::open(Arc::new(memory(remains)), "remains").unwrap();
    assert!(read_all(&layer) == expected, "neither old nor new after event {stop}");
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
