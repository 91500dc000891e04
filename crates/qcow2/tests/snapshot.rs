//! Internal snapshots: the same steps by QEMU and by us must leave images that QEMU finds alike and sound.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use qtk_block::{Access, BlockRead, BlockWrite, RawFile};
use qtk_qcow2::{Error, Layer, NewSnapshot, Preallocation, SnapshotRefusal, Transaction};
use serde_json::Value;
use support::{Device, assert_clean, memory, mixed_disk, open, qemu_img, qemu_io, qemu_read, read_all};

/// A folder with two images that start alike: `qemu.qcow2`, which QEMU changes, and `ours.qcow2`.
struct Pair {
    folder: tempfile::TempDir,
    backed: bool,
}

impl Pair {
    fn new(size: u64, options: &str, backed: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let backing = if backed {
            mixed_disk(&folder.path().join("base.raw"), usize::try_from(size / 2).unwrap() & !511, 3000);
            "-b base.raw -F raw "
        } else {
            ""
        };
        qemu_img(folder.path(), &format!("create -f qcow2 -o {options} {backing}qemu.qcow2 {size}"));
        std::fs::copy(folder.path().join("qemu.qcow2"), folder.path().join("ours.qcow2")).unwrap();
        Self { folder, backed }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn ours(&self) -> PathBuf {
        self.path().join("ours.qcow2")
    }

    fn begin(&self) -> Transaction {
        let backing = self.backed.then(|| {
            Arc::new(RawFile::open(&self.path().join("base.raw"), Access::ReadOnly).unwrap()) as Arc<dyn BlockRead>
        });
        Transaction::begin(Arc::new(open(&self.ours())), backing).unwrap()
    }

    fn change(&self, change: impl FnOnce(&Transaction)) {
        let transaction = self.begin();
        change(&transaction);
        transaction.commit_settled().unwrap();
        assert_clean(&self.ours());
    }

    fn both(&self, change: impl Fn(&str)) {
        change("qemu.qcow2");
        change("ours.qcow2");
    }

    fn names(&self) -> Vec<String> {
        open(&self.ours()).snapshots().unwrap().into_iter().map(|snapshot| snapshot.name).collect()
    }

    fn info(&self, image: &str) -> Value {
        let mut info: Value =
            serde_json::from_str(&qemu_img(self.path(), &format!("info --output=json {image}"))).unwrap();
        for snapshot in info.get_mut("snapshots").and_then(Value::as_array_mut).into_iter().flatten() {
            snapshot["date-sec"] = 0.into();
            snapshot["date-nsec"] = 0.into();
        }
        for key in ["filename", "actual-size", "children"] {
            info[key] = Value::Null;
        }
        info
    }

    fn assert_alike(&self) {
        assert_eq!(self.info("ours.qcow2"), self.info("qemu.qcow2"));
        qemu_img(self.path(), "compare qemu.qcow2 ours.qcow2");
        for (index, snapshot) in open(&self.ours()).snapshots().unwrap().iter().enumerate() {
            let content = |image: &str| {
                let wanted = format!("snapshot.id={}", snapshot.id);
                qemu_img(self.path(), &format!("convert -l {wanted} -O raw {image} snapshot.raw"));
                std::fs::read(self.path().join("snapshot.raw")).unwrap()
            };
            let expected = content("qemu.qcow2");
            assert!(content("ours.qcow2") == expected, "{} differs", snapshot.name);
            if !self.backed {
                // QEMU gives it the size that the disk has now.
                let ours = read_all(&open(&self.ours()).at_snapshot(index).unwrap());
                let common = ours.len().min(expected.len());
                assert!(ours[..common] == expected[..common]);
            }
        }
    }
}

fn snapshot(name: &str) -> NewSnapshot {
    NewSnapshot { name: name.into(), taken: (1, 2), icount: Some(0) }
}

#[derive(Clone, Debug)]
enum Operation {
    /// By QEMU on both images, so that it must find its way in what we left.
    QemuWrite {
        range: Range<u64>,
        byte: u8,
    },
    Write {
        range: Range<u64>,
        byte: u8,
    },
    Zero(Range<u64>),
    Create,
    Apply(usize),
    Delete(usize),
    /// In tenths of the first size.
    Resize(u64),
}

fn operations(size: u64) -> impl Strategy<Value = Vec<Operation>> {
    let range = (0..size / 512, 1..size / 1024).prop_map(move |(at, len)| at * 512..(at * 512 + len * 512).min(size));
    let operation = prop_oneof![
        2 => (range.clone(), 1..255_u8).prop_map(|(range, byte)| Operation::QemuWrite { range, byte }),
        2 => (range.clone(), 1..255_u8).prop_map(|(range, byte)| Operation::Write { range, byte }),
        1 => range.prop_map(Operation::Zero),
        4 => Just(Operation::Create),
        3 => (0..9_usize).prop_map(Operation::Apply),
        2 => (0..9_usize).prop_map(Operation::Delete),
        1 => (10..15_u64).prop_map(Operation::Resize),
    ];
    proptest::collection::vec(operation, 3..14)
}

fn play(pair: &Pair, size: u64, resizable: bool, operations: &[Operation]) {
    for (step, operation) in operations.iter().enumerate() {
        let names = pair.names();
        let pick = |index: usize| names.get(index % names.len().max(1)).cloned();
        match operation {
            Operation::QemuWrite { range, byte } => {
                let write = format!("write -P {byte} {} {}", range.start, range.end - range.start);
                pair.both(|image| drop(qemu_io(pair.path(), image, &[&write])));
            }
            Operation::Write { range, byte } => {
                let len = range.end - range.start;
                qemu_io(pair.path(), "qemu.qcow2", &[&format!("write -P {byte} {} {len}", range.start)]);
                pair.change(|t| t.write_at(&vec![*byte; usize::try_from(len).unwrap()], range.start).unwrap());
            }
            Operation::Zero(range) => {
                let len = range.end - range.start;
                qemu_io(pair.path(), "qemu.qcow2", &[&format!("write -z {} {len}", range.start)]);
                pair.change(|t| t.zero(range.clone()).unwrap());
            }
            Operation::Create => {
                let name = format!("s{step}");
                qemu_img(pair.path(), &format!("snapshot -c {name} qemu.qcow2"));
                pair.change(|t| drop(t.create_snapshot(&snapshot(&name)).unwrap()));
            }
            Operation::Apply(index) => {
                if let Some(name) = pick(*index) {
                    qemu_img(pair.path(), &format!("snapshot -a {name} qemu.qcow2"));
                    pair.change(|t| t.apply_snapshot(&name).unwrap());
                }
            }
            Operation::Delete(index) => {
                if let Some(name) = pick(*index) {
                    qemu_img(pair.path(), &format!("snapshot -d {name} qemu.qcow2"));
                    pair.change(|t| t.delete_snapshot(&name).unwrap());
                }
            }
            Operation::Resize(tenths) => {
                if resizable || names.is_empty() {
                    let size = size / 10 * tenths / 512 * 512;
                    qemu_img(pair.path(), &format!("resize --shrink qemu.qcow2 {size}"));
                    pair.change(|t| t.resize(size, Preallocation::Off).unwrap());
                }
            }
        }
        pair.assert_alike();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn as_qemu_does_it(
        (options, size) in prop_oneof![
            Just(("cluster_size=512", 200 << 10)),
            Just(("cluster_size=4k", (3 << 20) + 1536)),
            Just(("cluster_size=64k,refcount_bits=64", 3 << 20)),
            Just(("cluster_size=4k,refcount_bits=4", 2 << 20)),
            Just(("cluster_size=4k,compat=0.10", 3 << 20)),
            Just(("cluster_size=2M", 5 << 20)),
            Just(("cluster_size=64k,extended_l2=on", 3 << 20)),
        ],
        backed in any::<bool>(),
        operations in operations(150 << 10),
    ) {
        let pair = Pair::new(size, options, backed);
        play(&pair, size, !options.contains("0.10"), &operations);
    }
}

#[test]
fn compressed_clusters_are_shared() {
    let pair = Pair::new(1 << 20, "cluster_size=4k", false);
    mixed_disk(&pair.path().join("source.raw"), 1 << 20, 3000);
    pair.both(|image| {
        qemu_img(pair.path(), &format!("convert -c -f raw -O qcow2 -o cluster_size=4k source.raw {image}"));
    });
    play(
        &pair,
        1 << 20,
        true,
        &[
            Operation::Create,
            Operation::Write { range: 5000..50_000, byte: 7 },
            Operation::Create,
            Operation::Apply(0),
            Operation::Write { range: 20_000..90_000, byte: 8 },
            Operation::Delete(0),
            Operation::Apply(0),
            Operation::Delete(0),
        ],
    );
}

#[test]
fn names_and_identifiers_are_found_as_qemu_does() {
    let pair = Pair::new(1 << 20, "cluster_size=4k", false);
    for (step, name) in ["2", "1", "twice", "twice"].into_iter().enumerate() {
        pair.both(|image| drop(qemu_io(pair.path(), image, &[&format!("write -P {} 0 64k", step + 1)])));
        qemu_img(pair.path(), &format!("snapshot -c {name} qemu.qcow2"));
        pair.change(|t| drop(t.create_snapshot(&snapshot(name)).unwrap()));
    }
    pair.assert_alike();
    for (wanted, byte) in [("1", 1), ("2", 2), ("twice", 3), ("4", 4)] {
        qemu_img(pair.path(), &format!("snapshot -a {wanted} qemu.qcow2"));
        pair.change(|t| t.apply_snapshot(wanted).unwrap());
        pair.assert_alike();
        assert_eq!(qemu_read(&pair.ours())[0], byte);
    }
    for name in ["1", "twice", "2"] {
        qemu_img(pair.path(), &format!("snapshot -d {name} qemu.qcow2"));
        pair.change(|t| t.delete_snapshot(name).unwrap());
        pair.assert_alike();
    }
    assert_eq!(pair.names(), ["twice"]);
    let error = pair.begin().delete_snapshot("4").unwrap_err();
    assert!(matches!(error, Error::Snapshot { refusal: SnapshotRefusal::NotFound, .. }), "{error}");
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let pair = Pair::new(1 << 20, "cluster_size=4k,refcount_bits=1", false);
    pair.both(|image| drop(qemu_io(pair.path(), image, &["write -P 3 0 64k"])));
    let before = std::fs::read(pair.ours()).unwrap();
    let refused = |error: Error| match error {
        Error::Snapshot { refusal, .. } => refusal,
        error => panic!("{error}"),
    };
    assert_eq!(refused(pair.begin().apply_snapshot("none").unwrap_err()), SnapshotRefusal::NotFound);
    let long = "x".repeat(1 << 16);
    assert_eq!(refused(pair.begin().create_snapshot(&snapshot(&long)).unwrap_err()), SnapshotRefusal::NameTooLong);
    // A count of one bit cannot say that two tables use a cluster.
    assert!(matches!(pair.begin().create_snapshot(&snapshot("a")), Err(Error::NotWritable { .. })));
    assert!(std::fs::read(pair.ours()).unwrap() == before);
    qemu_img(pair.path(), "bitmap --add ours.qcow2 changes");
    assert_eq!(refused(pair.begin().apply_snapshot("none").unwrap_err()), SnapshotRefusal::Bitmaps);
}

#[test]
fn one_transaction_can_do_it_all() {
    let pair = Pair::new(1 << 20, "cluster_size=4k", false);
    pair.both(|image| drop(qemu_io(pair.path(), image, &["write -P 3 0 64k"])));
    qemu_img(pair.path(), "snapshot -c first qemu.qcow2");
    qemu_io(pair.path(), "qemu.qcow2", &["write -P 4 10k 64k"]);
    qemu_img(pair.path(), "snapshot -c second qemu.qcow2");
    qemu_io(pair.path(), "qemu.qcow2", &["write -P 5 20k 64k"]);
    pair.change(|t| {
        t.create_snapshot(&snapshot("first")).unwrap();
        t.write_at(&[4; 64 << 10], 10 << 10).unwrap();
        t.create_snapshot(&snapshot("second")).unwrap();
        t.write_at(&[5; 64 << 10], 20 << 10).unwrap();
    });
    pair.assert_alike();
    qemu_img(pair.path(), "snapshot -a first qemu.qcow2");
    qemu_img(pair.path(), "snapshot -d first qemu.qcow2");
    qemu_img(pair.path(), "snapshot -d second qemu.qcow2");
    qemu_io(pair.path(), "qemu.qcow2", &["write -P 6 30k 64k"]);
    pair.change(|t| {
        t.apply_snapshot("first").unwrap();
        t.delete_snapshot("first").unwrap();
        t.delete_snapshot("second").unwrap();
        t.write_at(&[6; 64 << 10], 30 << 10).unwrap();
    });
    pair.assert_alike();
    let transaction = pair.begin();
    transaction.create_snapshot(&snapshot("new")).unwrap();
    let error = transaction.apply_snapshot("new").unwrap_err();
    assert!(matches!(error, Error::Snapshot { refusal: SnapshotRefusal::Uncommitted, .. }), "{error}");
}

#[test]
fn the_state_of_a_machine_is_kept_past_the_disk() {
    let pair = Pair::new(1 << 20, "cluster_size=4k", false);
    let with_state = |name: &str, byte: u8| {
        pair.both(|image| {
            qemu_io(pair.path(), image, &[&format!("write -P {byte} 0 64k"), &format!("write -b -P {byte} 0 20k")]);
        });
        qemu_img(pair.path(), &format!("snapshot -c {name} qemu.qcow2"));
        pair.change(|t| drop(t.create_snapshot(&snapshot(name)).unwrap()));
        pair.assert_alike();
    };
    let assert_state = |byte: u8| {
        for image in ["qemu.qcow2", "ours.qcow2"] {
            let read = qemu_io(pair.path(), image, &[&format!("read -b -P {byte} 0 20k")]);
            assert!(!read.contains("failed"), "{image}: {read}");
        }
    };
    with_state("first", 1);
    with_state("second", 2);
    for (name, byte) in [("first", 1), ("second", 2)] {
        qemu_img(pair.path(), &format!("snapshot -a {name} qemu.qcow2"));
        pair.change(|t| t.apply_snapshot(name).unwrap());
        pair.assert_alike();
        assert_state(byte);
    }
    qemu_img(pair.path(), "snapshot -d first qemu.qcow2");
    pair.change(|t| t.delete_snapshot("first").unwrap());
    assert_state(2);
    pair.both(|image| drop(qemu_io(pair.path(), image, &["write -b -P 7 0 20k"])));
    assert_clean(&pair.ours());
    qemu_img(pair.path(), "snapshot -a second qemu.qcow2");
    pair.change(|t| t.apply_snapshot("second").unwrap());
    assert_state(2);
}

/// The bytes of our image, changed by `change`.
fn damage(pair: &Pair, change: impl FnOnce(&mut [u8])) {
    let mut bytes = std::fs::read(pair.ours()).unwrap();
    change(&mut bytes);
    std::fs::write(pair.ours(), bytes).unwrap();
}

#[test]
fn hostile_snapshots_cannot_free_what_others_use() {
    let pair = Pair::new(1 << 20, "cluster_size=4k", false);
    pair.both(|image| drop(qemu_io(pair.path(), image, &["write -P 3 0 64k"])));
    pair.change(|t| drop(t.create_snapshot(&snapshot("a")).unwrap()));
    let layer = open(&pair.ours());
    let l1 = usize::try_from(layer.snapshots().unwrap()[0].l1_table.0).unwrap();
    let table = usize::try_from(layer.header().snapshot_table.0).unwrap();
    let header = layer.header();
    let sound = std::fs::read(pair.ours()).unwrap();
    for target in [0, header.refcount_table.0, header.l1_table.0, header.snapshot_table.0, 1 << 40, 0x1200] {
        // L2 tables where other metadata lies, past the file's end and within a cluster.
        damage(&pair, |bytes| bytes[l1..l1 + 8].copy_from_slice(&(target | 1 << 63).to_be_bytes()));
        for change in [Transaction::apply_snapshot, Transaction::delete_snapshot] {
            let result = change(&pair.begin(), "a");
            assert!(target == 0 || matches!(result, Err(Error::Corrupt { .. })), "{target:#x}: {result:?}");
        }
        std::fs::write(pair.ours(), &sound).unwrap();
    }
    // More entries than a table can have.
    damage(&pair, |bytes| bytes[table + 8..table + 12].fill(0xff));
    assert!(matches!(open(&pair.ours()).at_snapshot(0).map(drop), Err(Error::Corrupt { .. })));
}

#[test]
fn devices_of_fixed_size_take_snapshots_where_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -o cluster_size=4k image.qcow2 8M");
    qemu_io(folder.path(), "image.qcow2", &["write -P 7 0 1M"]);
    let path = folder.path().join("image.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.resize(4 << 20, 0);
    let device = Arc::new(Device(memory(&bytes)));
    let one = NewSnapshot { name: "one".into(), taken: (1, 0), icount: None };
    for create in [true, false] {
        let layer = Arc::new(Layer::open(device.clone(), "device").unwrap());
        let transaction = Transaction::begin(layer, None).unwrap();
        let changed =
            if create { transaction.create_snapshot(&one).map(drop) } else { transaction.delete_snapshot("one") };
        changed.unwrap();
        transaction.commit_settled().unwrap();
        std::fs::write(&path, read_all(&*device)).unwrap();
        assert_clean(&path);
        assert!(qemu_read(&path)[..1 << 20].iter().all(|&byte| byte == 7));
    }
}
