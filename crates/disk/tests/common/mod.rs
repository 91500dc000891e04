//! Images made by the real tools.
#![allow(dead_code, reason = "every test program uses its own part of this module")]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qtk_block::{Access, BlockRead, BlockWrite, RawFile};
use tempfile::NamedTempFile;

pub(crate) const MIB: u64 = 1 << 20;

/// Runs a tool that the tests judge by; without it they fail.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(args).env("PATH", path).env("MTOOLS_SKIP_CHECK", "1").output();
    let output = output.unwrap_or_else(|error| panic!("the tests need `{program}`: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}\n{stderr}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

/// A sparse file on the host.
pub(crate) struct Image(NamedTempFile);

impl Image {
    pub(crate) fn new(size: u64) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        Self(file)
    }

    pub(crate) fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    pub(crate) fn write(&self, bytes: &[u8], offset: u64) {
        self.0.as_file().write_all_at(bytes, offset).unwrap();
    }

    pub(crate) fn read(&self, len: usize, offset: u64) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.as_file().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// Puts another image's content at `offset`.
    pub(crate) fn insert(&self, other: &Self, offset: u64) {
        run(
            "dd",
            &[
                &format!("if={}", other.path()),
                &format!("of={}", self.path()),
                "bs=1M",
                &format!("seek={offset}"),
                "oflag=seek_bytes",
                "conv=notrunc,sparse",
                "status=none",
            ],
        );
    }

    /// Copies `len` bytes at `offset` into a file of their own.
    pub(crate) fn cut(&self, offset: u64, len: u64) -> Self {
        let part = Self::new(len);
        run(
            "dd",
            &[
                &format!("if={}", self.path()),
                &format!("of={}", part.path()),
                "bs=64K",
                &format!("skip={offset}"),
                &format!("count={len}"),
                "iflag=skip_bytes,count_bytes,fullblock",
                "conv=notrunc,sparse",
                "status=none",
            ],
        );
        part
    }

    pub(crate) fn reader(&self) -> Arc<dyn BlockRead> {
        Arc::new(RawFile::open(self.0.path(), Access::ReadOnly).unwrap())
    }

    pub(crate) fn writer(&self) -> Arc<dyn BlockWrite> {
        Arc::new(RawFile::open(self.0.path(), Access::ReadWrite).unwrap())
    }

    /// An ext4 file system holding a copy of `folder`.
    pub(crate) fn ext4(size: u64, label: &str, folder: &Path) -> Self {
        let image = Self::new(size);
        run("mke2fs", &["-q", "-t", "ext4", "-L", label, "-d", folder.to_str().unwrap(), image.path()]);
        image
    }

    /// An empty FAT file system.
    pub(crate) fn fat(size: u64, bits: u32, label: &str) -> Self {
        let image = Self::new(size);
        run("mkfs.vfat", &["-F", &bits.to_string(), "-n", label, "-i", "1234ABCD", image.path()]);
        image
    }
}

/// Makes files below `folder`; a name ending in `/` is a directory, a content starting with `->` a link.
pub(crate) fn populate(folder: &Path, files: &[(&str, &str)]) {
    for (name, content) in files {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content.strip_prefix("->") {
            Some(target) => std::os::unix::fs::symlink(target, path).unwrap(),
            None if name.ends_with('/') => std::fs::create_dir_all(path).unwrap(),
            None => std::fs::write(path, content).unwrap(),
        }
    }
}
