//! Journals and orphans that a crash left: images copied while the kernel had them mounted.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;

use qtk_ext4::{EditOptions, Editor, Ext4, FileType, Ino, Timestamp};
use support::crash::{SHAPES, crashed};
use support::{DISTRIBUTION, Image, noise, read_all, resolve};

const NOW: Timestamp = Timestamp { seconds: 1_700_000_000, nanos: 0 };

/// Every inode below a directory with what can be compared of it.
fn listing(fs: &Ext4, dir: Ino, path: &str, all: &mut Vec<(String, FileType, u64, Vec<u8>)>) {
    for entry in fs.read_dir(dir).unwrap() {
        let path = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
        let metadata = fs.metadata(entry.ino).unwrap();
        match metadata.file_type {
            FileType::Directory => {
                all.push((path.clone(), FileType::Directory, metadata.size, Vec::new()));
                listing(fs, entry.ino, &path, all);
            }
            file_type => all.push((path, file_type, metadata.size, read_all(fs, entry.ino))),
        }
    }
}

fn list(fs: &Ext4) -> Vec<(String, FileType, u64, Vec<u8>)> {
    let mut all = Vec::new();
    listing(fs, Ino::ROOT, "", &mut all);
    all.sort();
    all
}

#[test]
fn replays_as_e2fsck_does() {
    for shape in SHAPES {
        let image = crashed(shape);
        let superblock = image.debugfs("show_super_stats -h");
        assert!(superblock.contains("needs_recovery"), "{superblock}");
        let before = std::fs::read(image.path()).unwrap();
        let seen = list(&image.open());
        assert!(std::fs::read(image.path()).unwrap() == before, "reading changed the image");
        assert!(seen.iter().any(|(path, _, size, _)| path == "/last" && *size == 13));

        let judge = image.copy();
        judge.replay_by_e2fsck();
        assert!(list(&judge.open()) == seen, "{shape:?}");

        let mut editor = Editor::open(image.device(), EditOptions::new(NOW)).unwrap();
        let last = resolve(editor.fs(), "last");
        editor.write_at(last, b"THE", 0).unwrap();
        editor.commit().unwrap();
        image.assert_clean();
        let superblock = image.debugfs("show_super_stats -h");
        for gone in ["needs_recovery", "orphan_present", "First orphan inode"] {
            assert!(!superblock.contains(gone), "{superblock}");
        }
        assert_eq!(image.content(last), b"THE last file");
        let mut expected = seen;
        expected
            .iter_mut()
            .filter(|(path, ..)| path == "/last")
            .for_each(|(.., content)| content[..3].copy_from_slice(b"THE"));
        assert!(list(&image.open()) == expected, "{shape:?}");
        // The kernel goes on from here.
        image.mounted(|root| std::fs::write(root.join("more"), b"more").unwrap());
        image.assert_clean();
    }
}

#[test]
fn orphans_are_freed() {
    for shape in SHAPES {
        let image = crashed(shape);
        let judge = image.copy();
        // A mount processes orphans as the editor does.
        judge.mounted(|_| ());
        let mut editor = Editor::open(image.device(), EditOptions::new(NOW)).unwrap();
        editor.commit().unwrap();
        image.assert_clean();
        let (ours, kernels) = (image.open(), judge.open());
        assert_eq!(ours.free_inodes(), kernels.free_inodes(), "{shape:?}");
        assert_eq!(ours.free_blocks(), kernels.free_blocks(), "{shape:?}");
    }
}

#[test]
fn a_truncation_cut_short_is_finished() {
    for shape in [DISTRIBUTION, &["-t", "ext3"]] {
        let source = tempfile::tempdir().unwrap();
        std::fs::write(source.path().join("file"), noise(100_000, 1)).unwrap();
        let image = Image::make("32M", shape, Some(source.path()));
        let file = resolve(&image.open(), "file");
        image.debugfs_write(&format!("sif <{file}> size 10000\nssv last_orphan {file}\n"));
        let mut editor = Editor::open(image.device(), EditOptions::new(NOW)).unwrap();
        editor.commit().unwrap();
        image.assert_clean();
        assert_eq!(image.content(file), noise(100_000, 1)[..10_000]);
        assert_eq!(image.open().metadata(file).unwrap().allocated, 12_288);
    }
}

#[test]
fn a_circular_orphan_list_is_corrupt() {
    let source = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        std::fs::write(source.path().join(name), b"x").unwrap();
    }
    let image = Image::make("16M", DISTRIBUTION, Some(source.path()));
    let (a, b) = (resolve(&image.open(), "a"), resolve(&image.open(), "b"));
    image.debugfs_write(&format!("sif <{a}> dtime @{b}\nsif <{b}> dtime @{a}\nssv last_orphan {a}\n"));
    let error = Editor::open(image.device(), EditOptions::new(NOW)).unwrap_err();
    assert!(error.to_string().contains("goes round in circles"), "{error}");
}

/// A journal written by debugfs onto an image, with features as asked.
fn handmade(shape: &[&str], journal_options: &str, revoke: bool) -> Image {
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("file"), noise(40_000, 2)).unwrap();
    let image = Image::make("32M", shape, Some(source.path()));
    let block = image.debugfs("bmap /file 3").trim().to_owned();
    let other = image.debugfs("bmap /file 4").trim().to_owned();
    let content = image.folder().join("content");
    let mut bytes = noise(4096, 77);
    bytes[..4].copy_from_slice(&0xc03b_3998_u32.to_be_bytes());
    std::fs::write(&content, bytes).unwrap();
    let content = content.display();
    let revoked = if revoke { format!("jw -r {other}\n") } else { String::new() };
    image.debugfs_write(&format!(
        "jo {journal_options}\njw -b {block} {content}\njw -b {other} {content}\n{revoked}jc\n"
    ));
    image
}

#[test]
fn replays_every_kind_of_journal() {
    let unsummed: &[&str] = &["-O", "^metadata_csum"];
    let narrow: &[&str] = &["-O", "^metadata_csum,^64bit"];
    let original = noise(40_000, 2);
    for (shape, options, revoke) in [
        (DISTRIBUTION, "", true),
        (DISTRIBUTION, "-c -v 2", true),
        (DISTRIBUTION, "-c -v 3", true),
        (unsummed, "", true),
        (narrow, "", true),
        // One sum for a whole transaction; debugfs gets those with revoked blocks wrong.
        (unsummed, "-c", false),
        (narrow, "-c", false),
    ] {
        let image = handmade(shape, options, revoke);
        let judge = image.copy();
        judge.replay_by_e2fsck();
        let expected = judge.content(resolve(&judge.open(), "file"));
        let is_original = |block: usize| {
            let bytes = block * 4096..(block + 1) * 4096;
            expected[bytes.clone()] == original[bytes]
        };
        assert!(!is_original(3) && is_original(4) == revoke, "{shape:?} {options}");
        let fs = image.open();
        assert!(read_all(&fs, resolve(&fs, "file")) == expected, "{shape:?} {options}");
        Editor::open(image.device(), EditOptions::new(NOW)).unwrap().commit().unwrap();
        image.assert_clean();
        assert!(image.content(resolve(&fs, "file")) == expected);
    }
}

#[test]
fn a_damaged_journal_is_an_error() {
    let image = handmade(DISTRIBUTION, "-c -v 3", true);
    let place: u64 = image.debugfs("bmap <8> 2").trim().parse().unwrap();
    let device = File::options().write(true).open(image.path()).unwrap();
    device.write_all_at(b"damage", place * 4096 + 100).unwrap();
    let error = Ext4::open(image.device()).unwrap_err();
    assert!(error.to_string().starts_with("journal block 2: the checksum"), "{error}");
    assert!(Editor::open(image.device(), EditOptions::new(NOW)).is_err());
}

#[test]
fn a_log_that_the_superblock_does_not_announce_is_not_edited_over() {
    let image = handmade(DISTRIBUTION, "", true);
    image.debugfs_write("feature -needs_recovery\n");
    let error = Editor::open(image.device(), EditOptions::new(NOW)).unwrap_err();
    assert!(error.to_string().starts_with("journal block 0: the journal holds changes"), "{error}");
    image.open();
}
