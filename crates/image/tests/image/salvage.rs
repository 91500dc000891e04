//! What a damaged image still holds.

use qtk_block::{BlockRead, NoProgress};
use qtk_image::{Image, OpenOptions, Salvage, salvage};

use crate::common::{Folder, content};

const SIZE: usize = 4 << 20;
const CLUSTER: usize = 64 << 10;

/// A compressed image with a damaged overlay, and the disk as it was.
fn damaged(folder: &Folder) -> Vec<u8> {
    let mut disk = content(7, SIZE);
    std::fs::write(folder.file("disk.raw"), &disk).unwrap();
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "base.qcow2"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "image.qcow2"]);
    folder.qemu_io("image.qcow2", &["write -P 9 1M 256k"]);
    disk[1 << 20..(1 << 20) + (256 << 10)].fill(9);
    disk
}

/// Changes the L2 entry of a guest cluster.
fn poke(folder: &Folder, image: &str, cluster: usize, entry: u64) {
    let path = folder.file(image);
    let mut bytes = std::fs::read(&path).unwrap();
    let word = |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l1 = usize::try_from(word(&bytes, 40)).unwrap();
    let l2 = usize::try_from(word(&bytes, l1) & 0x00ff_ffff_ffff_fe00).unwrap();
    bytes[l2 + cluster * 8..l2 + cluster * 8 + 8].copy_from_slice(&entry.to_be_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn what_can_be_read_is_copied_and_the_rest_is_named() {
    let folder = Folder::new();
    let mut disk = damaged(&folder);
    // Two neighbours past the end, one misaligned, and one in the base that is no stream.
    poke(&folder, "image.qcow2", 16, 1 << 63 | 1 << 40);
    poke(&folder, "image.qcow2", 17, 1 << 63 | 1 << 41);
    poke(&folder, "image.qcow2", 19, 1 << 63 | 0x5_0200);
    poke(&folder, "base.qcow2", 40, 1 << 62 | 8);
    let lost_clusters = [16..18, 19..20, 40..41].map(|clusters| clusters.start * CLUSTER..clusters.end * CLUSTER);
    lost_clusters.iter().for_each(|range| disk[range.clone()].fill(0));

    let image = Image::open(folder.file("image.qcow2"), &OpenOptions::default()).unwrap();
    let mut lost = Vec::new();
    let report = salvage(&image, &folder.file("out.qcow2"), &mut |range| lost.push(range), &NoProgress).unwrap();
    assert_eq!(lost, lost_clusters.map(|range| range.start as u64..range.end as u64));
    assert_eq!(report, Salvage { disk_size: SIZE as u64, lost: 4 * CLUSTER as u64 });
    folder.check("out.qcow2");
    let copy = Image::open(folder.file("out.qcow2"), &OpenOptions::default()).unwrap();
    let mut found = vec![0; SIZE];
    copy.read_at(&mut found, 0).unwrap();
    assert!(found == disk);
    std::fs::write(folder.file("expected.raw"), &disk).unwrap();
    folder.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "expected.raw", "out.qcow2"]);
}

#[test]
fn a_lost_table_loses_what_it_maps() {
    let folder = Folder::new();
    damaged(&folder);
    let path = folder.file("base.qcow2");
    let mut bytes = std::fs::read(&path).unwrap();
    let l1 = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    bytes[l1..l1 + 8].copy_from_slice(&(1_u64 << 63 | 1 << 45).to_be_bytes());
    std::fs::write(path, bytes).unwrap();
    let image = Image::open(folder.file("image.qcow2"), &OpenOptions::default()).unwrap();
    let mut lost = Vec::new();
    salvage(&image, &folder.file("out.qcow2"), &mut |range| lost.push(range), &NoProgress).unwrap();
    assert_eq!(lost, [0..1 << 20, (1 << 20) + (256 << 10)..SIZE as u64]);
    let copy = Image::open(folder.file("out.qcow2"), &OpenOptions::default()).unwrap();
    let mut found = vec![0; 256 << 10];
    copy.read_at(&mut found, 1 << 20).unwrap();
    assert!(found.iter().all(|&byte| byte == 9));
}
