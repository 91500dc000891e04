//! Changes of more than guest data, stopped at every point as those in `crash.rs`.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::path::Path;

use qtk_block::{BlockWrite, Preallocation};
use qtk_qcow2::{Amend, Backing, CompressionType, GuestCluster, NewBitmap, NewSnapshot, Transaction, Version, codec};
use support::crash::{Scenario, change, rich_image};
use support::{noise, qemu_img, qemu_io};

type Change = Box<dyn Fn(&Transaction)>;

fn crash_everywhere(image: &[u8], change: &Change) {
    for finish in [Transaction::commit, Transaction::commit_settled] {
        Scenario::record(image.to_vec(), change, Some(finish)).crash();
    }
}

/// An image that `qemu-img` and `qemu-io` made.
fn image(make: impl FnOnce(&Path)) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    std::fs::read(folder.path().join("image.qcow2")).unwrap()
}

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
fn sizes_and_clusters() {
    for (cluster, refcount_bits) in [(512, 16), (4096, 8)] {
        let image = rich_image(cluster, refcount_bits);
        for (_, change) in metadata_changes(cluster as u64) {
            crash_everywhere(&image, &change);
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
fn snapshots_and_amendments() {
    for (cluster, refcount_bits) in [(512, 16), (4096, 8)] {
        let image = rich_image(cluster, refcount_bits);
        for (_, change) in feature_changes(cluster as u64) {
            crash_everywhere(&image, &change);
        }
    }
}

#[test]
fn bitmaps() {
    for options in ["cluster_size=4k", "cluster_size=64k"] {
        let image = image(|folder| {
            qemu_img(folder, &format!("create -f qcow2 -o {options} image.qcow2 200k"));
            qemu_img(folder, "bitmap --add -g 512 image.qcow2 one");
            qemu_img(folder, "bitmap --add --disable image.qcow2 two");
            qemu_io(folder, "image.qcow2", &["write -P 1 3000 7000"]);
        });
        let new = NewBitmap { name: "three".into(), granularity: Some(1024), enabled: true };
        let changes: [Change; 5] = [
            Box::new(|t| t.write_at(&noise(1, 9000), 20_000).unwrap()),
            Box::new(move |t| t.add_bitmap(&new).unwrap()),
            Box::new(|t| t.remove_bitmap("one").unwrap()),
            Box::new(|t| {
                t.merge_bitmap("two", &t.bitmap_contents("one").unwrap()).unwrap();
                t.clear_bitmap("one").unwrap();
                t.enable_bitmap("two").unwrap();
            }),
            Box::new(|t| {
                t.remove_bitmap("one").unwrap();
                t.remove_bitmap("two").unwrap();
                t.set_backing(Some(Backing { name: "base.raw".into(), format: Some("raw".into()) })).unwrap();
            }),
        ];
        for change in &changes {
            crash_everywhere(&image, change);
        }
    }
}

#[test]
fn an_upgrade() {
    let image = image(|folder| {
        qemu_img(folder, "create -f qcow2 -o compat=0.10,cluster_size=4k image.qcow2 100k");
        qemu_io(folder, "image.qcow2", &["write -P 1 3000 70000"]);
    });
    let amend =
        Amend { version: Some(Version::V3), lazy_refcounts: Some(true), refcount_bits: Some(64), ..Amend::default() };
    crash_everywhere(&image, &(Box::new(move |t: &Transaction| t.amend(&amend).unwrap()) as Change));
}

/// Names in the header that move others past its first sector, and back.
#[test]
fn headers_longer_than_a_sector() {
    let name = |len: usize| format!("{}base.raw", "./".repeat((len - 8) / 2));
    for options in ["cluster_size=4k", "cluster_size=64k"] {
        for (old, new) in [(0, 1000), (1000, 900), (300, 400), (1000, 20), (400, 0), (20, 1000)] {
            let image = image(|folder| {
                qemu_img(folder, &format!("create -f qcow2 -o {options} image.qcow2 100k"));
                if old > 0 {
                    std::fs::write(folder.join("base.raw"), []).unwrap();
                    qemu_img(folder, &format!("rebase -u -b {} -F raw image.qcow2", name(old)));
                }
            });
            let backing = (new > 0).then(|| Backing { name: name(new), format: (new != 20).then(|| "raw".into()) });
            crash_everywhere(
                &image,
                &(Box::new(move |t: &Transaction| t.set_backing(backing.clone()).unwrap()) as Change),
            );
        }
    }
}
