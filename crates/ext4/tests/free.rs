//! What is free, by the judgement of dumpe2fs, of the kernel's own discards, and of e2fsck once it is gone.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use qtk_ext4::Ext4;
use support::crash::{self, crashed};
use support::{DISTRIBUTION, Image, noise, resolve, tool};

const SHAPES: &[&[&str]] = &[
    DISTRIBUTION,
    &["-b", "1024"],
    &["-b", "2048", "-I", "512"],
    &["-I", "128"],
    &["-O", "^metadata_csum"],
    &["-O", "^metadata_csum,uninit_bg,^64bit"],
    &["-O", "^metadata_csum,uninit_bg,^64bit", "-b", "1024"],
    &["-O", "^flex_bg,^resize_inode"],
    &["-O", "^flex_bg,^resize_inode", "-b", "1024", "-g", "1024"],
    &["-O", "meta_bg,^resize_inode", "-b", "1024"],
    &["-O", "meta_bg,^resize_inode,^flex_bg", "-b", "1024", "-g", "512", "-N", "4096"],
    &["-O", "bigalloc", "-C", "16384"],
    &["-O", "bigalloc", "-C", "65536", "-b", "1024", "-N", "1024"],
    &["-O", "bigalloc,^flex_bg,^resize_inode", "-C", "32768", "-g", "16384"],
    &["-t", "ext2"],
    &["-t", "ext3", "-b", "1024"],
    &["-t", "ext2", "-r", "0", "-I", "128", "-O", "none"],
    &["-O", "sparse_super2,large_dir,^has_journal"],
    &["-O", "sparse_super2", "-b", "1024"],
    &["-E", "packed_meta_blocks=1", "-b", "1024"],
    &["-G", "4", "-b", "1024"],
];

/// Blocks of this size no kernel on x86 mounts.
const LARGE_BLOCKS: &[&str] = &["-b", "65536", "-N", "8192"];

/// What can be asked for: all free ranges, joined where they touch.
fn free(fs: &Ext4) -> Result<Vec<Range<u64>>, qtk_ext4::Error> {
    let mut all: Vec<Range<u64>> = Vec::new();
    fs.for_each_free(|range| match all.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        last => {
            assert!(range.start < range.end && last.is_none_or(|last| last.end < range.start), "{range:?}");
            all.push(range);
        }
    })?;
    Ok(all)
}

/// The same by dumpe2fs.
fn free_by_dumpe2fs(image: &Image) -> Vec<Range<u64>> {
    let text = tool("dumpe2fs", &[image.path().to_str().unwrap()]);
    let (block_size, blocks) = (field(&text, "Block size:").unwrap(), field(&text, "Block count:").unwrap());
    // A cluster is listed by its first block.
    let ratio = field(&text, "Cluster size:").unwrap_or(block_size) / block_size;
    let mut all: Vec<Range<u64>> = Vec::new();
    for list in text.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")) {
        for run in list.split(", ").filter(|run| !run.is_empty()) {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
            let bytes = first * block_size..blocks.min(last + ratio) * block_size;
            match all.last_mut() {
                Some(before) if before.end == bytes.start => before.end = bytes.end,
                _ => all.push(bytes),
            }
        }
    }
    all
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

/// An image of an odd size that the kernel has filled and partly emptied again.
fn used(shape: &[&str]) -> Image {
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("file"), noise(300_000, 1)).unwrap();
    let image = Image::make("77777K", shape, Some(source.path()));
    image.mounted(|root| {
        for at in 0..300 {
            std::fs::write(root.join(format!("file-{at}")), noise(at * 331 % 80_000, at as u64)).unwrap();
        }
        for at in (0..300).filter(|at| at % 3 != 1) {
            std::fs::remove_file(root.join(format!("file-{at}"))).unwrap();
        }
    });
    image
}

fn overwrite(image: &Path, ranges: &[Range<u64>]) {
    let file = File::options().write(true).open(image).unwrap();
    for range in ranges {
        file.write_all_at(&vec![0xa5; usize::try_from(range.end - range.start).unwrap()], range.start).unwrap();
    }
}

/// Every file below a folder with its content.
fn tree(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                all.push((path.strip_prefix(root).unwrap().to_owned(), std::fs::read(path).unwrap()));
            }
        }
    }
    all.sort();
    all
}

#[test]
fn dumpe2fs_says_the_same_and_nobody_misses_it() {
    for shape in SHAPES {
        for image in [Image::make("77777K", shape, None), used(shape)] {
            let found = free(&image.open()).unwrap_or_else(|error| panic!("{shape:?}: {error}"));
            assert_eq!(found, free_by_dumpe2fs(&image), "{shape:?}");
            assert!(!found.is_empty());
            let before = image.mounted(tree);
            overwrite(image.path(), &found);
            image.assert_clean();
            assert!(image.mounted(tree) == before, "{shape:?}");
        }
    }
}

#[test]
fn large_blocks_too() {
    let source = tempfile::tempdir().unwrap();
    for at in 0..20_u64 {
        std::fs::write(source.path().join(format!("file-{at}")), noise(300_000, at)).unwrap();
    }
    let image = Image::make("77M", LARGE_BLOCKS, Some(source.path()));
    image.debugfs_write("rm file-3\nrm file-8\nrm file-9\n");
    let found = free(&image.open()).unwrap();
    assert_eq!(found, free_by_dumpe2fs(&image));
    overwrite(image.path(), &found);
    image.assert_clean();
    assert!(image.content(resolve(&image.open(), "file-10")) == noise(300_000, 10));
}

#[test]
fn a_journal_to_be_replayed_counts() {
    for shape in crash::SHAPES {
        let image = crashed(shape);
        let found = free(&image.open()).unwrap_or_else(|error| panic!("{shape:?}: {error}"));
        // A replay alone does not free what files hold that lost their names while they were open.
        let judge = image.copy();
        judge.debugfs_write("journal_run\n");
        assert_eq!(found, free_by_dumpe2fs(&judge), "{shape:?}");
        // The kernel replays as if nothing had happened.
        let judge = image.copy();
        overwrite(image.path(), &found);
        let expected = judge.mounted(tree);
        assert!(expected.len() > 150);
        assert!(image.mounted(tree) == expected, "{shape:?}");
        image.assert_clean();
        assert_eq!(free(&image.open()).unwrap(), free(&judge.open()).unwrap(), "{shape:?}");
    }
}

/// The kernel punches what it discards out of the file beneath, so that it reads as zeroes.
#[test]
fn the_kernel_discards_as_much() {
    for shape in SHAPES {
        let image = used(shape);
        let found = free(&image.open()).unwrap();
        overwrite(image.path(), &found);
        image.mounted(|root| tool("fstrim", &[root.to_str().unwrap()]));
        let device = image.device();
        // A discard covers whole blocks of the file beneath, and no discard a run shorter than that.
        const GRAIN: u64 = 4096;
        for range in found {
            let whole = range.start.next_multiple_of(GRAIN)..range.end / GRAIN * GRAIN;
            let mut bytes = vec![1; usize::try_from(whole.end.saturating_sub(whole.start)).unwrap()];
            qtk_block::BlockRead::read_at(&*device, &mut bytes, whole.start.min(range.end)).unwrap();
            assert!(bytes.iter().all(|&byte| byte == 0), "{shape:?}: the kernel keeps something in {range:?}");
        }
    }
}
