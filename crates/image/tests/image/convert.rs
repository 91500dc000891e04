//! Conversions, whose results must be those of `qemu-img`: the same disk, stored in the same way, in the same places.

use std::path::Path;

use crate::common::{Folder, content, new_image, noise};
use qtk_block::NoProgress;
use qtk_image::{BitmapCopy, ConvertOptions, ConvertReport, Format, Image, OpenOptions, Target, convert};

const MIB: usize = 1 << 20;

/// What is converted to what, in the words of `qemu-img convert`.
#[derive(Clone, Copy)]
struct Case<'a> {
    sources: &'a [&'a str],
    format: Format,
    options: &'a str,
    flags: &'a [&'a str],
}

impl Case<'_> {
    fn by_qemu(&self, folder: &Folder, output: &str) -> bool {
        let mut arguments = vec!["convert", "-O", self.format.name()];
        if !self.options.is_empty() {
            arguments.extend(["-o", self.options]);
        }
        arguments.extend(self.flags);
        arguments.extend(self.sources);
        arguments.push(output);
        folder.run("qemu-img", &arguments).status.success()
    }

    fn by_us(&self, folder: &Folder, output: &str) -> Result<ConvertReport, qtk_image::Error> {
        let open = |name: &&str| Image::open(folder.file(name), &OpenOptions::default()).unwrap();
        let sources: Vec<Image> = self.sources.iter().map(open).collect();
        let path = folder.file(output);
        let mut options = ConvertOptions::default();
        let mut existing = false;
        let mut flags = self.flags.iter();
        while let Some(flag) = flags.next() {
            match *flag {
                "-c" => options.compress = true,
                "-S" => options.sparse_size = flags.next().unwrap().parse().unwrap(),
                "-n" => existing = true,
                "-C" => options.offload = true,
                // What QEMU has looked at before it fails to offload depends on how much it does at once.
                "-m" => assert_eq!(flags.next(), Some(&"1")),
                "--target-is-zero" => options.target_is_zero = true,
                "--salvage" => options.salvage = true,
                "--bitmaps" => options.bitmaps = BitmapCopy::All,
                "--skip-broken-bitmaps" => options.bitmaps = BitmapCopy::Consistent,
                other => panic!("{other}"),
            }
        }
        let image = new_image(self.format, self.options);
        let target = if existing {
            let open = OpenOptions { format: Some(self.format), ..OpenOptions::writable() };
            Target::Existing { image: Image::open(&path, &open)?, overlay: false }
        } else {
            Target::New { path: &path, image: &image }
        };
        convert(&sources, target, &options, &mut |_| {}, &NoProgress)
    }

    /// Converts with both tools, from the same start.
    fn compare(&self, folder: &Folder) {
        let words = format!("{:?} {} -o {:?} {:?}", self.sources, self.format, self.options, self.flags);
        let (theirs, ours) = ("theirs.out", "ours.out");
        let by_qemu = self.by_qemu(folder, theirs);
        let by_us = self.by_us(folder, ours);
        assert_eq!(by_us.is_ok(), by_qemu, "{words}: {by_us:?}");
        if !by_qemu {
            return;
        }
        let format = self.format.name();
        let map = |name: &str| folder.qemu_img(&["map", "--output=json", "-f", format, name]);
        folder.qemu_img(&["compare", "-f", format, "-F", format, theirs, ours]);
        // Streams of another compressor have other lengths.
        if !self.flags.contains(&"-c") {
            assert_same_lines(&map(ours), &map(theirs), &words);
        }
        if self.format == Format::Qcow2 {
            folder.check(ours);
            let end = |name: &str| {
                let report = folder.qemu_img(&["check", "--output=json", name]);
                let report: serde_json::Value = serde_json::from_str(&report).unwrap();
                (report["image-end-offset"].clone(), report["allocated-clusters"].clone())
            };
            if !self.flags.contains(&"-c") {
                assert_eq!(end(ours), end(theirs), "{words}");
            }
        }
    }
}

/// Images of all kinds: `holes.raw`, `solid.raw`, `plain.qcow2`, `small.qcow2`, `top.qcow2` and others.
fn images() -> Folder {
    let folder = Folder::new();
    std::fs::write(folder.file("solid.raw"), content(1, 5 * MIB + 70_001)).unwrap();
    folder.qemu_img(&["convert", "-f", "raw", "-O", "raw", "solid.raw", "holes.raw"]);
    folder.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "solid.raw", "plain.qcow2"]);
    folder.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", "solid.raw", "small.qcow2"]);
    folder.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", "extended_l2=on", "solid.raw", "sub.qcow2"]);
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "solid.raw", "packed.qcow2"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "packed.qcow2", "-F", "qcow2", "top.qcow2", "9M"]);
    std::fs::write(folder.file("noise"), noise(7, 200_000)).unwrap();
    folder.qemu_io(
        "top.qcow2",
        &[
            "write -z 1M 300k",
            "write -s noise 2100k 3k",
            "write -P 0 3M 128k",
            "write -P 2 8M 1M",
            "write -z 1600k 5k",
            "discard 4M 256k",
            "write -P 9 6M 100k",
            "write -P 8 5900k 10k",
        ],
    );
    folder.qemu_img(&["create", "-q", "-f", "raw", "empty.raw", "3M"]);
    folder
}

const SOURCES: [&str; 8] =
    ["solid.raw", "holes.raw", "plain.qcow2", "small.qcow2", "sub.qcow2", "packed.qcow2", "top.qcow2", "empty.raw"];

#[test]
fn into_new_images() {
    let folder = images();
    for source in SOURCES {
        for (format, options, flags) in [
            (Format::Raw, "", &[][..]),
            (Format::Raw, "", &["-S", "0"]),
            (Format::Raw, "", &["-S", "512"]),
            (Format::Raw, "", &["-S", "65536"]),
            (Format::Qcow2, "", &[]),
            (Format::Qcow2, "", &["-S", "0"]),
            (Format::Qcow2, "", &["-c"]),
            (Format::Qcow2, "", &["-c", "-S", "0"]),
            (Format::Qcow2, "cluster_size=512", &[]),
            (Format::Qcow2, "cluster_size=512,refcount_bits=64", &["-S", "512"]),
            (Format::Qcow2, "cluster_size=4096,refcount_bits=1", &["-S", "1024"]),
            (Format::Qcow2, "cluster_size=4096", &["-S", "131072"]),
            (Format::Qcow2, "cluster_size=2097152", &[]),
            (Format::Qcow2, "cluster_size=2097152,compression_type=zstd", &["-c"]),
            (Format::Qcow2, "cluster_size=512", &["-c"]),
            (Format::Qcow2, "extended_l2=on", &[]),
            (Format::Qcow2, "extended_l2=on,cluster_size=16384", &["-S", "512"]),
            (Format::Qcow2, "extended_l2=on", &["-c"]),
            (Format::Qcow2, "compat=0.10", &[]),
            (Format::Qcow2, "lazy_refcounts=on", &[]),
            (Format::Qcow2, "preallocation=metadata", &[]),
            (Format::Qcow2, "preallocation=falloc,cluster_size=4096", &[]),
            (Format::Qcow2, "preallocation=full", &[]),
            (Format::Qcow2, "preallocation=metadata,extended_l2=on", &[]),
        ] {
            Case { sources: &[source], format, options, flags }.compare(&folder);
        }
    }
}

#[test]
fn offloaded() {
    let folder = images();
    // Of a file that ends within a sector QEMU looks at the end all the same.
    let sources: Vec<&str> = SOURCES.into_iter().filter(|source| *source != "solid.raw").collect();
    for source in &sources {
        for (format, options) in [
            (Format::Raw, ""),
            (Format::Qcow2, ""),
            (Format::Qcow2, "cluster_size=512"),
            (Format::Qcow2, "cluster_size=2097152"),
            (Format::Qcow2, "extended_l2=on"),
            (Format::Qcow2, "preallocation=falloc"),
            (Format::Qcow2, "backing_file=packed.qcow2,backing_fmt=qcow2"),
        ] {
            Case { sources: &[source], format, options, flags: &["-C", "-m", "1"] }.compare(&folder);
        }
    }
    Case { sources: &sources, format: Format::Qcow2, options: "", flags: &["-C", "-m", "1"] }.compare(&folder);
}

#[test]
fn offloaded_to_another_file_system() {
    let (folder, elsewhere) = (images(), tempfile::tempdir_in("/dev/shm").unwrap());
    let options = ConvertOptions { offload: true, ..ConvertOptions::default() };
    for source in SOURCES {
        for format in [Format::Raw, Format::Qcow2] {
            let image = Image::open(folder.file(source), &OpenOptions::default()).unwrap();
            let (path, new) = (elsewhere.path().join("out"), new_image(format, ""));
            let target = Target::New { path: &path, image: &new };
            convert(&[image], target, &options, &mut |_| {}, &NoProgress).unwrap();
            let path = path.to_str().unwrap();
            folder.qemu_img(&["compare", "-F", format.name(), source, path]);
            if format == Format::Qcow2 {
                folder.check(path);
            }
        }
    }
}

#[test]
fn several_sources() {
    let folder = images();
    for (format, options) in [(Format::Raw, ""), (Format::Qcow2, ""), (Format::Qcow2, "cluster_size=4096")] {
        let sources = &["solid.raw", "top.qcow2", "empty.raw", "small.qcow2"];
        Case { sources, format, options, flags: &[] }.compare(&folder);
        Case { sources, format, options, flags: &["-S", "0"] }.compare(&folder);
    }
}

#[test]
fn into_overlays() {
    let folder = images();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "packed.qcow2", "-F", "qcow2", "other.qcow2", "5M"]);
    folder.qemu_io("other.qcow2", &["write -P 5 1M 64k", "write -P 5 2M 1M"]);
    for source in SOURCES {
        for options in [
            "backing_file=packed.qcow2,backing_fmt=qcow2",
            "backing_file=packed.qcow2,backing_fmt=qcow2,cluster_size=4096",
            "backing_file=packed.qcow2,backing_fmt=qcow2,cluster_size=512",
            "backing_file=packed.qcow2,backing_fmt=qcow2,cluster_size=2097152",
            "backing_file=other.qcow2,backing_fmt=qcow2,extended_l2=on",
            "backing_file=other.qcow2,backing_fmt=qcow2,compat=0.10",
            "backing_file=empty.raw,backing_fmt=raw",
        ] {
            for flags in [&[][..], &["-S", "0"], &["-c"]] {
                if source != "empty.raw" || !options.contains("empty") {
                    Case { sources: &[source], format: Format::Qcow2, options, flags }.compare(&folder);
                }
            }
        }
    }
}

#[test]
fn into_images_that_are_there() {
    let folder = images();
    let reset = |create: &[&str], writes: &[&str]| {
        for name in ["theirs.out", "ours.out"] {
            let mut arguments = vec!["create", "-q"];
            arguments.extend(create);
            arguments.extend([name, "12M"]);
            folder.qemu_img(&arguments);
            if !writes.is_empty() {
                let writes: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
                let mut arguments = vec!["-f", create[1]];
                arguments.extend(writes);
                arguments.push(name);
                assert!(folder.run("qemu-io", &arguments).status.success());
            }
        }
    };
    let writes = ["write -P 9 0 700k", "write -P 9 3M 1M", "write -z 5M 64k", "write -P 9 11M 1M"];
    for source in ["holes.raw", "small.qcow2", "top.qcow2"] {
        for (create, writes) in [
            (&["-f", "raw"][..], &writes[..]),
            (&["-f", "qcow2"], &[]),
            (&["-f", "qcow2"], &writes),
            (&["-f", "qcow2", "-o", "cluster_size=512"], &writes),
            (&["-f", "qcow2", "-o", "extended_l2=on"], &writes),
            (&["-f", "qcow2", "-o", "compat=0.10"], &writes),
            (&["-f", "qcow2", "-b", "plain.qcow2", "-F", "qcow2"], &writes),
        ] {
            for flags in [&["-n"][..], &["-n", "-S", "0"], &["-n", "--target-is-zero"]] {
                reset(create, writes);
                let format = Format::from_name(create[1]).unwrap();
                let case = Case { sources: &[source], format, options: "", flags };
                let words = format!("{source} {create:?} {writes:?} {flags:?}");
                assert!(case.by_qemu(&folder, "theirs.out"), "{words}");
                case.by_us(&folder, "ours.out").unwrap();
                let format = format.name();
                folder.qemu_img(&["compare", "-f", format, "-F", format, "theirs.out", "ours.out"]);
                if format == "qcow2" {
                    let map =
                        |name: &str| without_offsets(&folder.qemu_img(&["map", "--output=json", "-f", format, name]));
                    assert_same_lines(&map("ours.out"), &map("theirs.out"), &words);
                    folder.check("ours.out");
                }
            }
        }
    }
    assert!(!Path::new("ours.out").exists());
}

#[test]
fn bitmaps_come_along() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "top.qcow2", "40M"]);
    folder.qemu_img(&["bitmap", "--add", "top.qcow2", "coarse"]);
    folder.qemu_io("top.qcow2", &["write -P 1 1M 3M"]);
    folder.qemu_img(&["bitmap", "--add", "-g", "512", "top.qcow2", "fine"]);
    folder.qemu_io("top.qcow2", &["write -P 2 30M 5k", "write -z 7M 1M"]);
    folder.qemu_img(&["bitmap", "--disable", "top.qcow2", "fine"]);
    let bitmaps = |name: &str| -> serde_json::Value {
        let info: serde_json::Value = serde_json::from_str(&folder.qemu_img(&["info", "--output=json", name])).unwrap();
        info["format-specific"]["data"]["bitmaps"].clone()
    };
    for options in ["", "cluster_size=4096", "extended_l2=on"] {
        let case = Case { sources: &["top.qcow2"], format: Format::Qcow2, options, flags: &["--bitmaps"] };
        case.compare(&folder);
        assert_eq!(bitmaps("ours.out"), bitmaps("theirs.out"));
        assert_eq!(bitmaps("ours.out").as_array().unwrap().len(), 2);
        let contents = |name: &str, bitmap: &str| {
            let image = Image::open(folder.file(name), &OpenOptions::default()).unwrap();
            let layer = image.layers()[0].qcow2().unwrap().clone();
            layer.bitmap_contents(bitmap).unwrap().ranges().collect::<Vec<_>>()
        };
        for bitmap in ["coarse", "fine"] {
            assert_eq!(contents("ours.out", bitmap), contents("theirs.out", bitmap), "{options} {bitmap}");
            assert_eq!(contents("ours.out", bitmap), contents("top.qcow2", bitmap), "{options} {bitmap}");
        }
    }
}

fn assert_same_lines(ours: &str, theirs: &str, words: &str) {
    if ours != theirs {
        let same = ours.lines().zip(theirs.lines()).take_while(|(ours, theirs)| ours == theirs).count();
        let part = |text: &str| text.lines().skip(same.saturating_sub(2)).take(5).collect::<Vec<_>>().join("\n");
        panic!("{words}\nours:\n{}\ntheirs:\n{}", part(ours), part(theirs));
    }
}

/// Lines of a map as a reader sees them: where a transaction puts its clusters is its own affair.
fn without_offsets(map: &str) -> String {
    let entries: Vec<serde_json::Value> = serde_json::from_str(map).unwrap();
    let mut lines: Vec<(u64, u64, String)> = Vec::new();
    for mut entry in entries {
        let fields = entry.as_object_mut().unwrap();
        fields.remove("offset");
        let start = fields.remove("start").unwrap().as_u64().unwrap();
        let length = fields.remove("length").unwrap().as_u64().unwrap();
        let rest = entry.to_string();
        match lines.last_mut() {
            Some((_, last, same)) if *same == rest => *last += length,
            _ => lines.push((start, length, rest)),
        }
    }
    lines.iter().map(|line| format!("{line:?}\n")).collect()
}

#[test]
fn a_level_that_the_codec_has_not_is_refused_whatever_there_is_to_compress() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "raw", "empty.raw", "1M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "there.qcow2", "1M"]);
    let options = ConvertOptions { compress: true, level: Some(99), ..ConvertOptions::default() };
    let source = || [Image::open(folder.file("empty.raw"), &OpenOptions::default()).unwrap()];
    let (path, image) = (folder.file("new.qcow2"), new_image(Format::Qcow2, ""));
    let there = Image::open(folder.file("there.qcow2"), &OpenOptions::writable()).unwrap();
    for target in [Target::New { path: &path, image: &image }, Target::Existing { image: there, overlay: false }] {
        let refused = convert(&source(), target, &options, &mut |_| {}, &NoProgress);
        assert!(matches!(refused, Err(qtk_image::Error::Codec { .. })), "{refused:?}");
    }
    assert!(!path.exists());
}
