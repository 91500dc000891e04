//! Populated file systems of every shape, and what the two checkers say of one.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use qtk_ext4::{CheckOptions, CheckReport, Error, check};

use crate::support::{Image, noise};

/// Shapes that the kernel can mount, to fill them as a running system does.
pub(crate) const MOUNTABLE: &[&[&str]] = &[
    &["-b", "1024"],
    &["-b", "4096", "-O", "orphan_file,metadata_csum_seed"],
    &["-b", "1024", "-O", "^metadata_csum"],
    &["-b", "2048", "-I", "512", "-O", "^metadata_csum,uninit_bg,^64bit"],
    &["-t", "ext3", "-b", "1024"],
    &["-t", "ext2", "-b", "1024", "-I", "128"],
    &["-t", "ext2", "-r", "0", "-b", "1024", "-I", "128", "-O", "none"],
    &["-b", "1024", "-O", "inline_data", "-I", "256"],
    &["-b", "1024", "-O", "bigalloc", "-C", "8192"],
    &["-b", "4096", "-O", "bigalloc", "-C", "65536"],
    &["-b", "1024", "-O", "meta_bg,^resize_inode", "-g", "1024"],
    &["-b", "1024", "-O", "sparse_super2", "-g", "2048"],
    &["-b", "1024", "-O", "ea_inode,large_dir"],
    &["-b", "1024", "-O", "^flex_bg,^resize_inode", "-g", "2048"],
    &["-b", "1024", "-G", "4", "-g", "1024", "-O", "^has_journal"],
    &["-b", "1024", "-O", "project,quota", "-I", "256"],
    &["-b", "1024", "-O", "verity,stable_inodes,encrypt"],
    &["-b", "1024", "-I", "1024", "-O", "^extent,^64bit"],
    &["-b", "1024", "-O", "fast_commit"],
];

/// Shapes that only mke2fs fills: this kernel does not mount them.
pub(crate) const BY_MKE2FS: &[&[&str]] = &[
    &["-b", "1024", "-O", "mmp"],
    &["-b", "1024", "-O", "casefold", "-E", "encoding=utf8"],
    &["-b", "65536", "-N", "1024"],
    &["-b", "16384"],
];

/// What fills a file system: trees of extents, long directories, links, names.
pub(crate) fn make_tree(root: &Path) {
    let path = |name: &str| root.join(name);
    std::fs::create_dir_all(path("dir/below/further")).unwrap();
    for at in 0..150 {
        std::fs::write(path("dir").join(format!("a rather long file name to fill blocks {at}")), b"x").unwrap();
    }
    std::fs::write(path("file"), noise(300_000, 1)).unwrap();
    std::fs::write(path("small"), b"forty bytes that may lie within an inode").unwrap();
    std::fs::write(path("a bit more"), noise(110, 2)).unwrap();
    std::fs::hard_link(path("small"), path("linked")).unwrap();
    let sparse = std::fs::File::create(path("sparse")).unwrap();
    for at in 0..300 {
        sparse.write_all_at(b"x", at * 9000).unwrap();
    }
    std::os::unix::fs::symlink("t".repeat(100), path("long link")).unwrap();
    std::os::unix::fs::symlink("target", path("link")).unwrap();
    crate::support::tool("mkfifo", &[path("pipe").to_str().unwrap()]);
}

/// What the kernel does to a mounted file system: directories with an index, attributes in each place, holes, devices.
fn use_mounted(root: &Path) {
    for at in 0..250 {
        std::fs::write(root.join("dir").join(format!("another long file name to fill blocks {at}")), b"x").unwrap();
    }
    for at in 0..40 {
        std::fs::remove_file(root.join("dir").join(format!("a rather long file name to fill blocks {at}"))).unwrap();
    }
    let set = |name: &str, attribute: &str, value: &str| {
        // Some shapes have no attributes, or no room for a large one.
        let _ = Command::new("setfattr").args(["-n", attribute, "-v", value]).arg(root.join(name)).output();
    };
    set("file", "user.short", "1");
    set("file", "user.longer", &"v".repeat(300));
    set("small", "user.large", &"w".repeat(3000));
    set("dir", "trusted.some", "thing");
    let file = std::fs::File::options().write(true).open(root.join("file")).unwrap();
    file.write_all_at(b"far", 5_000_000).unwrap();
    std::fs::create_dir(root.join("empty")).unwrap();
    let made = Command::new("mknod").arg(root.join("device")).args(["c", "1", "3"]).status().unwrap();
    assert!(made.success());
}

/// A filled image of a shape.
pub(crate) fn populated(shape: &[&str], size: &str) -> Image {
    let source = tempfile::tempdir().unwrap();
    make_tree(source.path());
    let image = Image::make(size, shape, Some(source.path()));
    if MOUNTABLE.contains(&shape) && !shape.iter().any(|word| word.contains("quota")) {
        image.mounted(use_mounted);
    }
    image
}

/// What this crate says of an image.
pub(crate) fn our_verdict(image: &Image) -> Result<CheckReport, Error> {
    check(image.device(), &CheckOptions::default())
}

/// What e2fsck says: whether it is clean, and its words. It may take for ever on damage, which counts as not clean.
pub(crate) fn e2fsck(path: &Path) -> (bool, String) {
    let output = Command::new("timeout")
        .args(["-s", "KILL", "20", "e2fsck", "-fn"])
        .arg(path)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}
