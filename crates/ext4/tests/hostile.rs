//! Damaged images give errors: no panic, no endless loop, no memory beyond the image's size.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::sync::Arc;

use proptest::prelude::*;
use qtk_block::{BlockRead, BlockWrite, MemoryDisk};
use qtk_ext4::{EditOptions, Editor, Error, Ext4, FileType, Ino, NewNode, NodeKind, Timestamp};
use support::{Image, noise};

/// A small image with everything that has a form on disk: trees of extents, an indexed directory, attributes, links.
fn image(shape: &[&str]) -> Vec<u8> {
    let source = tempfile::tempdir().unwrap();
    let path = |name: &str| source.path().join(name);
    std::fs::create_dir(path("dir")).unwrap();
    for at in 0..200 {
        std::fs::write(path("dir").join(format!("a rather long file name to fill blocks {at}")), b"x").unwrap();
    }
    std::fs::write(path("file"), noise(300_000, 1)).unwrap();
    let sparse = std::fs::File::create(path("sparse")).unwrap();
    for at in 0..400 {
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"x", at * 9000).unwrap();
    }
    std::os::unix::fs::symlink("t".repeat(100), path("link")).unwrap();
    let image = Image::make("6M", shape, Some(source.path()));
    // The kernel makes the index.
    image.mounted(|root| {
        for at in 0..200 {
            std::fs::write(root.join("dir").join(format!("another long file name to fill blocks {at}")), b"x").unwrap();
        }
    });
    std::fs::read(image.path()).unwrap()
}

fn device(bytes: &[u8]) -> Arc<MemoryDisk> {
    let disk = MemoryDisk::new(bytes.len() as u64);
    disk.write_at(bytes, 0).unwrap();
    Arc::new(disk)
}

/// Reads all that can be reached. Damage may hide anything, so errors are passed over.
fn walk(fs: &Ext4) {
    let mut left = vec![Ino::ROOT];
    let mut steps = 0;
    while let Some(dir) = left.pop() {
        steps += 1;
        let Ok(entries) = fs.read_dir(dir) else { continue };
        for entry in entries.iter().take(500) {
            let _ = fs.lookup(dir, &entry.name);
            let _ = fs.xattrs(entry.ino);
            let Ok(metadata) = fs.metadata(entry.ino) else { continue };
            match metadata.file_type {
                FileType::Directory if steps < 50 => left.push(entry.ino),
                FileType::Symlink => drop(fs.read_link(entry.ino)),
                FileType::Regular => {
                    let mut at = 0;
                    for _ in 0..1000 {
                        let Ok(Some(range)) = fs.data_range(entry.ino, at) else { break };
                        assert!(range.start >= at && range.end > range.start);
                        let _ = fs.read_at(entry.ino, &mut [0; 5000], range.start);
                        at = range.end;
                    }
                }
                _ => {}
            }
        }
    }
}

/// Writes, creates and removes what can be.
fn edit(disk: Arc<MemoryDisk>) -> Result<(), Error> {
    let mut editor = Editor::open(disk, EditOptions::new(Timestamp { seconds: 1_700_000_000, nanos: 0 }))?;
    for name in ["file", "sparse"] {
        if let Ok(Some(ino)) = editor.fs().lookup(Ino::ROOT, name.as_bytes()) {
            let _ = editor.write_at(ino, &noise(50_000, 3), 290_000);
            let _ = editor.truncate(ino, 1000);
            let _ = editor.unlink(Ino::ROOT, name.as_bytes());
        }
    }
    if let Ok(Some(dir)) = editor.fs().lookup(Ino::ROOT, b"dir") {
        let node = NewNode { kind: NodeKind::File, permissions: 0o644, uid: 0, gid: 0, mtime: None };
        for at in 0..100 {
            let _ = editor.create(dir, format!("a new file with a name that is long {at}").as_bytes(), &node);
        }
        let _ = editor.unlink(dir, b"another long file name to fill blocks 7");
        let _ = editor.rename(dir, b"another long file name to fill blocks 8", Ino::ROOT, b"moved");
    }
    editor.commit()
}

fn check(shape: &[&str], cases: u32) {
    let original = image(shape);
    let size = original.len();
    // Most of the damage goes where the metadata is: the front of the device.
    let place = prop_oneof![1024..2048_usize, 2048..100_000_usize, 2048..1_500_000_usize, 0..size];
    let damage = proptest::collection::vec((place, any::<u8>(), 1..5_usize), 1..30);
    proptest!(ProptestConfig::with_cases(cases), |(damage in damage)| {
        let mut bytes = original.clone();
        for (at, value, len) in damage {
            let end = (at + len).min(size);
            bytes[at.min(size)..end].fill(value);
        }
        let disk = device(&bytes);
        if let Ok(fs) = Ext4::open(disk.clone()) {
            walk(&fs);
        }
        let _ = edit(disk);
    });
}

#[test]
fn survives_damage_that_checksums_see() {
    check(&["-b", "1024"], 80);
}

#[test]
fn survives_damage_that_nothing_sees() {
    check(&["-b", "1024", "-O", "^metadata_csum"], 120);
    check(&["-t", "ext3", "-b", "1024"], 80);
}

#[test]
fn a_truncated_image_is_an_error() {
    let original = image(&["-b", "1024"]);
    for len in [0, 1, 1023, 1024, 2047, 2048, 4096, original.len() / 2, original.len() - 1] {
        let error = Ext4::open(device(&original[..len])).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{len}: {error}");
    }
    let zeroes = MemoryDisk::new(1 << 20);
    assert_eq!(zeroes.size(), 1 << 20);
    let error = Ext4::open(Arc::new(zeroes)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "superblock: this is no ext2, ext3 or ext4 file system; repair the file system with e2fsck"
    );
}
