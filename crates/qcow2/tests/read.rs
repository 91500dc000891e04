//! Images made by QEMU, read as QEMU reads them.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::path::Path;
use std::sync::Arc;

use qtk_block::{BlockRead, ExtentKind};
use qtk_qcow2::{Corruption, Encryption, Error, Layer, MappingKind, Version};
use support::{check_as_qemu, memory, mixed_disk, noise, open, qemu_img, qemu_io, qemu_read, read_all, storage};

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
    let data = layer.data_storage().unwrap();
    let mut at = 0;
    while at < layer.size() {
        let mapping = layer.mapping(at..layer.size()).unwrap();
        assert_eq!(mapping.range.start, at);
        let range = usize::try_from(at).unwrap()..usize::try_from(mapping.range.end).unwrap();
        let content = &expected[range.clone()];
        match mapping.kind {
            MappingKind::Unallocated | MappingKind::Zero { .. } => assert!(content.iter().all(|&byte| byte == 0)),
            MappingKind::Data { host } => {
                let stored = usize::try_from(data.size().saturating_sub(host.0)).unwrap().min(range.len());
                let mut bytes = vec![0; range.len()];
                data.read_at(&mut bytes[..stored], host.0).unwrap();
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

/// Writes, zeroes and discards at every size, so that subclusters get every state beside every other.
fn scribble(folder: &Path, grain: usize, size: usize) {
    let mut commands = Vec::new();
    for (index, bytes) in noise(grain as u64, 300).chunks_exact(5).enumerate() {
        let place = usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
        let (offset, len) = ((place * grain / 3 % size) & !511, (usize::from(bytes[2]) * grain / 40 + 512) & !511);
        let len = len.min(size - offset);
        commands.push(match bytes[3] % 5 {
            0 | 1 => format!("write -P {} {offset} {len}", index + 1),
            2 => format!("write -z {offset} {len}"),
            3 => format!("write -zu {offset} {len}"),
            _ => format!("discard {offset} {len}"),
        });
    }
    qemu_io(folder, "image.qcow2", &commands.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn subclusters_in_every_state() {
    for (cluster, preallocation) in [(16 << 10, "off"), (64 << 10, "metadata"), (64 << 10, "off"), (2 << 20, "off")] {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("extended_l2=on,cluster_size={cluster},preallocation={preallocation}");
        let size = cluster * 5 + 1536;
        qemu_img(folder.path(), &format!("create -f qcow2 -o {options} image.qcow2 {size}"));
        scribble(folder.path(), cluster / 32, size);
        let layer = assert_reads_as_qemu(&folder.path().join("image.qcow2"));
        assert!(layer.header().extended_l2());
        assert_eq!(layer.header().subcluster_size(), cluster as u64 / 32);
    }
}

#[test]
fn compressed_clusters_beside_subclusters() {
    let folder = converted(900 << 10, 70_000, "-c -o extended_l2=on,cluster_size=32k,compression_type=zstd");
    scribble(folder.path(), 1024, 900 << 10);
    assert_reads_as_qemu(&folder.path().join("image.qcow2"));
}

#[test]
fn subclusters_that_contradict_themselves_are_corrupt() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -o extended_l2=on image.qcow2 1M");
    qemu_io(folder.path(), "image.qcow2", &["write 64k 64k"]);
    let image = folder.path().join("image.qcow2");
    let sound = std::fs::read(&image).unwrap();
    // The bitmaps of an unallocated cluster and of an allocated one.
    for (at, bitmap) in [(0x40008, 1_u64 << 5), (0x40018, 1 << 5 | 1 << 37)] {
        let mut bytes = sound.clone();
        bytes[at..at + 8].copy_from_slice(&bitmap.to_be_bytes());
        let layer = Layer::open(Arc::new(memory(&bytes)), "image").unwrap();
        let error = read_error(&layer);
        assert!(matches!(error, Error::Corrupt { what: Corruption::Malformed { .. }, .. }), "{error}");
    }
}

fn read_error(layer: &Layer) -> Error {
    let mut at = 0;
    loop {
        match layer.mapping(at..layer.size()) {
            Ok(mapping) => at = mapping.range.end,
            Err(error) => return error,
        }
    }
}

#[test]
fn external_data_files() {
    for options in ["", ",data_file_raw=on", ",extended_l2=on", ",cluster_size=512"] {
        let folder = tempfile::tempdir().unwrap();
        // QEMU looks for a relative name in its working directory.
        let data = folder.path().join("data.raw").to_str().unwrap().to_owned();
        qemu_img(folder.path(), &format!("create -f qcow2 -o data_file={data}{options} image.qcow2 700k"));
        scribble(folder.path(), 4096, 700 << 10);
        let image = folder.path().join("image.qcow2");
        let metadata = Layer::open(storage(&image), "image").unwrap();
        assert_eq!(metadata.header().data_file_name().as_deref(), Some(data.as_str()));
        assert_eq!(metadata.header().data_file_raw(), options.contains("raw"));
        assert!(matches!(metadata.data_storage(), Err(Error::DataFileMissing { .. })));
        assert!(metadata.read_at(&mut [0; 512], 0).is_err());
        assert!(metadata.mapping(0..700 << 10).is_ok());
        let layer = assert_reads_as_qemu(&image);
        if layer.header().data_file_raw() {
            assert!(read_all(&layer) == std::fs::read(data).unwrap()[..700 << 10]);
        }
    }
}

#[test]
fn a_data_file_holds_each_cluster_in_its_place() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -o data_file=data.raw image.qcow2 1M");
    qemu_io(folder.path(), "image.qcow2", &["write 0 128k"]);
    let mut bytes = std::fs::read(folder.path().join("image.qcow2")).unwrap();
    for entry in [0x8000_0000_0003_0000_u64, 0x4000_0000_0001_0000] {
        bytes[0x40008..0x40010].copy_from_slice(&entry.to_be_bytes());
        let layer = Layer::open(Arc::new(memory(&bytes)), "image").unwrap();
        assert!(layer.mapping(0..1 << 16).is_ok());
        assert!(matches!(read_error(&layer), Error::Corrupt { what: Corruption::Malformed { .. }, .. }));
    }
}

#[test]
fn a_snapshot_shows_its_own_disk() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    qemu_img(path, "create -f qcow2 -o cluster_size=512 image.qcow2 100k");
    qemu_io(path, "image.qcow2", &["write -P 1 0 100k"]);
    qemu_img(path, "snapshot -c small image.qcow2");
    qemu_img(path, "resize image.qcow2 2M");
    qemu_io(path, "image.qcow2", &["write -P 2 50k 1M"]);
    qemu_img(path, "snapshot -c large image.qcow2");
    qemu_io(path, "image.qcow2", &["write -P 3 0 2M"]);
    let layer = open(&path.join("image.qcow2"));
    let (small, large) = (layer.at_snapshot(0).unwrap(), layer.at_snapshot(1).unwrap());
    assert_eq!((small.size(), large.size()), (100 << 10, 2 << 20));
    assert!(read_all(&small).iter().all(|&byte| byte == 1));
    // QEMU shows every snapshot on a disk of the image's present size.
    qemu_img(path, "convert -l large -O raw image.qcow2 large.raw");
    assert!(read_all(&large) == std::fs::read(path.join("large.raw")).unwrap());
    qemu_img(path, "convert -l small -O raw image.qcow2 small.raw");
    assert!(read_all(&small.with_size(2 << 20)) == std::fs::read(path.join("small.raw")).unwrap());
    assert!(layer.at_snapshot(2).is_err());
}

#[test]
fn zero_clusters_in_version_2_are_corrupt() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -o compat=0.10 image.qcow2 1M");
    qemu_io(folder.path(), "image.qcow2", &["write 0 128k"]);
    let mut bytes = std::fs::read(folder.path().join("image.qcow2")).unwrap();
    bytes[0x4000f] |= 1;
    let layer = Layer::open(Arc::new(memory(&bytes)), "image").unwrap();
    assert!(matches!(read_error(&layer), Error::Corrupt { what: Corruption::Malformed { .. }, .. }));
}

#[test]
fn headers_of_any_length() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 -b base -F raw -u image.qcow2 1M");
    let image = folder.path().join("image.qcow2");
    let sound = std::fs::read(&image).unwrap();
    for length in [104_usize, 112, 120, 512, 4096] {
        let mut bytes = sound.clone();
        let rest = bytes[112..0x400].to_vec();
        bytes[112..length.max(112)].fill(0xab);
        bytes[length..length + rest.len()].copy_from_slice(&rest);
        bytes[100..104].copy_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
        let name_at = u64::from_be_bytes(sound[8..16].try_into().unwrap()) + length as u64 - 112;
        bytes[8..16].copy_from_slice(&name_at.to_be_bytes());
        std::fs::write(&image, &bytes).unwrap();
        let layer = open(&image);
        let header = layer.header();
        assert_eq!(header.unknown_fields, vec![0xab; length.saturating_sub(112)]);
        assert_eq!(header.backing_format().as_deref(), Some("raw"));
        assert_eq!(header.backing_name.as_deref(), Some("base"));
        let info = qemu_img(folder.path(), "info image.qcow2");
        assert!(info.contains("backing file: base") && info.contains("backing file format: raw"), "{length}: {info}");
    }
}

#[test]
fn encrypted_images_show_their_metadata_only() {
    let folder = tempfile::tempdir().unwrap();
    let secret = "--object secret,id=s,data=abc";
    for (format, expected) in [("aes", Encryption::Aes), ("luks", Encryption::Luks)] {
        let options = format!("-o encrypt.format={format},encrypt.key-secret=s");
        qemu_img(folder.path(), &format!("create -f qcow2 {secret} {options} {format}.qcow2 1M"));
        let layer = open(&folder.path().join(format!("{format}.qcow2")));
        assert_eq!(layer.header().encryption, Some(expected));
        assert!(layer.snapshots().unwrap().is_empty());
        assert!(matches!(layer.mapping(0..1 << 20), Err(Error::Unsupported { .. })));
        assert!(matches!(layer.data_storage(), Err(Error::Unsupported { .. })));
        assert_eq!(layer.read_at(&mut [0; 512], 0).unwrap_err().kind(), std::io::ErrorKind::Unsupported);
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
