//! Commits and rollbacks stopped at every point, with unsynced writes kept, dropped, picked at random or torn; and hosts that
//! fail at every point.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use qtk_block::{BlockRead, BlockWrite, Extent, HostStorage, MemoryDisk, WriteEvent, WriteRecorder};
use qtk_qcow2::{ClusterBits, CreateOptions, Layer, Transaction, check, create};
use support::{assert_clean, memory, mixed_disk, noise, qemu_img, qemu_io, qemu_read, read_all};

/// A file as the crash left it.
#[derive(Clone)]
struct Remains(Vec<u8>);

impl Remains {
    fn apply(&mut self, event: &WriteEvent) {
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

/// What a scenario does to an image, and what it leaves.
struct Scenario {
    before: Vec<u8>,
    old: Vec<u8>,
    new: Vec<u8>,
    events: Vec<WriteEvent>,
}

impl Scenario {
    fn record(before: Vec<u8>, change: impl Fn(&Transaction), commit: bool) -> Self {
        let recorder = Arc::new(WriteRecorder::new(memory(&before)));
        let layer = Arc::new(Layer::open(recorder.clone(), "image").unwrap());
        let old = read_all(&*layer);
        let transaction = Transaction::begin(layer, None).unwrap();
        change(&transaction);
        let new = if commit { read_all(&transaction) } else { old.clone() };
        if commit {
            transaction.commit().unwrap();
        }
        drop(transaction);
        Self { before, old, new, events: recorder.events() }
    }

    fn header_write(&self) -> Option<usize> {
        self.events.iter().position(|event| matches!(event, WriteEvent::Write { offset: 0, .. }))
    }

    /// Crashes everywhere and judges what is left.
    fn crash(&self) {
        let folder = tempfile::tempdir().unwrap();
        let header_write = self.header_write().unwrap_or(usize::MAX);
        let mut seen = BTreeSet::new();
        let mut synced = Remains(self.before.clone());
        let mut unsynced_from = 0;
        for stop in 0..=self.events.len() {
            let unsynced = &self.events[unsynced_from..stop];
            for selection in selections(unsynced, stop as u64) {
                let remains = synced.clone().with(&selection.iter().collect::<Vec<_>>());
                let replaced = header_write < unsynced_from
                    || selection.iter().any(|event| matches!(event, WriteEvent::Write { offset: 0, .. }));
                if !seen.insert(digest(&remains.0)) {
                    continue;
                }
                let expected = if replaced { &self.new } else { &self.old };
                assert_state(&remains.0, expected, stop);
                // Every state is judged by our own check, and by QEMU's near the commit and now and then.
                if stop.abs_diff(header_write) <= 2 || seen.len() % 16 == 0 {
                    assert_state_for_qemu(folder.path(), &remains.0, expected);
                }
            }
            if let Some(WriteEvent::Flush) = self.events.get(stop) {
                unsynced.iter().for_each(|event| synced.apply(event));
                unsynced_from = stop + 1;
            }
        }
        assert_state_for_qemu(
            folder.path(),
            &synced.with(&self.events[unsynced_from..].iter().collect::<Vec<_>>()).0,
            &self.new,
        );
    }
}

fn digest(bytes: &[u8]) -> (usize, u64) {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    (bytes.len(), bytes.iter().fold(0xcbf2_9ce4_8422_2325, fold))
}

fn assert_state(remains: &[u8], expected: &[u8], stop: usize) {
    let layer = Layer::open(Arc::new(memory(remains)), "remains").unwrap();
    assert!(read_all(&layer) == expected, "neither old nor new after event {stop}");
    let report = check(&layer).unwrap();
    assert!(report.is_clean(), "after event {stop}: {report:#?}");
}

fn assert_state_for_qemu(folder: &Path, remains: &[u8], expected: &[u8]) {
    let image = folder.join("remains.qcow2");
    std::fs::write(&image, remains).unwrap();
    assert_clean(&image);
    assert!(qemu_read(&image) == expected, "QEMU reads something else");
}

/// A compressed image with a snapshot and plain and zero clusters.
fn rich_image(cluster: usize, refcount_bits: u32) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    mixed_disk(&folder.path().join("source.raw"), cluster * 40, cluster * 2 / 3);
    let options = format!("cluster_size={cluster},refcount_bits={refcount_bits}");
    qemu_img(folder.path(), &format!("convert -c -f raw -O qcow2 -o {options} source.raw image.qcow2"));
    qemu_io(folder.path(), "image.qcow2", &[&format!("write -P 1 0 {}", cluster * 5)]);
    qemu_img(folder.path(), "snapshot -c one image.qcow2");
    qemu_io(folder.path(), "image.qcow2", &[&format!("write -P 2 {} {}", cluster * 2, cluster * 2)]);
    std::fs::read(folder.path().join("image.qcow2")).unwrap()
}

fn empty_image(size: u64, bits: u32, refcount_bits: u32) -> Vec<u8> {
    let disk = Arc::new(MemoryDisk::new(0));
    let cluster_bits = ClusterBits::new(bits).unwrap();
    create(disk.clone(), "image", &CreateOptions { size, cluster_bits, refcount_bits, ..CreateOptions::default() })
        .unwrap();
    read_all(&*disk)
}

/// Partial, whole, repeated and zeroing writes over a disk of at least 40 clusters.
fn change(cluster: u64) -> impl Fn(&Transaction) {
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

#[test]
fn commits_are_atomic() {
    for (cluster, refcount_bits) in [(512, 16), (4096, 8), (4096, 64)] {
        Scenario::record(rich_image(cluster, refcount_bits), change(cluster as u64), true).crash();
    }
    for (bits, refcount_bits) in [(9, 64), (9, 1), (12, 1)] {
        let image = empty_image(100 << bits, bits, refcount_bits);
        Scenario::record(image, change(1 << bits), true).crash();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn commits_of_anything_are_atomic(
        (bits, changes) in prop_oneof![Just(9_u32), Just(12)].prop_flat_map(|bits| {
            let cluster = 1_u64 << bits;
            let range = (0..cluster * 36, 1..cluster * 4);
            (Just(bits), proptest::collection::vec((range, 0..4_u64), 1..12))
        }),
        order in 3..=6_u32,
    ) {
        let change = |transaction: &Transaction| {
            for &((at, len), kind) in &changes {
                match kind {
                    0 => transaction.zero(at..at + len).unwrap(),
                    1 => transaction.discard(at..at + len).unwrap(),
                    seed => transaction.write_at(&noise(seed, usize::try_from(len).unwrap()), at).unwrap(),
                }
            }
        };
        Scenario::record(rich_image(1 << bits, 1 << order), change, true).crash();
    }
}

#[test]
fn a_growing_refcount_table_is_atomic() {
    // A 512-byte table of 64 blocks, each of 64 counts, covers 2 MiB of file.
    let image = empty_image(8 << 20, 9, 64);
    let scenario =
        Scenario::record(image, |transaction| transaction.write_at(&noise(1, 3 << 20), 12_345).unwrap(), true);
    let image = scenario.events.iter().fold(Remains(scenario.before.clone()), |mut remains, event| {
        remains.apply(event);
        remains
    });
    let header = Layer::open(Arc::new(memory(&image.0)), "image").unwrap().header().clone();
    assert!(header.refcount_table_clusters > 1);
    let folder = tempfile::tempdir().unwrap();
    assert_state_for_qemu(folder.path(), &image.0, &scenario.new);
}

#[test]
fn rollbacks_leave_the_old_image() {
    let before = rich_image(4096, 16);
    let scenario = Scenario::record(before.clone(), change(4096), false);
    scenario.crash();
    let mut after = Remains(before.clone());
    scenario.events.iter().for_each(|event| after.apply(event));
    assert_eq!(after.0.len(), before.len());
}

/// Storage on which one operation fails.
struct Failing {
    disk: MemoryDisk,
    countdown: AtomicUsize,
}

impl Failing {
    fn step(&self) -> io::Result<()> {
        match self.countdown.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(1) => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

impl BlockRead for Failing {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_at(buf, offset)
    }
    fn extent(&self, range: Range<u64>) -> io::Result<Extent> {
        self.disk.extent(range)
    }
}

impl BlockWrite for Failing {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.step()?;
        self.disk.write_at(buf, offset)
    }
    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.disk.zero(range)
    }
    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.disk.discard(range)
    }
    fn flush(&self) -> io::Result<()> {
        self.step()?;
        self.disk.flush()
    }
}

impl HostStorage for Failing {
    fn set_size(&self, size: u64) -> io::Result<()> {
        self.disk.set_size(size)
    }
}

/// Changes an image and commits, as far as the host lets it.
fn try_change(layer: Layer, cluster: u64) -> io::Result<()> {
    let transaction = Transaction::begin(Arc::new(layer), None)?;
    transaction.write_at(&noise(1, 5000), cluster - 100)?;
    transaction.zero(cluster * 5..cluster * 7 + 1)?;
    transaction.write_at(&noise(2, 100), cluster * 3)?;
    transaction.commit()?;
    Ok(())
}

#[test]
fn a_failing_host_costs_nothing() {
    let cluster = 4096;
    let before = rich_image(4096, 16);
    let mut failures = 0;
    for countdown in 1.. {
        let storage = Arc::new(Failing { disk: memory(&before), countdown: AtomicUsize::new(countdown) });
        let layer = Layer::open(storage.clone(), "image").unwrap();
        let old = read_all(&layer);
        let result = try_change(layer, cluster);
        let after = Layer::open(storage.clone(), "image").unwrap();
        assert!(check(&after).unwrap().is_clean(), "host failed at step {countdown}");
        match result {
            Ok(()) => break,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::StorageFull),
        }
        failures += 1;
        // The header's own write, and the sync after it, come last: only then may it be the new image.
        if read_all(&after) == old {
            assert_eq!(storage.size(), before.len() as u64);
        }
    }
    assert!(failures > 8);
}

#[test]
fn a_failed_write_can_be_followed_by_others() {
    let before = empty_image(1 << 20, 12, 16);
    let storage = Arc::new(Failing { disk: memory(&before), countdown: AtomicUsize::new(1) });
    let layer = Arc::new(Layer::open(storage.clone(), "image").unwrap());
    let transaction = Transaction::begin(layer, None).unwrap();
    assert!(transaction.write_at(&[1; 9000], 0).is_err());
    transaction.write_at(&[2; 9000], 100).unwrap();
    transaction.commit().unwrap();
    assert!(transaction.write_at(&[3], 0).is_err());
    let after = Layer::open(storage, "image").unwrap();
    assert!(check(&after).unwrap().is_clean());
    assert_eq!(read_all(&after)[..9200], [vec![0; 100], vec![2; 9000], vec![0; 100]].concat());
}
