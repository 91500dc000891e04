//! Commits and rollbacks stopped at every point, with unsynced writes kept, dropped, picked at random or torn; and hosts that
//! fail at every point.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use qtk_block::{BlockRead, BlockWrite, Extent, HostStorage, MemoryDisk, Preallocation};
use qtk_qcow2::{
    Amend, Backing, ClusterBits, CompressionType, CreateOptions, GuestCluster, Layer, NewBitmap, NewSnapshot,
    Transaction, Version, check, codec, create,
};
use support::crash::{Scenario, assert_state_for_qemu};
use support::{memory, mixed_disk, noise, qemu_img, qemu_io, read_all};

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
        for finish in [Transaction::commit, Transaction::commit_settled] {
            Scenario::record(rich_image(cluster, refcount_bits), change(cluster as u64), Some(finish)).crash();
        }
    }
    for (bits, refcount_bits) in [(9, 64), (9, 1), (12, 1)] {
        let image = empty_image(100 << bits, bits, refcount_bits);
        Scenario::record(image, change(1 << bits), Some(Transaction::commit)).crash();
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
        Scenario::record(rich_image(1 << bits, 1 << order), change, Some(Transaction::commit)).crash();
    }
}

type Change = Box<dyn Fn(&Transaction)>;

/// Changes of more than guest data.
fn metadata_changes(cluster: u64) -> Vec<(&'static str, Change)> {
    let backing = |name: &str| Some(Backing { name: name.into(), format: Some("raw".into()) });
    let pack = move |transaction: &Transaction| {
        for index in 0..12 {
            let bytes = [noise(index, 100), vec![7; usize::try_from(cluster).unwrap() - 100]].concat();
            let mut compressed = vec![0; bytes.len()];
            let mut compressor = codec::Compressor::new(CompressionType::Zlib, None).unwrap();
            let len = compressor.compress(&bytes, &mut compressed).unwrap().unwrap();
            transaction.write_compressed(GuestCluster(index * 3), &compressed[..len]).unwrap();
        }
        transaction.write_at(&[1; 10], 0).unwrap();
    };
    vec![
        ("grow", Box::new(move |t: &Transaction| t.resize(cluster * 9000 + 512, Preallocation::Off).unwrap())),
        ("shrink", Box::new(move |t: &Transaction| t.resize(cluster * 3 + 512, Preallocation::Off).unwrap())),
        ("preallocate", Box::new(move |t: &Transaction| t.resize(cluster * 150, Preallocation::Metadata).unwrap())),
        ("clear", Box::new(|t: &Transaction| t.clear().unwrap())),
        ("backing", Box::new(move |t: &Transaction| t.set_backing(backing("base.raw")).unwrap())),
        ("compress", Box::new(pack)),
        (
            "all",
            Box::new(move |t: &Transaction| {
                change(cluster)(t);
                t.resize(cluster * 300, Preallocation::Off).unwrap();
                pack(t);
                t.resize(cluster * 100, Preallocation::Off).unwrap();
                t.set_backing(backing("base.raw")).unwrap();
            }),
        ),
    ]
}

#[test]
fn changes_of_metadata_are_atomic() {
    for (cluster, refcount_bits) in [(512, 16), (4096, 8)] {
        for (_, change) in metadata_changes(cluster as u64) {
            for finish in [Transaction::commit, Transaction::commit_settled] {
                Scenario::record(rich_image(cluster, refcount_bits), &change, Some(finish)).crash();
            }
        }
    }
}

/// Changes of snapshots, bitmaps and the format, which begin with a snapshot and without bitmaps.
fn feature_changes(cluster: u64) -> Vec<(&'static str, Change)> {
    let snapshot = |name: &str| NewSnapshot { name: name.into(), taken: (1, 2), icount: None };
    let bitmap =
        |name: &str, granularity| NewBitmap { name: name.into(), granularity: Some(granularity), enabled: true };
    let amend = |amend: Amend| -> Change { Box::new(move |t| t.amend(&amend).unwrap()) };
    vec![
        ("create", Box::new(move |t| drop(t.create_snapshot(&snapshot("two")).unwrap()))),
        ("apply", Box::new(|t| t.apply_snapshot("one").unwrap())),
        ("delete", Box::new(|t| t.delete_snapshot("one").unwrap())),
        (
            "all",
            Box::new(move |t| {
                t.apply_snapshot("one").unwrap();
                change(cluster)(t);
                t.create_snapshot(&snapshot("two")).unwrap();
                t.write_at(&[3; 1000], cluster * 2).unwrap();
                t.add_bitmap(&bitmap("changes", 512)).unwrap();
                change(cluster)(t);
                t.delete_snapshot("one").unwrap();
            }),
        ),
        (
            "bitmaps",
            Box::new(move |t| {
                t.add_bitmap(&bitmap("fine", 512)).unwrap();
                t.add_bitmap(&bitmap("coarse", 4096)).unwrap();
                change(cluster)(t);
                t.remove_bitmap("coarse").unwrap();
            }),
        ),
        ("down", amend(Amend { version: Some(Version::V2), refcount_bits: Some(16), ..Amend::default() })),
        ("narrow", amend(Amend { refcount_bits: Some(8), ..Amend::default() })),
        ("wide", amend(Amend { refcount_bits: Some(64), lazy_refcounts: Some(true), ..Amend::default() })),
    ]
}

#[test]
fn changes_of_features_are_atomic() {
    for (cluster, refcount_bits) in [(512, 16), (4096, 8)] {
        for (_, change) in feature_changes(cluster as u64) {
            for finish in [Transaction::commit, Transaction::commit_settled] {
                Scenario::record(rich_image(cluster, refcount_bits), &change, Some(finish)).crash();
            }
        }
    }
}

#[test]
fn a_growing_refcount_table_is_atomic() {
    // A 512-byte table of 64 blocks, each of 64 counts, covers 2 MiB of file.
    let image = empty_image(8 << 20, 9, 64);
    for finish in [Transaction::commit, Transaction::commit_settled] {
        let change = |transaction: &Transaction| transaction.write_at(&noise(1, 3 << 20), 12_345).unwrap();
        let scenario = Scenario::record(image.clone(), change, Some(finish));
        let image = scenario.after();
        let header = Layer::open(Arc::new(memory(&image)), "image").unwrap().header().clone();
        assert!(header.refcount_table_clusters > 1);
        let folder = tempfile::tempdir().unwrap();
        assert_state_for_qemu(folder.path(), &image, &scenario.new);
    }
}

#[test]
fn rollbacks_leave_the_old_image() {
    let before = rich_image(4096, 16);
    let scenario = Scenario::record(before.clone(), change(4096), None);
    scenario.crash();
    assert_eq!(scenario.after().len(), before.len());
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
