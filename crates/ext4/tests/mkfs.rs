//! New file systems, compared block for block with those that mke2fs makes, and judged by e2fsck and the kernel.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::fs::File;
use std::path::Path;

use qtk_block::{BlockRead, BlockWrite, ExtentKind, MemoryDisk, RawFile};
use qtk_ext4::mkfs::{ErrorBehaviour, MkfsError, MkfsOptions, Profile, Reserved, Type, Usage, format};
use qtk_ext4::{EditOptions, Editor, Ext4, Ino, NewNode, NodeKind, Timestamp};
use support::Image;

const NOW: i64 = 1_700_000_000;
const UUID: &str = "11111111-2222-3333-4444-555555555555";
const HASH_SEED: &str = "66666666-7777-8888-9999-aaaaaaaaaaaa";

fn id(text: &str) -> [u8; 16] {
    let digits: Vec<u8> = text.bytes().filter(|&byte| byte != b'-').collect();
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).unwrap()).unwrap();
    let bytes: Vec<u8> = digits.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
    bytes.try_into().unwrap()
}

/// Debian 12's defaults, which are those of the mke2fs that judges.
fn options() -> MkfsOptions {
    MkfsOptions {
        profile: Profile::Debian12,
        uuid: id(UUID),
        hash_seed: Some(id(HASH_SEED)),
        now: NOW,
        ..MkfsOptions::default()
    }
}

fn empty(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// Bytes of the superblock that mke2fs sets by what it happened to write: the count of written bytes, and with it the
/// checksum; and what it leaves behind in the inode's block map, and so in the superblock's copy, of extents that it moved.
fn without_accidents(superblock: &mut [u8]) {
    superblock[0x178..0x180].fill(0);
    superblock[0x3fc..0x400].fill(0);
}

/// Asserts that both files hold the same, superblocks' accidents aside.
fn assert_same(ours: &Path, theirs: &Path, what: &str) {
    let [ours, theirs] = [ours, theirs].map(|path| RawFile::from_file(File::open(path).unwrap()).unwrap());
    let mut at = 0;
    while at < ours.size() {
        let [mine, other] = [&ours, &theirs].map(|file| file.extent(at..file.size()).unwrap());
        let end = mine.range.end.min(other.range.end);
        if mine.kind != ExtentKind::Data && other.kind != ExtentKind::Data {
            at = end;
            continue;
        }
        let len = usize::try_from((end - at).min(1 << 20)).unwrap();
        let read = |file: &RawFile| {
            let mut bytes = vec![0; len];
            file.read_at(&mut bytes, at).unwrap();
            for block in bytes.chunks_mut(1024).filter(|block| block.get(56..58) == Some(&[0x53, 0xef])) {
                without_accidents(block);
            }
            bytes
        };
        let (mine, other) = (read(&ours), read(&theirs));
        if let Some(place) = mine.iter().zip(&other).position(|(mine, other)| mine != other) {
            let place = at + place as u64;
            panic!("{what}: byte {place:#x} (1 KiB block {}, byte {:#x}) differs", place / 1024, place % 1024);
        }
        at += len as u64;
    }
}

fn mke2fs(path: &Path, args: &str) {
    // A clock that stands still is what makes the result comparable.
    let all = format!("E2FSPROGS_FAKE_TIME={NOW} mke2fs -q -F -U {UUID} {args}");
    let words: Vec<&str> = all.split_whitespace().chain([path.to_str().unwrap()]).collect();
    support::tool("env", &words);
}

/// Makes both, compares them, and asks e2fsck about ours.
fn compare(size: u64, args: &str, options: &MkfsOptions) {
    let folder = tempfile::tempdir().unwrap();
    let theirs = folder.path().join("theirs");
    empty(&theirs, size);
    let extended = if args.contains("-E ") { format!("{args},") } else { format!("{args} -E ") };
    mke2fs(&theirs, &format!("{extended}hash_seed={HASH_SEED},root_owner=0:0"));
    let ours = Image::empty(size);
    format(&*ours.device(), options).unwrap_or_else(|error| panic!("{args}: {error}"));
    assert_same(ours.path(), &theirs, &format!("{size} {args}"));
    ours.assert_clean();
}

#[test]
fn defaults_are_those_of_mke2fs_at_every_size() {
    const MIB: u64 = 1 << 20;
    for size in
        [MIB, 2 * MIB, 9 * MIB, 17 * MIB + 12345, 64 * MIB, 136 * MIB, 511 * MIB, 512 * MIB, 2049 * MIB, 40 << 30]
    {
        for (name, kind) in [("ext2", Type::Ext2), ("ext3", Type::Ext3), ("ext4", Type::Ext4)] {
            // Without checksums of groups, mke2fs writes all inode tables.
            if kind == Type::Ext4 || size < 1 << 30 {
                compare(size, &format!("-t {name}"), &MkfsOptions { kind, ..options() });
            }
        }
    }
}

#[test]
fn profiles_differ_in_features() {
    for profile in [Profile::Ubuntu2404, Profile::Debian13] {
        for size in [3 << 20, 64 << 20, 3 << 30] {
            let args = "-t ext4 -O metadata_csum_seed,orphan_file";
            compare(size, args, &MkfsOptions { profile, ..options() });
        }
    }
}

#[test]
fn features_are_laid_out_as_by_mke2fs() {
    let edits = [
        "^has_journal",
        "^metadata_csum",
        "^metadata_csum,uninit_bg,^64bit",
        "^flex_bg",
        "^64bit,^extent",
        "^resize_inode",
        "^resize_inode,meta_bg",
        "^resize_inode,^sparse_super",
        "sparse_super2",
        "^filetype,^dir_index,^ext_attr,^large_file,^huge_file,^dir_nlink,^extra_isize",
        "large_dir,ea_inode,orphan_file",
    ];
    for edit in edits {
        for size in [40 << 20, 700 << 20] {
            compare(size, &format!("-t ext4 -O {edit}"), &MkfsOptions { features: edit.to_owned(), ..options() });
        }
    }
}

#[test]
fn numbers_are_those_of_mke2fs() {
    let base = options;
    let cases: Vec<(&str, MkfsOptions)> = vec![
        ("-b 1024 -I 128", MkfsOptions { block_size: Some(1024), inode_size: Some(128), ..base() }),
        ("-b 2048 -I 512", MkfsOptions { block_size: Some(2048), inode_size: Some(512), ..base() }),
        ("-b 16384", MkfsOptions { block_size: Some(16384), ..base() }),
        ("-b 65536 -I 1024", MkfsOptions { block_size: Some(65536), inode_size: Some(1024), ..base() }),
        ("-N 16", MkfsOptions { inodes: Some(16), ..base() }),
        ("-N 100000", MkfsOptions { inodes: Some(100_000), ..base() }),
        ("-i 65536 -m 0", MkfsOptions { bytes_per_inode: Some(65536), reserved: Reserved::Percent(0.0), ..base() }),
        (
            "-m 2.5 -T largefile",
            MkfsOptions { reserved: Reserved::Percent(2.5), usage: Some(Usage::LargeFile), ..base() },
        ),
        (
            "-g 8192 -G 4 -b 4096",
            MkfsOptions { blocks_per_group: Some(8192), groups_per_flex: Some(4), block_size: Some(4096), ..base() },
        ),
        ("-J size=8", MkfsOptions { journal_size: Some(8 << 20), ..base() }),
        (
            "-O ^flex_bg -E stride=16,stripe_width=64",
            MkfsOptions { features: "^flex_bg".to_owned(), stride: 16, stripe_width: 64, ..base() },
        ),
        ("-E resize=10000000", MkfsOptions { resize: Some(10_000_000), ..base() }),
        (
            "-O sparse_super2 -E num_backup_sb=1",
            MkfsOptions { features: "sparse_super2".to_owned(), backups: 1, ..base() },
        ),
        (
            "-L label -M /mnt -e remount-ro",
            MkfsOptions {
                label: b"label".to_vec(),
                last_mounted: b"/mnt".to_vec(),
                errors: ErrorBehaviour::RemountReadOnly,
                ..base()
            },
        ),
        ("-E nodiscard", MkfsOptions { lazy_inode_tables: true, ..base() }),
    ];
    for (args, options) in cases {
        compare(200 << 20, &format!("-t ext4 {args}"), &options);
    }
}

#[test]
fn what_was_on_the_device_is_gone() {
    let old = Image::make("32M", &["-b", "1024", "-L", "old"], None);
    let blank = Image::empty(32 << 20);
    for image in [&old, &blank] {
        format(&*image.device(), &options()).unwrap();
    }
    assert_same(old.path(), blank.path(), "over an old file system");
}

#[test]
fn the_kernel_mounts_it_and_the_editor_fills_it() {
    let image = Image::empty(100 << 20);
    let made = MkfsOptions { profile: Profile::Ubuntu2404, root_permissions: 0o750, root_owner: (7, 8), ..options() };
    format(&*image.device(), &made).unwrap();
    let now = Timestamp { seconds: NOW, nanos: 0 };
    let mut editor = Editor::open(image.device(), EditOptions::new(now)).unwrap();
    for at in 0..500_u32 {
        let node = NewNode { kind: NodeKind::File, permissions: 0o640, uid: at, gid: 70_000, mtime: None };
        let ino = editor.create(Ino::ROOT, format!("file {at}").as_bytes(), &node).unwrap();
        editor.write_at(ino, format!("content {at}").as_bytes(), 0).unwrap();
    }
    editor.commit().unwrap();
    image.assert_clean();
    image.mounted(|root| {
        assert_eq!(std::fs::read_to_string(root.join("file 499")).unwrap(), "content 499");
        assert_eq!(std::fs::read_dir(root).unwrap().count(), 501);
        std::fs::write(root.join("by the kernel"), vec![7; 3_000_000]).unwrap();
    });
    image.assert_clean();
}

#[test]
fn a_huge_device_takes_little_memory_and_no_time() {
    let device = MemoryDisk::new(16 << 40);
    let made = format(&device, &MkfsOptions { device_is_zero: true, ..options() }).unwrap();
    assert_eq!((made.blocks, made.inodes), (1 << 32, 1 << 28));
    let fs = Ext4::open(std::sync::Arc::new(device)).unwrap();
    assert_eq!(fs.free_blocks(), made.free_blocks);
    assert!(fs.lookup(Ino::ROOT, b"lost+found").unwrap().is_some());
}

#[test]
fn equal_options_give_equal_bytes() {
    let seedless = MkfsOptions { hash_seed: None, ..options() };
    let [one, two] = [(); 2].map(|()| Image::empty(20 << 20));
    for image in [&one, &two] {
        format(&*image.device(), &seedless).unwrap();
    }
    assert_same(one.path(), two.path(), "made twice");
}

#[test]
fn refusals_say_what_to_do_and_write_nothing() {
    let device = MemoryDisk::new(64 << 20);
    device.write_at(b"precious", 0).unwrap();
    let cases = [
        (MkfsOptions { features: "bigalloc".to_owned(), ..options() }, "bigalloc"),
        (MkfsOptions { features: "^sparkle".to_owned(), ..options() }, "sparkle"),
        (MkfsOptions { features: "meta_bg".to_owned(), ..options() }, "^resize_inode"),
        (MkfsOptions { block_size: Some(3000), ..options() }, "power of two"),
        (MkfsOptions { inode_size: Some(8192), ..options() }, "inode size"),
        (MkfsOptions { reserved: Reserved::Percent(51.0), ..options() }, "half"),
        (MkfsOptions { reserved: Reserved::Percent(f64::NAN), ..options() }, "half"),
        (MkfsOptions { journal_size: Some(1 << 40), ..options() }, "journal"),
        (MkfsOptions { label: vec![b'x'; 17], ..options() }, "label"),
        (MkfsOptions { inodes: Some(u32::MAX), ..options() }, "inodes"),
        (MkfsOptions { bytes_per_inode: Some(1), ..options() }, "bytes per inode"),
        (MkfsOptions { blocks_per_group: Some(9), ..options() }, "multiple of 8"),
        (MkfsOptions { resize: Some(10), ..options() }, "resize"),
    ];
    for (options, word) in cases {
        let message = format(&device, &options).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    }
    for size in [0, 1024, 4096, 10_000] {
        assert!(matches!(format(&MemoryDisk::new(size), &options()), Err(MkfsError::TooSmall)), "{size}");
    }
    let mut start = [0; 8];
    device.read_at(&mut start, 0).unwrap();
    assert_eq!(&start, b"precious");
}
