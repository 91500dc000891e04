//! Images written in one pass, judged by `qemu-img`.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use qtk_block::{BlockRead, HostStorage};
use qtk_qcow2::codec::{Compressor, decompress};
use qtk_qcow2::{
    Backing, ClusterBits, CompressionType, CreateOptions, GuestCluster, GuestOffset, ImageWriter, Layer, MappingKind,
    PackedCluster, Preallocation, Version,
};
use support::{assert_clean, noise, open, qemu_img, qemu_read, storage, tool, used_clusters};

/// Clusters by index: holes, text, noise, half and half, so that packed and plain clusters alternate.
fn cluster(index: u64, len: usize) -> Option<Vec<u8>> {
    let mut state = index.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut noise = |len: usize| -> Vec<u8> {
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[5]
            })
            .collect()
    };
    match index % 7 {
        0 => None,
        1 | 4 => Some(noise(len)),
        2 => Some([noise(len * 3 / 4), vec![7; len - len * 3 / 4]].concat()),
        _ => Some(format!("cluster {index} ").into_bytes().into_iter().cycle().take(len).collect()),
    }
}

fn write(path: &Path, expected: &Path, size: u64, bits: u32, kind: CompressionType) {
    let file = std::fs::File::create_new(path).unwrap();
    drop(file);
    let storage = storage(path);
    let bits = ClusterBits::new(bits).unwrap();
    let options = CreateOptions { size, cluster_bits: bits, compression: kind, ..CreateOptions::default() };
    let mut writer = ImageWriter::new(storage, "image", options).unwrap();
    let mut compressor = Compressor::new(kind, None).unwrap();
    let mut raw = vec![0; usize::try_from(size).unwrap()];
    let mut packed = vec![0; bits.buffer_len()];
    for (index, part) in raw.chunks_mut(bits.buffer_len()).enumerate() {
        let Some(mut content) = cluster(index as u64, bits.buffer_len()) else { continue };
        content[part.len()..].fill(0);
        part.copy_from_slice(&content[..part.len()]);
        let guest = GuestCluster(index as u64);
        match compressor.compress(&content, &mut packed).unwrap() {
            Some(len) => writer.compressed(guest, &packed[..len]).unwrap(),
            None => writer.write(bits.guest_offset(guest), part).unwrap(),
        }
    }
    assert_eq!(writer.finish().unwrap(), path.metadata().unwrap().len());
    std::fs::write(expected, &raw).unwrap();
}

#[test]
fn qemu_reads_every_cluster_size_and_codec() {
    let folder = tempfile::tempdir().unwrap();
    let name = |name: &str| folder.path().join(name);
    for kind in [CompressionType::Zlib, CompressionType::Zstd] {
        for (bits, size) in
            [(9, 300_032), (9, 0), (12, 5 << 20), (16, 70 << 20), (16, (20 << 20) + 512), (21, 90 << 20)]
        {
            let (image, raw) = (name(&format!("{bits}-{size}-{kind:?}.qcow2")), name("expected.raw"));
            write(&image, &raw, size, bits, kind);
            let image = image.to_str().unwrap();
            let check = tool("qemu-img", ["check", "--output=json", image]);
            assert!(!check.contains("leaks") && !check.contains("corruptions"), "{image}: {check}");
            tool("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), image]);
        }
    }
}

/// What QEMU writes at once.
const PIECE: u64 = 2 << 20;

fn new_storage(image: &Path) -> Arc<dyn HostStorage> {
    std::fs::write(image, "").unwrap();
    storage(image)
}

/// A sparse disk with noise in the given ranges, which must ascend and not touch.
fn sparse_disk(path: &Path, size: u64, runs: &[(u64, u64)]) {
    let disk = std::fs::File::create(path).unwrap();
    disk.set_len(size).unwrap();
    for &(start, len) in runs {
        disk.write_all_at(&noise(start + 1, usize::try_from(len).unwrap()), start).unwrap();
    }
}

/// Writes the disk by ourselves and by `qemu-img convert`, and compares the files.
fn assert_laid_out_as_by_qemu(options: CreateOptions, text: &str, runs: &[(u64, u64)]) {
    let folder = tempfile::tempdir().unwrap();
    let name = |name: &str| folder.path().join(name);
    sparse_disk(&name("disk.raw"), options.size, runs);
    qemu_img(folder.path(), &format!("convert -f raw -O qcow2 -o {text} disk.raw theirs.qcow2"));
    let mut writer = ImageWriter::new(new_storage(&name("ours.qcow2")), "image", options).unwrap();
    for &(start, len) in runs {
        for at in (start..start + len).step_by(usize::try_from(PIECE).unwrap()) {
            let mut piece = vec![0; usize::try_from(PIECE.min(start + len - at)).unwrap()];
            storage(&name("disk.raw")).read_at(&mut piece, at).unwrap();
            writer.write(GuestOffset(at), &piece).unwrap();
        }
    }
    writer.finish().unwrap();
    assert!(used_clusters(&name("ours.qcow2")) == used_clusters(&name("theirs.qcow2")), "{text}: {runs:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn the_layout_of_convert(
        bits in 9..=21_u32,
        order in 0..=6_u32,
        extended_l2 in any::<bool>(),
        preallocation in prop_oneof![3 => Just(Preallocation::Off), 1 => Just(Preallocation::Metadata)],
        runs in proptest::collection::vec((1..40_u64, 1..200_u64), 0..12),
        tail in 0..3_u64,
    ) {
        // File systems keep holes in blocks of 4 KiB.
        let mut end = 0;
        let runs: Vec<(u64, u64)> = runs.iter().map(|&(gap, len)| {
            let start = end + (gap << 12 << (bits / 4));
            end = start + (len << 12);
            (start, len << 12)
        }).collect();
        let extended_l2 = extended_l2 && bits >= 14;
        let options = CreateOptions {
            size: end + tail * 5632,
            cluster_bits: ClusterBits::new(bits).unwrap(),
            refcount_bits: 1 << order,
            extended_l2,
            preallocation,
            ..CreateOptions::default()
        };
        let (cluster, width) = (options.cluster_bits.size(), options.refcount_bits);
        let preallocated = if preallocation == Preallocation::Off { "off" } else { "metadata" };
        let extended = if extended_l2 { "on" } else { "off" };
        let text = format!("cluster_size={cluster},refcount_bits={width},extended_l2={extended},preallocation={preallocated}");
        assert_laid_out_as_by_qemu(options, &text, &runs);
    }
}

#[test]
fn refcount_tables_move_as_by_qemu() {
    // Half a cluster of refcounts counts 16 KiB, and the first table 1 MiB.
    let options = CreateOptions {
        size: 12 << 20,
        cluster_bits: ClusterBits::new(9).unwrap(),
        refcount_bits: 64,
        ..CreateOptions::default()
    };
    assert_laid_out_as_by_qemu(options, "cluster_size=512,refcount_bits=64", &[(4096, 5 << 20), (6 << 20, 6 << 20)]);
}

#[test]
fn several_refcount_blocks_in_a_sparse_image() {
    let runs: Vec<(u64, u64)> = (0..40).map(|index| ((index * 60) << 20, 4 << 20)).collect();
    let options = CreateOptions { size: 3 << 30, refcount_bits: 64, ..CreateOptions::default() };
    assert_laid_out_as_by_qemu(options, "refcount_bits=64", &runs);
}

#[test]
fn compressed_streams_are_packed_as_by_qemu() {
    // Deflate decodes a byte or so before a stream's end, so only zstd tells how long a stream is.
    let kind = CompressionType::Zstd;
    for (bits, width) in [(9, 16), (12, 1), (12, 64), (16, 2), (16, 16)] {
        let folder = tempfile::tempdir().unwrap();
        let name = |name: &str| folder.path().join(name);
        let cluster_bits = ClusterBits::new(bits).unwrap();
        let size = cluster_bits.size() * 700 + 512;
        let mut disk = vec![0; usize::try_from(size).unwrap()];
        for (index, part) in disk.chunks_mut(cluster_bits.buffer_len()).enumerate() {
            if let Some(content) = cluster(index as u64, part.len()) {
                part.copy_from_slice(&content);
            }
        }
        std::fs::write(name("disk.raw"), disk).unwrap();
        let text = format!("cluster_size={},refcount_bits={width},compression_type={kind}", cluster_bits.size());
        qemu_img(folder.path(), &format!("convert -c -f raw -O qcow2 -o {text} disk.raw theirs.qcow2"));
        let options =
            CreateOptions { size, cluster_bits, compression: kind, refcount_bits: width, ..CreateOptions::default() };
        let mut writer = ImageWriter::new(new_storage(&name("ours.qcow2")), "image", options).unwrap();
        copy_streams(&open(&name("theirs.qcow2")), &mut writer);
        writer.finish().unwrap();
        assert!(used_clusters(&name("ours.qcow2")) == used_clusters(&name("theirs.qcow2")), "{text}");
    }
}

/// Gives the writer each of the layer's clusters as it is stored.
fn copy_streams(layer: &Layer, writer: &mut ImageWriter) {
    let size = layer.cluster_size();
    for start in (0..layer.size()).step_by(usize::try_from(size).unwrap()) {
        let mapping = layer.mapping(start..layer.size().min(start + size)).unwrap();
        match mapping.kind {
            MappingKind::Compressed { host, len } => {
                let mut stream = vec![0; usize::try_from(len).unwrap()];
                layer.storage().read_at(&mut stream, host.0).unwrap();
                stream.truncate(shortest(layer.compression(), &stream, size));
                writer.compressed(GuestCluster(start / size), &stream).unwrap();
            }
            MappingKind::Data { .. } => {
                let mut content = vec![0; usize::try_from(mapping.range.end - start).unwrap()];
                layer.read_at(&mut content, start).unwrap();
                writer.write(GuestOffset(start), &content).unwrap();
            }
            MappingKind::Unallocated | MappingKind::Zero { .. } => {}
        }
    }
}

/// The fewest bytes of a stream that decode to a cluster. The length that an entry knows ends with a sector.
fn shortest(kind: CompressionType, stream: &[u8], cluster_size: u64) -> usize {
    let mut cluster = vec![0; usize::try_from(cluster_size).unwrap()];
    let lengths: Vec<usize> = (stream.len().saturating_sub(511)..=stream.len()).collect();
    lengths[lengths.partition_point(|&len| decompress(kind, &stream[..len], &mut cluster).is_err())]
}

#[test]
fn zeroes_hide_a_backing_file() {
    for (version, extended_l2) in [(Version::V2, false), (Version::V3, false), (Version::V3, true)] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("base.raw"), vec![9; 1 << 20]).unwrap();
        let options = CreateOptions {
            size: 1 << 20,
            version,
            extended_l2,
            backing: Some(Backing { name: "base.raw".into(), format: Some("raw".into()) }),
            ..CreateOptions::default()
        };
        let image = folder.path().join("image.qcow2");
        let mut writer = ImageWriter::new(new_storage(&image), "image", options).unwrap();
        writer.write(GuestOffset(64 << 10), &[1; 64 << 10]).unwrap();
        writer.zero(192 << 10..320 << 10).unwrap();
        writer.write(GuestOffset(320 << 10), &[2; 6 << 10]).unwrap();
        writer.zero(326 << 10..400 << 10).unwrap();
        writer.zero(960 << 10..1 << 20).unwrap();
        writer.finish().unwrap();
        assert_clean(&image);
        let disk = qemu_read(&image);
        // A cluster that is written in part reads as zeroes elsewhere; a subcluster has a life of its own.
        let rest = if extended_l2 { 9 } else { 0 };
        let expected = [(64, 9), (128, 1), (192, 9), (320, 0), (326, 2), (400, 0), (448, rest), (960, 9), (1024, 0)];
        let mut at = 0;
        for (end, byte) in expected {
            assert!(
                disk[at << 10..end << 10].iter().all(|&b| b == byte),
                "{version:?}, {extended_l2}: {at}..{end} KiB"
            );
            at = end;
        }
    }
}

#[test]
fn runs_of_streams_are_stored_as_single_streams_are() {
    let folder = tempfile::tempdir().unwrap();
    let bits = ClusterBits::new(12).unwrap();
    let options = CreateOptions { size: 8 << 20, cluster_bits: bits, ..CreateOptions::default() };
    let bytes: Vec<u8> = (0..600_000_u32).map(|at| (at >> 3).to_le_bytes()[0] ^ at.to_le_bytes()[0]).collect();
    // Streams of all lengths, with gaps between some; a plain cluster ends each run of 100.
    let streams: Vec<_> = (0..1500_usize)
        .map(|index| {
            let start = index * 390 + index % 5 / 4 * 7;
            PackedCluster {
                guest: GuestCluster(index as u64 + index as u64 / 100),
                bytes: start..start + 390,
                shared: 0,
            }
        })
        .collect();
    let write = |name: &str, in_runs: bool| {
        let path = folder.path().join(name);
        std::fs::File::create_new(&path).unwrap();
        let mut writer = ImageWriter::new(storage(&path), "image", options.clone()).unwrap();
        for run in streams.chunks(100) {
            match in_runs {
                true => writer.compressed_run(&bytes, run.iter().cloned()).unwrap(),
                false => {
                    run.iter().for_each(|stream| writer.compressed(stream.guest, &bytes[stream.bytes.clone()]).unwrap())
                }
            }
            let next = run.last().unwrap().guest.0 + 1;
            writer.write(GuestOffset(next << 12), &[7; 4096]).unwrap();
        }
        writer.finish().unwrap();
        std::fs::read(path).unwrap()
    };
    assert!(write("runs", true) == write("singles", false));
}

#[test]
fn clusters_must_ascend_and_lie_on_the_disk() {
    let storage = Arc::new(qtk_block::MemoryDisk::new(0));
    let options = CreateOptions { size: 10 << 16, ..CreateOptions::default() };
    let mut writer = ImageWriter::new(storage, "image", options).unwrap();
    writer.write(GuestOffset(3 << 16), &[1; 1 << 16]).unwrap();
    assert!(writer.compressed(GuestCluster(3), &[1; 100]).is_err());
    let too_long = PackedCluster { guest: GuestCluster(5), bytes: 90..110, shared: 0 };
    assert!(writer.compressed_run(&[1; 100], [too_long]).is_err());
    assert!(writer.write(GuestOffset(10 << 16), &[1; 1 << 16]).is_err());
}

#[test]
fn a_disk_larger_than_the_l1_table_allows_is_refused() {
    let storage = Arc::new(qtk_block::MemoryDisk::new(0));
    let options =
        CreateOptions { size: u64::MAX, cluster_bits: ClusterBits::new(9).unwrap(), ..CreateOptions::default() };
    assert!(ImageWriter::new(storage, "image", options).is_err());
}
