//! Chains that can be opened, and images that cannot.

use crate::common::{Folder, content};
use qtk_block::{BlockRead, BlockWrite, NoProgress};
use qtk_image::{
    BackingPolicy, Error, FlattenOptions, Format, Image, NewImage, OpenOptions, SnapshotName, Warning, create_image,
    flatten,
};
use qtk_qcow2::{ClusterBits, CreateOptions};

fn create(folder: &Folder, name: &str, base: &str, format: &str) {
    folder.qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", base, "-F", format, name, "4M"]);
}

fn error(folder: &Folder, name: &str, options: &OpenOptions) -> Error {
    match Image::open(folder.file(name), options) {
        Ok(_) => panic!("{name} could be opened"),
        Err(error) => error,
    }
}

/// An error and all it goes back to, as a user sees it.
fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[test]
fn bad_chains_are_refused_by_name() {
    let folder = Folder::new();
    create(&folder, "self.qcow2", "./self.qcow2", "qcow2");
    create(&folder, "a.qcow2", "b.qcow2", "qcow2");
    create(&folder, "b.qcow2", "./a.qcow2", "qcow2");
    create(&folder, "orphan.qcow2", "nowhere.raw", "raw");
    create(&folder, "nbd.qcow2", "nbd://localhost/disk", "raw");
    create(&folder, "http.qcow2", "http://localhost/disk", "raw");
    create(&folder, "json.qcow2", "json:{\"driver\":\"null-co\"}", "raw");
    create(&folder, "vmdk.qcow2", "disk.vmdk", "vmdk");
    std::fs::write(folder.file("disk.vmdk"), b"KDMV and so on").unwrap();
    std::fs::write(folder.file("text"), b"").unwrap();
    create(&folder, "notqcow2.qcow2", "text", "qcow2");
    create(&folder, "folder.qcow2", ".", "raw");
    for (name, parts) in [
        ("self.qcow2", &["self.qcow2", "comes back to"][..]),
        ("a.qcow2", &["b.qcow2", "comes back to", "a.qcow2"]),
        ("orphan.qcow2", &["orphan.qcow2", "backing file", "nowhere.raw", "No such file"]),
        ("nbd.qcow2", &["nbd://localhost/disk", "not a local file"]),
        ("http.qcow2", &["http://localhost/disk", "not a local file"]),
        ("json.qcow2", &["json:", "not a local file"]),
        ("vmdk.qcow2", &["disk.vmdk", "vmdk images are not supported", "convert"]),
        ("disk.vmdk", &["disk.vmdk", "vmdk images are not supported", "convert"]),
        ("notqcow2.qcow2", &["text", "does not begin as a qcow2 image"]),
        ("folder.qcow2", &["folder.qcow2", "to be a regular file"]),
        ("missing.qcow2", &["missing.qcow2", "No such file"]),
    ] {
        for options in [OpenOptions::default(), OpenOptions::writable()] {
            let text = text(&error(&folder, name, &options));
            assert!(parts.iter().all(|part| text.contains(part)), "{name}: {text}");
        }
    }
    let network = Image::open("nbd://localhost/disk", &OpenOptions::default()).unwrap_err();
    assert!(matches!(network, Error::Protocol { .. }), "{network}");
}

#[test]
fn a_chain_without_end_is_refused() {
    let folder = Folder::new();
    std::fs::write(folder.file("0"), vec![0; 1 << 20]).unwrap();
    folder.qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", "0", "-F", "raw", "1", "1M"]);
    for layer in 2..300 {
        let base = (layer - 1).to_string();
        folder.qemu_img(&["create", "-q", "-u", "-f", "qcow2", "-b", &base, "-F", "qcow2", &layer.to_string(), "1M"]);
    }
    assert!(text(&error(&folder, "299", &OpenOptions::default())).contains("longer than"));
    let image = Image::open(folder.file("200"), &OpenOptions::default()).unwrap();
    assert_eq!(image.layers().len(), 201);
    image.read_at(&mut [0; 70_000], 5000).unwrap();
}

#[test]
fn a_truncated_image_is_corrupt() {
    let folder = Folder::new();
    std::fs::write(folder.file("disk.raw"), content(1, 3 << 20)).unwrap();
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "whole.qcow2"]);
    let whole = std::fs::read(folder.file("whole.qcow2")).unwrap();
    for len in [10, 100, 60_000, 100_000, 200_000, whole.len() / 2] {
        std::fs::write(folder.file("cut.qcow2"), &whole[..len]).unwrap();
        let options = OpenOptions { format: Some(Format::Qcow2), ..OpenOptions::default() };
        let result = Image::open(folder.file("cut.qcow2"), &options)
            .and_then(|image| flatten(&image, &folder.file("out"), &FlattenOptions::default(), &NoProgress));
        let error = result.unwrap_err();
        assert!(error.is_corruption() && text(&error).contains("cut.qcow2"), "{len}: {}", text(&error));
        assert!(!folder.file("out").exists());
    }
}

#[test]
fn policies_say_which_backing_files_are_followed() {
    let folder = Folder::new();
    std::fs::create_dir_all(folder.file("inside/deep")).unwrap();
    for base in ["outside.raw", "inside/deep/base.raw"] {
        std::fs::write(folder.file(base), vec![1; 1 << 20]).unwrap();
    }
    std::os::unix::fs::symlink("../outside.raw", folder.file("inside/link.raw")).unwrap();
    create(&folder, "inside/good.qcow2", "deep/base.raw", "raw");
    create(&folder, "inside/up.qcow2", "../outside.raw", "raw");
    create(&folder, "inside/link.qcow2", "link.raw", "raw");
    let within = BackingPolicy::Within(folder.file("inside"));
    for (name, policy, allowed) in [
        ("inside/good.qcow2", BackingPolicy::Follow, true),
        ("inside/good.qcow2", within.clone(), true),
        ("inside/good.qcow2", BackingPolicy::Deny, false),
        ("inside/up.qcow2", BackingPolicy::Follow, true),
        ("inside/up.qcow2", within.clone(), false),
        ("inside/link.qcow2", within, false),
        ("outside.raw", BackingPolicy::Deny, true),
    ] {
        let options = OpenOptions { backing: policy.clone(), ..OpenOptions::default() };
        match Image::open(folder.file(name), &options) {
            Ok(_) => assert!(allowed, "{name} {policy:?}"),
            Err(Error::BackingDenied { .. }) => assert!(!allowed, "{name} {policy:?}"),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_backing_format_that_is_not_recorded_is_guessed_with_a_warning() {
    let folder = Folder::new();
    std::fs::write(folder.file("base.raw"), vec![1; 1 << 20]).unwrap();
    let options = NewImage { base: Some("base.raw".into()), ..NewImage::default() };
    create_image(&folder.file("mid.qcow2"), &options).unwrap();
    create(&folder, "top.qcow2", "mid.qcow2", "qcow2");
    folder.qemu_img(&["rebase", "-u", "-b", "", "top.qcow2"]);
    // An old header: QEMU itself records a format nowadays.
    let storage =
        std::sync::Arc::new(qtk_block::RawFile::open(&folder.file("top.qcow2"), qtk_block::Access::ReadWrite).unwrap());
    let backing = Some(qtk_qcow2::Backing { name: "mid.qcow2".to_owned(), format: None });
    let old = qtk_qcow2::CreateOptions { size: 1 << 20, backing, ..Default::default() };
    qtk_qcow2::create(storage, "top.qcow2", &old).unwrap();
    let image = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    let [Warning::BackingFormatGuessed { format, .. }] = image.warnings() else { panic!("{:?}", image.warnings()) };
    assert_eq!(*format, Format::Qcow2);
    assert_eq!(image.layers().len(), 3);
}

#[test]
fn a_named_raw_image_is_never_guessed() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "nested", "64M"]);
    let nested = std::fs::read(folder.file("nested")).unwrap();
    create(&folder, "top.qcow2", "nested", "raw");
    let raw = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    for (name, options) in [("nested", raw), ("top.qcow2", OpenOptions::default())] {
        let image = Image::open(folder.file(name), &options).unwrap();
        let mut head = vec![0; 1000];
        image.read_at(&mut head, 0).unwrap();
        assert_eq!(head, nested[..1000], "{name}");
    }
}

#[test]
fn overlays_are_created_on_what_is_there() {
    let folder = Folder::new();
    std::fs::create_dir(folder.file("sub")).unwrap();
    std::fs::write(folder.file("base.raw"), vec![1; (5 << 20) + 100]).unwrap();
    let on = |base: &str| NewImage { base: Some(base.into()), ..NewImage::default() };
    create_image(&folder.file("sub/mid.qcow2"), &on("../base.raw")).unwrap();
    let cluster_bits = ClusterBits::from_size(4096).unwrap();
    let small_clusters = CreateOptions { cluster_bits, ..CreateOptions::default() };
    create_image(&folder.file("top.qcow2"), &NewImage { qcow2: small_clusters, ..on("sub/mid.qcow2") }).unwrap();
    create_image(&folder.file("larger.qcow2"), &NewImage { size: Some(9 << 20), ..on("top.qcow2") }).unwrap();
    create_image(
        &folder.file("empty.raw"),
        &NewImage { format: Format::Raw, size: Some(1 << 20), ..NewImage::default() },
    )
    .unwrap();
    for image in ["sub/mid.qcow2", "top.qcow2", "larger.qcow2"] {
        folder.check(image);
        folder.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "base.raw", image]);
    }
    let info = folder.qemu_img(&["info", "--output=json", "sub/mid.qcow2"]);
    assert!(info.contains("\"backing-filename-format\": \"raw\"") && info.contains("\"../base.raw\""), "{info}");
    assert!(info.contains("\"virtual-size\": 5243392"), "{info}");
    let before = folder.names();
    let refused = |name: &str, options: NewImage| create_image(&folder.file(name), &options).unwrap_err();
    assert!(matches!(refused("new.qcow2", on("nowhere")), Error::Backing { .. }));
    assert!(matches!(refused("new.qcow2", NewImage::default()), Error::Invalid { .. }));
    assert!(matches!(refused("base.raw", on("sub/mid.qcow2")), Error::BackingLoop { .. } | Error::Busy { .. }));
    let odd = NewImage { qcow2: CreateOptions { refcount_bits: 5, ..CreateOptions::default() }, ..on("base.raw") };
    assert!(matches!(refused("new.qcow2", odd), Error::Qcow2(_)));
    assert_eq!(folder.names(), before);
}

#[test]
fn a_transaction_on_an_overlay_leaves_its_base_alone() {
    let folder = Folder::new();
    let mut expected = content(3, (3 << 20) + 1536);
    std::fs::write(folder.file("base.raw"), &expected).unwrap();
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2"]);
    create_image(&folder.file("top.qcow2"), &NewImage { base: Some("base.qcow2".into()), ..NewImage::default() })
        .unwrap();
    let base = std::fs::read(folder.file("base.qcow2")).unwrap();
    let transaction = Image::open(folder.file("top.qcow2"), &OpenOptions::writable()).unwrap().begin().unwrap();
    transaction.write_at(&[0xcd; 70_000], 1_000_001).unwrap();
    transaction.zero(2_000_000..2_300_000).unwrap();
    transaction.commit().unwrap();
    drop(transaction);
    expected[1_000_001..1_070_001].fill(0xcd);
    expected[2_000_000..2_300_000].fill(0);
    std::fs::write(folder.file("expected.raw"), &expected).unwrap();
    folder.check("top.qcow2");
    folder.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "expected.raw", "top.qcow2"]);
    assert!(std::fs::read(folder.file("base.qcow2")).unwrap() == base);
    let read_only = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    assert!(matches!(read_only.begin(), Err(Error::Invalid { .. })));
}

#[test]
fn a_snapshot_shows_the_disk_as_it_was_in_todays_size() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "disk.qcow2", "4M"]);
    folder.qemu_io("disk.qcow2", &["write -P 1 3M 1M"]);
    folder.qemu_img(&["snapshot", "-c", "one", "disk.qcow2"]);
    folder.qemu_io("disk.qcow2", &["write -P 2 0 4M"]);
    let open = |snapshot| {
        Image::open(folder.file("disk.qcow2"), &OpenOptions { snapshot: Some(snapshot), ..OpenOptions::default() })
    };
    let exact = |id: &str, name: &str| SnapshotName::Exact { id: Some(id.into()), name: Some(name.into()) };
    for size in ["8M", "3500k"] {
        folder.qemu_img(&["resize", "-q", "--shrink", "disk.qcow2", size]);
        folder.qemu_img(&["convert", "-l", "one", "-O", "raw", "disk.qcow2", "flat.raw"]);
        let expected = std::fs::read(folder.file("flat.raw")).unwrap();
        for name in [SnapshotName::Any("one".into()), SnapshotName::Any("1".into()), exact("1", "one")] {
            let image = open(name).unwrap();
            let mut content = vec![0; usize::try_from(image.size()).unwrap()];
            image.read_at(&mut content, 0).unwrap();
            assert!(content == expected);
        }
    }
    for name in [SnapshotName::Any("two".into()), exact("1", "two"), SnapshotName::Exact { id: None, name: None }] {
        assert!(matches!(open(name), Err(Error::SnapshotNotFound { .. })));
    }
}

#[test]
fn an_image_that_was_not_closed_cleanly_is_repaired_before_it_is_written() {
    let folder = Folder::new();
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "lazy", "4M"]);
    folder.run("qemu-io", &["-c", "write -P 5 1M 1M", "-c", "abort", "lazy"]);
    let path = folder.file("lazy");
    let before = std::fs::read(&path).unwrap();
    let read = Image::open(&path, &OpenOptions::default()).unwrap();
    assert!(read.warnings().is_empty() && std::fs::read(&path).unwrap() == before);
    drop(read);
    let image = Image::open(&path, &OpenOptions::writable()).unwrap();
    assert!(matches!(image.warnings(), [Warning::Repaired { findings, .. }] if !findings.is_empty()));
    let transaction = image.begin().unwrap();
    transaction.write_at(&[6; 1 << 20], 2 << 20).unwrap();
    transaction.commit().unwrap();
    drop(transaction);
    folder.check("lazy");
    let mut expected = vec![0; 4 << 20];
    expected[1 << 20..2 << 20].fill(5);
    expected[2 << 20..3 << 20].fill(6);
    std::fs::write(folder.file("expected"), expected).unwrap();
    folder.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "expected", "lazy"]);
}
