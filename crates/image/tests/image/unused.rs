//! Copies that leave out what nobody needs, against a model in memory and `qemu-img`.

use std::ops::Range;

use proptest::prelude::*;
use qtk_block::{BlockRead, NoProgress};
use qtk_image::{ConvertOptions, ConvertReport, FlattenOptions, Format, Image, OpenOptions, Target, convert, flatten};
use qtk_qcow2::CompressionType;

use crate::common::{Folder, content, new_image, noise};

const MIB: usize = 1 << 20;

fn open(folder: &Folder, name: &str) -> Image {
    Image::open(folder.file(name), &OpenOptions::default()).unwrap()
}

fn read(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Compressed clusters under plain ones, and holes: 6 MiB and a bit.
fn chain() -> Folder {
    let folder = Folder::new();
    std::fs::write(folder.file("base.raw"), content(3, 6 * MIB + 1536)).unwrap();
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2"]);
    std::fs::write(folder.file("noise"), noise(4, 500_000)).unwrap();
    folder.qemu_io("top.qcow2", &["write -s noise 1M 488k", "write -P 7 3M 100k", "write -z 5M 64k"]);
    folder
}

fn ranges(cuts: &[u64]) -> Vec<Range<u64>> {
    let mut cuts = cuts.to_vec();
    cuts.sort_unstable();
    cuts.dedup();
    cuts.as_chunks().0.iter().map(|&[start, end]| start..end).collect()
}

fn without(disk: &[u8], unused: &[Range<u64>]) -> Vec<u8> {
    let mut disk = disk.to_vec();
    for range in unused {
        disk[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].fill(0);
    }
    disk
}

/// The ways to flatten: format, codec and cluster size.
const WAYS: [(Format, Option<CompressionType>, Option<u64>); 5] = [
    (Format::Raw, None, None),
    (Format::Qcow2, None, None),
    (Format::Qcow2, Some(CompressionType::Zlib), None),
    (Format::Qcow2, Some(CompressionType::Zstd), Some(2 << 20)),
    (Format::Qcow2, None, Some(512)),
];

fn copied(folder: &Folder, name: &str, options: &ConvertOptions, target: (Format, &str)) -> ConvertReport {
    let (path, image) = (folder.file(name), new_image(target.0, target.1));
    let target = Target::New { path: &path, image: &image };
    convert(&[open(folder, "top.qcow2")], target, options, &mut |_| {}, &NoProgress).unwrap()
}

fn check_flatten(folder: &Folder, disk: &[u8], unused: &[Range<u64>]) {
    std::fs::write(folder.file("expected"), without(disk, unused)).unwrap();
    for (format, compression, cluster_size) in WAYS {
        let mut first = None;
        for threads in [1, 5] {
            let options = FlattenOptions {
                format,
                compression,
                cluster_size,
                unused: unused.to_vec(),
                threads: Some(threads),
                ..FlattenOptions::default()
            };
            flatten(&open(folder, "top.qcow2"), &folder.file("out"), &options, &NoProgress).unwrap();
            let bytes = std::fs::read(folder.file("out")).unwrap();
            assert!(first.get_or_insert_with(|| bytes.clone()) == &bytes, "{format:?} on {threads} threads");
        }
        folder.qemu_img(&["compare", "-f", "raw", "-F", format.name(), "expected", "out"]);
        if format == Format::Qcow2 {
            folder.check("out");
        }
    }
}

fn check_convert(folder: &Folder, disk: &[u8], unused: &[Range<u64>]) {
    let options = ConvertOptions { unused: unused.to_vec(), ..ConvertOptions::default() };
    let everything = ConvertOptions { sparse_size: 0, ..options.clone() };
    let expected = without(disk, unused);
    for (options, format, features) in [
        (&options, Format::Raw, ""),
        (&options, Format::Qcow2, "cluster_size=16384,extended_l2=on"),
        (&everything, Format::Raw, ""),
        (&everything, Format::Qcow2, ""),
    ] {
        copied(folder, "out", options, (format, features));
        assert!(read(&open(folder, "out")) == expected, "{format:?} {features}");
    }
    // On a base the rest is what the topmost file leaves to it.
    for features in ["cluster_size=65536", "cluster_size=16384,extended_l2=on"] {
        let base = folder.file("base.qcow2").to_str().unwrap().to_owned();
        let features = format!("{features},backing_fmt=qcow2,backing_file={base}");
        copied(folder, "over.qcow2", &options, (Format::Qcow2, &features));
        folder.check("over.qcow2");
        let found = read(&open(folder, "over.qcow2"));
        for (at, ((&found, &needed), &stored)) in found.iter().zip(&expected).zip(disk).enumerate() {
            let is_unused = unused.iter().any(|range| range.contains(&(at as u64)));
            assert!(found == needed || is_unused && found == stored, "byte {at}: {found}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]

    #[test]
    fn nothing_else_is_left_out(
        cuts in proptest::collection::vec(0..6 * MIB as u64 / 512, 0..60),
        grain in prop_oneof![Just(512), Just(4096), Just(65536)],
    ) {
        let folder = chain();
        let disk = read(&open(&folder, "top.qcow2"));
        let cuts: Vec<u64> = cuts.into_iter().map(|cut| cut * 512 / grain * grain).collect();
        let unused = ranges(&cuts);
        check_flatten(&folder, &disk, &unused);
        check_convert(&folder, &disk, &unused);
    }
}

#[test]
fn what_is_left_out_is_neither_read_nor_stored() {
    let folder = Folder::new();
    let disk: Vec<u8> = noise(1, 8 * MIB).iter().map(|byte| byte | 0xf0).collect();
    std::fs::write(folder.file("top.raw"), disk).unwrap();
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "top.raw", "top.qcow2"]);
    let unused: Vec<Range<u64>> = vec![4096..12_288, MIB as u64..7 * MIB as u64];
    let options = ConvertOptions { unused: unused.clone(), ..ConvertOptions::default() };
    let report = copied(&folder, "out", &options, (Format::Qcow2, ""));
    assert_eq!(report.left_out, 6 * MIB as u64 + 8192);
    assert_eq!(report.plain_bytes, 2 * MIB as u64);
    // Damage there does not matter.
    let mut bytes = std::fs::read(folder.file("top.qcow2")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle - 1_000_000..middle + 1_000_000].fill(0xff);
    std::fs::write(folder.file("top.qcow2"), bytes).unwrap();
    copied(&folder, "again", &options, (Format::Qcow2, ""));
    folder.qemu_img(&["compare", "out", "again"]);
    let (path, image) = (folder.file("whole"), new_image(Format::Qcow2, ""));
    let target = Target::New { path: &path, image: &image };
    let whole = ConvertOptions::default();
    assert!(convert(&[open(&folder, "top.qcow2")], target, &whole, &mut |_| {}, &NoProgress).is_err());
}

#[test]
fn what_an_image_held_where_nobody_needs_it_is_gone() {
    let folder = chain();
    let unused = ranges(&[65536, 131_072, 1 << 20, 2 << 20, 3_200_000, 3_210_240]);
    let options = ConvertOptions { unused: unused.clone(), ..ConvertOptions::default() };
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "old.qcow2", "7M"]);
    folder.qemu_io("old.qcow2", &["write -P 200 0 7M"]);
    let image = Image::open(folder.file("old.qcow2"), &OpenOptions::writable()).unwrap();
    let target = Target::Existing { image, overlay: false };
    convert(&[open(&folder, "top.qcow2")], target, &options, &mut |_| {}, &NoProgress).unwrap();
    folder.check("old.qcow2");
    let mut expected = without(&read(&open(&folder, "top.qcow2")), &unused);
    expected.resize(7 * MIB, 200);
    assert!(read(&open(&folder, "old.qcow2")) == expected);
}
