//! Random writes, truncations and reservations on several files at once, against their content in memory.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use proptest::prelude::*;
use qtk_ext4::{EditOptions, Editor, Error, Ino, Timestamp};
use support::{DISTRIBUTION, Image, noise, read_all, resolve};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

#[derive(Clone, Debug)]
enum Operation {
    Write {
        file: usize,
        offset: u64,
        len: usize,
    },
    /// Writes of one byte in every `stride` bytes.
    Dot {
        file: usize,
        offset: u64,
        count: u64,
        stride: u64,
    },
    Truncate {
        file: usize,
        size: u64,
    },
    Reserve {
        file: usize,
        size: u64,
    },
    Commit,
    Reopen,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let file = 0..NAMES.len();
    let offset = prop_oneof![0..5000_u64, 0..300_000_u64, 0..3_000_000_u64];
    let operation = prop_oneof![
        6 => (file.clone(), offset.clone(), prop_oneof![0..9000_usize, 0..400_000_usize])
            .prop_map(|(file, offset, len)| Operation::Write { file, offset, len }),
        3 => (file.clone(), offset.clone(), 1..200_u64, 500..20_000_u64)
            .prop_map(|(file, offset, count, stride)| Operation::Dot { file, offset, count, stride }),
        4 => (file.clone(), prop_oneof![Just(0), offset]).prop_map(|(file, size)| Operation::Truncate { file, size }),
        1 => (file, 0..2_000_000_u64).prop_map(|(file, size)| Operation::Reserve { file, size }),
        1 => Just(Operation::Commit),
        1 => Just(Operation::Reopen),
    ];
    proptest::collection::vec(operation, 1..60)
}

fn open(image: &Image) -> Editor {
    let now = Timestamp { seconds: 1_700_000_000, nanos: 0 };
    Editor::open(image.device(), EditOptions::new(now)).unwrap()
}

/// Writes to the file and, if there was space, to its content.
fn write(editor: &mut Editor, ino: Ino, content: &mut Vec<u8>, data: &[u8], offset: u64) {
    match editor.write_at(ino, data, offset) {
        Ok(()) if data.is_empty() => {}
        Ok(()) => {
            let offset = usize::try_from(offset).unwrap();
            content.resize(content.len().max(offset + data.len()), 0);
            content[offset..offset + data.len()].copy_from_slice(data);
        }
        Err(Error::NoSpace("blocks")) => {}
        Err(other) => panic!("{other}"),
    }
}

fn run(image: &Image, operations: &[Operation]) {
    let mut editor = open(image);
    let free = editor.fs().free_blocks();
    let inos = NAMES.map(|name| resolve(editor.fs(), name));
    let mut contents: [Vec<u8>; 4] = Default::default();
    for (seed, operation) in operations.iter().enumerate() {
        match *operation {
            Operation::Write { file, offset, len } => {
                write(&mut editor, inos[file], &mut contents[file], &noise(len, seed as u64), offset);
            }
            Operation::Dot { file, offset, count, stride } => {
                for at in 0..count {
                    write(&mut editor, inos[file], &mut contents[file], b"dot", offset + at * stride);
                }
            }
            Operation::Truncate { file, size } => {
                editor.truncate(inos[file], size).unwrap();
                contents[file].resize(usize::try_from(size).unwrap(), 0);
            }
            Operation::Reserve { file, size } => match editor.reserve(inos[file], size) {
                Ok(()) | Err(Error::NoSpace("blocks")) => {}
                Err(other) => panic!("{other}"),
            },
            Operation::Commit => editor.commit().unwrap(),
            Operation::Reopen => {
                editor.commit().unwrap();
                drop(editor);
                editor = open(image);
            }
        }
    }
    for (ino, content) in inos.iter().zip(&contents) {
        assert!(read_all(editor.fs(), *ino) == *content, "inode {ino} before the commit");
    }
    editor.commit().unwrap();
    image.assert_clean();
    for (ino, content) in inos.iter().zip(&contents) {
        assert!(image.content(*ino) == *content, "inode {ino}");
        editor.truncate(*ino, 0).unwrap();
    }
    editor.commit().unwrap();
    image.assert_clean();
    assert_eq!(editor.fs().free_blocks(), free, "blocks leaked");
}

fn check(size: &str, shape: &[&str], cases: u32) {
    let source = tempfile::tempdir().unwrap();
    for name in NAMES {
        std::fs::write(source.path().join(name), b"").unwrap();
    }
    let empty = Image::make(size, shape, Some(source.path()));
    proptest!(ProptestConfig::with_cases(cases), |(operations in operations())| {
        run(&empty.copy(), &operations);
    });
}

#[test]
fn with_blocks_of_4_kib() {
    check("24M", DISTRIBUTION, 8);
}

#[test]
fn with_blocks_of_1_kib_and_little_space() {
    check("10M", &["-b", "1024"], 8);
}

#[test]
fn with_blocks_of_64_kib() {
    check("32M", &["-b", "65536", "-N", "64", "-O", "^has_journal"], 4);
}

#[test]
fn with_block_maps() {
    check("12M", &["-t", "ext3", "-b", "1024"], 6);
}

#[test]
fn with_groups_that_were_never_used() {
    check("40M", &["-b", "1024", "-g", "1024", "-O", "^metadata_csum,uninit_bg"], 6);
}
