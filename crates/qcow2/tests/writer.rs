//! Images written in one pass, judged by `qemu-img`.
#![cfg(test)]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qtk_block::{Access, HostStorage, RawFile};
use qtk_qcow2::codec::Compressor;
use qtk_qcow2::{ClusterBits, CompressionType, CreateOptions, GuestCluster, GuestOffset, ImageWriter};

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img must be installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

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
    let storage: Arc<dyn HostStorage> = Arc::new(RawFile::open(path, Access::ReadWrite).unwrap());
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
            let check = qemu_img(&["check", "--output=json", image]);
            assert!(!check.contains("leaks") && !check.contains("corruptions"), "{image}: {check}");
            qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), image]);
        }
    }
}

#[test]
fn clusters_must_ascend_and_lie_on_the_disk() {
    let storage = Arc::new(qtk_block::MemoryDisk::new(0));
    let options = CreateOptions { size: 10 << 16, ..CreateOptions::default() };
    let mut writer = ImageWriter::new(storage, "image", options).unwrap();
    writer.write(GuestOffset(3 << 16), &[1; 1 << 16]).unwrap();
    assert!(writer.compressed(GuestCluster(3), &[1; 100]).is_err());
    assert!(writer.write(GuestOffset(10 << 16), &[1; 1 << 16]).is_err());
}

#[test]
fn a_disk_larger_than_the_l1_table_allows_is_refused() {
    let storage = Arc::new(qtk_block::MemoryDisk::new(0));
    let options =
        CreateOptions { size: u64::MAX, cluster_bits: ClusterBits::new(9).unwrap(), ..CreateOptions::default() };
    assert!(ImageWriter::new(storage, "image", options).is_err());
}
