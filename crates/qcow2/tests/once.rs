//! Images that store equal clusters once, judged by `qemu-img` and `qemu-io`.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use qtk_block::{MemoryDisk, Preallocation};
use qtk_qcow2::{CompressionType, CreateOptions, GuestCluster, GuestOffset, ImageWriter, Tally};
use support::repetitive::Repetitive;
use support::{assert_clean, qemu_img, qemu_io, qemu_read};

const CODECS: [Option<CompressionType>; 3] = [None, Some(CompressionType::Zlib), Some(CompressionType::Zstd)];

/// Writes the disk and lets QEMU check and read it.
fn written(disk: &Repetitive, image: &Path) -> Tally {
    let tally = disk.write(image, false);
    assert_clean(image);
    assert!(qemu_read(image) == disk.disk(), "{disk:?} reads otherwise");
    tally
}

fn repetitive() -> impl Strategy<Value = Repetitive> {
    let shape = (9_u32..=16, 0_u32..=6, prop::sample::select(CODECS.to_vec()), 0..2_usize);
    (shape, prop::collection::vec(prop_oneof![3 => 0..6_u8, 1 => any::<u8>()], 1..300)).prop_map(
        |((bits, order, codec, short), clusters)| Repetitive {
            bits,
            refcount_bits: 1 << order,
            codec,
            clusters,
            short: if bits > 9 { short } else { 0 },
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equal_clusters_are_stored_once(disk in repetitive()) {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image.qcow2");
        let tally = written(&disk, &image);
        let filled: Vec<_> = disk.clusters.iter().filter(|&&number| number != 0).collect();
        let distinct = filled.iter().collect::<HashSet<_>>().len() as u64;
        prop_assert!(tally.shared <= filled.len() as u64 - distinct);
        if disk.refcount_bits >= 16 && disk.short == 0 {
            prop_assert_eq!(tally.shared, filled.len() as u64 - distinct);
        }
        if disk.refcount_bits == 1 {
            prop_assert_eq!(tally.shared, 0);
        }
        let asked = folder.path().join("asked.qcow2");
        prop_assert_eq!(disk.write(&asked, true), tally);
        prop_assert!(std::fs::read(&asked).unwrap() == std::fs::read(&image).unwrap(), "asking changes the image");
    }
}

#[test]
fn every_cluster_size_and_refcount_width() {
    let folder = tempfile::tempdir().unwrap();
    for codec in CODECS {
        for (bits, refcount_bits) in [(9, 1), (9, 64), (12, 2), (16, 4), (16, 16), (18, 8), (21, 16), (21, 2)] {
            let clusters = (0..40).map(|index| index * 3 % 5).chain([9, 9, 9, 9, 9, 0, 9, 3, 4]).collect();
            let disk = Repetitive { bits, refcount_bits, codec, clusters, short: 0 };
            written(&disk, &folder.path().join("image.qcow2"));
        }
    }
}

#[test]
fn a_content_with_too_many_users_is_stored_again() {
    let folder = tempfile::tempdir().unwrap();
    for codec in CODECS {
        // One user more than two refcounts of 16 bits can count, behind more than a table of other clusters.
        let clusters = (1..=70).chain(std::iter::repeat_n(72, 2 * 65_535 + 1)).collect();
        let disk = Repetitive { bits: 9, refcount_bits: 16, codec, clusters, short: 0 };
        let tally = written(&disk, &folder.path().join("image.qcow2"));
        assert_eq!(tally.shared, 2 * 65_534, "{codec:?}");
        assert_eq!(tally.repeated, if codec.is_some() { 2 } else { 0 });
    }
}

#[test]
fn the_clusters_of_a_disk_end_may_be_cut() {
    let folder = tempfile::tempdir().unwrap();
    for codec in CODECS {
        let disk = Repetitive { bits: 12, refcount_bits: 16, codec, clusters: vec![4, 3, 1, 3, 4], short: 1 };
        let tally = written(&disk, &folder.path().join("image.qcow2"));
        assert_eq!(tally.shared, 2);
    }
}

#[test]
fn qemu_writes_to_one_of_those_that_share() {
    let folder = tempfile::tempdir().unwrap();
    for codec in CODECS {
        let image = folder.path().join("image.qcow2");
        let clusters = (0..600).map(|index| u8::try_from(index % 3 + 1).unwrap()).collect();
        let disk = Repetitive { bits: 12, refcount_bits: 16, codec, clusters, short: 0 };
        disk.write(&image, false);
        let mut expected = disk.disk();
        qemu_io(folder.path(), "image.qcow2", &["write -P 7 0 512", "write -z 8k 4k", "discard 1M 64k"]);
        expected[..512].fill(7);
        expected[8 << 10..12 << 10].fill(0);
        expected[1 << 20..(1 << 20) + (64 << 10)].fill(0);
        assert_clean(&image);
        assert!(qemu_read(&image) == expected);
        qemu_img(folder.path(), "snapshot -c before image.qcow2");
        qemu_io(folder.path(), "image.qcow2", &["write -P 8 0 1200k"]);
        assert_clean(&image);
        qemu_img(folder.path(), "snapshot -a before image.qcow2");
        qemu_img(folder.path(), "snapshot -d before image.qcow2");
        assert_clean(&image);
        assert!(qemu_read(&image) == expected);
    }
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let options = CreateOptions { size: 1 << 20, ..CreateOptions::default() };
    let write_once = |options: CreateOptions, offset, bytes: &[u8], digests| {
        let data = options.data_file.is_some().then(|| Arc::new(MemoryDisk::new(0)) as _);
        let mut writer = ImageWriter::new_with(Arc::new(MemoryDisk::new(0)), data, "image", options).unwrap();
        writer.write_once(GuestOffset(offset), bytes, &vec![[1; 32]; digests]).map_err(|error| error.to_string())
    };
    let cluster = &[1; 64 << 10][..];
    assert_eq!(write_once(options.clone(), 1 << 16, cluster, 1), Ok(()));
    for (options, word) in [
        (CreateOptions { extended_l2: true, ..options.clone() }, "subclusters"),
        (CreateOptions { data_file: Some("data".into()), ..options.clone() }, "external data file"),
        (CreateOptions { preallocation: Preallocation::Metadata, ..options.clone() }, "preallocation"),
    ] {
        let refusal = write_once(options, 0, cluster, 1).unwrap_err();
        assert!(refusal.contains(word), "{refusal}");
    }
    for (offset, bytes, digests) in [(0, cluster, 0), (512, cluster, 1), (0, &cluster[..512], 1), (1 << 20, cluster, 1)]
    {
        assert!(write_once(options.clone(), offset, bytes, digests).is_err());
    }
    let mut writer = ImageWriter::new(Arc::new(MemoryDisk::new(0)), "image", options).unwrap();
    assert!(writer.repeat(GuestCluster(0), &[1; 32]).is_err());
}
