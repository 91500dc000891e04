//! Images made by QEMU, read as QEMU reads them.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::path::Path;

use qtk_block::{BlockRead, ExtentKind};
use qtk_qcow2::{Layer, MappingKind, Version};
use support::{check_as_qemu, mixed_disk, open, qemu_img, qemu_io, qemu_read, read_all};

/// Converts a disk of noise, text and holes with the given options, and returns the folder that holds `image.qcow2`.
fn converted(size: usize, piece: usize, options: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    mixed_disk(&folder.path().join("source.raw"), size, piece);
    qemu_img(folder.path(), &format!("convert -f raw -O qcow2 {options} source.raw image.qcow2"));
    folder
}

/// Reads the image whole, in odd pieces and by its mappings, and compares with QEMU.
fn assert_reads_as_qemu(image: &Path) -> Layer {
    check_as_qemu(image);
    let layer = open(image);
    let expected = qemu_read(image);
    assert!(read_all(&layer) == expected, "{} reads differently", image.display());
    for start in (0..expected.len()).step_by(expected.len() / 50 + 1) {
        let len = (expected.len() - start).min(start % 7001 + 1);
        let mut piece = vec![0; len];
        layer.read_at(&mut piece, start as u64).unwrap();
        assert!(piece == expected[start..start + len], "{len} bytes at {start}");
    }
    assert_mappings_are_right(&layer, &expected);
    layer
}

fn assert_mappings_are_right(layer: &Layer, expected: &[u8]) {
    let mut at = 0;
    while at < layer.size() {
        let mapping = layer.mapping(at..layer.size()).unwrap();
        assert_eq!(mapping.range.start, at);
        let range = usize::try_from(at).unwrap()..usize::try_from(mapping.range.end).unwrap();
        let content = &expected[range.clone()];
        match mapping.kind {
            MappingKind::Unallocated | MappingKind::Zero { .. } => assert!(content.iter().all(|&byte| byte == 0)),
            MappingKind::Data { host } => {
                let stored = usize::try_from(layer.storage().size() - host.0).unwrap().min(range.len());
                let mut bytes = vec![0; range.len()];
                layer.storage().read_at(&mut bytes[..stored], host.0).unwrap();
                assert!(bytes == content, "data at {at}");
            }
            MappingKind::Compressed { host, len } => {
                assert_eq!(at % layer.cluster_size(), 0);
                assert!(host.0 + len <= layer.storage().size());
                let mut bytes = vec![0; usize::try_from(layer.cluster_size()).unwrap()];
                let mut input = vec![0; usize::try_from(len).unwrap()];
                layer.storage().read_at(&mut input, host.0).unwrap();
                qtk_qcow2::codec::decompress(layer.compression(), &input, &mut bytes).unwrap();
                assert!(bytes[..range.len()] == *content, "compressed data at {at}");
            }
        }
        at = mapping.range.end;
    }
    let mut extents = Vec::new();
    let mut at = 0;
    while at < layer.size() {
        let extent = layer.extent(at..layer.size()).unwrap();
        at = extent.range.end;
        extents.push(extent.kind);
    }
    assert!(extents.windows(2).all(|pair| pair[0] != pair[1]), "extents of one kind touch");
}

#[test]
fn every_cluster_size() {
    for bits in 9..=21 {
        let cluster = 1_usize << bits;
        for codec in ["", "-c -o compression_type=zlib,", "-c -o compression_type=zstd,"] {
            let options = if codec.is_empty() { "-o " } else { codec };
            let options = format!("{options}cluster_size={cluster}");
            let folder = converted(cluster * 9 + 512, cluster * 2 / 3, &options);
            assert_reads_as_qemu(&folder.path().join("image.qcow2"));
        }
    }
}

#[test]
fn every_refcount_width() {
    for order in 0..=6 {
        let width = 1 << order;
        let folder = converted(300_000 & !511, 7000, &format!("-o cluster_size=1k,refcount_bits={width}"));
        let layer = assert_reads_as_qemu(&folder.path().join("image.qcow2"));
        assert_eq!(layer.header().refcount_bits(), width);
    }
}

#[test]
fn version_2() {
    for options in ["-o compat=0.10,cluster_size=4k", "-c -o compat=0.10"] {
        let folder = converted(300 << 10, 7000, options);
        let layer = assert_reads_as_qemu(&folder.path().join("image.qcow2"));
        assert_eq!(layer.header().version, Version::V2);
    }
}

#[test]
fn zero_clusters_snapshots_and_preallocation() {
    let folder = converted(40 << 16, 30_000, "-o preallocation=metadata");
    let path = folder.path();
    qemu_io(path, "image.qcow2", &["write -z 64k 128k", "write -zu 512k 64k", "write -z 300k 10k"]);
    qemu_img(path, "snapshot -c first image.qcow2");
    qemu_io(path, "image.qcow2", &["write -P 7 1M 200k", "discard 64k 64k"]);
    let layer = assert_reads_as_qemu(&path.join("image.qcow2"));
    assert!(layer.mapping(64 << 10..128 << 10).is_ok_and(|run| matches!(run.kind, MappingKind::Zero { .. })));
    let snapshots = layer.snapshots().unwrap();
    assert_eq!((snapshots.len(), snapshots[0].id.as_str(), snapshots[0].name.as_str()), (1, "1", "first"));
    assert_eq!(snapshots[0].disk_size, Some(40 << 16));
}

#[test]
fn long_runs_are_one_mapping() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -o preallocation=falloc image.qcow2 2G");
    let layer = open(&folder.path().join("image.qcow2"));
    // An L2 table lies between every 512 MiB of data.
    let run = layer.mapping(0..2 << 30).unwrap();
    assert!(matches!(run.kind, MappingKind::Data { .. }));
    assert!(run.range.end >= 512 << 20, "{run:?}");
    qemu_img(folder.path(), "create -f qcow2 empty.qcow2 1T");
    let empty = open(&folder.path().join("empty.qcow2"));
    let run = empty.mapping(4096..1 << 40).unwrap();
    assert_eq!((run.range, run.kind), (4096..1 << 40, MappingKind::Unallocated));
    assert_eq!(empty.extent(0..1 << 40).unwrap().kind, ExtentKind::Unallocated);
}

#[test]
fn backing_name_and_format_are_named_only() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -u -b ../base/image.img -F raw image.qcow2 1M");
    let layer = open(&folder.path().join("image.qcow2"));
    assert_eq!(layer.header().backing_name.as_deref(), Some("../base/image.img"));
    assert_eq!(layer.header().backing_format().as_deref(), Some("raw"));
    assert!(read_all(&layer).iter().all(|&byte| byte == 0));
}

#[test]
fn bitmaps_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 image.qcow2 1M");
    qemu_img(folder.path(), "bitmap --add -g 4k image.qcow2 changes");
    let bitmaps = open(&folder.path().join("image.qcow2")).bitmaps().unwrap();
    assert_eq!((bitmaps[0].name.as_str(), bitmaps[0].granularity, bitmaps[0].in_use), ("changes", 4096, false));
}
