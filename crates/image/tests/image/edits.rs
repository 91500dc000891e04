//! `commit`, `rebase` and `resize` on random chains, against what `qemu-img` makes of copies of them.

use std::path::Path;

use proptest::prelude::*;
use qtk_block::{NoProgress, Preallocation};
use qtk_image::{
    CommitOptions, Error, Image, NewSize, NodeSpec, OpenOptions, RebaseMode, RebaseOptions, ResizeOptions, commit,
    rebase, resize,
};
use qtk_qcow2::Backing;
use serde_json::Value;

use crate::common::Folder;

const SECTOR: usize = 512;

/// One layer of a chain, by the options and commands that make it.
#[derive(Clone, Debug)]
struct Layer {
    sectors: usize,
    options: String,
    commands: Vec<String>,
}

fn command(sectors: usize) -> impl Strategy<Value = String> {
    let lengths = prop_oneof![Just(1_usize), Just(8), Just(128), Just(400), Just(2048)];
    (0..sectors, lengths, 1..255_u8, 0..6_u8).prop_map(move |(start, len, pattern, kind)| {
        let (offset, len) = (start * SECTOR, len.min(sectors - start) * SECTOR);
        match kind {
            0..=2 => format!("write -P {pattern} {offset} {len}"),
            3 => format!("write -z {offset} {len}"),
            4 => format!("write -z -u {offset} {len}"),
            _ => format!("discard {offset} {len}"),
        }
    })
}

fn layer() -> impl Strategy<Value = Layer> {
    let options = prop_oneof![
        3 => Just("cluster_size=64k"),
        1 => Just("cluster_size=512"),
        1 => Just("cluster_size=4k"),
        1 => Just("cluster_size=2M"),
        1 => Just("cluster_size=4k,compat=0.10"),
        1 => Just("cluster_size=64k,extended_l2=on"),
        1 => Just("cluster_size=64k,refcount_bits=64"),
    ];
    (1..6000_usize, options).prop_flat_map(|(sectors, options)| {
        prop::collection::vec(command(sectors), 0..5).prop_map(move |commands| Layer {
            sectors,
            options: options.to_owned(),
            commands,
        })
    })
}

/// Makes the chain `0`, `1`, … in `folder`; the lowest is raw if asked for.
fn make(folder: &Folder, layers: &[Layer], raw_base: bool) {
    for (depth, layer) in layers.iter().enumerate() {
        let (name, below) = (depth.to_string(), depth.wrapping_sub(1).to_string());
        let format = format_of(depth, raw_base);
        let mut arguments = vec!["create", "-q", "-u", "-f", format];
        if format == "qcow2" {
            arguments.extend(["-o", layer.options.as_str()]);
        }
        if depth > 0 {
            arguments.extend(["-b", below.as_str(), "-F", format_of(depth - 1, raw_base)]);
        }
        let size = (layer.sectors * SECTOR).to_string();
        arguments.extend([name.as_str(), size.as_str()]);
        folder.qemu_img(&arguments);
        let commands: Vec<&str> = layer.commands.iter().map(String::as_str).collect();
        if !commands.is_empty() {
            let mut arguments = vec!["-f", format];
            arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
            arguments.push(&name);
            assert!(folder.run("qemu-io", &arguments).status.success());
        }
    }
}

fn format_of(depth: usize, raw_base: bool) -> &'static str {
    if depth == 0 && raw_base { "raw" } else { "qcow2" }
}

/// A folder with the same files, and the same holes in them.
fn copy_of(folder: &Folder) -> Folder {
    let copy = Folder::new();
    let (from, to) = (folder.path().join("."), copy.path().to_owned());
    let (from, to) = (from.to_str().unwrap(), to.to_str().unwrap());
    assert!(folder.run("cp", &["-a", "--sparse=never", from, to]).status.success());
    copy
}

/// The map of an image, without the places of clusters, which may differ.
fn map_of(folder: &Folder, name: &str, format: &str) -> Vec<Value> {
    let map: Vec<Value> =
        serde_json::from_str(&folder.qemu_img(&["map", "--output=json", "-f", format, name])).unwrap();
    let mut joined: Vec<Value> = Vec::new();
    for mut entry in map {
        entry.as_object_mut().unwrap().remove("offset");
        match joined.last_mut() {
            Some(last)
                if ["depth", "present", "zero", "data", "compressed"].iter().all(|key| last[key] == entry[key]) =>
            {
                let length = last["length"].as_u64().unwrap() + entry["length"].as_u64().unwrap();
                last["length"] = length.into();
            }
            _ => joined.push(entry),
        }
    }
    joined
}

/// Fails unless an image reads the same in two folders and is clean in ours.
fn assert_same(theirs: &Folder, ours: &Folder, name: &str, format: &str) {
    let (their_path, our_path) = (theirs.file(name), ours.file(name));
    let paths = [&their_path, &our_path].map(|path| path.to_str().unwrap());
    ours.qemu_img(&["compare", "-f", format, "-F", format, paths[0], paths[1]]);
    if format == "qcow2" {
        ours.check(name);
        assert_eq!(map_of(ours, name, format), map_of(theirs, name, format), "{name}");
    }
}

fn spec(path: &Path) -> NodeSpec {
    NodeSpec::from_path(path)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn commits_are_those_of_qemu_img(
        layers in prop::collection::vec(layer(), 2..=4),
        raw_base: bool,
        base in prop::option::of(0..3_usize),
        keep: bool,
    ) {
        let theirs = Folder::new();
        make(&theirs, &layers, raw_base);
        let theirs = copy_of(&theirs);
        let ours = copy_of(&theirs);
        let top = (layers.len() - 1).to_string();
        let base = base.filter(|&base| base < layers.len() - 1).map(|base| base.to_string());
        let mut arguments = vec!["commit", "-q", "-f", "qcow2"];
        if let Some(base) = &base {
            arguments.extend(["-b", base]);
        }
        if keep {
            arguments.push("-d");
        }
        arguments.push(&top);
        let output = theirs.run("qemu-img", &arguments);
        let options = CommitOptions { base, keep_overlay: keep, ..CommitOptions::default() };
        commit(&spec(&ours.file(&top)), &OpenOptions::default(), &options, &NoProgress).unwrap();
        // It cannot write zeroes into version 2.
        if output.status.success() {
            for depth in (0..layers.len()).rev() {
                assert_same(&theirs, &ours, &depth.to_string(), format_of(depth, raw_base));
            }
        }
    }

    #[test]
    fn rebases_are_those_of_qemu_img(
        layers in prop::collection::vec(layer(), 2..=4),
        other in layer(),
        raw_base: bool,
        base in prop_oneof![Just(None), Just(Some("other".to_owned())), (0..2_usize).prop_map(|base| Some(base.to_string()))],
        compress: bool,
    ) {
        let theirs = Folder::new();
        make(&theirs, &layers, raw_base);
        make_other(&theirs, &other);
        let theirs = copy_of(&theirs);
        let ours = copy_of(&theirs);
        let top = (layers.len() - 1).to_string();
        let base = base.filter(|base| *base != top);
        let format = if base.as_deref() == Some("0") { format_of(0, raw_base) } else { "qcow2" };
        let compress = compress && !layers[layers.len() - 1].options.contains("extended");
        let mut arguments = vec!["rebase", "-f", "qcow2", "-b", base.as_deref().unwrap_or_default(), "-F", format];
        if compress {
            arguments.push("-c");
        }
        arguments.push(&top);
        let output = theirs.run("qemu-img", &arguments);
        // It damages its own memory when it compresses what some bases differ in.
        let crashed = output.status.code().is_none();
        prop_assert!(crashed && compress || output.status.success(), "{output:?}");
        let base = base.map(|name| Backing { name, format: Some(format.to_owned()) });
        let options = RebaseOptions { base, mode: RebaseMode::Safe, compress };
        rebase(&spec(&ours.file(&top)), &OpenOptions::default(), &options, &NoProgress).unwrap();
        if crashed {
            ours.check(&top);
            return Ok(());
        }
        assert_same(&theirs, &ours, &top, "qcow2");
        let info = |folder: &Folder| {
            let info: Value = serde_json::from_str(&folder.qemu_img(&["info", "--output=json", &top])).unwrap();
            (info["backing-filename"].clone(), info["backing-filename-format"].clone())
        };
        assert_eq!(info(&ours), info(&theirs));
    }

    #[test]
    fn resized_disks_keep_what_they_had(
        layers in prop::collection::vec(layer(), 1..=2),
        raw_base: bool,
        sizes in prop::collection::vec((1..8000_u64, 0..4_usize), 1..3),
    ) {
        const MODES: [(Preallocation, &str); 4] = [
            (Preallocation::Off, "off"),
            (Preallocation::Metadata, "metadata"),
            (Preallocation::Falloc, "falloc"),
            (Preallocation::Full, "full"),
        ];
        let theirs = Folder::new();
        make(&theirs, &layers, raw_base);
        let theirs = copy_of(&theirs);
        let ours = copy_of(&theirs);
        let depth = layers.len() - 1;
        let (top, format) = (depth.to_string(), format_of(depth, raw_base));
        let mut old = (layers[depth].sectors * SECTOR) as u64;
        for (sectors, mode) in sizes {
            let new = sectors * SECTOR as u64;
            let raw_metadata = format == "raw" && mode == 1;
            let (preallocation, mode) = MODES[if new <= old || raw_metadata { 0 } else { mode }];
            let options = OpenOptions { format: qtk_image::Format::from_name(format), ..OpenOptions::default() };
            let sizes = ResizeOptions { size: NewSize::To(new), shrink: true, preallocation };
            let resized = resize(&spec(&ours.file(&top)), &options, &sizes).unwrap();
            assert_eq!((resized.old, resized.new), (old, new));
            let prealloc = format!("--preallocation={mode}");
            let output =
                theirs.run("qemu-img", &["resize", "-q", "-f", format, "--shrink", &prealloc, &top, &new.to_string()]);
            if !output.status.success() || new < old {
                // It cannot write zeroes into version 2, and shows what was cut off when a disk grows again.
                break;
            }
            old = new;
        }
        if format == "qcow2" {
            ours.check(&top);
        }
        let (their_path, our_path) = (theirs.file(&top), ours.file(&top));
        let paths = [&their_path, &our_path].map(|path| path.to_str().unwrap());
        let output = ours.run("qemu-img", &["compare", "-f", format, "-F", format, paths[0], paths[1]]);
        assert!(output.status.success(), "{output:?}");
    }
}

fn make_other(folder: &Folder, layer: &Layer) {
    let size = (layer.sectors * SECTOR).to_string();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", &layer.options, "other", &size]);
    folder.qemu_io("other", &layer.commands.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "base", "4M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"]);
    folder.qemu_io("top", &["write -P 1 1M 1M"]);
    let read = |name: &str| std::fs::read(folder.file(name)).unwrap();
    let before = [read("base"), read("top")];
    let (top, base) = (spec(&folder.file("top")), spec(&folder.file("base")));
    let open = OpenOptions::default();
    let to = |name: &str, format: Option<&str>| RebaseOptions {
        base: Some(Backing { name: name.to_owned(), format: format.map(str::to_owned) }),
        ..RebaseOptions::default()
    };
    let rebase = |spec: &NodeSpec, options: &RebaseOptions| rebase(spec, &open, options, &NoProgress).unwrap_err();
    let commit = |spec: &NodeSpec, base: Option<&str>| {
        let options = CommitOptions { base: base.map(str::to_owned), ..CommitOptions::default() };
        commit(spec, &open, &options, &NoProgress).unwrap_err()
    };
    let resize =
        |size, shrink, preallocation| resize(&top, &open, &ResizeOptions { size, shrink, preallocation }).unwrap_err();
    assert!(matches!(commit(&base, None), Error::NoBacking { .. }));
    assert!(matches!(commit(&top, Some("nowhere")), Error::NotInChain { .. }));
    assert!(matches!(commit(&top, Some("top")), Error::NotInChain { .. }));
    assert!(matches!(rebase(&top, &to("nowhere", Some("raw"))), Error::NewBacking { .. }));
    assert!(matches!(rebase(&top, &to("base", None)), Error::BackingFormatMissing { .. }));
    assert!(matches!(rebase(&top, &to("top", Some("qcow2"))), Error::NewBacking { .. }));
    assert!(matches!(resize(NewSize::To(1 << 20), false, Preallocation::Off), Error::WouldShrink { .. }));
    assert!(matches!(resize(NewSize::To(1 << 20), true, Preallocation::Full), Error::PreallocatedShrink { .. }));
    assert!(matches!(resize(NewSize::Shrink(4 << 20), true, Preallocation::Off), Error::SizeNotPositive { .. }));
    assert!(matches!(resize(NewSize::Grow(1000), true, Preallocation::Off), Error::UnalignedSize { .. }));
    assert!([read("base"), read("top")] == before);
}

#[test]
fn the_overlay_is_emptied_only_after_its_base_has_everything() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "raw", "base", "4M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top"]);
    folder.qemu_io("top", &["write -P 7 1M 1M"]);
    let before = std::fs::read(folder.file("top")).unwrap();
    // A log that another change left stands in the way of the base's transaction, once the chain is open.
    std::fs::create_dir(folder.file("base.qtk-txn")).unwrap();
    let top = spec(&folder.file("top"));
    commit(&top, &OpenOptions::default(), &CommitOptions::default(), &NoProgress).unwrap_err();
    assert!(std::fs::read(folder.file("top")).unwrap() == before);
    std::fs::remove_dir(folder.file("base.qtk-txn")).unwrap();
    commit(&top, &OpenOptions::default(), &CommitOptions::default(), &NoProgress).unwrap();
    folder.check("top");
    let map = map_of(&folder, "top", "qcow2");
    assert!(map.iter().all(|entry| entry["depth"] == 1), "{map:?}");
    let mut base = vec![0; 4 << 20];
    base[1 << 20..2 << 20].fill(7);
    assert!(std::fs::read(folder.file("base")).unwrap() == base);
    assert_eq!(folder.names(), ["base", "top"]);
    assert!(Image::open(folder.file("top"), &OpenOptions::default()).is_ok());
}

#[test]
fn only_the_window_of_a_raw_base_is_written() {
    let folder = Folder::new();
    let mut expected = vec![1; 4 << 20];
    std::fs::write(folder.file("base"), &expected).unwrap();
    expected[1 << 20..][..128 << 10].fill(8);
    let base = folder.file("base");
    let window = format!(
        r#"json:{{"driver":"raw","offset":1048576,"size":1048576,"file":{{"driver":"file","filename":"{}"}}}}"#,
        base.display()
    );
    let open = OpenOptions { json_names: true, ..OpenOptions::default() };
    let commit_overlay = |size: &str, write: &str| {
        folder.qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", &window, "-F", "raw", "top", size]);
        folder.qemu_io("top", &[write]);
        commit(&spec(&folder.file("top")), &open, &CommitOptions::default(), &NoProgress)
    };
    commit_overlay("1M", "write -P 8 0 128k").unwrap();
    assert!(std::fs::read(&base).unwrap() == expected);
    // The window cannot grow, and so the file must not.
    commit_overlay("2M", "write -P 9 0 128k").unwrap_err();
    assert!(std::fs::read(&base).unwrap() == expected);
}
