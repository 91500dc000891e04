//! `info` and `map` against what `qemu-img` prints.

use crate::common::{Folder, content};
use qtk_image::{Image, NodeSpec, OpenOptions, chain_info, info, map, node_info};
use serde_json::Value;

fn images() -> Folder {
    let folder = Folder::new();
    std::fs::write(folder.file("odd.raw"), content(0, 5_000_001)).unwrap();
    // A relative name would start at the working directory.
    let with_data_file = |name: &str| format!("data_file={}", folder.file(name).display());
    for (name, options) in [
        ("plain.qcow2", "cluster_size=64k"),
        ("v2.qcow2", "compat=0.10"),
        ("lazy.qcow2", "lazy_refcounts=on,refcount_bits=64,cluster_size=4k"),
        ("zstd.qcow2", "compression_type=zstd,cluster_size=2M"),
        ("subclusters.qcow2", "extended_l2=on,cluster_size=128k"),
        ("places.qcow2", "preallocation=metadata"),
        ("small-places.qcow2", "preallocation=metadata,cluster_size=512"),
        ("parts.qcow2", "preallocation=metadata,extended_l2=on"),
        ("space.qcow2", "preallocation=falloc"),
        ("data-file.qcow2", &*with_data_file("data-file.raw")),
        ("data-file-raw.qcow2", &*format!("{},data_file_raw=on", with_data_file("data-file-raw.raw"))),
    ] {
        folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "20M"]);
        folder.qemu_io(name, &["write -P 1 100k 300k", "write -P 2 5M 1M", "write -z 6M 1M", "discard 5M 128k"]);
    }
    folder.qemu_img(&["snapshot", "-c", "first", "lazy.qcow2"]);
    folder.qemu_img(&["snapshot", "-c", "größer", "lazy.qcow2"]);
    folder.qemu_img(&["bitmap", "--add", "-g", "32k", "lazy.qcow2", "one"]);
    folder.qemu_img(&["bitmap", "--add", "--disable", "lazy.qcow2", "two"]);
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
        let entries: Vec<Value> = map(&image, 0..u64::MAX).unwrap().iter().map(qtk_image::MapEntry::to_json).collect();
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
        let expected = json(&folder.qemu_img(&["info", "--output=json", path_text]));
        // As text, since the order of keys counts too.
        assert_eq!(alone.to_string(), expected.to_string(), "{name}");
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

#[test]
fn the_text_of_infos_is_that_of_qemu_img() {
    let folder = images();
    let utc = |seconds: u64| {
        let date = folder.run("date", &["-u", "+%F %T", &format!("-d@{seconds}")]);
        String::from_utf8(date.stdout).unwrap().trim_end().to_owned()
    };
    for name in &folder.names() {
        let path = folder.file(name);
        let path_text = path.to_str().unwrap();
        let text = info(&path, &OpenOptions::default()).unwrap().to_text(&utc);
        let expected = folder.run("env", &["TZ=UTC", "qemu-img", "info", path_text]);
        assert_eq!(text, String::from_utf8(expected.stdout).unwrap(), "{name}");
    }
}

#[test]
fn descriptions_are_named_as_in_qemu_img() {
    let folder = images();
    let odd = folder.file("odd.raw").to_str().unwrap().to_owned();
    let plain = folder.file("plain.qcow2").to_str().unwrap().to_owned();
    for options in [
        format!("driver=raw,file.filename={odd}"),
        format!("driver=raw,offset=512,size=1M,file.filename={odd}"),
        format!("driver=raw,offset=1,file.filename={odd}"),
        format!("driver=file,filename={odd}"),
        format!("driver=raw,file.driver=raw,file.offset=3k,file.file.filename={odd}"),
        format!("driver=qcow2,file.driver=raw,file.size=64M,file.file.filename={plain}"),
        format!("driver=qcow2,file.driver=raw,file.file.filename={plain}"),
        format!("file.filename={plain},cache-size=1M,overlap-check=all,node-name=disk"),
    ] {
        let spec = NodeSpec::from_options(options.split(',').map(|option| option.split_once('=').unwrap()));
        let output = folder.run("qemu-img", &["info", "--output=json", "--image-opts", &options]);
        match node_info(&spec, &OpenOptions::default()) {
            Ok(info) => assert_eq!(
                info.to_json().to_string(),
                json(&String::from_utf8(output.stdout).unwrap()).to_string(),
                "{options}"
            ),
            Err(error) => {
                let expected = format!("qemu-img: Could not open '{options}': {error}\n");
                assert_eq!(String::from_utf8(output.stderr).unwrap(), expected);
            }
        }
    }
}
