//! Measuring, number for number as `qemu-img` does.

use qtk_image::{Format, Image, MeasureSource, Measurement, OpenOptions, measure};

use crate::common::{Folder, content, new_image};

/// What `qemu-img measure` says, unless it refuses.
fn measured_by_qemu(folder: &Folder, format: Format, options: &str, source: &[&str]) -> Option<Measurement> {
    let format = format.name();
    let mut arguments = vec!["measure", "--output=json", "-O", format];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend(source);
    let output = folder.run("qemu-img", &arguments);
    let report: serde_json::Value = output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())?;
    let number = |key: &str| report.get(key).map(|value| value.as_u64().unwrap());
    let (required, fully_allocated) = (number("required").unwrap(), number("fully-allocated").unwrap());
    Some(Measurement { required, fully_allocated, bitmaps: number("bitmaps") })
}

#[test]
fn disks_of_any_size() {
    let folder = Folder::new();
    for options in [
        "",
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=2097152",
        "cluster_size=512,refcount_bits=64",
        "refcount_bits=1",
        "refcount_bits=64",
        "cluster_size=16384,extended_l2=on",
        "extended_l2=on,refcount_bits=2",
        "compat=0.10",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full,backing_file=none",
        "backing_file=none",
    ] {
        for size in [0, 1, 512, 65_537, 1 << 29, (1 << 30) + 5, 3 << 33, 1 << 40, 1 << 45, 1 << 55, i64::MAX as u64] {
            let expected = measured_by_qemu(&folder, Format::Qcow2, options, &["--size", &size.to_string()]);
            let found = measure(MeasureSource::Size(size), &new_image(Format::Qcow2, options)).ok();
            assert_eq!(found, expected, "{options} {size}");
        }
    }
    for size in [0, 1, 1000, 1 << 40, 1 << 60] {
        let expected = measured_by_qemu(&folder, Format::Raw, "", &["--size", &size.to_string()]);
        assert_eq!(measure(MeasureSource::Size(size), &new_image(Format::Raw, "")).ok(), expected);
    }
}

#[test]
fn images_with_holes_and_bitmaps() {
    let folder = Folder::new();
    std::fs::write(folder.file("sparse.raw"), content(3, (5 << 20) + 700)).unwrap();
    folder.qemu_img(&["convert", "-f", "raw", "-O", "raw", "sparse.raw", "holes.raw"]);
    folder.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "sparse.raw", "small.qcow2"]);
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "sparse.raw", "compressed.qcow2"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "reserved.qcow2", "9M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "9M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "compressed.qcow2", "-F", "qcow2", "top.qcow2", "9M"]);
    folder.qemu_io("top.qcow2", &["write -z 1M 300k", "write -P 1 2100k 3k", "discard 3M 1M", "write -P 2 8M 1M"]);
    folder.qemu_img(&["bitmap", "--add", "top.qcow2", "one"]);
    folder.qemu_img(&["bitmap", "--add", "-g", "512", "--disable", "top.qcow2", "two of a longer name"]);
    for image in
        ["sparse.raw", "holes.raw", "small.qcow2", "compressed.qcow2", "reserved.qcow2", "old.qcow2", "top.qcow2"]
    {
        let opened = Image::open(folder.file(image), &OpenOptions::default()).unwrap();
        for (format, options) in [
            (Format::Raw, ""),
            (Format::Qcow2, ""),
            (Format::Qcow2, "cluster_size=512"),
            (Format::Qcow2, "cluster_size=2097152,refcount_bits=8"),
            (Format::Qcow2, "extended_l2=on"),
            (Format::Qcow2, "compat=0.10"),
            (Format::Qcow2, "backing_file=none"),
            (Format::Qcow2, "preallocation=full"),
        ] {
            let expected = measured_by_qemu(&folder, format, options, &[image]);
            assert!(expected.is_some());
            let found = measure(MeasureSource::Image(&opened), &new_image(format, options)).ok();
            assert_eq!(found, expected, "{image} {options}");
        }
    }
}
