//! Amending: the same request to QEMU and to us must be refused alike, or leave images that QEMU finds alike and sound.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtk_block::{Access, BlockRead, RawFile};
use qtk_qcow2::{Amend, AmendRefusal, Backing, Error, Layer, NewSnapshot, Transaction, Version};
use serde_json::Value;
use support::{assert_clean, mixed_disk, open, qemu_img, qemu_io, qemu_read, run, storage};

/// A folder with `qemu.qcow2` and `ours.qcow2`, alike so far.
struct Pair(tempfile::TempDir);

impl Pair {
    fn new(arguments: &str, size: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        mixed_disk(&folder.path().join("base.raw"), 1 << 20, 3000);
        let arguments = [arguments, " "].concat();
        qemu_img(folder.path(), &format!("create -f qcow2 {}ours.qcow2 {size}", arguments.trim_start()));
        let pair = Self(folder);
        pair.copy();
        pair
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn ours(&self) -> PathBuf {
        self.path().join("ours.qcow2")
    }

    /// Lets QEMU's image start from ours.
    fn copy(&self) {
        std::fs::copy(self.ours(), self.path().join("qemu.qcow2")).unwrap();
    }

    fn prepare(self, lines: &[&str]) -> Self {
        for line in lines {
            match line.strip_prefix("io ") {
                Some(command) => drop(qemu_io(self.path(), "ours.qcow2", &[command])),
                None => drop(qemu_img(self.path(), line)),
            }
        }
        self.copy();
        self
    }

    fn amend(&self, amend: &Amend) -> Result<(), Error> {
        let layer = Arc::new(layer(&self.ours()));
        let backing = layer.header().backing_name.as_ref().map(|_| {
            Arc::new(RawFile::open(&self.path().join("base.raw"), Access::ReadOnly).unwrap()) as Arc<dyn BlockRead>
        });
        let transaction = Transaction::begin(layer, backing).unwrap();
        transaction.amend(amend)?;
        transaction.commit_settled()
    }

    fn info(&self, image: &str) -> Value {
        let mut info: Value =
            serde_json::from_str(&qemu_img(self.path(), &format!("info --output=json {image}"))).unwrap();
        for key in ["filename", "actual-size", "children"] {
            info[key] = Value::Null;
        }
        info
    }

    /// The disk in each snapshot of ours, as QEMU reads it, with the size that it has now.
    fn snapshots(&self) -> Vec<Vec<u8>> {
        let snapshots = open(&self.ours()).snapshots().unwrap();
        let content = |id: &str| {
            qemu_img(self.path(), &format!("convert -l snapshot.id={id} -O raw ours.qcow2 snapshot.raw"));
            std::fs::read(self.path().join("snapshot.raw")).unwrap()
        };
        snapshots.iter().map(|snapshot| content(&snapshot.id)).collect()
    }

    /// Amends both images, which must succeed, and compares what comes of it.
    fn assert_alike(&self, options: &str, amend: &Amend) {
        let snapshots = self.snapshots();
        qemu_img(self.path(), &format!("amend -f qcow2 -o {options} qemu.qcow2"));
        self.amend(amend).unwrap();
        assert_clean(&self.ours());
        assert_eq!(self.info("ours.qcow2"), self.info("qemu.qcow2"), "after {options}");
        qemu_img(self.path(), "compare qemu.qcow2 ours.qcow2");
        // QEMU itself, going down to version 2, zeroes clusters that only the disk and not the snapshot has as zeroes.
        assert!(self.snapshots().iter().zip(&snapshots).all(|(after, before)| alike(after, before)), "after {options}");
        let before = qemu_read(&self.ours());
        qemu_io(self.path(), "ours.qcow2", &["write -P 77 1000 3000", "write -z 200k 64k", "discard 64k 64k"]);
        assert_clean(&self.ours());
        let after = qemu_read(&self.ours());
        assert!(after[4000..64 << 10] == before[4000..64 << 10] && after[1000] == 77);
    }

    fn assert_refused(&self, options: &str, amend: &Amend) -> AmendRefusal {
        let qemu = run("qemu-img", ["amend".as_ref(), "-o".as_ref(), options.as_ref(), self.ours().as_os_str()]);
        assert!(!qemu.status.success(), "QEMU does {options}");
        let before = std::fs::read(self.ours()).unwrap();
        let refusal = match self.amend(amend) {
            Err(Error::Amend { refusal, .. }) => refusal,
            other => panic!("{options}: {other:?}"),
        };
        assert!(std::fs::read(self.ours()).unwrap() == before);
        refusal
    }
}

fn alike(one: &[u8], other: &[u8]) -> bool {
    one.iter().zip(other).all(|(one, other)| one == other)
}

fn layer(image: &Path) -> Layer {
    let data = image.with_file_name("data.raw");
    let data = data.exists().then(|| storage(&data));
    Layer::open_with(storage(image), "ours", data).unwrap()
}

fn version(version: Version) -> Amend {
    Amend { version: Some(version), ..Amend::default() }
}

fn refcount_bits(bits: u32) -> Amend {
    Amend { refcount_bits: Some(bits), ..Amend::default() }
}

const HISTORY: [&str; 7] = [
    "io write -P 1 0 200k",
    "io write -z 64k 64k",
    "snapshot -c first ours.qcow2",
    "io write -P 2 100k 300k",
    "io write -z 16k 32k",
    "snapshot -c second ours.qcow2",
    "io write -P 3 150k 100k",
];

#[test]
fn versions_up_and_down() {
    for arguments in
        ["-o cluster_size=4k", "-o cluster_size=64k", "-o cluster_size=4k -b base.raw -F raw", "-o cluster_size=512"]
    {
        let pair = Pair::new(arguments, "1M").prepare(&HISTORY);
        pair.assert_alike("compat=0.10", &version(Version::V2));
        pair.copy();
        pair.assert_alike("compat=1.1", &version(Version::V3));
    }
}

#[test]
fn tables_that_snapshots_share_are_converted_once() {
    let pair = Pair::new("-o cluster_size=4k -b base.raw -F raw", "1M").prepare(&[
        "io write -z 0 100k",
        "io write -P 1 20k 30k",
        "io write -z 30k 8k",
        "snapshot -c first ours.qcow2",
        "snapshot -c second ours.qcow2",
    ]);
    // QEMU would leave flags there that do not fit their refcounts.
    let expected: Vec<Vec<u8>> = vec![qemu_read(&pair.ours())];
    pair.amend(&version(Version::V2)).unwrap();
    assert_clean(&pair.ours());
    assert!(qemu_read(&pair.ours()) == expected[0]);
    for snapshot in ["first", "second"] {
        qemu_img(pair.path(), &format!("snapshot -a {snapshot} ours.qcow2"));
        assert_clean(&pair.ours());
        assert!(qemu_read(&pair.ours()) == expected[0]);
        qemu_img(pair.path(), &format!("snapshot -d {snapshot} ours.qcow2"));
        assert_clean(&pair.ours());
    }
}

#[test]
fn every_refcount_width() {
    for cluster_size in ["512", "4k", "64k"] {
        let pair = Pair::new(&format!("-o cluster_size={cluster_size}"), "1M").prepare(&HISTORY);
        for bits in [64, 32, 8, 4, 2, 16] {
            pair.assert_alike(&format!("refcount_bits={bits}"), &refcount_bits(bits));
            pair.copy();
        }
        assert!(matches!(
            pair.assert_refused("refcount_bits=1", &refcount_bits(1)),
            AmendRefusal::RefcountTooLarge { bits: 1, count: 2.., .. }
        ));
        let single = Pair::new(&format!("-o cluster_size={cluster_size}"), "1M").prepare(&HISTORY[..2]);
        single.assert_alike("refcount_bits=1", &refcount_bits(1));
    }
}

#[test]
fn several_things_at_once() {
    let pair = Pair::new("-o compat=0.10,cluster_size=4k", "1M")
        .prepare(&["io write -P 1 0 200k", "snapshot -c a ours.qcow2"]);
    let amend = Amend {
        version: Some(Version::V3),
        refcount_bits: Some(32),
        lazy_refcounts: Some(true),
        size: Some(3 << 20),
        ..Amend::default()
    };
    pair.assert_alike("compat=1.1,refcount_bits=32,lazy_refcounts=on,size=3M", &amend);
    let amend = Amend { lazy_refcounts: Some(false), size: Some(1 << 20), ..refcount_bits(16) };
    pair.copy();
    pair.assert_alike("lazy_refcounts=off,size=1M,refcount_bits=16", &amend);
    pair.copy();
    pair.assert_alike("compat=0.10", &version(Version::V2));
}

#[test]
fn bitmaps_do_not_outlive_version_3() {
    let pair = Pair::new("-o cluster_size=64k", "1M").prepare(&["bitmap --add ours.qcow2 changes", "io write 0 200k"]);
    pair.amend(&version(Version::V2)).unwrap();
    assert_clean(&pair.ours());
    pair.amend(&version(Version::V3)).unwrap();
    assert_clean(&pair.ours());
    assert!(open(&pair.ours()).bitmaps().unwrap().is_empty());
}

#[test]
fn bitmaps_follow_the_size() {
    for size in [3 << 20, 300 << 10] {
        let pair = Pair::new("-o cluster_size=4k", "1M").prepare(&[
            "bitmap --add -g 4k ours.qcow2 changes",
            "io write 0 8k",
            "io write 250k 100k",
            "io write 1020k 4k",
        ]);
        pair.assert_alike(&format!("size={size}"), &Amend { size: Some(size), ..Amend::default() });
        let ranges = |image: &str| -> Vec<_> {
            open(&pair.path().join(image)).bitmap_contents("changes").unwrap().ranges().collect()
        };
        qemu_io(pair.path(), "qemu.qcow2", &["write -P 77 1000 3000", "write -z 200k 64k", "discard 64k 64k"]);
        assert_eq!(ranges("ours.qcow2"), ranges("qemu.qcow2"));
    }
}

#[test]
fn what_cannot_be_said_is_refused() {
    let lazy = Amend { lazy_refcounts: Some(true), ..Amend::default() };
    let old = Pair::new("-o compat=0.10", "1M");
    assert_eq!(old.assert_refused("lazy_refcounts=on", &lazy), AmendRefusal::Version2LazyRefcounts);
    assert_eq!(old.assert_refused("refcount_bits=8", &refcount_bits(8)), AmendRefusal::Version2RefcountBits);
    assert_eq!(old.assert_refused("refcount_bits=3", &refcount_bits(3)), AmendRefusal::RefcountBits(3));

    let wide = Pair::new("-o refcount_bits=64", "1M");
    assert_eq!(wide.assert_refused("compat=0.10", &version(Version::V2)), AmendRefusal::DowngradeRefcountBits);
    assert_eq!(wide.assert_refused("refcount_bits=128", &refcount_bits(128)), AmendRefusal::RefcountBits(128));
    let data_file = Amend { data_file: Some(Some("x".into())), ..Amend::default() };
    assert_eq!(wide.assert_refused("data_file=x", &data_file), AmendRefusal::NoDataFile);
    let raw = Amend { data_file_raw: Some(true), ..Amend::default() };
    assert_eq!(wide.assert_refused("data_file_raw=on", &raw), AmendRefusal::DataFileRaw);

    let size = Amend { size: Some(513), ..Amend::default() };
    assert_eq!(wide.assert_refused("size=513", &size), AmendRefusal::UnalignedSize(513));

    let resized = Pair::new("", "1M").prepare(&["snapshot -c a ours.qcow2", "resize ours.qcow2 2M"]);
    assert_eq!(resized.assert_refused("compat=0.10", &version(Version::V2)), AmendRefusal::DowngradeSnapshots);

    let backed = Pair::new("-b base.raw -F raw", "1M");
    let backing = |format: Option<&str>| Amend {
        backing: Some(Some(Backing { name: "base.raw".into(), format: format.map(Into::into) })),
        ..Amend::default()
    };
    assert_eq!(backed.assert_refused("backing_file=base.raw", &backing(None)), AmendRefusal::Backing);
    backed.assert_alike("backing_file=base.raw,backing_fmt=raw", &backing(Some("raw")));
}

#[test]
fn codecs_of_version_2() {
    let pair = Pair::new("-o compression_type=zstd", "1M");
    pair.assert_alike("compat=0.10", &version(Version::V2));
    let folder = pair.path();
    std::fs::write(folder.join("text.raw"), "text ".repeat(100_000)).unwrap();
    qemu_img(folder, "convert -c -f raw -O qcow2 -o compression_type=zstd text.raw ours.qcow2");
    assert_eq!(pair.assert_refused("compat=0.10", &version(Version::V2)), AmendRefusal::DowngradeZstd);
}

#[test]
fn an_amended_image_can_have_more_in_the_same_transaction() {
    let pair = Pair::new("-o compat=0.10,cluster_size=4k", "1M").prepare(&["io write -P 1 0 200k"]);
    let transaction = Transaction::begin(Arc::new(open(&pair.ours())), None).unwrap();
    transaction.amend(&Amend { refcount_bits: Some(2), ..version(Version::V3) }).unwrap();
    transaction.create_snapshot(&NewSnapshot { name: "a".into(), taken: (1, 0), icount: None }).unwrap();
    transaction.commit().unwrap();
    assert_clean(&pair.ours());
    assert_eq!(open(&pair.ours()).header().refcount_bits(), 2);
}

#[test]
fn data_files_are_renamed_and_let_go() {
    let renamed = |name: Option<&str>| Amend { data_file: Some(name.map(Into::into)), ..Amend::default() };
    let pair = Pair::new("-o data_file=data.raw,data_file_raw=on", "1M").prepare(&["io write -P 9 100k 50k"]);
    // QEMU's own copy has to use the same data file, which amending leaves alone.
    assert_eq!(pair.assert_refused("compat=0.10", &version(Version::V2)), AmendRefusal::DowngradeDataFile);
    let raw = Amend { data_file_raw: Some(false), ..Amend::default() };
    for (options, amend) in [
        ("data_file_raw=on", Amend { data_file_raw: Some(true), ..Amend::default() }),
        ("data_file_raw=off", raw),
        ("refcount_bits=64,lazy_refcounts=on", Amend { lazy_refcounts: Some(true), ..refcount_bits(64) }),
        ("data_file=data.raw", renamed(Some("data.raw"))),
    ] {
        qemu_img(pair.path(), &format!("amend -o {options} qemu.qcow2"));
        pair.amend(&amend).unwrap();
        // QEMU looks for the data file where it runs, and ends with an error where it finds one.
        qemu_img(pair.path(), "check ours.qcow2");
        assert_eq!(pair.info("ours.qcow2"), pair.info("qemu.qcow2"), "after {options}");
    }
    assert!(!qemu_io(pair.path(), "ours.qcow2", &["read -P 9 100k 50k"]).contains("failed"));
    for (options, name) in [("data_file=", None), ("data_file=other.raw", Some("other.raw"))] {
        std::fs::copy(pair.ours(), pair.path().join("qemu.qcow2")).unwrap();
        pair.amend(&renamed(name)).unwrap();
        qemu_img(pair.path(), &format!("amend -o {options} qemu.qcow2"));
        let ours = layer(&pair.ours());
        assert_eq!(ours.header(), layer(&pair.path().join("qemu.qcow2")).header(), "after {options}");
        qemu_img(pair.path(), "create -q -f qcow2 -o data_file=data.raw again.qcow2 1M");
        std::fs::rename(pair.path().join("again.qcow2"), pair.ours()).unwrap();
    }
}

#[test]
fn subclusters_stay_in_version_3() {
    let pair = Pair::new("-o extended_l2=on", "1M").prepare(&["io write -P 9 100k 50k", "snapshot -c a ours.qcow2"]);
    assert_eq!(pair.assert_refused("compat=0.10", &version(Version::V2)), AmendRefusal::DowngradeFeatures(0x10));
    pair.assert_alike("refcount_bits=32,size=2M", &Amend { size: Some(2 << 20), ..refcount_bits(32) });
}
