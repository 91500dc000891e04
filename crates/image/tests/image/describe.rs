//! `info` and `map` against what `qemu-img` prints.

use crate::common::{Folder, content};
use qtk_image::{Image, OpenOptions, chain_info, info, map};
use serde_json::Value;

fn images() -> Folder {
    let folder = Folder::new();
    std::fs::write(folder.file("odd.raw"), content(0, 5_000_001)).unwrap();
    for (name, options) in [
        ("plain.qcow2", "cluster_size=64k"),
        ("v2.qcow2", "compat=0.10"),
        ("lazy.qcow2", "lazy_refcounts=on,refcount_bits=64,cluster_size=4k"),
        ("zstd.qcow2", "compression_type=zstd,cluster_size=2M"),
    ] {
        folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "20M"]);
        folder.qemu_io(name, &["write -P 1 100k 300k", "write -P 2 5M 1M", "write -z 6M 1M", "discard 5M 128k"]);
    }
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "odd.raw", "compressed.qcow2"]);
    for (name, base, format) in [
        ("on-raw.qcow2", "odd.raw", "raw"),
        ("on-compressed.qcow2", "compressed.qcow2", "qcow2"),
        ("third.qcow2", "on-raw.qcow2", "qcow2"),
    ] {
        folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", base, "-F", format, name, "7M"]);
        folder.qemu_io(name, &["write -P 3 1M 200k", "write -z 2M 64k", "write -P 4 6M 10k"]);
    }
    folder.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=512",
        "-b",
        "third.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
        "9M",
    ]);
    folder.qemu_io("top.qcow2", &["write -P 3 1500k 3k", "write -c -P 6 3M 64k"]);
    folder
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn maps_are_those_of_qemu_img() {
    let folder = images();
    for name in &folder.names() {
        let image = Image::open(folder.file(name), &OpenOptions::default()).unwrap();
        let entries: Vec<Value> = map(&image).unwrap().iter().map(qtk_image::MapEntry::to_json).collect();
        assert_eq!(Value::from(entries), json(&folder.qemu_img(&["map", "--output=json", name])), "{name}");
    }
}

#[test]
fn infos_are_those_of_qemu_img() {
    let folder = images();
    for name in &folder.names() {
        let path = folder.file(name);
        let path_text = path.to_str().unwrap();
        let alone = info(&path, &OpenOptions::default()).unwrap().to_json();
        assert_eq!(alone, json(&folder.qemu_img(&["info", "--output=json", path_text])), "{name}");
        let image = Image::open(&path, &OpenOptions::default()).unwrap();
        let chain: Vec<Value> = chain_info(&image).unwrap().iter().map(qtk_image::ImageInfo::to_json).collect();
        let expected = folder.qemu_img(&["info", "--output=json", "--backing-chain", path_text]);
        assert_eq!(Value::from(chain), json(&expected), "{name}");
    }
}

#[test]
fn a_missing_base_does_not_hide_the_overlay() {
    let folder = images();
    std::fs::remove_file(folder.file("odd.raw")).unwrap();
    let path = folder.file("on-raw.qcow2");
    let alone = info(&path, &OpenOptions::default()).unwrap().to_json();
    assert_eq!(alone, json(&folder.qemu_img(&["info", "--output=json", path.to_str().unwrap()])));
}
