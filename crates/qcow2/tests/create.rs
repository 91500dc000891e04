//! New images: byte for byte those that `qemu-img create` makes, clean, and written on by QEMU.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use qtk_block::MemoryDisk;
use qtk_qcow2::{
    Backing, ClusterBits, CompressionType, CreateOptions, Error, Layer, OptionProblem, Preallocation, Version, create,
    create_with,
};
use serde_json::Value;
use support::{assert_clean, check_as_qemu, qemu_img, qemu_io, qemu_read, run, storage, used_clusters};

fn info(folder: &Path, name: &str) -> Value {
    let mut info: Value = serde_json::from_str(&qemu_img(folder, &format!("info --output=json {name}"))).unwrap();
    for key in ["filename", "actual-size", "children"] {
        info.as_object_mut().unwrap().remove(key);
    }
    info
}

fn make(path: &Path, options: &CreateOptions) {
    std::fs::write(path, "").unwrap();
    create(storage(path), "image", options).unwrap();
}

#[test]
fn qemu_sees_what_it_would_have_made() {
    let v3 = CreateOptions { size: 10 << 20, ..CreateOptions::default() };
    let bits = |bits| ClusterBits::new(bits).unwrap();
    let cases = [
        ("", v3.clone()),
        ("cluster_size=512", CreateOptions { cluster_bits: bits(9), ..v3.clone() }),
        ("cluster_size=2M", CreateOptions { cluster_bits: bits(21), ..v3.clone() }),
        ("refcount_bits=1", CreateOptions { refcount_bits: 1, ..v3.clone() }),
        ("cluster_size=512,refcount_bits=64", CreateOptions { cluster_bits: bits(9), refcount_bits: 64, ..v3.clone() }),
        ("compression_type=zstd", CreateOptions { compression: CompressionType::Zstd, ..v3.clone() }),
        ("lazy_refcounts=on", CreateOptions { lazy_refcounts: true, ..v3.clone() }),
        ("compat=0.10", CreateOptions { version: Version::V2, ..v3.clone() }),
    ];
    for (options, ours) in cases {
        let folder = tempfile::tempdir().unwrap();
        let with = if options.is_empty() { String::new() } else { format!("-o {options} ") };
        qemu_img(folder.path(), &format!("create -f qcow2 {with}theirs.qcow2 10M"));
        let image = folder.path().join("ours.qcow2");
        make(&image, &ours);
        assert_eq!(info(folder.path(), "ours.qcow2"), info(folder.path(), "theirs.qcow2"), "{options}");
        assert_clean(&image);
        qemu_io(folder.path(), "ours.qcow2", &["write -P 5 1M 1M"]);
        assert_clean(&image);
        assert!(qemu_read(&image)[1 << 20..2 << 20].iter().all(|&byte| byte == 5));
    }
}

/// The options as `qemu-img create -o` takes them.
fn as_text(options: &CreateOptions) -> String {
    let on_off = |on| if on { "on" } else { "off" };
    let mut text = format!(
        "compat={},cluster_size={},refcount_bits={},lazy_refcounts={},extended_l2={},compression_type={}",
        if options.version == Version::V2 { "0.10" } else { "1.1" },
        options.cluster_bits.size(),
        options.refcount_bits,
        on_off(options.lazy_refcounts),
        on_off(options.extended_l2),
        options.compression,
    );
    let preallocation = match options.preallocation {
        Preallocation::Off => "off",
        Preallocation::Metadata => "metadata",
        Preallocation::Falloc => "falloc",
        Preallocation::Full => "full",
    };
    text += &format!(",preallocation={preallocation},data_file_raw={}", on_off(options.data_file_raw));
    if let Some(backing) = &options.backing {
        text += &format!(",backing_file={}", backing.name);
        text += &backing.format.as_ref().map_or(String::new(), |format| format!(",backing_fmt={format}"));
    }
    text + &options.data_file.as_ref().map_or(String::new(), |name| format!(",data_file={name}"))
}

/// Options of every kind, those that do not go together among them.
fn any_options(folder: PathBuf) -> impl Strategy<Value = CreateOptions> {
    let preallocation = prop_oneof![
        3 => Just(Preallocation::Off),
        1 => Just(Preallocation::Metadata),
        1 => Just(Preallocation::Falloc),
        1 => Just(Preallocation::Full),
    ];
    let often = |weight| proptest::bool::weighted(weight);
    let features = (often(0.2), often(0.2), often(0.3), often(0.2), often(0.2), often(0.2), often(0.2));
    let widths = prop_oneof![3 => Just(16), 2 => (0..8_u32).prop_map(|order| 1 << order)];
    (9..=21_u32, 0..(40_u64 << 11), features, widths, preallocation).prop_map(
        move |(bits, sectors, (v2, lazy, extended, zstd, data, raw, backing), refcount_bits, preallocation)| {
            let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
            CreateOptions {
                // Small disks where every cluster gets a place; large ones have metadata only.
                size: sectors * if preallocation == Preallocation::Off && !raw { 512 << (bits / 2) } else { 512 },
                cluster_bits: ClusterBits::new(bits).unwrap(),
                version: if v2 { Version::V2 } else { Version::V3 },
                refcount_bits,
                compression: if zstd { CompressionType::Zstd } else { CompressionType::Zlib },
                backing: backing.then(|| Backing { name: path("base.raw"), format: Some("raw".into()) }),
                lazy_refcounts: lazy,
                extended_l2: extended,
                data_file: data.then(|| path("data.raw")),
                data_file_raw: raw,
                preallocation,
            }
        },
    )
}

/// Makes the image by both, and compares the files.
fn assert_made_as_by_qemu(folder: &Path, options: &CreateOptions) {
    let text = as_text(options);
    let (ours, theirs, data) = (folder.join("ours.qcow2"), folder.join("theirs.qcow2"), folder.join("data.raw"));
    let arguments = ["create", "-q", "-f", "qcow2", "-o", &text, theirs.to_str().unwrap(), &options.size.to_string()];
    let made = run("qemu-img", arguments);
    let their_data_len = data.metadata().map_or(0, |metadata| metadata.len());
    std::fs::write(&ours, "").unwrap();
    let data_storage = options.data_file.as_ref().map(|_| {
        std::fs::write(&data, "").unwrap();
        storage(&data)
    });
    let result = create_with(storage(&ours), data_storage, "image", options);
    assert_eq!(result.is_ok(), made.status.success(), "{text}: {result:?}, {}", String::from_utf8_lossy(&made.stderr));
    if result.is_ok() {
        assert!(used_clusters(&ours) == used_clusters(&theirs), "{text} {}", options.size);
        if options.data_file.is_some() {
            assert_eq!(data.metadata().unwrap().len(), their_data_len, "{text} {}", options.size);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]
    #[test]
    fn the_same_bytes_as_by_qemu(seed_options in any_options(PathBuf::from("FOLDER"))) {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| name.replace("FOLDER", folder.path().to_str().unwrap());
        std::fs::write(folder.path().join("base.raw"), vec![1; 1 << 20]).unwrap();
        let backing = seed_options.backing.map(|backing| Backing { name: place(&backing.name), ..backing });
        let data_file = seed_options.data_file.as_deref().map(place);
        assert_made_as_by_qemu(folder.path(), &CreateOptions { backing, data_file, ..seed_options });
    }
}

#[test]
fn the_largest_disks() {
    for (bits, extended_l2, exponent) in
        [(9, false, 37), (16, false, 51), (16, true, 50), (21, false, 61), (21, true, 60)]
    {
        let folder = tempfile::tempdir().unwrap();
        let cluster_bits = ClusterBits::new(bits).unwrap();
        let largest = CreateOptions { size: 1 << exponent, cluster_bits, extended_l2, ..CreateOptions::default() };
        assert_made_as_by_qemu(folder.path(), &largest);
        assert_made_as_by_qemu(folder.path(), &CreateOptions { size: largest.size + 512, ..largest });
    }
}

#[test]
fn sizes_from_nothing_to_the_limit() {
    for (size, bits) in [(0, 16), (512, 16), (1, 9), (1 << 40, 16), (1 << 50, 21), (128 << 30, 9)] {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image.qcow2");
        let cluster_bits = ClusterBits::new(bits).unwrap();
        make(&image, &CreateOptions { size, cluster_bits, ..CreateOptions::default() });
        assert_eq!(check_as_qemu(&image).leaks, 0, "{size} bytes in clusters of 2^{bits}");
    }
}

#[test]
fn overlays_name_their_backing() {
    for (bits, version) in [(9, Version::V3), (16, Version::V3), (16, Version::V2)] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("base.raw"), vec![9; 1 << 20]).unwrap();
        let options = CreateOptions {
            size: 1 << 20,
            version,
            cluster_bits: ClusterBits::new(bits).unwrap(),
            backing: Some(Backing { name: "base.raw".into(), format: Some("raw".into()) }),
            ..CreateOptions::default()
        };
        let image = folder.path().join("image.qcow2");
        make(&image, &options);
        assert_clean(&image);
        assert!(qemu_read(&image).iter().all(|&byte| byte == 9));
        assert_eq!(info(folder.path(), "image.qcow2")["backing-filename-format"], "raw");
    }
}

#[test]
fn impossible_options_are_named() {
    let v3 = CreateOptions::default();
    let v2 = CreateOptions { version: Version::V2, ..v3.clone() };
    let on = |name: &str| Some(Backing { name: name.into(), format: None });
    let raw = CreateOptions { data_file: Some("data.raw".into()), data_file_raw: true, ..v3.clone() };
    let cases = [
        (CreateOptions { extended_l2: true, ..v2.clone() }, OptionProblem::ExtendedL2InVersion2),
        (
            CreateOptions { extended_l2: true, cluster_bits: ClusterBits::new(13).unwrap(), ..v3.clone() },
            OptionProblem::ExtendedL2ClusterSize,
        ),
        (
            CreateOptions { preallocation: Preallocation::Metadata, backing: on("base"), ..v3.clone() },
            OptionProblem::PreallocationOnBacking,
        ),
        (CreateOptions { lazy_refcounts: true, ..v2.clone() }, OptionProblem::LazyRefcountsInVersion2),
        (CreateOptions { refcount_bits: 0, ..v3.clone() }, OptionProblem::RefcountWidth),
        (CreateOptions { refcount_bits: 12, ..v3.clone() }, OptionProblem::RefcountWidth),
        (CreateOptions { refcount_bits: 128, ..v3.clone() }, OptionProblem::RefcountWidth),
        (CreateOptions { refcount_bits: 8, ..v2.clone() }, OptionProblem::RefcountWidthInVersion2),
        (CreateOptions { data_file: None, ..raw.clone() }, OptionProblem::RawWithoutDataFile),
        (CreateOptions { backing: on("base"), ..raw.clone() }, OptionProblem::RawDataFileOnBacking),
        (CreateOptions { version: Version::V2, ..raw }, OptionProblem::DataFileInVersion2),
        (CreateOptions { compression: CompressionType::Zstd, ..v2 }, OptionProblem::CompressionInVersion2),
        (CreateOptions { size: u64::MAX, ..v3.clone() }, OptionProblem::SizeTooLarge),
        (CreateOptions { backing: on(&"x".repeat(2000)), ..v3.clone() }, OptionProblem::BackingName),
        (
            CreateOptions { backing: on(&"x".repeat(500)), cluster_bits: ClusterBits::new(9).unwrap(), ..v3 },
            OptionProblem::HeaderTooLarge,
        ),
    ];
    for (options, expected) in cases {
        let disk = Arc::new(MemoryDisk::new(0));
        let error = create(disk.clone(), "new.qcow2", &options).unwrap_err();
        assert!(error.to_string().starts_with("new.qcow2"));
        let Error::ImpossibleOptions { problem, .. } = error else { panic!("{error}") };
        assert_eq!(problem, expected);
        assert!(Layer::open(disk, "new.qcow2").is_err());
    }
}
