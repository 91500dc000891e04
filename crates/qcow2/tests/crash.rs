//! Commits and rollbacks stopped at every point, with unsynced writes kept, dropped, picked at random or torn; and hosts that
//! fail at every point.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use qtk_block::{BlockRead, BlockWrite, Extent, HostStorage, MemoryDisk};
use qtk_qcow2::{ClusterBits, CreateOptions, Layer, Transaction, check, create};
use support::crash::{Scenario, assert_state_for_qemu, change, rich_image};
use support::{memory, noise, read_all};

fn empty_image(size: u64, bits: u32, refcount_bits: u32) -> Vec<u8> {
    let disk = Arc::new(MemoryDisk::new(0));
    let cluster_bits = ClusterBits::new(bits).unwrap();
    create(disk.clone(), "image", &CreateOptions { size, cluster_bits, refcount_bits, ..CreateOptions::default() })
        .unwrap();
    read_all(&*disk)
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
        assert_state_for_qemu(folder.path(), &image, &scenario.new.disk);
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
