//! Comparisons, with the answers of `qemu-img compare`.

use qtk_block::NoProgress;
use qtk_image::{Comparison, Image, OpenOptions, compare};

use crate::common::{Folder, content};

/// What `qemu-img compare` would say, without the warning about sizes.
fn words(comparison: Comparison) -> String {
    match comparison {
        Comparison::Identical => "Images are identical.".to_owned(),
        // It tells the sector, not the byte.
        Comparison::Different { offset } => format!("Content mismatch at offset {}!", offset / 512 * 512),
        Comparison::SizesDiffer => "Strict mode: Image size mismatch!".to_owned(),
        Comparison::AllocationDiffers { offset } => format!("Strict mode: Offset {offset} block status mismatch!"),
    }
}

#[test]
fn all_pairs_compare_as_in_qemu() {
    let folder = Folder::new();
    std::fs::write(folder.file("solid.raw"), content(1, 3 << 20)).unwrap();
    folder.qemu_img(&["convert", "-f", "raw", "-O", "raw", "solid.raw", "holes.raw"]);
    let mut changed = content(1, 3 << 20);
    changed[2_000_001] ^= 1;
    std::fs::write(folder.file("changed.raw"), &changed).unwrap();
    std::fs::write(folder.file("longer.raw"), [content(1, 3 << 20), vec![0; 70_000], vec![1; 1000]].concat()).unwrap();
    let file = std::fs::File::create(folder.file("empty.raw")).unwrap();
    file.set_len(3 << 20).unwrap();
    for (name, options) in [
        ("plain.qcow2", "cluster_size=64k"),
        ("small.qcow2", "cluster_size=512"),
        ("sub.qcow2", "extended_l2=on"),
        ("reserved.qcow2", "preallocation=metadata"),
        ("taken.qcow2", "preallocation=falloc"),
    ] {
        folder.qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", options, "solid.raw", name]);
    }
    folder.qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "solid.raw", "packed.qcow2"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "none.qcow2", "3M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "zero.qcow2", "3M"]);
    folder.qemu_io("zero.qcow2", &["write -z 0 1M", "write -P 1 1M 64k", "write -z 1M 64k", "write -P 0 2M 64k"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "-b", "plain.qcow2", "-F", "qcow2", "over.qcow2", "5M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "scattered.qcow2", "3M"]);
    folder.qemu_io("scattered.qcow2", &["write -P 1 1M 1M", "write -P 1 0 1M", "write -P 1 2M 1M"]);
    folder.qemu_img(&["create", "-q", "-f", "qcow2", "ordered.qcow2", "3M"]);
    folder.qemu_io("ordered.qcow2", &["write -P 1 0 3M"]);
    let names = folder.names();
    for first in &names {
        for second in &names {
            for strict in [false, true] {
                let mut arguments = vec!["compare", first, second];
                if strict {
                    arguments.insert(1, "-s");
                }
                let theirs = String::from_utf8(folder.run("qemu-img", &arguments).stdout).unwrap();
                let theirs = theirs.lines().last().unwrap();
                let open = |name| Image::open(folder.file(name), &OpenOptions::default()).unwrap();
                let ours = compare(&open(first), &open(second), strict, &NoProgress).unwrap();
                assert_eq!(words(ours), theirs, "{first} {second} strict: {strict}");
            }
        }
    }
}
