//! Guests made by the real tools, and their judgement of what became of them.
#![allow(dead_code, clippy::unwrap_used, reason = "every test program uses its own part of this module")]

use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qtk_block::{Access, BlockRead, BlockWrite, RawFile};
use qtk_disk::{EditOptions, GuestPath, Timestamp, Tree};
use tempfile::NamedTempFile;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const NOW: i64 = 1_700_000_000;

/// Runs a tool that the tests judge by; without it they fail.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(args).env("PATH", path).output();
    let output = output.unwrap_or_else(|error| panic!("the tests need `{program}`: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{stdout}{stderr}", output.status);
    stdout.into_owned()
}

pub(crate) fn path(path: &str) -> GuestPath {
    GuestPath::from(path)
}

/// A disk that is one ext4 file system, or has one per partition.
pub(crate) struct Guest(NamedTempFile);

impl Guest {
    /// An ext4 file system of 64 MiB that holds a copy of `folder`.
    pub(crate) fn from_folder(folder: &Path, features: &str) -> Self {
        Self::of_size(64 * MIB, folder, features)
    }

    pub(crate) fn of_size(size: u64, folder: &Path, features: &str) -> Self {
        let guest = Self::empty(size);
        let folder = folder.to_str().unwrap();
        run("mke2fs", &["-q", "-t", "ext4", "-O", features, "-d", folder, guest.host_path()]);
        guest
    }

    /// A guest with these files; see [`populate`].
    pub(crate) fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        populate(folder.path(), files);
        Self::from_folder(folder.path(), "metadata_csum")
    }

    pub(crate) fn empty(size: u64) -> Self {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        Self(file)
    }

    pub(crate) fn host_path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    pub(crate) fn write(&self, bytes: &[u8], offset: u64) {
        self.0.as_file().write_all_at(bytes, offset).unwrap();
    }

    /// Replaces all occurrences of some bytes.
    pub(crate) fn replace(&self, from: &[u8], to: &[u8]) {
        let image = std::fs::read(self.0.path()).unwrap();
        let found: Vec<_> = (0..image.len() - from.len()).filter(|&at| image[at..].starts_with(from)).collect();
        assert!(!found.is_empty(), "{} is not in the image", from.escape_ascii());
        found.into_iter().for_each(|at| self.write(to, at as u64));
    }

    pub(crate) fn open(&self) -> Tree {
        let device: Arc<dyn BlockRead> = Arc::new(RawFile::open(self.0.path(), Access::ReadOnly).unwrap());
        Tree::open(device, None).unwrap()
    }

    /// Edits and commits; e2fsck must be content with the result.
    pub(crate) fn edit<T>(&self, edit: impl FnOnce(&mut Tree) -> T) -> T {
        let device: Arc<dyn BlockWrite> = Arc::new(RawFile::open(self.0.path(), Access::ReadWrite).unwrap());
        let options = EditOptions::new(Timestamp { seconds: NOW, nanos: 0 });
        let mut tree = Tree::open_rw(device, None, options).unwrap();
        let result = edit(&mut tree);
        tree.commit().unwrap();
        result
    }

    pub(crate) fn check(&self) {
        run("e2fsck", &["-fn", self.host_path()]);
    }

    pub(crate) fn debugfs(&self, command: &str) -> String {
        run("debugfs", &["-R", command, self.host_path()])
    }

    pub(crate) fn content(&self, file: &str) -> Vec<u8> {
        let mut content = Vec::new();
        qtk_guest::cat(&self.open(), &path(file), &mut content).unwrap_or_else(|error| panic!("{file}: {error}"));
        content
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

/// Everything below a host folder that a copy should keep, one line per file, sorted. `owners` includes them.
pub(crate) fn describe(folder: &Path, owners: bool) -> Vec<String> {
    let mut lines = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(dir) = folders.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let name = path.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
            let kind = metadata.file_type();
            let content = if kind.is_file() {
                format!("{:08x} links {}", checksum(&std::fs::read(&path).unwrap()), metadata.nlink())
            } else if kind.is_symlink() {
                format!("-> {}", std::fs::read_link(&path).unwrap().display())
            } else if kind.is_dir() {
                folders.push(path);
                "directory".to_owned()
            } else {
                format!("fifo {} rdev {}", kind.is_fifo(), metadata.rdev())
            };
            let owner = if owners { format!("{}:{}", metadata.uid(), metadata.gid()) } else { String::new() };
            let (mode, size) = (metadata.mode(), if kind.is_dir() { 0 } else { metadata.size() });
            lines.push(format!(
                "{name} {mode:o} {size} {owner} {}.{} {content}",
                metadata.mtime(),
                metadata.mtime_nsec()
            ));
        }
    }
    lines.sort();
    lines
}

/// FNV-1a: enough to tell test files apart.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// Bytes that differ everywhere.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(len)
    .collect()
}

/// Fails with the lines that one side has and the other has not.
pub(crate) fn assert_same(left: &[String], right: &[String]) {
    let missing = |from: &[String], in_: &[String]| -> Vec<String> {
        from.iter().filter(|line| !in_.contains(line)).take(10).cloned().collect()
    };
    let (only_left, only_right) = (missing(left, right), missing(right, left));
    assert!(left == right, "only left: {only_left:#?}\nonly right: {only_right:#?}");
}

/// A tree with all that a copy can lose: modes, times, links of both kinds, holes, odd names, many files.
pub(crate) fn varied_tree(folder: &Path, time: &str) {
    populate(
        folder,
        &[("a/b/c/deep", "deep"), ("empty-dir/", ""), ("link", "->a/b"), ("dangling", "->/nowhere"), ("empty", "")],
    );
    std::fs::write(folder.join("binary"), pattern(3_000_001)).unwrap();
    std::fs::write(folder.join("na me\u{1b}é"), "odd").unwrap();
    let sparse = std::fs::File::create(folder.join("sparse")).unwrap();
    sparse.write_all_at(b"middle", 20 * MIB).unwrap();
    sparse.set_len(30 * MIB + 1).unwrap();
    drop(sparse);
    std::fs::hard_link(folder.join("binary"), folder.join("a/same")).unwrap();
    std::fs::create_dir(folder.join("many")).unwrap();
    for number in 0..1000 {
        std::fs::write(folder.join(format!("many/file-{number:04}")), format!("content {number}")).unwrap();
    }
    for (name, mode) in
        [("empty", "600"), ("a/b/c/deep", "4755"), ("empty-dir", "1777"), ("a/b", "2750"), ("na me\u{1b}é", "444")]
    {
        run("chmod", &[mode, folder.join(name).to_str().unwrap()]);
    }
    let all = folder.to_str().unwrap();
    run("find", &[all, "-depth", "-exec", "touch", "-h", "-d", time, "{}", "+"]);
}
