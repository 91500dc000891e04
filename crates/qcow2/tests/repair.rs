//! Repairs against those of `qemu-img check -r`: the same counts, the same words, an image of the same state. And what ours
//! promises beyond: all or nothing, and no other structure changed.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use qtk_block::{BlockRead, WriteRecorder};
use qtk_qcow2::{CheckReport, Error, Finding, Layer, Repair, RepairReport, check, repair, repair_dirty};
use serde_json::Value;
use support::crash::each_remains;
use support::{
    Device, counter, memory, mixed_disk, open_damaged, qemu_check, qemu_img, qemu_io, qemu_read, read_all, run,
};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

/// An image in memory, its fields by name.
#[derive(Clone)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn word(&self, at: u64) -> u64 {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap();
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn change(&mut self, at: u64, change: impl FnOnce(u64) -> u64) {
        let word = change(self.word(at));
        self.put(at, &word.to_be_bytes());
    }

    fn l1(&self) -> u64 {
        self.word(40)
    }

    fn l2(&self) -> u64 {
        self.word(self.l1()) & OFFSET
    }

    fn refcount_table(&self) -> u64 {
        self.word(48)
    }

    /// Where the 16-bit refcount of a cluster is.
    fn refcount(&self, cluster: u64) -> u64 {
        self.word(self.refcount_table()) + cluster * 2
    }

    fn snapshot_table(&self) -> u64 {
        self.word(64)
    }

    /// The cluster of the `index`th data cluster of the first L2 table.
    fn data(&self, index: u64) -> u64 {
        (self.word(self.l2() + index * 8) & OFFSET) / CLUSTER
    }
}

const CLUSTER: u64 = 4096;

/// Compressed, plain and zero clusters, and two snapshots.
fn image() -> Bytes {
    let folder = tempfile::tempdir().unwrap();
    mixed_disk(&folder.path().join("source.raw"), 60 << 12, 3000);
    qemu_img(folder.path(), "convert -c -f raw -O qcow2 -o cluster_size=4k source.raw image.qcow2");
    qemu_io(folder.path(), "image.qcow2", &["write -P 1 0 40k", "write -z 44k 4k"]);
    qemu_img(folder.path(), "snapshot -c one image.qcow2");
    qemu_io(folder.path(), "image.qcow2", &["write -P 2 8k 80k"]);
    qemu_img(folder.path(), "snapshot -c two image.qcow2");
    qemu_io(folder.path(), "image.qcow2", &["write -P 3 12k 12k", "write -z 60k 8k"]);
    Bytes(std::fs::read(folder.path().join("image.qcow2")).unwrap())
}

type Damage = (&'static str, fn(&mut Bytes));

/// What QEMU repairs whole, by class.
const REPAIRABLE: &[Damage] = &[
    ("nothing", |_| ()),
    ("a leak", |image| image.put(image.refcount(image.data(0)), &[0, 9])),
    ("a leak past the end", |image| image.put(image.refcount(image.0.len() as u64 / CLUSTER + 7), &[0, 1])),
    ("a refcount too low", |image| image.put(image.refcount(image.l2() / CLUSTER), &[0, 0])),
    ("a shared cluster counted once", |image| image.put(image.refcount(image.data(9)), &[0, 1])),
    ("copied flags", |image| {
        image.change(image.l1(), |entry| entry ^ COPIED);
        image.change(image.l2(), |entry| entry ^ COPIED);
    }),
    ("no refcount block", |image| image.put(image.refcount_table(), &[0; 8])),
    ("no refcount table", |image| image.put(56, &[0; 4])),
    ("a refcount block past the end", |image| image.put(image.refcount_table() + 8, &(1_u64 << 30).to_be_bytes())),
    ("a refcount block beyond all files", |image| image.put(image.refcount_table() + 8, &(1_u64 << 50).to_be_bytes())),
    ("a guest cluster lost", |image| image.put(image.l2() + 8, &[0; 8])),
    ("the active state lost", |image| image.put(image.l1(), &[0; 8])),
    // Of the second snapshot, whose entry follows one of 72 bytes; the first bytes past the table are its name then.
    ("too much extra data", |image| image.put(image.snapshot_table() + 72 + 36, &[0, 0, 5, 0])),
    ("marks", |image| image.put(72, &[0, 0, 0, 0, 0, 0, 0, 3])),
    ("marks and a refcount", |image| {
        image.put(72, &[0, 0, 0, 0, 0, 0, 0, 3]);
        image.put(image.refcount(image.data(2)), &[0, 5]);
    }),
];

/// What stays damaged, but not more than QEMU leaves it.
const LASTING: &[Damage] = &[
    ("data misaligned", |image| image.change(image.l2(), |entry| entry | 512)),
    ("data past the end", |image| image.change(image.l2(), |_| COPIED | 1 << 40)),
    ("reserved bits", |image| image.change(image.l2(), |entry| entry | 1 << 58)),
    ("an L2 table past the end", |image| image.change(image.l1(), |_| COPIED | 1 << 40)),
    ("a snapshot's L1 table misaligned", |image| image.change(image.snapshot_table(), |offset| offset | 8)),
    ("a compressed cluster with the flag", |image| {
        let entries = (0..60).map(|index| image.l2() + index * 8);
        let compressed = entries.into_iter().find(|&at| image.word(at) >> 62 == 1).unwrap();
        image.change(compressed, |entry| entry | COPIED);
    }),
];

fn damaged(damage: &Damage) -> Bytes {
    thread_local!(static IMAGE: Bytes = image());
    let mut image = IMAGE.with(Clone::clone);
    (damage.1)(&mut image);
    image
}

/// Repairs a file; the report and what was said.
fn repair_file(image: &Path, what: Repair) -> (RepairReport, String) {
    let mut said = String::new();
    let mut say = |finding: &Finding| {
        let program = if finding.is_error_report() { "qemu-img: " } else { "" };
        said += &format!("{program}{finding}\n");
    };
    let report = repair(&open_damaged(image), what, &mut say).unwrap();
    (report, said)
}

/// Repairs a copy with QEMU, as JSON, and what it said.
fn qemu_repair(image: &Path, what: Repair) -> (Value, String) {
    let what = if what == Repair::All { "all" } else { "leaks" };
    let output = run("qemu-img", ["check", "-r", what, "--output=json", image.to_str().unwrap()]);
    (serde_json::from_slice(&output.stdout).unwrap_or(Value::Null), String::from_utf8(output.stderr).unwrap())
}

/// Repairs as QEMU does, and compares what was said, what was counted, and what is left.
fn compare_repairs(damage: &Damage, what: Repair) {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (folder.path().join("ours.qcow2"), folder.path().join("theirs.qcow2"));
    let bytes = damaged(damage).0;
    std::fs::write(&ours, &bytes).unwrap();
    std::fs::write(&theirs, &bytes).unwrap();
    let name = format!("{} repaired for {what:?}", damage.0);
    let (report, said) = repair_file(&ours, what);
    let (judge, judge_said) = qemu_repair(&theirs, what);
    if report.check.failure.is_some() {
        assert!(judge_said.contains("Check failed"), "{name}: {report:#?}");
        assert!(std::fs::read(&ours).unwrap() == bytes, "{name} failed but changed the image");
        return;
    }
    // QEMU prints what its second check finds, too.
    assert!(judge_said.starts_with(&said), "{name}:\n{said}\nagainst\n{judge_said}");
    assert_eq!(report.leaks_fixed, counter(&judge, "leaks-fixed"), "leaks of {name}: {judge}");
    assert_eq!(report.corruptions_fixed, counter(&judge, "corruptions-fixed"), "corruptions of {name}: {judge}");
    let without_name = |image: &Path| {
        let mut check = qemu_check(image);
        check.as_object_mut().unwrap().remove("filename");
        check
    };
    assert_eq!(without_name(&ours), without_name(&theirs), "what is left of {name}");
    if REPAIRABLE.contains(damage) {
        assert!(what == Repair::Leaks || check(&open_damaged(&ours)).unwrap().is_clean(), "{name}");
        assert!(qemu_read(&ours) == qemu_read(&theirs), "content of {name}");
        let list = |image: &str| qemu_img(folder.path(), &format!("snapshot -l {image}"));
        assert_eq!(list("ours.qcow2"), list("theirs.qcow2"), "snapshots of {name}");
    }
}

#[test]
fn repairs_as_qemu_does() {
    for damage in REPAIRABLE.iter().chain(LASTING) {
        for what in [Repair::Leaks, Repair::All] {
            compare_repairs(damage, what);
        }
    }
}

#[test]
fn what_qemu_gives_up_is_repaired() {
    let damages: &[Damage] = &[
        ("a refcount table entry with reserved bits", |image| image.change(image.refcount_table(), |entry| entry | 1)),
        ("a misaligned refcount block", |image| image.change(image.refcount_table(), |entry| entry | 512)),
    ];
    for damage in damages {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image.qcow2");
        std::fs::write(&image, damaged(damage).0).unwrap();
        repair_file(&image, Repair::All);
        support::assert_clean(&image);
        assert!(qemu_img(folder.path(), "snapshot -l image.qcow2").contains("two"), "{}", damage.0);
    }
}

/// QEMU writes the header when it opens an image with bitmaps, before it has read the snapshots, and so loses them.
#[test]
fn snapshots_survive_where_there_are_bitmaps() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    std::fs::write(&path, image().0).unwrap();
    qemu_img(folder.path(), "bitmap --add image.qcow2 changes");
    let mut bytes = Bytes(std::fs::read(&path).unwrap());
    bytes.put(bytes.refcount(bytes.data(0)), &[0, 7]);
    std::fs::write(&path, bytes.0).unwrap();
    assert_eq!(repair_file(&path, Repair::All).0.leaks_fixed, 1);
    support::assert_clean(&path);
    assert!(qemu_img(folder.path(), "snapshot -l image.qcow2").contains("two"));
    assert!(qemu_img(folder.path(), "info image.qcow2").contains("changes"));
}

#[test]
fn a_structure_that_two_claim_is_left_alone() {
    let mut bytes = image();
    // The guest's first cluster is the L2 table itself, whose flags would have to change.
    let l2 = bytes.l2();
    bytes.change(l2, |_| l2 | COPIED);
    let disk = Arc::new(WriteRecorder::new(memory(&bytes.0)));
    let layer = Layer::open_damaged(disk.clone(), "image", None).unwrap();
    let error = repair(&layer, Repair::All, &mut |_| ()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Corrupt { .. }), "{text}");
    assert!(text.contains("the L2 table of L1 entry 0 and the L2 entry of guest offset 0x0 overlap"), "{text}");
    assert!(disk.events().is_empty());
}

#[test]
fn dirty_images_are_repaired_before_they_are_written() {
    let mut bytes = image();
    bytes.put(bytes.refcount(bytes.data(2)), &[0, 5]);
    assert!(!repair_dirty(&layer_of(&bytes.0), &mut |_| ()).unwrap());
    bytes.put(79, &[1]);
    let disk = Arc::new(memory(&bytes.0));
    let layer = Layer::open(disk.clone(), "image").unwrap();
    assert!(repair_dirty(&layer, &mut |_| ()).unwrap());
    let layer = Layer::open(disk, "image").unwrap();
    assert_eq!(layer.header().features.incompatible, 0);
    assert!(check(&layer).unwrap().is_clean());
}

fn layer_of(bytes: &[u8]) -> Layer {
    Layer::open_damaged(Arc::new(memory(bytes)), "image", None).unwrap()
}

#[test]
fn repairs_are_atomic() {
    for damage in REPAIRABLE {
        // A file of a gigabyte takes too long to crash so often.
        if damage.0.contains("past the end") || damage.0.contains("beyond") {
            continue;
        }
        let before = damaged(damage).0;
        let old = read_all(&layer_of(&before));
        let recorder = Arc::new(WriteRecorder::new(memory(&before)));
        let layer = Layer::open_damaged(recorder.clone(), "image", None).unwrap();
        repair(&layer, Repair::All, &mut |_| ()).unwrap();
        each_remains(&before, &recorder.events(), |stop, remains, replaced| {
            if !replaced {
                assert!(remains.starts_with(&before), "{}: changed before event {stop}", damage.0);
                return;
            }
            let layer = layer_of(remains);
            let report = check(&layer).unwrap();
            assert!(report.is_clean(), "{} after event {stop}: {report:#?}", damage.0);
            assert!(read_all(&layer) == old, "{}: other content after event {stop}", damage.0);
        });
    }
}

#[test]
fn devices_of_fixed_size_are_repaired_where_there_is_room() {
    for (damage, room) in REPAIRABLE.iter().flat_map(|damage| [(damage, 64), (damage, 0)]) {
        let mut bytes = damaged(damage).0;
        if damage.0.contains("past the end") || damage.0.contains("beyond") {
            continue;
        }
        bytes.resize(bytes.len().next_multiple_of(4096) + room * 4096, 0);
        let old = read_all(&layer_of(&bytes));
        let device = Arc::new(Device(memory(&bytes)));
        let layer = Layer::open_damaged(device.clone(), "image", None).unwrap();
        let repaired = repair(&layer, Repair::All, &mut |_| ());
        let layer = Layer::open_damaged(device.clone(), "image", None).unwrap();
        assert!(read_all(&layer) == old, "{}", damage.0);
        if repaired.is_ok() {
            assert!(check(&layer).unwrap().is_clean(), "{}", damage.0);
        } else {
            assert!(room == 0, "{}: {repaired:?}", damage.0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is damaged: a repair changes nothing that can be read, leaves no more damage, and finds none of its own.
    #[test]
    fn a_repair_does_no_harm(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0..64_u32), 1..4),
        all in any::<bool>(),
    ) {
        let mut before = damaged(&REPAIRABLE[0]);
        let words = metadata_words(&before);
        for (word, bit) in changes {
            before.change(*word.get(&words), |word| word ^ 1 << bit);
        }
        let disk = Arc::new(WriteRecorder::new(memory(&before.0)));
        let Ok(layer) = Layer::open_damaged(disk.clone(), "image", None) else { return Ok(()) };
        let found = check(&layer).unwrap();
        let readable = readable(&layer);
        let Ok(report) = repair(&layer, if all { Repair::All } else { Repair::Leaks }, &mut |_| ()) else {
            prop_assert!(disk.events().is_empty());
            return Ok(());
        };
        let layer = Layer::open_damaged(disk.clone(), "image", None).unwrap();
        let left = check(&layer).unwrap();
        if report.check.failure.is_some() {
            prop_assert!(disk.events().is_empty());
        }
        prop_assert!(found.failure.is_some() || harm(&left) <= harm(&found), "{found:#?} became {left:#?}");
        for (at, cluster) in readable {
            let mut buf = vec![0; cluster.len()];
            layer.read_at(&mut buf, at).unwrap();
            prop_assert!(buf == cluster, "other content at {at:#x}");
        }
    }
}

/// Damage, without flags that only cost a copy: a refcount that loses a lost snapshot's uses leaves them behind.
fn harm(report: &CheckReport) -> usize {
    let flag = |finding: &&Finding| !matches!(finding, Finding::L1Copied { .. } | Finding::L2Copied { .. });
    report.findings.iter().filter(flag).filter(|finding| !finding.to_string().starts_with("Leaked")).count()
}

/// The clusters that can be read.
fn readable(layer: &Layer) -> Vec<(u64, Vec<u8>)> {
    let clusters = (0..60).map(|index| (index * CLUSTER, vec![0; 4096]));
    clusters.filter_map(|(at, mut buf)| layer.read_at(&mut buf, at).is_ok().then_some((at, buf))).collect()
}

/// Where tables of the active state, refcounts and the snapshot table lie in the file.
fn metadata_words(image: &Bytes) -> Vec<u64> {
    let block = image.word(image.refcount_table());
    let areas =
        [(image.l1(), 1), (image.l2(), 60), (image.refcount_table(), 2), (block, 20), (image.snapshot_table(), 4)];
    areas.into_iter().flat_map(|(start, count)| (0..count).map(move |index| start + index * 8)).collect()
}
