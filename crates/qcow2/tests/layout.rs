//! Settled commits against `qemu-img`, which changes images in place: the same clusters end up in the same places.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::path::Path;
use std::sync::Arc;

use qtk_block::{Access, Preallocation, RawFile};
use qtk_qcow2::{Amend, NewBitmap, NewSnapshot, Transaction, Version};
use support::{assert_clean, counter, noise, open, qemu_check, qemu_img, qemu_io, qemu_read};

/// A change as an argument line of `qemu-img`, and as ours.
struct Change {
    line: &'static str,
    ours: fn(&Transaction),
}

const CHANGES: [Change; 14] = [
    Change { line: "resize image.qcow2 40M", ours: |t| t.resize(40 << 20, Preallocation::Off).unwrap() },
    Change { line: "resize image.qcow2 +512", ours: |t| t.resize((8 << 20) + 512, Preallocation::Off).unwrap() },
    Change { line: "resize --shrink image.qcow2 1M", ours: |t| t.resize(1 << 20, Preallocation::Off).unwrap() },
    Change { line: "resize --shrink image.qcow2 512", ours: |t| t.resize(512, Preallocation::Off).unwrap() },
    Change {
        line: "resize --preallocation=metadata image.qcow2 9M",
        ours: |t| t.resize(9 << 20, Preallocation::Metadata).unwrap(),
    },
    Change { line: "snapshot -c two image.qcow2", ours: |t| snapshot(t, "two") },
    Change { line: "snapshot -a one image.qcow2", ours: |t| t.apply_snapshot("one").unwrap() },
    Change { line: "snapshot -d one image.qcow2", ours: |t| t.delete_snapshot("one").unwrap() },
    Change { line: "bitmap --add image.qcow2 changes", ours: |t| t.add_bitmap(&bitmap()).unwrap() },
    Change { line: "amend -o compat=0.10 image.qcow2", ours: |t| amend(t, |a| a.version = Some(Version::V2)) },
    Change { line: "amend -o refcount_bits=32 image.qcow2", ours: |t| amend(t, |a| a.refcount_bits = Some(32)) },
    Change { line: "amend -o refcount_bits=8 image.qcow2", ours: |t| amend(t, |a| a.refcount_bits = Some(8)) },
    Change { line: "amend -o lazy_refcounts=on image.qcow2", ours: |t| amend(t, |a| a.lazy_refcounts = Some(true)) },
    Change { line: "rebase -u -b base.raw -F raw image.qcow2", ours: |t| t.set_backing(Some(base())).unwrap() },
];

fn base() -> qtk_qcow2::Backing {
    qtk_qcow2::Backing { name: "base.raw".into(), format: Some("raw".into()) }
}

fn bitmap() -> NewBitmap {
    NewBitmap { name: "changes".into(), granularity: None, enabled: true }
}

fn amend(transaction: &Transaction, what: fn(&mut Amend)) {
    let mut amend = Amend::default();
    what(&mut amend);
    transaction.amend(&amend).unwrap();
}

fn snapshot(transaction: &Transaction, name: &str) {
    transaction.create_snapshot(&NewSnapshot { name: name.into(), taken: (0, 0), icount: None }).unwrap();
}

/// An image of 8 MiB with data here and there, and maybe a snapshot in which some of it differs.
fn image(folder: &Path, options: &str, with_snapshot: bool) {
    qemu_img(folder, &format!("create -f qcow2 -o {options} image.qcow2 8M"));
    qemu_io(folder, "image.qcow2", &["write -P 1 0 300k", "write -P 2 3M 70k", "write -P 3 7M 1M"]);
    if with_snapshot {
        qemu_img(folder, "snapshot -c one image.qcow2");
        qemu_io(folder, "image.qcow2", &["write -P 4 100k 50k", "write -P 5 5M 100k"]);
    }
    std::fs::write(folder.join("base.raw"), noise(1, 1 << 20)).unwrap();
}

/// Where everything lies, as far as `qemu-img` tells.
fn layout(image: &Path) -> (String, u64, u64) {
    let folder = image.parent().unwrap();
    let name = image.file_name().unwrap().to_str().unwrap();
    let map = qemu_img(folder, &format!("map --output=json {name}"));
    (map, counter(&qemu_check(image), "image-end-offset"), image.metadata().unwrap().len())
}

#[test]
fn settled_commits_leave_an_image_as_an_update_in_place_would() {
    let mut different = Vec::new();
    for options in [
        "cluster_size=64k",
        "cluster_size=4k",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=64k,extended_l2=on",
    ] {
        for with_snapshot in if options == "cluster_size=64k" { vec![false, true] } else { vec![true] } {
            for Change { line, ours } in &CHANGES {
                // QEMU splits its last run of such small clusters for a refcount block.
                let splits = options == "cluster_size=512" && line.contains("preallocation");
                let downgrade =
                    line.contains("compat=0.10") && (options.contains("extended") || options.contains("refcount"));
                if splits || downgrade || !with_snapshot && line.ends_with("one image.qcow2") {
                    continue;
                }
                let folder = tempfile::tempdir().unwrap();
                image(folder.path(), options, with_snapshot);
                let (theirs, subject) = (folder.path().join("image.qcow2"), folder.path().join("ours.qcow2"));
                std::fs::copy(&theirs, &subject).unwrap();
                qemu_img(folder.path(), line);
                let transaction = Transaction::begin(Arc::new(open(&subject)), None).unwrap();
                ours(&transaction);
                transaction.commit_settled().unwrap();
                drop(transaction);
                assert_clean(&subject);
                assert!(qemu_read(&subject) == qemu_read(&theirs), "{options}, {line}: the disks differ");
                let ((map, end, size), theirs) = (layout(&subject), layout(&theirs));
                let first = map.lines().zip(theirs.0.lines()).find(|(ours, theirs)| ours != theirs);
                if first.is_some() || (end, size) != (theirs.1, theirs.2) {
                    different.push(format!(
                        "{options}, {with_snapshot}, {line}: {first:?}, end {end}, {size} bytes, but {} and {}",
                        theirs.1, theirs.2
                    ));
                }
            }
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}

#[test]
fn a_cleared_image_is_as_after_qemu_imgs_commit() {
    for options in
        ["cluster_size=64k", "cluster_size=512", "cluster_size=4k,refcount_bits=1", "compat=0.10", "extended_l2=on"]
    {
        for with_snapshot in [false, true] {
            // One bit cannot count a snapshot; and QEMU makes an L2 table for every part of the disk, which tells among small ones.
            if with_snapshot && (options.contains("refcount_bits=1") || options.contains("512")) {
                continue;
            }
            let folder = tempfile::tempdir().unwrap();
            let base = folder.path().join("base.raw");
            std::fs::write(&base, noise(1, 1 << 20)).unwrap();
            qemu_img(folder.path(), &format!("create -f qcow2 -o {options} -b base.raw -F raw image.qcow2 8M"));
            qemu_io(folder.path(), "image.qcow2", &["write -P 1 0 300k", "write -P 2 3M 70k"]);
            if with_snapshot {
                qemu_img(folder.path(), "snapshot -c one image.qcow2");
            }
            let (theirs, subject) = (folder.path().join("image.qcow2"), folder.path().join("ours.qcow2"));
            std::fs::copy(&theirs, &subject).unwrap();
            qemu_img(folder.path(), "commit image.qcow2");
            let backing = Arc::new(RawFile::open(&base, Access::ReadOnly).unwrap());
            let transaction = Transaction::begin(Arc::new(open(&subject)), Some(backing)).unwrap();
            transaction.clear().unwrap();
            transaction.commit_settled().unwrap();
            drop(transaction);
            assert_clean(&subject);
            assert_eq!(layout(&subject), layout(&theirs), "{options}, {with_snapshot}");
        }
    }
}
