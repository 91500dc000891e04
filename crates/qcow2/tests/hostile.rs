//! Images that lie: each gets one error that names the place, and nothing panics, loops or takes memory that the file does not.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::sync::Arc;

use proptest::prelude::*;
use qtk_block::{BlockRead, BlockWrite, MemoryDisk, Preallocation};
use qtk_qcow2::{Amend, Error, Layer, NewBitmap, NewSnapshot, Repair, Transaction, Version, check, repair};
use support::{memory, mixed_disk, qemu_img, qemu_io};

/// Options of images to damage.
const KINDS: [&str; 4] =
    ["-c -o cluster_size=4k", "-c -o extended_l2=on,cluster_size=16k", "-o compat=0.10", "-o data_file=data"];

/// A compressed image of 4 KiB clusters with a snapshot, a bitmap and plain clusters.
fn image() -> Vec<u8> {
    image_of(KINDS[0])
}

fn image_of(options: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    mixed_disk(&folder.path().join("source.raw"), 40 << 12, 3000);
    qemu_img(folder.path(), &format!("convert -f raw -O qcow2 {options} source.raw image.qcow2"));
    if options.contains("data_file") {
        return std::fs::read(folder.path().join("image.qcow2")).unwrap();
    }
    qemu_io(folder.path(), "image.qcow2", &["write -P 1 0 20k"]);
    qemu_img(folder.path(), "snapshot -c one image.qcow2");
    if !options.contains("0.10") {
        qemu_img(folder.path(), "bitmap --add image.qcow2 changes");
    }
    std::fs::read(folder.path().join("image.qcow2")).unwrap()
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn offset(bytes: &[u8], at: usize) -> usize {
    usize::try_from(word(bytes, at) & 0x00ff_ffff_ffff_fe00).unwrap()
}

/// Where the data of a header extension begins.
fn extension(bytes: &[u8], magic: u32) -> usize {
    bytes[..4096].windows(4).position(|bytes| bytes == magic.to_be_bytes()).unwrap() + 8
}

/// Does everything that can be done with an image and returns the first error.
fn use_image(bytes: &[u8]) -> Result<(), Error> {
    let layer = Arc::new(Layer::open(Arc::new(memory(bytes)), "hostile.qcow2")?);
    let mut buf = vec![0; 1 << 16];
    for at in (0..layer.size().min(1 << 20)).step_by(buf.len()) {
        let len = usize::try_from(layer.size() - at).unwrap_or(usize::MAX).min(buf.len());
        layer.read_at(&mut buf[..len], at).map_err(own_error)?;
    }
    layer.snapshots()?;
    layer.bitmaps()?;
    check(&layer)?;
    let transaction = Transaction::begin(layer, None)?;
    transaction.write_at(&[1; 5000], 100).map_err(own_error)?;
    transaction.commit()
}

/// Changes an image in every way, each in a transaction of its own.
fn change_image(bytes: &[u8]) {
    let snapshot = NewSnapshot { name: "two".into(), taken: (0, 0), icount: None };
    let bitmap = NewBitmap { name: "two".into(), granularity: None, enabled: true };
    let version = |version| Amend { version: Some(version), ..Amend::default() };
    let width = Amend { refcount_bits: Some(64), ..Amend::default() };
    type Change<'a> = &'a dyn Fn(&Transaction) -> Result<(), Error>;
    let changes: [Change<'_>; 13] = [
        &|t| t.write_at(&[1; 9000], 3000).map_err(own_error),
        &|t| t.zero(5000..90_000).map_err(own_error),
        &|t| t.discard(0..90_000).map_err(own_error),
        &|t| t.create_snapshot(&snapshot).map(drop),
        &|t| t.apply_snapshot("one"),
        &|t| t.delete_snapshot("one"),
        &|t| t.resize(512, Preallocation::Off),
        &|t| t.resize(1 << 20, Preallocation::Metadata),
        &|t| t.clear(),
        &|t| t.add_bitmap(&bitmap),
        &|t| t.amend(&version(Version::V2)),
        &|t| t.amend(&version(Version::V3)),
        &|t| t.amend(&width),
    ];
    for change in changes {
        let data = Some(Arc::new(MemoryDisk::new(0)) as _);
        let Ok(layer) = Layer::open_with(Arc::new(memory(bytes)), "hostile.qcow2", data) else { return };
        // Allocating a disk of any size would take memory in proportion to it.
        if layer.size() > 1 << 30 {
            return;
        }
        let Ok(transaction) = Transaction::begin(Arc::new(layer), None) else { return };
        if change(&transaction).is_ok() {
            let _ = transaction.commit_settled();
        }
    }
}

fn own_error(error: std::io::Error) -> Error {
    *error.into_inner().unwrap().downcast().unwrap()
}

#[test]
fn every_lie_is_named() {
    let sound = image();
    use_image(&sound).unwrap();
    let (l1, refcounts, snapshots) = (offset(&sound, 40), offset(&sound, 48), offset(&sound, 64));
    let l2 = offset(&sound, l1);
    let bitmaps = extension(&sound, 0x2385_2875);
    let far = (1_u64 << 50).to_be_bytes();
    let big = u32::MAX.to_be_bytes();
    let (l1_table, refcount_table) = ((l1 as u64).to_be_bytes(), (refcounts as u64).to_be_bytes());
    let cases: Vec<(&str, usize, &[u8], &str)> = vec![
        ("magic", 0, b"RAW!", "does not begin as a qcow2 image"),
        ("version", 4, &[0, 0, 0, 9], "qcow2 version 9 is not supported"),
        ("backing name offset", 8, &far, "backing_file_offset"),
        ("backing name length", 8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0x10, 0], "backing_file_size"),
        ("cluster bits too small", 20, &[0, 0, 0, 8], "cluster_bits of the header is 8"),
        ("cluster bits too large", 20, &big, "cluster_bits"),
        ("size beyond the L1 table", 24, &[0x7f; 8], "l1_size"),
        ("AES", 32, &[0, 0, 0, 1], "AES encryption is not supported"),
        ("LUKS", 32, &[0, 0, 0, 2], "LUKS encryption but no LUKS header"),
        ("crypt method", 32, &big, "crypt_method"),
        ("l1_size over the limit", 36, &big, "l1_size"),
        ("l1_size over the file", 36, &[0, 0x10, 0, 0], "the L1 table lies at"),
        ("l1_size too small", 36, &[0; 4], "l1_size"),
        ("L1 offset misaligned", 40, &[0, 0, 0, 0, 0, 0, 0x10, 8], "the L1 table points to 0x1008"),
        ("L1 offset past the end", 40, &far, "the L1 table lies at 0x4000000000000"),
        ("L1 offset zero", 40, &[0; 8], "the header and the L1 table overlap"),
        ("refcount table misaligned", 48, &[0, 0, 0, 0, 0, 0, 0x10, 8], "the refcount table points to 0x1008"),
        ("refcount table past the end", 48, &far, "the refcount table lies at"),
        ("refcount table too large", 56, &big, "refcount_table_clusters"),
        ("no refcount table", 56, &[0; 4], "refcount_table_clusters"),
        ("too many snapshots", 60, &big, "nb_snapshots"),
        ("snapshots past the end", 64, &far, "the snapshot table lies at"),
        ("snapshots misaligned", 64, &[0, 0, 0, 0, 0, 0, 0, 1], "the snapshot table points to 0x1"),
        ("external data file", 72, &[0, 0, 0, 0, 0, 0, 0, 4], "not its place on the disk"),
        ("extended L2", 72, &[0, 0, 0, 0, 0, 0, 0, 16], "clusters are too small for subclusters"),
        ("unknown feature", 72, &[0x80, 0, 0, 0, 0, 0, 0, 0], "unknown feature bit 63"),
        ("dirty", 72, &[0, 0, 0, 0, 0, 0, 0, 1], "not closed cleanly"),
        ("marked corrupt", 72, &[0, 0, 0, 0, 0, 0, 0, 2], "marked as corrupt"),
        ("compression bit alone", 72, &[0, 0, 0, 0, 0, 0, 0, 8], "compression type and its feature bit disagree"),
        ("compression type alone", 104, &[1], "compression type and its feature bit disagree"),
        ("unknown compression", 104, &[7], "compression type 7 is not supported"),
        ("refcount order", 96, &[0, 0, 0, 7], "refcount_order"),
        ("header length short", 100, &[0, 0, 0, 96], "header_length"),
        ("header length odd", 100, &[0, 0, 0, 109], "not a multiple of 8"),
        ("header length long", 100, &big, "header_length"),
        ("extension length", bitmaps - 4, &big, "length of header extension 0x23852875"),
        ("L2 table past the end", l1, &far, "the L2 table of L1 entry 0 lies at"),
        ("L2 table misaligned", l1, &[0, 0, 0, 0, 0, 0, 0x12, 0], "L1 entry 0 points to 0x1200"),
        ("L1 entry reserved bits", l1, &[0xc0], "reserved bits"),
        ("data past the end", l2, &far, "the L2 entry of guest offset 0x0 lies at"),
        ("data misaligned", l2, &[0x80, 0, 0, 0, 0, 0, 0x12, 0], "guest offset 0x0 points to 0x1200"),
        (
            "compressed past the end",
            l2 + 48,
            &[0x40, 0x3f, 0xff, 0xff, 0xff, 0xff, 0, 0],
            "guest offset 0x6000 lies at",
        ),
        ("compressed garbage", l2 + 48, &[0x40, 0, 0, 0, 0, 0, 0, 0], "the compressed cluster at guest offset 0x6000"),
        ("refcount block past the end", refcounts, &far, "refcount block 0 lies at"),
        ("refcount block misaligned", refcounts, &[0, 0, 0, 0, 0, 0, 0x12, 0], "refcount block 0 points to 0x1200"),
        ("no refcount block", refcounts, &[0; 8], "whose refcount is too low"),
        ("refcount block on the L1 table", refcounts, &l1_table, "overlap"),
        ("L1 table on the refcount table", 40, &refcount_table, "reserved bits|overlap|past the file"),
        ("snapshot's L1 table past the end", snapshots, &far, "the L1 table of snapshot 0 lies at"),
        ("snapshot's L1 table over the limit", snapshots + 8, &big, "the L1 table of snapshot 0 lies at"),
        ("snapshot's extra data", snapshots + 36, &big, "extra_data_size"),
        ("snapshot's name past the end", snapshots + 12, &[0xff; 4], "snapshot 0 lies at"),
        ("bitmap directory past the end", bitmaps + 16, &far, "the bitmap directory lies at"),
        ("bitmap directory misaligned", bitmaps + 23, &[1], "the bitmap directory points to"),
        ("bitmap count", bitmaps, &big, "the bitmap directory is malformed"),
    ];
    for (lie, at, bytes, named) in cases {
        let mut image = sound.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        let Err(error) = use_image(&image) else { panic!("{lie}: not noticed") };
        let text = error.to_string();
        assert!(named.split('|').any(|named| text.contains(named)), "{lie}: {text}");
        assert!(text.contains("hostile.qcow2"), "{lie}: {text}");
        assert!(std::error::Error::source(&error).is_none_or(|source| !text.contains(&source.to_string())));
    }
}

#[test]
fn an_l2_table_serves_one_l1_entry() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -o cluster_size=4k image.qcow2 8M");
    qemu_io(folder.path(), "image.qcow2", &["write -P 1 0 4k"]);
    let mut image = std::fs::read(folder.path().join("image.qcow2")).unwrap();
    let l1 = offset(&image, 40);
    image.copy_within(l1..l1 + 8, l1 + 16);
    let layer = Layer::open(Arc::new(memory(&image)), "hostile.qcow2").unwrap();
    let mut buf = [0; 512];
    layer.read_at(&mut buf, 0).unwrap();
    layer.read_at(&mut buf, 2 << 20).unwrap();
    let error = layer.read_at(&mut buf, 4 << 20).unwrap_err().to_string();
    assert!(error.contains("L1 entry 0") && error.contains("L1 entry 2") && error.contains("overlap"), "{error}");
    assert!(!check(&layer).unwrap().is_clean());
}

#[test]
fn zeroes_on_metadata_are_not_filled() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 image.qcow2 8M");
    qemu_io(folder.path(), "image.qcow2", &["write 0 64k"]);
    qemu_img(folder.path(), "snapshot -c one image.qcow2");
    qemu_io(folder.path(), "image.qcow2", &["write 0 64k"]);
    let mut image = std::fs::read(folder.path().join("image.qcow2")).unwrap();
    let (entry, table) = (offset(&image, offset(&image, 40)) + 8, word(&image, 64));
    image[entry..entry + 8].copy_from_slice(&(1 << 63 | table | 1).to_be_bytes());
    let disk = Arc::new(memory(&image));
    let transaction = Transaction::begin(Arc::new(Layer::open(disk.clone(), "hostile.qcow2").unwrap()), None).unwrap();
    let error = transaction.amend(&Amend { version: Some(Version::V2), ..Amend::default() }).unwrap_err().to_string();
    assert!(error.contains("the snapshot table") && error.contains("overlap"), "{error}");
    drop(transaction);
    assert!(support::read_all(&*disk) == image);
}

#[test]
fn truncated_images_are_refused() {
    let sound = image();
    for len in [0, 3, 71, 72, 103, 111, 4096, 8192, sound.len() / 2] {
        let error = use_image(&sound[..len]).expect_err("truncated");
        assert!(matches!(error, Error::Corrupt { .. } | Error::Unsupported { .. }), "{len} bytes: {error}");
    }
}

#[test]
fn a_feature_is_called_what_the_image_calls_it() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 image.qcow2 1M");
    let mut image = std::fs::read(folder.path().join("image.qcow2")).unwrap();
    let table = extension(&image, 0x6803_f857);
    image[table..table + 11].copy_from_slice(b"\0\x30time warp");
    image[table + 11] = 0;
    image[73] = 1;
    let error = use_image(&image).unwrap_err().to_string();
    assert!(error.contains("feature \"time warp\""), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damage_anywhere_is_survived(
        kind in 0..KINDS.len(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
    ) {
        thread_local!(static IMAGES: Vec<Vec<u8>> = KINDS.iter().map(|options| image_of(options)).collect());
        let mut image = IMAGES.with(|images| images[kind].clone());
        for (at, value, in_header) in changes {
            let range = if in_header { 600 } else { image.len() };
            image[at.index(range)] = value;
        }
        let _ = use_image(&image);
        change_image(&image);
        let disk = Arc::new(memory(&image));
        if let Ok(layer) = Layer::open_damaged(disk.clone(), "hostile.qcow2", Some(Arc::new(MemoryDisk::new(0)))) {
            let _ = repair(&layer, Repair::All, &mut |_| ());
        }
    }
}
