//! File content written, grown and cut, judged by e2fsck and debugfs.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use qtk_ext4::{EditOptions, Editor, Error, Ino, Timestamp};
use support::{DISTRIBUTION, Image, noise, read_all, resolve};

const NOW: Timestamp = Timestamp { seconds: 1_700_000_000, nanos: 123_456_789 };

fn edit(image: &Image) -> Editor {
    Editor::open(image.device(), EditOptions::new(NOW)).unwrap()
}

/// An image that holds empty files of these names.
fn image_with(size: &str, shape: &[&str], names: &[&str]) -> Image {
    let source = tempfile::tempdir().unwrap();
    for name in names {
        std::fs::write(source.path().join(name), b"").unwrap();
    }
    Image::make(size, shape, Some(source.path()))
}

/// Shapes that can be written to.
const SHAPES: &[&[&str]] = &[
    DISTRIBUTION,
    &["-b", "1024"],
    &["-b", "65536", "-N", "64"],
    &["-I", "128"],
    &["-I", "1024", "-O", "^metadata_csum"],
    &["-O", "^metadata_csum,uninit_bg,^64bit", "-b", "2048"],
    &["-O", "^flex_bg,^resize_inode", "-b", "1024"],
    &["-t", "ext2"],
    &["-t", "ext3", "-b", "1024"],
];

#[test]
fn files_are_what_was_written() {
    for shape in SHAPES {
        let image = image_with("64M", shape, &["small", "large", "sparse", "grown"]);
        let mut editor = edit(&image);
        let small = resolve(editor.fs(), "small");
        editor.write_at(small, b"hello", 0).unwrap();
        editor.write_at(small, b"world", 100_000).unwrap();
        let large = resolve(editor.fs(), "large");
        let content = noise(20_000_001, 1);
        editor.reserve(large, content.len() as u64).unwrap();
        for (at, piece) in content.chunks(1_000_003).enumerate() {
            editor.write_at(large, piece, at as u64 * 1_000_003).unwrap();
        }
        let sparse = resolve(editor.fs(), "sparse");
        for at in (0..200).rev() {
            editor.write_at(sparse, &noise(700, at), at * 140_000).unwrap();
        }
        let grown = resolve(editor.fs(), "grown");
        for at in 0..300 {
            editor.write_at(grown, &noise(777, at), at * 777).unwrap();
        }
        editor.truncate(sparse, 14_000_350).unwrap();
        editor.truncate(sparse, 14_100_000).unwrap();
        let before_commit = read_all(editor.fs(), sparse);
        editor.commit().unwrap();
        image.assert_clean();

        let mut expected = vec![0; 100_005];
        expected[..5].copy_from_slice(b"hello");
        expected[100_000..].copy_from_slice(b"world");
        assert_eq!(image.content(small), expected);
        assert!(image.content(large) == content, "{shape:?}");
        let mut expected = vec![0; 14_100_000];
        for at in 0..=100_usize {
            let len = if at == 100 { 350 } else { 700 };
            expected[at * 140_000..][..len].copy_from_slice(&noise(700, at as u64)[..len]);
        }
        assert!(image.content(sparse) == expected && before_commit == expected, "{shape:?}");
        assert_eq!(image.content(grown), (0..300).flat_map(|at| noise(777, at)).collect::<Vec<_>>());
        let extents = image.debugfs(&format!("stat <{large}>"));
        assert!(!shape.contains(&"-b") || extents.contains("EXTENTS") || shape.contains(&"ext3"), "{extents}");
    }
}

#[test]
fn a_reserved_file_takes_few_extents() {
    let image = image_with("256M", DISTRIBUTION, &["a", "b"]);
    let mut editor = edit(&image);
    let files = [resolve(editor.fs(), "a"), resolve(editor.fs(), "b")];
    let content = noise(60 << 20, 3);
    for ino in files {
        editor.reserve(ino, content.len() as u64).unwrap();
    }
    for at in 0..60 {
        for ino in files {
            editor.write_at(ino, &content[at << 20..(at + 1) << 20], (at as u64) << 20).unwrap();
        }
    }
    editor.commit().unwrap();
    image.assert_clean();
    for ino in files {
        let extents = image.debugfs(&format!("dump_extents -l <{ino}>"));
        assert!(extents.lines().count() <= 4, "{extents}");
        assert!(image.content(ino) == content);
    }
}

/// Fills the image with files of one block and removes every other block of the whole by cutting files.
fn fragment(editor: &mut Editor, ino: Ino) {
    let block = u64::from(editor.fs().block_size());
    // Two files written in turns, so that their blocks alternate.
    let other = resolve(editor.fs(), "other");
    for at in 0..2000 {
        editor.write_at(ino, &noise(10, at), at * block).unwrap();
        editor.write_at(other, &noise(10, at), at * block).unwrap();
    }
}

#[test]
fn extent_trees_grow_and_shrink() {
    for shape in SHAPES {
        if shape.contains(&"65536") {
            continue;
        }
        let image = image_with("64M", shape, &["file", "other", "third"]);
        let mut editor = edit(&image);
        let file = resolve(editor.fs(), "file");
        let other = resolve(editor.fs(), "other");
        let block = u64::from(editor.fs().block_size());
        fragment(&mut editor, file);
        editor.commit().unwrap();
        image.assert_clean();
        let depth = |ino| image.debugfs(&format!("dump_extents -n <{ino}>")).lines().count();
        assert!(shape.contains(&"ext2") || shape.contains(&"ext3") || depth(file) > 5);

        // The gaps that this leaves hold the next file.
        editor.truncate(other, 0).unwrap();
        let third = resolve(editor.fs(), "third");
        let content = noise(usize::try_from(3000 * block).unwrap(), 5);
        editor.write_at(third, &content, 0).unwrap();
        editor.truncate(file, 500 * block + 5).unwrap();
        editor.commit().unwrap();
        image.assert_clean();
        assert!(image.content(third) == content);
        assert_eq!(image.content(file).len() as u64, 500 * block + 5);

        for ino in [file, third] {
            editor.truncate(ino, 0).unwrap();
        }
        editor.commit().unwrap();
        image.assert_clean();
        for ino in [file, other, third] {
            assert_eq!(editor.fs().metadata(ino).unwrap().allocated, 0);
        }
    }
}

#[test]
fn a_full_file_system_is_a_clean_error() {
    for shape in [DISTRIBUTION, &["-b", "1024", "-O", "^has_journal"], &["-t", "ext2", "-b", "1024"]] {
        let image = image_with("16M", shape, &["a", "b"]);
        let mut editor = edit(&image);
        let free = editor.fs().free_blocks();
        let (a, b) = (resolve(editor.fs(), "a"), resolve(editor.fs(), "b"));
        let too_much = vec![7; 20 << 20];
        assert!(matches!(editor.reserve(a, too_much.len() as u64), Err(Error::NoSpace("blocks"))));
        assert!(matches!(editor.write_at(a, &too_much, 0), Err(Error::NoSpace("blocks"))));
        assert_eq!(editor.fs().free_blocks(), free);
        assert_eq!(editor.fs().metadata(a).unwrap().size, 0);

        let mut written = 0;
        while editor.write_at(b, &[9; 5000], written * 9000).is_ok() {
            written += 1;
        }
        assert!(editor.fs().free_blocks() < 8);
        editor.commit().unwrap();
        image.assert_clean();
        let content = image.content(b);
        assert_eq!(content.len() as u64, (written - 1) * 9000 + 5000);
        editor.truncate(b, 0).unwrap();
        editor.commit().unwrap();
        image.assert_clean();
        assert_eq!(editor.fs().free_blocks(), free);
    }
}

#[test]
fn unwritten_extents_become_data_where_written() {
    let image = image_with("64M", DISTRIBUTION, &["file"]);
    image.mounted(|root| {
        support::tool("fallocate", &["-l", "8M", root.join("file").to_str().unwrap()]);
    });
    let mut editor = edit(&image);
    let file = resolve(editor.fs(), "file");
    let mut expected = vec![0; 8 << 20];
    assert!(read_all(editor.fs(), file) == expected);
    assert_eq!(editor.fs().data_range(file, 0).unwrap(), None);
    for (at, seed) in [(5, 1), (4096 * 7, 2), (1_000_000, 3), (8_388_000, 4)] {
        let piece = noise(600.min((8 << 20) - at), seed);
        editor.write_at(file, &piece, at as u64).unwrap();
        expected[at..at + piece.len()].copy_from_slice(&piece);
    }
    assert!(read_all(editor.fs(), file) == expected);
    editor.commit().unwrap();
    image.assert_clean();
    assert!(image.content(file) == expected);
}

#[test]
fn files_beyond_2_gib_are_marked_in_the_superblock() {
    for shape in [DISTRIBUTION, &["-t", "ext2"], &["-t", "ext3", "-O", "^large_file"]] {
        let image = image_with("16M", shape, &["file"]);
        let mut editor = edit(&image);
        let file = resolve(editor.fs(), "file");
        editor.write_at(file, b"far away", 3 << 30).unwrap();
        assert!(matches!(editor.write_at(file, b"x", 1 << 60), Err(Error::FileTooLarge(_))));
        editor.commit().unwrap();
        image.assert_clean();
        assert!(image.debugfs("show_super_stats -h").contains("large_file"));
        let mut end = [0; 10];
        assert_eq!(image.open().read_at(file, &mut end, (3 << 30) - 2).unwrap(), 10);
        assert_eq!(&end, b"\0\0far away");
    }
}

#[test]
fn groups_that_were_never_used_stay_so_while_others_have_space() {
    let image = image_with("128M", &["-b", "1024"], &["file"]);
    let unused = || image.debugfs("show_super_stats").matches("Block not init").count();
    let before = unused();
    let mut editor = edit(&image);
    let file = resolve(editor.fs(), "file");
    editor.write_at(file, &noise(3 << 20, 1), 0).unwrap();
    editor.commit().unwrap();
    assert_eq!(unused(), before);
    editor.write_at(file, &noise(30 << 20, 2), 0).unwrap();
    editor.commit().unwrap();
    image.assert_clean();
    assert!((1..before).contains(&unused()), "{before} before");
}

#[test]
fn opening_and_committing_nothing_changes_nothing() {
    let image = image_with("32M", DISTRIBUTION, &["file"]);
    let before = std::fs::read(image.path()).unwrap();
    edit(&image).commit().unwrap();
    let mut editor = edit(&image);
    editor.write_at(resolve(editor.fs(), "file"), b"", 0).unwrap();
    drop(editor);
    assert!(std::fs::read(image.path()).unwrap() == before);
}

#[test]
fn two_runs_give_the_same_bytes() {
    let one = image_with("32M", DISTRIBUTION, &["file", "other"]);
    let two = one.copy();
    for image in [&one, &two] {
        let mut editor = edit(image);
        let file = resolve(editor.fs(), "file");
        fragment(&mut editor, file);
        editor.commit().unwrap();
    }
    assert!(std::fs::read(one.path()).unwrap() == std::fs::read(two.path()).unwrap());
}

#[test]
fn no_file_outgrows_its_block_map() {
    const SIZES: [u64; 5] = [1 << 32, 1 << 34, (1 << 34) + (1 << 28), 1 << 41, 1 << 43];
    let tuned = image_with("16M", &["-b", "1024", "-O", "^extent,^64bit"], &["file"]);
    support::tool("tune2fs", &["-O", "extent", tuned.path().to_str().unwrap()]);
    let shapes = SHAPES.iter().map(|shape| image_with("64M", shape, &["file"]));
    for image in shapes.chain([tuned]) {
        for size in SIZES {
            let mut editor = edit(&image);
            let file = resolve(editor.fs(), "file");
            match editor.truncate(file, size) {
                Err(Error::FileTooLarge(_)) => continue,
                result => result.unwrap(),
            }
            editor.commit().unwrap();
            image.assert_clean();
        }
    }
}

#[test]
fn refuses_by_name_what_it_cannot_keep_up() {
    for (feature, args) in [
        ("quota", vec!["-O", "quota"]),
        ("bigalloc", vec!["-O", "bigalloc"]),
        ("inline_data", vec!["-O", "inline_data"]),
        ("mmp", vec!["-O", "mmp"]),
        ("encrypt", vec!["-O", "encrypt"]),
        ("casefold", vec!["-O", "casefold"]),
        ("verity", vec!["-O", "verity"]),
        ("ea_inode", vec!["-O", "ea_inode"]),
        ("meta_bg", vec!["-O", "meta_bg,^resize_inode"]),
        ("large_dir", vec!["-O", "large_dir"]),
    ] {
        let image = Image::make("16M", &args, None);
        let error = Editor::open(image.device(), EditOptions::new(NOW)).unwrap_err();
        assert_eq!(error.to_string(), format!("the file system feature {feature} is not supported for writing"));
        image.open();
    }
    let damaged = Image::make("16M", DISTRIBUTION, None);
    damaged.debugfs_write("ssv state 2\n");
    let error = Editor::open(damaged.device(), EditOptions::new(NOW)).unwrap_err();
    assert!(error.to_string().contains("e2fsck"), "{error}");
    let unclean = Image::make("16M", &["-t", "ext2"], None);
    unclean.debugfs_write("ssv state 0\n");
    let error = Editor::open(unclean.device(), EditOptions::new(NOW)).unwrap_err();
    assert!(error.to_string().contains("was not unmounted"), "{error}");
}
