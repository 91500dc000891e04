//! Images made, changed and judged by the real tools.
#![allow(dead_code, clippy::unwrap_used, reason = "every test program uses its own part of this module")]

pub(crate) mod crash;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use qtk_block::{Access, RawFile};
use qtk_ext4::{Ext4, Ino};
use tempfile::TempDir;

/// What mke2fs switches on beyond its defaults in Ubuntu 24.04 and Debian 13.
pub(crate) const DISTRIBUTION: &[&str] = &["-O", "orphan_file,metadata_csum_seed"];

fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| {
        panic!("these tests need {:?} (Debian package e2fsprogs or util-linux): {error}", command.get_program())
    })
}

/// Runs a tool that must succeed, and gives what it printed.
pub(crate) fn tool(name: &str, args: &[&str]) -> String {
    let output = run(Command::new(name).args(args).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"));
    assert!(output.status.success(), "{name} {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A file system in a file of a temporary folder.
pub(crate) struct Image {
    folder: TempDir,
    path: PathBuf,
}

impl Image {
    /// Made by mke2fs with `args` (ext4 with 4 KiB blocks if these say nothing else), of `size` as mke2fs reads it, holding the tree below `root` if there is one.
    pub(crate) fn make(size: &str, args: &[&str], root: Option<&Path>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let mut all = vec!["-q", "-F"];
        for default in [["-t", "ext4"], ["-b", "4096"]] {
            if !args.contains(&default[0]) {
                all.extend(default);
            }
        }
        all.extend(args);
        if let Some(root) = root {
            all.extend(["-d", root.to_str().unwrap()]);
        }
        all.extend([path.to_str().unwrap(), size]);
        tool("mke2fs", &all);
        Self { folder, path }
    }

    /// A file of `size` zero bytes.
    pub(crate) fn empty(size: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        Self { folder, path }
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn path_str(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// A second image with the same bytes.
    pub(crate) fn copy(&self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        tool("cp", &["--sparse=always", self.path_str(), path.to_str().unwrap()]);
        Self { folder, path }
    }

    pub(crate) fn device(&self) -> Arc<RawFile> {
        Arc::new(RawFile::open(&self.path, Access::ReadWrite).unwrap())
    }

    pub(crate) fn open(&self) -> Ext4 {
        Ext4::open(self.device()).unwrap()
    }

    /// Asserts that e2fsck finds nothing to repair.
    pub(crate) fn assert_clean(&self) {
        let output = run(Command::new("e2fsck").args(["-fn", self.path_str()]).env("PATH", "/usr/sbin:/sbin"));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "e2fsck -fn: {}\n{text}", output.status);
    }

    /// What e2fsck does to a journal alone.
    pub(crate) fn replay_by_e2fsck(&self) {
        let args = ["-y", "-E", "journal_only", self.path_str()];
        let output = run(Command::new("e2fsck").args(args).env("PATH", "/usr/sbin:/sbin"));
        assert!(output.status.code().is_some_and(|code| code < 4), "{output:?}");
    }

    /// Lets e2fsck give every directory a fresh index.
    pub(crate) fn rebuild_indexes(&self) {
        let output = run(Command::new("e2fsck").args(["-fyD", self.path_str()]).env("PATH", "/usr/sbin:/sbin"));
        assert!(output.status.code().is_some_and(|code| code < 4), "{output:?}");
    }

    /// What debugfs prints for a request.
    pub(crate) fn debugfs(&self, request: &str) -> String {
        tool("debugfs", &["-R", request, self.path_str()])
    }

    /// Lets debugfs change the image; fails if debugfs complains.
    pub(crate) fn debugfs_write(&self, requests: &str) {
        let script = self.folder.path().join("requests");
        std::fs::write(&script, requests).unwrap();
        let output = run(Command::new("debugfs")
            .args(["-w", "-f", script.to_str().unwrap(), self.path_str()])
            .env("PATH", "/usr/sbin:/sbin"));
        let complaints = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<_> = complaints.lines().filter(|line| !line.starts_with("debugfs 1.")).collect();
        assert!(output.status.success() && lines.is_empty(), "{complaints}");
    }

    /// A file's content as debugfs sees it.
    pub(crate) fn content(&self, ino: Ino) -> Vec<u8> {
        let target = self.folder.path().join("dumped");
        self.debugfs(&format!("dump <{ino}> {}", target.display()));
        std::fs::read(target).unwrap()
    }

    /// Runs `work` with the image mounted by the kernel; needs root and loop devices.
    pub(crate) fn mounted<T>(&self, work: impl FnOnce(&Path) -> T) -> T {
        let mount = Mount::new(self);
        work(&mount.point)
    }
}

struct Mount {
    point: PathBuf,
}

impl Mount {
    fn new(image: &Image) -> Self {
        let point = image.folder().join("mount");
        std::fs::create_dir_all(&point).unwrap();
        let args = ["-o", "loop", image.path_str(), point.to_str().unwrap()];
        let output = run(Command::new("mount").args(args));
        assert!(output.status.success(), "these tests mount images and so need root and loop devices: {output:?}");
        Self { point }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Another mount namespace may hold a copy of the mount, which then outlives it; and others that look at new mounts
        // hold them for a moment. Once the file system is read-only, the image is at rest in any case.
        for _ in 0..100 {
            let at_rest = run(Command::new("mount").args(["-o", "remount,ro"]).arg(&self.point)).status.success();
            if at_rest && run(Command::new("umount").arg(&self.point)).status.success() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("{} cannot be unmounted", self.point.display());
    }
}

/// The inode at a path from the root, components separated by slashes.
pub(crate) fn resolve(fs: &Ext4, path: &str) -> Ino {
    path.split('/').filter(|name| !name.is_empty()).fold(Ino::ROOT, |dir, name| {
        fs.lookup(dir, name.as_bytes()).unwrap().unwrap_or_else(|| panic!("{name} of {path} is missing"))
    })
}

/// The whole content of a file.
pub(crate) fn read_all(fs: &Ext4, ino: Ino) -> Vec<u8> {
    let size = usize::try_from(fs.metadata(ino).unwrap().size).unwrap();
    let mut content = vec![0xaa; size];
    assert_eq!(fs.read_at(ino, &mut content, 0).unwrap(), size);
    content
}

/// Bytes that differ from place to place and from seed to seed, and do not compress away.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
