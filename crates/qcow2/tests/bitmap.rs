//! Persistent dirty bitmaps: what we write, QEMU's block layer must read back bit for bit, and the other way round.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use qtk_block::BlockWrite;
use qtk_qcow2::{BitmapRefusal, Error, NewBitmap, Preallocation, Transaction};
use serde_json::Value;
use support::{assert_clean, open, qemu_img, qemu_io};

fn begin(image: &Path) -> Transaction {
    Transaction::begin(Arc::new(open(image)), None).unwrap()
}

fn change(image: &Path, change: impl FnOnce(&Transaction)) {
    let transaction = begin(image);
    change(&transaction);
    transaction.commit_settled().unwrap();
    assert_clean(image);
}

fn new(name: &str, granularity: u64) -> NewBitmap {
    NewBitmap { name: name.into(), granularity: Some(granularity), enabled: true }
}

fn ranges(image: &Path, bitmap: &str) -> Vec<Range<u64>> {
    open(image).bitmap_contents(bitmap).unwrap().ranges().collect()
}

/// Serves an image as long as it lives.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The dirty ranges of a disabled bitmap as QEMU exports them.
fn ranges_by_qemu(image: &Path, bitmap: &str) -> Vec<Range<u64>> {
    let socket = image.with_extension("socket");
    let server = Command::new("qemu-nbd")
        .args(["-r", "-f", "qcow2", "-B", bitmap, "-k"])
        .args([&socket, image])
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run qemu-nbd ({error}): install qemu-utils"));
    let server = Server(server);
    let started = Instant::now();
    while !socket.exists() {
        assert!(started.elapsed() < Duration::from_secs(20), "qemu-nbd does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let export = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let map = qemu_img(image.parent().unwrap(), &format!("map --output=json --image-opts {export}"));
    drop(server);
    let _ = std::fs::remove_file(socket);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let dirty = map.iter().filter(|extent| extent["data"] == Value::Bool(false));
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for extent in dirty {
        let start = number(extent, "start");
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end += number(extent, "length"),
            _ => ranges.push(start..start + number(extent, "length")),
        }
    }
    ranges
}

struct Images {
    folder: tempfile::TempDir,
}

impl Images {
    fn new(options: &str, size: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        qemu_img(folder.path(), &format!("create -f qcow2 -o {options} qemu.qcow2 {size}"));
        std::fs::copy(folder.path().join("qemu.qcow2"), folder.path().join("ours.qcow2")).unwrap();
        Self { folder }
    }

    fn path(&self, image: &str) -> PathBuf {
        self.folder.path().join(image)
    }

    fn qemu(&self, line: &str) {
        qemu_img(self.folder.path(), line);
    }

    fn bitmaps_in_info(&self, image: &str) -> Value {
        let info: Value =
            serde_json::from_str(&qemu_img(self.folder.path(), &format!("info --output=json {image}"))).unwrap();
        info["format-specific"]["data"]["bitmaps"].clone()
    }

    fn assert_alike(&self) {
        let (ours, theirs) = (self.path("ours.qcow2"), self.path("qemu.qcow2"));
        assert_eq!(self.bitmaps_in_info("ours.qcow2"), self.bitmaps_in_info("qemu.qcow2"));
        for bitmap in open(&ours).bitmaps().unwrap() {
            assert_eq!(ranges(&ours, &bitmap.name), ranges(&theirs, &bitmap.name), "{}", bitmap.name);
        }
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Add { granularity: u64, enabled: bool },
    Remove(usize),
    Clear(usize),
    Enable(usize, bool),
    Merge { into: usize, from: usize },
    Write(Range<u64>),
    Zero(Range<u64>),
    QemuWrite(Range<u64>),
    Resize(u64),
}

fn operations(size: u64) -> impl Strategy<Value = Vec<Operation>> {
    let range = (0..size, 1..size / 4).prop_map(move |(at, len)| at..(at + len).min(size));
    let operation = prop_oneof![
        4 => (9..20_u32, any::<bool>()).prop_map(|(bits, enabled)| Operation::Add { granularity: 1 << bits, enabled }),
        1 => (0..9_usize).prop_map(Operation::Remove),
        1 => (0..9_usize).prop_map(Operation::Clear),
        2 => (0..9_usize, any::<bool>()).prop_map(|(index, on)| Operation::Enable(index, on)),
        3 => (0..9_usize, 0..9_usize).prop_map(|(into, from)| Operation::Merge { into, from }),
        3 => range.clone().prop_map(Operation::Write),
        1 => range.clone().prop_map(Operation::Zero),
        1 => range.prop_map(Operation::QemuWrite),
        1 => (size / 1024..size / 256).prop_map(|sectors| Operation::Resize(sectors * 512)),
    ];
    proptest::collection::vec(operation, 3..14)
}

fn play(images: &Images, operations: &[Operation]) {
    let (ours, folder) = (images.path("ours.qcow2"), images.folder.path());
    for (step, operation) in operations.iter().enumerate() {
        let names: Vec<String> = open(&ours).bitmaps().unwrap().into_iter().map(|bitmap| bitmap.name).collect();
        let disk = open(&ours).header().size;
        let on_disk = |range: &Range<u64>| range.start.min(disk - 1)..range.end.min(disk);
        let pick = |index: &usize| names.get(index % names.len().max(1)).map(String::as_str);
        match operation {
            Operation::Add { granularity, enabled } => {
                let option = if *enabled { "" } else { "--disable " };
                images.qemu(&format!("bitmap --add -g {granularity} {option}qemu.qcow2 b{step}"));
                change(&ours, |t| {
                    let bitmap = NewBitmap { enabled: *enabled, ..new(&format!("b{step}"), *granularity) };
                    t.add_bitmap(&bitmap).unwrap();
                });
            }
            Operation::Remove(index) => {
                let Some(name) = pick(index) else { continue };
                images.qemu(&format!("bitmap --remove qemu.qcow2 {name}"));
                change(&ours, |t| t.remove_bitmap(name).unwrap());
            }
            Operation::Clear(index) => {
                let Some(name) = pick(index) else { continue };
                images.qemu(&format!("bitmap --clear qemu.qcow2 {name}"));
                change(&ours, |t| t.clear_bitmap(name).unwrap());
            }
            Operation::Enable(index, on) => {
                let Some(name) = pick(index) else { continue };
                images.qemu(&format!("bitmap --{} qemu.qcow2 {name}", if *on { "enable" } else { "disable" }));
                change(&ours, |t| if *on { t.enable_bitmap(name) } else { t.disable_bitmap(name) }.unwrap());
            }
            Operation::Merge { into, from } => {
                let (Some(into), Some(from)) = (pick(into), pick(from)) else { continue };
                images.qemu(&format!("bitmap --merge {from} qemu.qcow2 {into}"));
                change(&ours, |t| t.merge_bitmap(into, &t.bitmap_contents(from).unwrap()).unwrap());
            }
            Operation::Write(range) => {
                let range = on_disk(range);
                qemu_io(folder, "qemu.qcow2", &[&format!("write {} {}", range.start, range.end - range.start)]);
                let bytes = vec![0xcd; usize::try_from(range.end - range.start).unwrap()];
                change(&ours, |t| t.write_at(&bytes, range.start).unwrap());
            }
            Operation::Zero(range) => {
                let range = on_disk(range);
                qemu_io(folder, "qemu.qcow2", &[&format!("write -z {} {}", range.start, range.end - range.start)]);
                change(&ours, |t| t.zero(range).unwrap());
            }
            Operation::Resize(size) => {
                images.qemu(&format!("resize --shrink qemu.qcow2 {size}"));
                change(&ours, |t| t.resize(*size, Preallocation::Off).unwrap());
            }
            Operation::QemuWrite(range) => {
                let range = on_disk(range);
                let write = format!("write {} {}", range.start, range.end - range.start);
                qemu_io(folder, "qemu.qcow2", &[&write]);
                qemu_io(folder, "ours.qcow2", &[&write]);
                assert_clean(&ours);
            }
        }
        images.assert_alike();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn as_qemu_does_it(
        (options, size, operations) in prop_oneof![
            Just(("cluster_size=512", 300_032)),
            Just(("cluster_size=4k", 2_000_384)),
            Just(("cluster_size=64k", 5 << 20)),
            Just(("cluster_size=2M", 9_000_448)),
        ].prop_flat_map(|(options, size)| (Just(options), Just(size), operations(size))),
    ) {
        play(&Images::new(options, size), &operations);
    }
}

#[test]
fn qemu_exports_our_bits() {
    for (options, granularity) in [("cluster_size=512", 512), ("cluster_size=64k", 65536), ("cluster_size=4k", 1 << 20)]
    {
        let images = Images::new(options, 5_000_192);
        let image = images.path("ours.qcow2");
        change(&image, |t| {
            t.add_bitmap(&new("changes", granularity)).unwrap();
            t.write_at(&[1; 3000], 100_000).unwrap();
            t.zero(2_000_000..3_000_000).unwrap();
            t.write_at(&[2; 100], 5_000_192 - 100).unwrap();
            t.disable_bitmap("changes").unwrap();
            t.write_at(&[3; 100], 4_000_000).unwrap();
        });
        let ours = ranges(&image, "changes");
        assert_eq!(ours, ranges_by_qemu(&image, "changes"));
        assert!(ours.len() >= 2 && ours.last().unwrap().end == 5_000_192);
    }
}

#[test]
fn an_edit_leaves_bitmaps_consistent() {
    for options in ["cluster_size=4k", "cluster_size=64k"] {
        let images = Images::new(options, 1 << 20);
        let image = images.path("ours.qcow2");
        for (name, option) in [("changes", ""), ("before", "--disable ")] {
            images.qemu(&format!("bitmap --add {option}ours.qcow2 {name}"));
        }
        change(&image, |t| t.write_at(&[1; 100], 200_000).unwrap());
        let bitmaps = open(&image).bitmaps().unwrap();
        assert!(bitmaps.iter().all(|bitmap| !bitmap.in_use));
        let cluster = open(&image).cluster_size();
        let start = 200_000 / cluster * cluster;
        assert_eq!(ranges(&image, "changes"), vec![start..start + cluster]);
        assert!(ranges(&image, "before").is_empty());
    }
}

#[test]
fn pages_of_ones_are_read() {
    let images = Images::new("cluster_size=4k", 1 << 20);
    let image = images.path("ours.qcow2");
    images.qemu("bitmap --add --disable ours.qcow2 all");
    let table = usize::try_from(open(&image).bitmaps().unwrap()[0].table.0).unwrap();
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[table + 7] = 1;
    std::fs::write(&image, bytes).unwrap();
    assert_eq!(ranges(&image, "all"), vec![0..1 << 20]);
    assert_eq!(ranges_by_qemu(&image, "all"), vec![0..1 << 20]);
    change(&image, |t| {
        t.add_bitmap(&new("copy", 512)).unwrap();
        t.merge_bitmap("copy", &t.bitmap_contents("all").unwrap()).unwrap();
        t.remove_bitmap("all").unwrap();
    });
    assert_eq!(ranges(&image, "copy"), vec![0..1 << 20]);
}

#[test]
fn what_cannot_be_done_is_said() {
    let images = Images::new("cluster_size=4k", 1 << 20);
    let image = images.path("ours.qcow2");
    change(&image, |t| t.add_bitmap(&new("there", 4096)).unwrap());
    let refusal = |result: Result<(), Error>| match result {
        Err(Error::Bitmap { refusal, .. }) => refusal,
        other => panic!("{other:?}"),
    };
    let add = |bitmap: NewBitmap| refusal(begin(&image).add_bitmap(&bitmap));
    assert_eq!(add(new("there", 4096)), BitmapRefusal::Exists);
    assert_eq!(add(new("", 4096)), BitmapRefusal::EmptyName);
    assert_eq!(add(new(&"x".repeat(1024), 4096)), BitmapRefusal::NameTooLong { max: 1023 });
    for granularity in [0, 256, 1000, 1 << 32] {
        assert_eq!(add(new("new", granularity)), BitmapRefusal::Granularity(granularity));
    }
    assert_eq!(refusal(begin(&image).remove_bitmap("none")), BitmapRefusal::NotFound);
    images.qemu("create -f qcow2 larger.qcow2 2M");
    images.qemu("bitmap --add larger.qcow2 b");
    let larger = open(&images.path("larger.qcow2")).bitmap_contents("b").unwrap();
    assert_eq!(
        refusal(begin(&image).merge_bitmap("there", &larger)),
        BitmapRefusal::DifferentSizes { destination: 1 << 20, source_size: 2 << 20 }
    );
    images.qemu("create -f qcow2 -o compat=0.10 old.qcow2 1M");
    assert_eq!(refusal(begin(&images.path("old.qcow2")).add_bitmap(&new("b", 4096))), BitmapRefusal::Version2);
    images.qemu("create -f qcow2 huge.qcow2 60T");
    assert_eq!(refusal(begin(&images.path("huge.qcow2")).add_bitmap(&new("b", 4096))), BitmapRefusal::TooLarge);
}

#[test]
fn an_inconsistent_bitmap_can_only_be_removed() {
    let images = Images::new("cluster_size=4k", 1 << 20);
    let image = images.path("ours.qcow2");
    images.qemu("bitmap --add ours.qcow2 broken");
    let at = usize::try_from(directory_offset(&image)).unwrap() + 15;
    let mut bytes = std::fs::read(&image).unwrap();
    bytes[at] |= 1;
    std::fs::write(&image, bytes).unwrap();
    let inconsistent = |result: Result<(), Error>| {
        assert!(matches!(result, Err(Error::Bitmap { refusal: BitmapRefusal::Inconsistent, .. })), "{result:?}");
    };
    inconsistent(begin(&image).clear_bitmap("broken"));
    inconsistent(begin(&image).enable_bitmap("broken"));
    inconsistent(open(&image).bitmap_contents("broken").map(drop));
    change(&image, |t| t.write_at(b"edited", 0).unwrap());
    assert!(open(&image).bitmaps().unwrap()[0].in_use);
    change(&image, |t| t.remove_bitmap("broken").unwrap());
    assert!(open(&image).bitmaps().unwrap().is_empty());
    assert_eq!(images.bitmaps_in_info("ours.qcow2"), Value::Null);
}

fn directory_offset(image: &Path) -> u64 {
    open(image).header().bitmaps().unwrap().unwrap().directory_offset
}

#[test]
fn hostile_bitmaps_cannot_free_what_others_use() {
    let images = Images::new("cluster_size=4k", 1 << 20);
    let image = images.path("ours.qcow2");
    change(&image, |t| {
        t.add_bitmap(&new("b", 4096)).unwrap();
        t.write_at(&[1; 100], 0).unwrap();
    });
    let sound = std::fs::read(&image).unwrap();
    let table = usize::try_from(open(&image).bitmaps().unwrap()[0].table.0).unwrap();
    let header = open(&image).header().clone();
    for entry in [header.refcount_table.0, header.l1_table.0, 1 << 40, 0x1200, 3, 1 << 60] {
        let mut bytes = sound.clone();
        bytes[table..table + 8].copy_from_slice(&entry.to_be_bytes());
        std::fs::write(&image, &bytes).unwrap();
        let transaction = begin(&image);
        assert!(matches!(transaction.remove_bitmap("b"), Err(Error::Corrupt { .. })), "{entry:#x}");
        drop(transaction);
        assert!(std::fs::read(&image).unwrap() == bytes);
    }
}
