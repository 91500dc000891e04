//! Our check against `qemu-img check` on images that are sound, leak, or are damaged at random.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::path::Path;

use proptest::prelude::*;
use qtk_qcow2::{Finding, check};
use support::{assert_clean, check_as_qemu, mixed_disk, qemu_check, qemu_img, qemu_io, run};

/// An image with compressed, plain and zero clusters, two snapshots and a bitmap; `bits` is the cluster size's logarithm.
fn rich_image(folder: &Path, bits: u32, refcount_bits: u32) {
    let cluster = 1_usize << bits;
    mixed_disk(&folder.join("source.raw"), cluster * 60, cluster * 2 / 3);
    let options = format!("cluster_size={cluster},refcount_bits={refcount_bits}");
    qemu_img(folder, &format!("convert -c -f raw -O qcow2 -o {options} source.raw image.qcow2"));
    qemu_io(
        folder,
        "image.qcow2",
        &[&format!("write -P 1 0 {}", cluster * 5), &format!("write -z {} {cluster}", cluster * 7)],
    );
    qemu_img(folder, "snapshot -c one image.qcow2");
    qemu_io(folder, "image.qcow2", &[&format!("write -P 2 {} {}", cluster * 2, cluster * 20)]);
    qemu_img(folder, "snapshot -c two image.qcow2");
    qemu_io(folder, "image.qcow2", &[&format!("write -zu {} {}", cluster * 3, cluster * 3)]);
    qemu_img(folder, "bitmap --add image.qcow2 changes");
    qemu_io(folder, "image.qcow2", &[&format!("write -P 3 {} {}", cluster * 30, cluster * 2)]);
}

#[test]
fn sound_images_count_alike() {
    for (bits, refcount_bits) in [(12, 8), (16, 16), (16, 64), (21, 32)] {
        let folder = tempfile::tempdir().unwrap();
        rich_image(folder.path(), bits, refcount_bits);
        assert_clean(&folder.path().join("image.qcow2"));
    }
}

#[test]
fn names_leaks() {
    let folder = tempfile::tempdir().unwrap();
    qemu_img(folder.path(), "create -f qcow2 image.qcow2 1M");
    let image = folder.path().join("image.qcow2");
    let mut bytes = std::fs::read(&image).unwrap();
    // The refcount block is the third cluster; count one cluster after the L1 table.
    bytes[0x2_0000 + 2 * 4 + 1] = 1;
    bytes.resize(0x5_0000, 0);
    std::fs::write(&image, bytes).unwrap();
    let report = check_as_qemu(&image);
    assert_eq!(report.leaks, 1);
    assert_eq!(report.findings[0].to_string(), "Leaked cluster 4 refcount=1 reference=0");
    assert!(matches!(report.findings[..], [Finding::Refcount { refcount: 1, references: 0, repaired: false, .. }]));
}

/// Whether QEMU can check the image at all.
fn qemu_opens(image: &Path) -> bool {
    let output = run("qemu-img", ["check".as_ref(), "--output=json".as_ref(), image.as_os_str()]);
    !output.stdout.is_empty() && qemu_check(image).get("image-end-offset").is_some()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_images_count_alike(changes in proptest::collection::vec((any::<prop::sample::Index>(), 0..64_u32), 1..4)) {
        thread_local!(static SOUND: Vec<u8> = {
            let folder = tempfile::tempdir().unwrap();
            rich_image(folder.path(), 12, 16);
            std::fs::read(folder.path().join("image.qcow2")).unwrap()
        });
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image.qcow2");
        let mut bytes = SOUND.with(Clone::clone);
        let words = metadata_words(&bytes);
        for (word, bit) in changes {
            let at = words[word.index(words.len())];
            bytes[at + 7 - (bit / 8) as usize] ^= 1 << (bit % 8);
        }
        std::fs::write(&image, bytes).unwrap();
        if qemu_opens(&image) {
            check_as_qemu(&image);
        } else {
            let _ = qtk_qcow2::Layer::open(support::storage(&image), "image").map(|layer| check(&layer));
        }
    }
}

/// Where L1, L2 and refcount entries of the active state lie in the file.
fn metadata_words(bytes: &[u8]) -> Vec<usize> {
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let offset = |entry: u64| usize::try_from(entry & 0x00ff_ffff_ffff_fe00).unwrap();
    let l1 = offset(word(40));
    let refcount_table = offset(word(48));
    let table = offset(word(l1));
    let block = offset(word(refcount_table));
    let entries = |start: usize, count: usize| (0..count).map(move |index| start + index * 8);
    entries(l1, 1).chain(entries(table, 60)).chain(entries(refcount_table, 2)).chain(entries(block, 20)).collect()
}
