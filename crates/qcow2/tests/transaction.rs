//! Random changes against a model of the disk, with QEMU as judge after every commit.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use qtk_block::{Access, BlockRead, BlockWrite, Preallocation, RawFile};
use qtk_qcow2::{
    Backing, ClusterBits, CompressionType, CreateOptions, Error, GuestCluster, Transaction, Version, codec, create,
};
use support::repetitive::Repetitive;
use support::{assert_clean, mixed_disk, noise, open, qemu_img, qemu_io, qemu_read, read_all, storage};

#[derive(Clone, Debug)]
enum Operation {
    Write { range: Range<u64>, seed: u64 },
    Zero(Range<u64>),
    Discard(Range<u64>),
    Resize(u64),
    Compress { cluster: u64, seed: u64 },
    Commit,
    CommitSettled,
    RollBack,
}

/// A disk under test: the image, its backing and what it should hold as committed and as pending.
struct Subject {
    image: PathBuf,
    backing: Option<PathBuf>,
    committed: Vec<u8>,
    pending: Vec<u8>,
    transaction: Transaction,
}

impl Subject {
    fn new(image: PathBuf, backing: Option<PathBuf>) -> Self {
        assert_clean(&image);
        let committed = qemu_read(&image);
        let transaction = begin(&image, backing.as_deref());
        Self { pending: committed.clone(), committed, transaction, image, backing }
    }

    fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Write { range, seed } => {
                let bytes = noise(*seed, span(range).len());
                self.transaction.write_at(&bytes, range.start).unwrap();
                self.pending[span(range)].copy_from_slice(&bytes);
            }
            Operation::Zero(range) => {
                self.transaction.zero(range.clone()).unwrap();
                self.pending[span(range)].fill(0);
            }
            Operation::Discard(range) => {
                self.transaction.discard(range.clone()).unwrap();
                // What a discarded range reads as is not specified, but it must stay so.
                self.transaction.read_at(&mut self.pending[span(range)], range.start).unwrap();
            }
            Operation::Resize(size) => {
                self.transaction.resize(*size, Preallocation::Off).unwrap();
                let kept = self.pending.len().min(usize::try_from(*size).unwrap());
                self.pending.resize(usize::try_from(*size).unwrap(), 0);
                let mut now = read_all(&self.transaction);
                assert!(now[..kept] == self.pending[..kept] && now[kept..].iter().all(|&byte| byte == 0));
                std::mem::swap(&mut self.pending, &mut now);
            }
            Operation::Compress { cluster, seed } => self.compress(*cluster, *seed),
            Operation::Commit | Operation::CommitSettled => {
                match operation {
                    Operation::Commit => self.transaction.commit().unwrap(),
                    _ => self.transaction.commit_settled().unwrap(),
                }
                self.assert_reads_pending();
                self.committed.clone_from(&self.pending);
                self.reopen();
            }
            Operation::RollBack => {
                self.pending.clone_from(&self.committed);
                self.reopen();
            }
        }
    }

    /// Writes a compressed cluster, if the disk reaches as far.
    fn compress(&mut self, cluster: u64, seed: u64) {
        let layer = open(&self.image);
        let len = usize::try_from(layer.cluster_size()).unwrap();
        let start = usize::try_from(cluster).unwrap() * len;
        if start >= self.pending.len() {
            return;
        }
        let content = [noise(seed, len / 4), vec![0; len - len / 4]].concat();
        let mut compressed = vec![0; len];
        let mut compressor = codec::Compressor::new(layer.compression(), None).unwrap();
        if let Some(used) = compressor.compress(&content, &mut compressed).unwrap() {
            self.transaction.write_compressed(GuestCluster(cluster), &compressed[..used]).unwrap();
            let end = self.pending.len().min(start + len);
            self.pending[start..end].copy_from_slice(&content[..end - start]);
        }
    }

    fn reopen(&mut self) {
        // The old transaction must be gone, and the file cut back, before the next one looks at it.
        let scratch = self.image.with_extension("scratch");
        create(new_file(&scratch), "scratch", &CreateOptions::default()).unwrap();
        drop(std::mem::replace(&mut self.transaction, begin(&scratch, None)));
        self.assert_image_is(&self.committed);
        self.transaction = begin(&self.image, self.backing.as_deref());
    }

    fn assert_image_is(&self, expected: &[u8]) {
        assert_clean(&self.image);
        assert!(qemu_read(&self.image) == expected, "QEMU reads something else");
    }

    fn assert_reads_pending(&self) {
        assert!(read_all(&self.transaction) == self.pending, "the transaction reads something else than was written");
    }
}

fn begin(image: &Path, backing: Option<&Path>) -> Transaction {
    let backing = backing.map(|path| Arc::new(RawFile::open(path, Access::ReadOnly).unwrap()) as Arc<dyn BlockRead>);
    Transaction::begin(Arc::new(open(image)), backing).unwrap()
}

fn new_file(path: &Path) -> Arc<dyn qtk_block::HostStorage> {
    std::fs::write(path, "").unwrap();
    storage(path)
}

fn span(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

/// Ranges on a disk: anywhere, and along clusters.
fn ranges(size: u64, cluster: u64) -> impl Strategy<Value = Range<u64>> {
    let anywhere = (0..size, 0..size.min(cluster * 6)).prop_map(move |(at, len)| at..(at + len).min(size));
    let along = (0..size / cluster, 1..8_u64)
        .prop_map(move |(first, count)| first * cluster..((first + count) * cluster).min(size));
    prop_oneof![anywhere, along]
}

fn operations(size: u64, cluster: u64) -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        8 => (ranges(size, cluster), any::<u64>()).prop_map(|(range, seed)| Operation::Write { range, seed }),
        2 => ranges(size, cluster).prop_map(Operation::Zero),
        2 => ranges(size, cluster).prop_map(Operation::Discard),
        1 => Just(Operation::Commit),
        1 => Just(Operation::CommitSettled),
        1 => Just(Operation::RollBack),
    ];
    proptest::collection::vec(operation, 1..24)
}

/// Those, compressed clusters, and resizing at the end, which would make other ranges invalid.
fn more_operations(size: u64, cluster: u64) -> impl Strategy<Value = Vec<Operation>> {
    let compress = (0..size / cluster, any::<u64>()).prop_map(|(cluster, seed)| Operation::Compress { cluster, seed });
    let sizes = prop_oneof![0..size / 512, 0..size / 256].prop_map(|sectors| sectors * 512);
    let resizes = proptest::collection::vec(sizes.prop_map(Operation::Resize), 0..3);
    (operations(size, cluster), proptest::collection::vec(compress, 0..6), resizes)
        .prop_map(|(operations, compressed, resizes)| [compressed, operations, resizes].concat())
}

fn play(mut subject: Subject, operations: &[Operation]) {
    for operation in operations {
        subject.apply(operation);
    }
    subject.assert_reads_pending();
    subject.apply(&Operation::Commit);
}

fn size_of(cluster_bits: u32) -> u64 {
    // Off every border, and over more than one L2 table where clusters are small.
    (40 << cluster_bits.min(16)) + 1536
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn images_of_our_own(
        (bits, operations) in prop_oneof![Just(9), Just(10), Just(12), Just(16), Just(21)]
            .prop_flat_map(|bits: u32| (Just(bits), more_operations(size_of(bits), 1 << bits.min(16)))),
        order in 0..=6_u32,
        v2 in any::<bool>(),
        backed in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let size = size_of(bits);
        // The backing is smaller than the image.
        let backing = backed.then(|| mixed_disk(&folder.path().join("base.raw"), usize::try_from(size * 3 / 4).unwrap() & !511, 3000));
        let options = CreateOptions {
            size,
            cluster_bits: ClusterBits::new(bits).unwrap(),
            version: if v2 { Version::V2 } else { Version::V3 },
            refcount_bits: if v2 { 16 } else { 1 << order },
            backing: backed.then(|| Backing { name: "base.raw".into(), format: Some("raw".into()) }),
            ..CreateOptions::default()
        };
        let image = folder.path().join("image.qcow2");
        create(new_file(&image), "image", &options).unwrap();
        play(Subject::new(image, backing), &operations);
    }

    #[test]
    fn images_with_shared_clusters(
        (bits, operations) in prop_oneof![Just(9), Just(12), Just(16)]
            .prop_flat_map(|bits: u32| (Just(bits), more_operations(size_of(bits), 1 << bits))),
        refcount_bits in prop_oneof![Just(2), Just(4), Just(16)],
        codec in prop_oneof![Just(None), Just(Some(CompressionType::Zlib)), Just(Some(CompressionType::Zstd))],
        contents in proptest::collection::vec(0..12_u8, 43),
        snapshot in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let clusters = contents[..usize::try_from(size_of(bits).div_ceil(1 << bits)).unwrap()].to_vec();
        let short = (clusters.len() << bits) / 512 - usize::try_from(size_of(bits)).unwrap() / 512;
        let disk = Repetitive { bits, refcount_bits, codec, clusters, short };
        let image = folder.path().join("image.qcow2");
        disk.write(&image, false);
        // Narrow refcounts may be at their limit already.
        if snapshot && refcount_bits == 16 {
            qemu_img(folder.path(), "snapshot -c one image.qcow2");
        }
        play(Subject::new(image, None), &operations);
    }

    #[test]
    fn images_with_subclusters(
        (bits, operations) in prop_oneof![Just(14), Just(16)]
            .prop_flat_map(|bits: u32| (Just(bits), more_operations(size_of(bits), 1 << (bits - 5)))),
        backed in any::<bool>(),
        snapshot in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let size = size_of(bits);
        let backing = backed.then(|| mixed_disk(&folder.path().join("base.raw"), usize::try_from(size * 3 / 4).unwrap() & !511, 3000));
        let with_backing = if backed { " -b base.raw -F raw" } else { "" };
        let options = format!("extended_l2=on,cluster_size={}", 1 << bits);
        qemu_img(folder.path(), &format!("create -f qcow2 -o {options}{with_backing} image.qcow2 {size}"));
        qemu_io(folder.path(), "image.qcow2", &["write -P 3 3000 5000", "write -z 70000 9000", "write -P 5 150000 40000"]);
        if snapshot {
            qemu_img(folder.path(), "snapshot -c one image.qcow2");
            qemu_io(folder.path(), "image.qcow2", &["write -P 9 2000 3000"]);
        }
        play(Subject::new(folder.path().join("image.qcow2"), backing), &operations);
    }

    #[test]
    fn images_with_a_data_file(
        (bits, operations) in prop_oneof![Just(12), Just(16)]
            .prop_flat_map(|bits: u32| (Just(bits), operations(size_of(bits), 1 << bits))),
        raw in any::<bool>(),
        extended in any::<bool>(),
        backed in any::<bool>(),
        resizes in proptest::collection::vec((0..200_u64).prop_map(|sectors| Operation::Resize(sectors * 512)), 0..3),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let bits = if extended { 16 } else { bits };
        let size = size_of(bits);
        let backed = backed && !raw;
        let backing = backed.then(|| mixed_disk(&folder.path().join("base.raw"), usize::try_from(size / 2).unwrap() & !511, 3000));
        let with_backing = if backed { " -b base.raw -F raw" } else { "" };
        let on = |flag: bool| if flag { "on" } else { "off" };
        let options = format!(
            "data_file={},data_file_raw={},extended_l2={},cluster_size={}", folder.path().join("data.raw").display(), on(raw), on(extended), 1 << bits
        );
        qemu_img(folder.path(), &format!("create -f qcow2 -o {options}{with_backing} image.qcow2 {size}"));
        qemu_io(folder.path(), "image.qcow2", &["write -P 3 3000 5000", "write -z 70000 9000"]);
        // What is written to a data file is written.
        let operations: Vec<_> = operations.into_iter().chain(resizes)
            .filter(|operation| !matches!(operation, Operation::RollBack)).collect();
        let image = folder.path().join("image.qcow2");
        let mut subject = Subject::new(image.clone(), backing);
        for operation in &operations {
            subject.apply(operation);
        }
        subject.apply(&Operation::Commit);
        if raw {
            let size = usize::try_from(open(&image).header().size).unwrap();
            let data = std::fs::read(folder.path().join("data.raw")).unwrap();
            prop_assert!(data[..size] == subject.committed[..]);
        }
    }

    #[test]
    fn compressed_images_with_snapshots(
        (bits, operations) in prop_oneof![Just(9), Just(12), Just(16)]
            .prop_flat_map(|bits: u32| (Just(bits), operations(size_of(bits), 1 << bits))),
        variant in prop_oneof![
            Just("compression_type=zlib"), Just("compression_type=zstd"), Just("compat=0.10"), Just("refcount_bits=64"),
        ],
        backed in any::<bool>(),
        snapshots in 0..3_usize,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let size = usize::try_from(size_of(bits)).unwrap();
        mixed_disk(&folder.path().join("source.raw"), size, 5000);
        let backing = backed.then(|| mixed_disk(&folder.path().join("base.raw"), (size / 2) & !511, 3000));
        let with_backing = if backed { "-B base.raw -F raw " } else { "" };
        let options = format!("cluster_size={},{variant}", 1 << bits);
        qemu_img(folder.path(), &format!("convert -c -f raw -O qcow2 -o {options} {with_backing}source.raw image.qcow2"));
        for snapshot in 0..snapshots {
            qemu_io(folder.path(), "image.qcow2", &[&format!("write -P {} {} 3000", snapshot + 1, snapshot * 1000)]);
            qemu_img(folder.path(), &format!("snapshot -c s{snapshot} image.qcow2"));
        }
        let image = folder.path().join("image.qcow2");
        let states: Vec<_> = (0..snapshots).map(|snapshot| snapshot_content(&image, snapshot)).collect();
        play(Subject::new(image.clone(), backing), &operations);
        for (snapshot, state) in states.iter().enumerate() {
            prop_assert!(snapshot_content(&image, snapshot) == *state, "snapshot {snapshot} has changed");
        }
    }
}

#[test]
fn what_we_do_not_know_is_kept_or_cleared() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -o cluster_size=4k,lazy_refcounts=on image.qcow2 1M");
    let image = folder.path().join("image.qcow2");
    let mut bytes = std::fs::read(&image).unwrap();
    let extension = [&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5][..], b"hello"].concat();
    bytes[112..112 + extension.len()].copy_from_slice(&extension);
    bytes[80] |= 0x80;
    bytes[88] |= 0x80;
    std::fs::write(&image, bytes).unwrap();
    let transaction = begin(&image, None);
    transaction.zero(0..1 << 20).unwrap();
    transaction.write_at(b"x", 0).unwrap();
    transaction.commit().unwrap();
    assert_clean(&image);
    let layer = open(&image);
    assert_eq!(layer.header().extension(0x1234_5678).unwrap().data, b"hello");
    assert_eq!(layer.header().features.compatible, 1 << 63 | 1);
    assert_eq!(layer.header().features.autoclear, 0);
}

#[test]
fn a_header_that_somebody_else_changed_stays() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 image.qcow2 1M");
    let image = folder.path().join("image.qcow2");
    let transaction = begin(&image, None);
    transaction.write_at(b"ours", 0).unwrap();
    qemu_img(folder.path(), "amend -o lazy_refcounts=on image.qcow2");
    let grown = image.metadata().unwrap().len();
    assert!(matches!(transaction.commit(), Err(Error::ChangedMeanwhile { .. })));
    drop(transaction);
    // Whoever changed the image may use what lies past its old end.
    assert!(image.metadata().unwrap().len() >= grown);
    assert_eq!(open(&image).header().features.compatible, 1);
}

#[test]
fn a_backing_image_must_be_given_where_there_is_one() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -u -b base.raw -F raw image.qcow2 1M");
    let layer = Arc::new(open(&folder.path().join("image.qcow2")));
    let error = Transaction::begin(layer, None).unwrap_err();
    assert!(error.to_string().contains("backing"), "{error}");
}

#[test]
fn threads_write_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 image.qcow2 8M");
    let image = folder.path().join("image.qcow2");
    let transaction = begin(&image, None);
    // Pieces that share clusters with those of other threads.
    let piece = 10_000;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let transaction = &transaction;
            scope.spawn(move || {
                for index in (thread..400).step_by(4) {
                    transaction.write_at(&noise(index, 10_000), index * piece).unwrap();
                }
            });
        }
    });
    transaction.commit().unwrap();
    assert_clean(&image);
    let expected: Vec<u8> = (0..400).flat_map(|index| noise(index, 10_000)).collect();
    assert!(qemu_read(&image)[..expected.len()] == expected);
}

fn snapshot_content(image: &Path, snapshot: usize) -> Vec<u8> {
    let folder = image.parent().unwrap();
    qemu_img(folder, &format!("convert -f qcow2 -l s{snapshot} -O raw image.qcow2 snapshot.raw"));
    std::fs::read(folder.join("snapshot.raw")).unwrap()
}

#[test]
fn what_a_disk_loses_when_it_shrinks_does_not_come_back() {
    let folder = tempfile::tempdir().unwrap();
    mixed_disk(&folder.path().join("source.raw"), 1 << 20, 5000);
    qemu_img(folder.path(), "convert -f raw -O qcow2 -o cluster_size=4k source.raw image.qcow2");
    play(
        Subject::new(folder.path().join("image.qcow2"), None),
        &[Operation::Resize(0), Operation::Resize(2 << 20), Operation::Write { range: 1..5000, seed: 1 }],
    );
}
