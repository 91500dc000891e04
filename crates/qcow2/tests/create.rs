//! New images: the same in `qemu-img info` as those that `qemu-img create` makes, clean, and written on by QEMU.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::path::Path;
use std::sync::Arc;

use qtk_block::MemoryDisk;
use qtk_qcow2::{
    Backing, ClusterBits, CompressionType, CreateOptions, Error, Layer, OptionProblem, Preallocation, Version, create,
};
use serde_json::Value;
use support::{assert_clean, check_as_qemu, qemu_img, qemu_io, qemu_read, storage};

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
