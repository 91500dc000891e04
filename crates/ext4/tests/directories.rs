//! Large directories and full file systems.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::path::Path;

use qtk_ext4::{EditOptions, Editor, Error, Ext4, Ino, NewNode, NodeKind, Timestamp};
use support::{DISTRIBUTION, Image, resolve};

const FILE: NewNode<'_> = NewNode { kind: NodeKind::File, permissions: 0o644, uid: 0, gid: 0, mtime: None };
const DIRECTORY: NewNode<'_> = NewNode { kind: NodeKind::Directory, permissions: 0o755, ..FILE };
const INDEXED: u32 = 0x1000;
const MANY: u32 = 20_000;

fn edit(image: &Image) -> Editor {
    Editor::open(image.device(), EditOptions::new(Timestamp { seconds: 1_700_000_000, nanos: 0 })).unwrap()
}

fn name(number: u32) -> Vec<u8> {
    format!("entry-{number:05}.conf").into_bytes()
}

/// Asserts that a directory has exactly the entries that `expected` accepts, for our reader and for the kernel.
fn assert_entries(image: &Image, path: &str, expected: impl Fn(u32) -> bool) {
    image.assert_clean();
    let fs = image.open();
    let dir = resolve(&fs, path);
    let wanted: Vec<_> = (0..2 * MANY).filter(|&number| expected(number)).map(name).collect();
    let mut found: Vec<_> = fs.read_dir(dir).unwrap().into_iter().map(|entry| entry.name).collect();
    found.sort();
    assert!(found == wanted, "{} entries instead of {}", found.len(), wanted.len());
    for number in 0..2 * MANY {
        assert_eq!(fs.lookup(dir, &name(number)).unwrap().is_some(), expected(number), "{number}");
    }
    image.mounted(|root| {
        let root = root.join(path);
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), wanted.len());
        for number in 0..2 * MANY {
            let path = root.join(String::from_utf8(name(number)).unwrap());
            assert_eq!(path.symlink_metadata().is_ok(), expected(number), "{}", path.display());
        }
    });
}

fn is_indexed(fs: &Ext4, path: &str) -> bool {
    fs.metadata(resolve(fs, path)).unwrap().flags & INDEXED != 0
}

#[test]
fn twenty_thousand_entries_come_and_half_of_them_go() {
    for shape in [&["-b", "1024"][..], DISTRIBUTION, &["-b", "1024", "-O", "^metadata_csum"]] {
        let image = Image::make("128M", &[shape, &["-N", "30000"]].concat(), None);
        let mut editor = edit(&image);
        let dir = editor.create(Ino::ROOT, b"many", &DIRECTORY).unwrap();
        for number in 0..MANY {
            editor.create(dir, &name(number), &FILE).unwrap();
        }
        editor.commit().unwrap();
        assert_entries(&image, "many", |number| number < MANY);
        for number in (0..MANY).step_by(2) {
            editor.unlink(dir, &name(number)).unwrap();
        }
        editor.commit().unwrap();
        assert_entries(&image, "many", |number| number < MANY && number % 2 == 1);
        assert!(is_indexed(editor.fs(), "many"));
    }
}

/// A directory of [`MANY`] entries that the kernel has made and indexed.
fn make_by_kernel(image: &Image) {
    image.mounted(|root| {
        let dir = root.join("many");
        std::fs::create_dir(&dir).unwrap();
        for number in 0..MANY {
            std::fs::write(dir.join(String::from_utf8(name(number)).unwrap()), b"").unwrap();
        }
    });
    image.assert_clean();
    assert!(is_indexed(&image.open(), "many"));
}

#[test]
fn the_index_that_the_kernel_made_is_kept() {
    for shape in [&["-b", "1024"][..], DISTRIBUTION] {
        let image = Image::make("128M", &[shape, &["-N", "50000"]].concat(), None);
        make_by_kernel(&image);
        let mut editor = edit(&image);
        let dir = resolve(editor.fs(), "many");
        for number in MANY..2 * MANY {
            editor.create(dir, &name(number), &FILE).unwrap();
        }
        for number in (0..2 * MANY).step_by(3) {
            editor.unlink(dir, &name(number)).unwrap();
        }
        editor.commit().unwrap();
        assert_entries(&image, "many", |number| number % 3 != 0);
        assert!(is_indexed(editor.fs(), "many"));
    }
}

#[test]
fn the_kernel_goes_on_where_we_stopped() {
    let image = Image::make("128M", &["-b", "1024", "-N", "50000"], None);
    let mut editor = edit(&image);
    let dir = editor.create(Ino::ROOT, b"many", &DIRECTORY).unwrap();
    for number in (0..2 * MANY).step_by(2) {
        editor.create(dir, &name(number), &FILE).unwrap();
    }
    editor.commit().unwrap();
    drop(editor);
    image.mounted(|root| {
        let path = |number| root.join("many").join(String::from_utf8(name(number)).unwrap());
        for number in 0..MANY {
            if number % 2 == 0 {
                std::fs::remove_file(path(number)).unwrap();
            } else {
                std::fs::write(path(number), b"").unwrap();
            }
        }
    });
    assert_entries(&image, "many", |number| (number < MANY) == (number % 2 == 1));
}

#[test]
fn a_linear_directory_of_many_blocks_stays_linear() {
    let source = tempfile::tempdir().unwrap();
    std::fs::create_dir(source.path().join("many")).unwrap();
    for number in 0..1000 {
        let path = source.path().join("many").join(String::from_utf8(name(number)).unwrap());
        std::fs::write(path, b"").unwrap();
    }
    let image = Image::make("64M", DISTRIBUTION, Some(source.path()));
    let mut editor = edit(&image);
    let dir = resolve(editor.fs(), "many");
    for number in 1000..1500 {
        editor.create(dir, &name(number), &FILE).unwrap();
    }
    for number in (0..1500).step_by(2) {
        editor.unlink(dir, &name(number)).unwrap();
    }
    editor.commit().unwrap();
    assert!(!is_indexed(editor.fs(), "many"));
    assert_entries(&image, "many", |number| number < 1500 && number % 2 == 1);
}

/// Makes nodes until there is no space, and checks that what was made before is whole.
fn fill(image: &Image, node: &NewNode<'_>, content: &[u8]) -> u32 {
    let mut editor = edit(image);
    let dir = editor.create(Ino::ROOT, b"many", &DIRECTORY).unwrap();
    let mut count = 0;
    let error = loop {
        let made = editor.create(dir, &name(count), node).and_then(|ino| match content {
            [] => Ok(()),
            content => editor.write_at(ino, content, 0).or_else(|error| {
                editor.unlink(dir, &name(count))?;
                Err(error)
            }),
        });
        match made {
            Ok(()) => count += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::NoSpace(_)), "{error}");
    editor.commit().unwrap();
    assert_entries(image, "many", |number| number < count);
    count
}

#[test]
fn a_full_file_system_is_a_clean_error() {
    let link = [b't'; 500];
    for shape in [&["-b", "1024", "-O", "^has_journal"][..], &["-O", "^has_journal"]] {
        let few_blocks = || Image::make("3M", &[shape, &["-N", "4096"]].concat(), None);
        let few_inodes = Image::make("16M", &[shape, &["-N", "256"]].concat(), None);
        assert!(fill(&few_inodes, &FILE, b"") > 200);
        assert_eq!(few_inodes.open().free_inodes(), 0);
        assert!(fill(&few_blocks(), &FILE, &[7; 5000]) > 100);
        assert!(fill(&few_blocks(), &DIRECTORY, b"") > 100);
        assert!(fill(&few_blocks(), &NewNode { kind: NodeKind::Symlink(&link), ..FILE }, b"") > 100);
    }
}

#[test]
fn counts_links_up_to_the_limit() {
    let shape = ["-b", "1024", "-N", "66000", "-O"];
    for (feature, counted) in [("dir_nlink", false), ("^dir_nlink", true)] {
        let image = Image::make("200M", &[&shape[..], &[feature]].concat(), None);
        let mut editor = edit(&image);
        let dir = editor.create(Ino::ROOT, b"many", &DIRECTORY).unwrap();
        let limit = 65_000 - 2;
        for number in 0..limit {
            editor.create(dir, &name(number), &DIRECTORY).unwrap();
        }
        assert_eq!(editor.fs().metadata(dir).unwrap().links, 65_000);
        let one_more = editor.create(dir, b"one more", &DIRECTORY);
        assert_eq!(matches!(one_more, Err(Error::TooManyLinks(ino)) if ino == dir), counted, "{one_more:?}");
        if !counted {
            assert_eq!(editor.fs().metadata(dir).unwrap().links, 1);
            editor.remove_dir(dir, &name(0)).unwrap();
            assert_eq!(editor.fs().metadata(dir).unwrap().links, 1);
        }
        editor.commit().unwrap();
        image.assert_clean();
    }
}

#[test]
fn a_file_has_no_more_names_than_links() {
    let image = Image::make("64M", DISTRIBUTION, None);
    let mut editor = edit(&image);
    let file = editor.create(Ino::ROOT, b"file", &FILE).unwrap();
    for number in 1..65_000 {
        editor.link(file, Ino::ROOT, &name(number)).unwrap();
    }
    assert!(matches!(editor.link(file, Ino::ROOT, b"one more"), Err(Error::TooManyLinks(_))));
    editor.commit().unwrap();
    image.assert_clean();
    image.mounted(|root: &Path| {
        assert_eq!(std::os::unix::fs::MetadataExt::nlink(&root.join("file").metadata().unwrap()), 65_000);
    });
}

#[test]
fn names_and_targets_have_limits() {
    let image = Image::make("16M", &["-b", "1024"], None);
    let mut editor = edit(&image);
    let long = [b'n'; 255];
    editor.create(Ino::ROOT, &long, &FILE).unwrap();
    assert!(matches!(editor.create(Ino::ROOT, &[b'n'; 256], &FILE), Err(Error::NameTooLong(256))));
    for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
        assert!(matches!(editor.create(Ino::ROOT, bad, &FILE), Err(Error::InvalidName(_))), "{bad:?}");
        assert!(editor.rename(Ino::ROOT, &long, Ino::ROOT, bad).is_err());
    }
    for (number, len) in [1, 59, 60, 1023].into_iter().enumerate() {
        let target = vec![b't'; len];
        let node = NewNode { kind: NodeKind::Symlink(&target), ..FILE };
        let ino = editor.create(Ino::ROOT, format!("link{number}").as_bytes(), &node).unwrap();
        assert_eq!(editor.fs().read_link(ino).unwrap(), target);
    }
    for target in [vec![b't'; 1024], vec![], b"a\0b".to_vec()] {
        assert!(editor.create(Ino::ROOT, b"bad", &NewNode { kind: NodeKind::Symlink(&target), ..FILE }).is_err());
    }
    let device = NewNode { kind: NodeKind::BlockDevice(4096, 0), ..FILE };
    assert!(matches!(editor.create(Ino::ROOT, b"bad", &device), Err(Error::NotPermitted { .. })));
    assert!(matches!(editor.unlink(Ino::ROOT, b"bad"), Err(Error::NotFound { .. })));
    editor.commit().unwrap();
    image.assert_clean();
}
