//! What of a disk nobody needs: which volumes are trusted, and which are left as they are.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use common::{Image, MIB, populate, run};
use proptest::prelude::*;
use qtk_block::{BlockRead, BlockWrite, MemoryDisk};
use qtk_disk::{Content, Needed, Place, Unused};

fn find(image: &Image) -> Unused {
    let unused = Unused::find(&image.reader());
    assert!(unused.ranges.iter().all(|range| range.start < range.end));
    assert!(unused.ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?}", unused.ranges);
    let sum: u64 = unused.ranges.iter().map(|range| range.end - range.start).sum();
    assert_eq!(sum, unused.volumes.iter().filter_map(|volume| volume.unused.as_ref().ok()).sum::<u64>());
    unused
}

/// What is said of the only volume.
fn of_whole(image: &Image) -> String {
    let unused = find(image);
    let [volume] = &unused.volumes[..] else { panic!("{:?}", unused.volumes) };
    assert_eq!(volume.place, Place::Disk);
    match &volume.unused {
        Ok(bytes) => bytes.to_string(),
        Err(needed) => needed.to_string(),
    }
}

fn ext4() -> Image {
    let folder = tempfile::tempdir().unwrap();
    populate(folder.path(), &[("etc/hostname", "guest\n"), ("var/data", &"x".repeat(3_000_000))]);
    Image::ext4(24 * MIB, "root", folder.path())
}

fn swap(arguments: &[&str]) -> Image {
    let image = Image::new(8 * MIB);
    run("mkswap", &[arguments, &["-q", image.path()]].concat());
    image
}

/// The bytes that dumpe2fs counts as free.
fn free_of(image: &Image) -> u64 {
    let text = run("dumpe2fs", &["-h", image.path()]);
    let field =
        |name: &str| -> u64 { text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().parse().unwrap() };
    field("Free blocks:") * field("Block size:")
}

/// The block that a structure of the first group begins at.
fn place_of(image: &Image, structure: &str) -> u64 {
    let text = run("debugfs", &["-R", "stats", image.path()]);
    let (_, rest) = text.split_once(&format!("{structure} at ")).unwrap();
    rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

fn shifted(ranges: &[Range<u64>], by: u64) -> Vec<Range<u64>> {
    ranges.iter().map(|range| range.start + by..range.end + by).collect()
}

#[test]
fn partitions_of_every_kind_of_table() {
    let (root, space, boot) = (ext4(), swap(&[]), Image::fat(8 * MIB, 12, "UEFI"));
    let (in_root, in_swap) = (find(&root).ranges, find(&space).ranges);
    assert_eq!(in_swap, vec![4096..8 * MIB]);
    let gpt = Image::new(64 * MIB);
    // Not in the order of their numbers.
    run("sgdisk", &["-n2:1M:+24M", "-n1:32M:+8M", "-n3:41M:+8M", "-n4:50M:+1M", gpt.path()]);
    let mbr = Image::new(64 * MIB);
    std::fs::write(mbr.path().to_owned() + ".table", "start=2048, size=49152, type=83\nstart=51200, type=5\nstart=65536, size=16384, type=82\nstart=83968, size=16384, type=c\n").unwrap();
    run("sh", &["-c", &format!("sfdisk -q {0} <{0}.table && rm {0}.table", mbr.path())]);
    for (disk, numbers) in [(&gpt, [2, 1, 3]), (&mbr, [1, 5, 6])] {
        disk.insert(&root, MIB);
        disk.insert(&space, 32 * MIB);
        disk.insert(&boot, 41 * MIB);
        let unused = find(disk);
        assert_eq!(unused.ranges, [shifted(&in_root, MIB), shifted(&in_swap, 32 * MIB)].concat());
        let of = |number| unused.volumes.iter().find(|volume| volume.place == Place::Partition(number)).unwrap();
        assert_eq!(*of(numbers[0]).unused.as_ref().unwrap(), free_of(&root));
        assert_eq!(*of(numbers[1]).unused.as_ref().unwrap(), 8 * MIB - 4096);
        assert!(matches!(of(numbers[2]).unused, Err(Needed::Foreign)));
        assert_eq!(of(numbers[2]).content, Content::Fat);
    }
}

#[test]
fn a_disk_without_partitions() {
    let root = ext4();
    assert_eq!(of_whole(&root), free_of(&root).to_string());
    assert_eq!(of_whole(&Image::new(MIB)), "what is free in it is not known");
    assert_eq!(of_whole(&Image::new(0)), "what is free in it is not known");
    for kind in ["ext2", "ext3"] {
        let image = Image::new(16 * MIB);
        run("mke2fs", &["-q", "-t", kind, image.path()]);
        assert_eq!(of_whole(&image), free_of(&image).to_string());
    }
}

#[test]
fn swap_spaces_of_all_page_sizes() {
    for page in [4096, 8192, 16_384, 65_536_u64] {
        let image = swap(&["-p", &page.to_string()]);
        assert_eq!(find(&image).ranges, vec![page..8 * MIB]);
    }
    let image = swap(&[]);
    image.write(&[2], 1024);
    assert_eq!(of_whole(&image), "the version of the swap space is not 1");
    let image = swap(&[]);
    image.write(&[0xff; 4], 1028);
    assert_eq!(of_whole(&image), "the swap space is larger than its partition");
    image.write(&[0; 4], 1028);
    assert_eq!(of_whole(&image), "the swap space has no pages");
    // Shorter than its partition.
    image.write(&9_u32.to_le_bytes(), 1028);
    assert_eq!(find(&image).ranges, vec![4096..40_960]);
}

#[test]
fn a_sleeping_machine_needs_everything() {
    const ASLEEP: &str = "the machine was put to sleep on disk and may need all of it when it wakes; shut it down";
    for mark in [&b"S1SUSPEND\0"[..], b"ULSUSPEND\0", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c"] {
        let image = swap(&[]);
        image.write(mark, 4086);
        assert_eq!(of_whole(&image), ASLEEP);
        let disk = Image::new(64 * MIB);
        run("sgdisk", &["-n1:1M:+24M", "-n2:32M:+8M", disk.path()]);
        disk.insert(&ext4(), MIB);
        disk.insert(&image, 32 * MIB);
        let unused = find(&disk);
        assert!(unused.volumes.iter().all(|volume| matches!(volume.unused, Err(Needed::Asleep))), "{unused:?}");
    }
    // In a file of a file system that was not unmounted.
    let folder = tempfile::tempdir().unwrap();
    let mut file = vec![0; 2 << 20];
    file[4086..4095].copy_from_slice(b"S1SUSPEND");
    std::fs::create_dir_all(folder.path().join("var/swap")).unwrap();
    for name in ["swap.img", "var/swapfile", "var/swap/1"] {
        std::fs::write(folder.path().join(name), &file).unwrap();
        let image = Image::ext4(24 * MIB, "root", folder.path());
        std::fs::remove_file(folder.path().join(name)).unwrap();
        assert_eq!(of_whole(&image), free_of(&image).to_string());
        run("debugfs", &["-w", "-R", "feature needs_recovery", image.path()]);
        assert_eq!(of_whole(&image), ASLEEP, "{name}");
    }
}

#[test]
fn traces_of_something_else_are_believed() {
    for (offset, bytes, name) in [
        (0, &b"bluestore block device"[..], "Ceph"),
        (512, b"!Stra0tis\x86\xff\x02^\x41rh", "Stratis"),
        (4096, b"\xfc\x4e\x2b\xa9", "a RAID"),
        (24 * MIB - 8192, b"\xfc\x4e\x2b\xa9", "a RAID"),
        (24 * MIB - 65_536, b"\xfc\x4e\x2b\xa9", "a RAID"),
        (4096 - 10, b"SWAPSPACE2", "a swap space"),
        (65_536 + 64, b"_BHRfS_M", "Btrfs"),
        (160 << 10, b"\x0c\xb1\xba\0\0\0\0\0", "ZFS"),
        (255 << 10, b"\0\0\0\0\0\xba\xb1\x0c", "ZFS"),
    ] {
        let image = ext4();
        image.write(bytes, offset);
        assert_eq!(of_whole(&image), format!("there are traces of {name} in the same place"));
    }
    // The table of a disk that became one file system.
    let image = ext4();
    std::fs::write(image.path().to_owned() + ".table", "start=2048, size=20000, type=83\n").unwrap();
    run("sh", &["-c", &format!("sfdisk -q {0} <{0}.table && rm {0}.table", image.path())]);
    assert_eq!(of_whole(&image), "there are traces of a partition table in the same place");
}

#[test]
fn what_is_damaged_stays_whole() {
    let refused = |image: &Image, words: &str| {
        let said = of_whole(image);
        assert!(said.contains(words), "{words}: {said}");
    };
    let damaged = |requests: &str| {
        let image = ext4();
        for request in requests.split(';') {
            run("debugfs", &["-w", "-R", request, image.path()]);
        }
        image
    };
    refused(&damaged("ssv state 3"), "marked as damaged");
    refused(&damaged("ssv state 0"), "was not unmounted");
    refused(&damaged("ssv feature_ro_compat 0x80000000"), "ro_compat 0x80000000 is not supported");
    refused(&damaged("clri <2>"), "inode 2");
    let miscounted = "set_bg 0 free_blocks_count 7;set_bg 0 checksum calc";
    refused(&damaged(miscounted), "its bitmap has not the free blocks that are counted");
    refused(&damaged("set_bg 0 checksum 7"), "the checksum of its descriptor is wrong");
    // Metadata that the bitmap calls free, everything else being consistent.
    let image = ext4();
    let text = run("debugfs", &["-R", "stats", image.path()]);
    let (_, count) = text.split_once("Group  0:").unwrap().1.split_once('\n').unwrap();
    let count: u32 = count.split_whitespace().next().unwrap().parse().unwrap();
    for request in [
        format!("freeb {} 1", place_of(&image, "inode table")),
        format!("set_bg 0 free_blocks_count {}", count + 1),
        "set_bg 0 checksum calc".to_owned(),
    ] {
        run("debugfs", &["-w", "-R", &request, image.path()]);
    }
    refused(&image, "its bitmap calls metadata free");
    // A bit that flipped.
    let image = ext4();
    let offset = place_of(&image, "block bitmap") * 1024 + 700;
    image.write(&[image.read(1, offset)[0] ^ 1], offset);
    refused(&image, "the checksum of a bitmap is wrong");
    // A table that leads nowhere.
    let image = Image::new(16 * MIB);
    run("sgdisk", &["-n1:1M:+8M", image.path()]);
    image.write(&[1; 512], 512);
    image.write(&[1; 512], 16 * MIB - 512);
    refused(&image, "GPT");
}

fn memory(image: &Image) -> MemoryDisk {
    let bytes = std::fs::read(Path::new(image.path())).unwrap();
    let disk = MemoryDisk::new(bytes.len() as u64);
    disk.write_at(&bytes, 0).unwrap();
    disk
}

#[test]
fn survives_any_damage() {
    let disk = Image::new(40 * MIB);
    run("sgdisk", &["-n1:1M:+24M", "-n2:30M:+8M", disk.path()]);
    disk.insert(&ext4(), MIB);
    disk.insert(&swap(&[]), 30 * MIB);
    let place = prop_oneof![0..20_000_u64, MIB..MIB + 400_000, 30 * MIB..30 * MIB + 4096, 0..40 * MIB - 8];
    let damage = proptest::collection::vec((place, any::<u8>(), 1..6_usize), 1..12);
    proptest!(ProptestConfig::with_cases(60), |(damage in damage)| {
        let device = memory(&disk);
        for (at, value, len) in damage {
            device.write_at(&vec![value; len], at).unwrap();
        }
        let size = device.size();
        let unused = Unused::find(&(Arc::new(device) as Arc<dyn BlockRead>));
        prop_assert!(unused.ranges.last().is_none_or(|last| last.end <= size));
        prop_assert!(unused.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
    });
}
