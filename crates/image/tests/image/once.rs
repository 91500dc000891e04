//! Copies that store equal clusters once, judged by `qemu-img`.

use proptest::prelude::*;
use qtk_block::{BlockWrite, NoProgress};
use qtk_image::{ConvertOptions, ConvertReport, FlattenOptions, Format, Image, OpenOptions, Target, convert, flatten};
use qtk_qcow2::CompressionType;

use crate::common::{Folder, content, new_image, noise};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Features of a target, and whether it is compressed.
const WAYS: [(&str, bool); 9] = [
    ("", false),
    ("", true),
    ("compression_type=zstd", true),
    ("cluster_size=512", false),
    ("cluster_size=512,refcount_bits=2", true),
    ("cluster_size=4096,refcount_bits=4", true),
    ("cluster_size=4096,refcount_bits=64,compression_type=zstd", true),
    ("cluster_size=16384,compat=0.10", true),
    ("cluster_size=2097152,refcount_bits=8", false),
];

fn open(folder: &Folder, name: &str) -> Image {
    Image::open(folder.file(name), &OpenOptions::default()).unwrap()
}

fn deduplicated(folder: &Folder, sources: &[&str], (features, compress): (&str, bool), name: &str) -> ConvertReport {
    let options = ConvertOptions { compress, dedup: true, ..ConvertOptions::default() };
    copied(folder, sources, features, name, &options).unwrap()
}

fn copied(
    folder: &Folder,
    sources: &[&str],
    features: &str,
    name: &str,
    options: &ConvertOptions,
) -> Result<ConvertReport, qtk_image::Error> {
    let sources: Vec<Image> = sources.iter().map(|name| open(folder, name)).collect();
    let (path, image) = (folder.file(name), new_image(Format::Qcow2, features));
    convert(&sources, Target::New { path: &path, image: &image }, options, &mut |_| {}, &NoProgress)
}

/// The raw disk `disk.raw` and the same compressed by QEMU, `zlib.qcow2` and `zstd.qcow2`.
fn disks(disk: &[u8], cluster: &str) -> Folder {
    let folder = Folder::new();
    std::fs::write(folder.file("disk.raw"), disk).unwrap();
    for kind in ["zlib", "zstd"] {
        let (options, name) = (format!("compression_type={kind},cluster_size={cluster}"), format!("{kind}.qcow2"));
        folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, "disk.raw", &name]);
    }
    folder
}

/// Fails unless the image is sound and holds the disks one after the other.
fn holds(folder: &Folder, image: &str, disks: &[&[u8]]) {
    folder.check(image);
    std::fs::write(folder.file("expected"), disks.concat()).unwrap();
    folder.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "expected", image]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_result_is_the_same_on_any_number_of_threads(
        blocks in proptest::collection::vec((0..9_u64, 1..6_usize), 1..200),
        tail in 0..9_usize,
    ) {
        let mut disk = Vec::new();
        for &(number, len) in &blocks {
            // Of three kinds: what compresses, what does not, and holes.
            let block = if number % 3 == 0 { noise(number, 16 * KIB) } else { vec![u8::try_from(number % 4).unwrap(); 16 * KIB] };
            (0..len).for_each(|_| disk.extend_from_slice(&block));
        }
        disk.resize(disk.len() + tail * 512, 7);
        let folder = disks(&disk, "64k");
        for (features, compress) in WAYS {
            let mut first = None;
            for threads in [1, 2, 7] {
                let options = ConvertOptions { compress, dedup: true, threads: Some(threads), ..ConvertOptions::default() };
                let report = copied(&folder, &["zlib.qcow2", "disk.raw", "zstd.qcow2"], features, "out", &options).unwrap();
                let result = (std::fs::read(folder.file("out")).unwrap(), report);
                prop_assert!(first.get_or_insert_with(|| result.clone()) == &result, "{features} on {threads} threads: {report:?}");
            }
            holds(&folder, "out", &[&disk, &disk, &disk]);
        }
    }
}

#[test]
fn it_does_not_matter_how_sources_store_what_is_alike() {
    let disk = content(3, 6 * MIB);
    let folder = disks(&disk, "64k");
    for (features, compress) in [("", false), ("", true), ("compression_type=zstd", true)] {
        let once = deduplicated(&folder, &["disk.raw"], (features, compress), "once");
        let sources = ["zlib.qcow2", "disk.raw", "zstd.qcow2"];
        let report = deduplicated(&folder, &sources, (features, compress), "out");
        holds(&folder, "out", &[&disk, &disk, &disk]);
        let clusters = disk.chunks(64 * KIB).filter(|cluster| cluster.iter().any(|&byte| byte != 0)).count() as u64;
        let distinct = clusters - once.shared;
        assert_eq!(report.shared, 3 * clusters - distinct, "{features}");
        assert_eq!(report.copied + report.compressed + report.plain_bytes.div_ceil(64 << 10), distinct);
        assert!(report.file_size < once.file_size * 11 / 10, "{report:?} {once:?}");
        let all = copied(&folder, &sources, features, "all", &ConvertOptions { compress, ..ConvertOptions::default() });
        let less = all.unwrap().file_size - report.file_size;
        // Streams of other encoders would have had other lengths.
        let off = if compress { less / 4 } else { 128 << 10 };
        assert!(report.saved.abs_diff(less) < off, "{less} against {report:?}");
    }
}

#[test]
fn chains_are_flattened_with_what_is_alike_stored_once() {
    let disk = content(5, 5 * MIB);
    let folder = disks(&[&disk[..], &disk[..]].concat(), "4k");
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "zlib.qcow2", "-F", "qcow2", "top.qcow2"]);
    folder.qemu_io("top.qcow2", &["write -P 7 1M 1M", "write -z 6M 200k", "write -P 7 9M 128k"]);
    for (compression, cluster_size) in [
        (None, None),
        (Some(CompressionType::Zlib), Some(4096)),
        (Some(CompressionType::Zstd), None),
        (Some(CompressionType::Zlib), Some(512)),
    ] {
        let options = FlattenOptions { compression, cluster_size, dedup: true, ..FlattenOptions::default() };
        let report = flatten(&open(&folder, "top.qcow2"), &folder.file("out"), &options, &NoProgress).unwrap();
        assert!(report.shared > 0 && report.saved > 0, "{report:?}");
        folder.check("out");
        folder.qemu_img(&["compare", "top.qcow2", "out"]);
        // What shares in the source does not share in a copy that is not asked to, and grows by nothing else.
        let options = FlattenOptions { compression, cluster_size, ..FlattenOptions::default() };
        let again = flatten(&open(&folder, "out"), &folder.file("again"), &options, &NoProgress).unwrap();
        flatten(&open(&folder, "top.qcow2"), &folder.file("whole"), &options, &NoProgress).unwrap();
        let plain = flatten(&open(&folder, "whole"), &folder.file("plain"), &options, &NoProgress).unwrap();
        folder.check("again");
        folder.qemu_img(&["compare", "top.qcow2", "again"]);
        assert!(again.file_size.abs_diff(plain.file_size) < plain.file_size / 20, "{again:?} {plain:?}");
    }
}

#[test]
fn zeroes_that_are_to_be_stored_are_stored_once() {
    let folder = Folder::new();
    let disk = vec![0; 70_000 * 512];
    std::fs::write(folder.file("disk.raw"), &disk).unwrap();
    for compress in [false, true] {
        for threads in [1, 5] {
            let options = ConvertOptions {
                compress,
                dedup: true,
                sparse_size: 0,
                threads: Some(threads),
                ..ConvertOptions::default()
            };
            let report = copied(&folder, &["disk.raw"], "cluster_size=512", "out", &options).unwrap();
            assert_eq!(report.shared, 70_000 - 2, "one refcount of 16 bits does not count them all");
            assert_eq!(report.copied + report.compressed + report.plain_bytes / 512, 2);
        }
        holds(&folder, "out", &[&disk]);
    }
}

#[test]
fn edits_leave_the_others_that_share_alone() {
    let folder = Folder::new();
    let disk = [content(2, MIB), content(2, MIB)].concat();
    std::fs::write(folder.file("disk.raw"), &disk).unwrap();
    for (features, compress) in WAYS {
        deduplicated(&folder, &["disk.raw"], (features, compress), "out.qcow2");
        let image = Image::open(folder.file("out.qcow2"), &OpenOptions::writable()).unwrap();
        let transaction = image.begin().unwrap();
        transaction.write_at(&[9; 100], 300_000).unwrap();
        transaction.zero(700_000..800_000).unwrap();
        transaction.commit().unwrap();
        drop(transaction);
        let mut expected = disk.clone();
        expected[300_000..300_100].fill(9);
        expected[700_000..800_000].fill(0);
        holds(&folder, "out.qcow2", &[&expected]);
        // Its clusters are shared with a snapshot now, too, unless there are too many users already.
        let wide = !features.contains("refcount_bits=2") && !features.contains("refcount_bits=4");
        if wide {
            folder.qemu_img(&["snapshot", "-c", "one", "out.qcow2"]);
            folder.qemu_io("out.qcow2", &["write -P 5 0 2M"]);
            folder.qemu_img(&["snapshot", "-a", "one", "out.qcow2"]);
            folder.qemu_img(&["snapshot", "-d", "one", "out.qcow2"]);
            holds(&folder, "out.qcow2", &[&expected]);
        }
    }
}

#[test]
fn what_cannot_be_shared_is_refused_and_nothing_written() {
    let folder = Folder::new();
    std::fs::write(folder.file("disk.raw"), content(1, MIB)).unwrap();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "there.qcow2", "1M"]);
    let dedup = ConvertOptions { dedup: true, ..ConvertOptions::default() };
    for (features, word) in [
        ("data_file=data.raw", "data file"),
        ("extended_l2=on", "subclusters"),
        ("preallocation=metadata", "preallocated"),
        ("refcount_bits=1", "one bit"),
    ] {
        let data = features.replace("data.raw", folder.file("data.raw").to_str().unwrap());
        let error = copied(&folder, &["disk.raw"], &data, "out", &dedup).unwrap_err().to_string();
        assert!(error.contains(word), "{features}: {error}");
    }
    let (path, raw) = (folder.file("out"), new_image(Format::Raw, ""));
    let existing = Image::open(folder.file("there.qcow2"), &OpenOptions::writable()).unwrap();
    for (target, word) in [
        (Target::New { path: &path, image: &raw }, "raw"),
        (Target::Existing { image: existing, overlay: false }, "new images"),
    ] {
        let error = convert(&[open(&folder, "disk.raw")], target, &dedup, &mut |_| {}, &NoProgress);
        assert!(error.unwrap_err().to_string().contains(word), "{word}");
    }
    let options = FlattenOptions { format: Format::Raw, dedup: true, ..FlattenOptions::default() };
    assert!(flatten(&open(&folder, "disk.raw"), &path, &options, &NoProgress).is_err());
    assert_eq!(folder.names(), ["disk.raw", "there.qcow2"]);
}

#[test]
fn on_a_base_only_what_is_stored_is_shared() {
    let folder = disks(&content(4, 2 * MIB), "64k");
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "zlib.qcow2", "-F", "qcow2", "top.qcow2"]);
    folder.qemu_io("top.qcow2", &["write -P 7 100k 700k", "write -z 1M 100k"]);
    let base = folder.file("zlib.qcow2");
    let features = format!("backing_fmt=qcow2,backing_file={}", base.to_str().unwrap());
    let report = deduplicated(&folder, &["top.qcow2"], (&features, false), "out.qcow2");
    assert_eq!(report.shared, 9);
    folder.check("out.qcow2");
    folder.qemu_img(&["compare", "top.qcow2", "out.qcow2"]);
}
