//! Running qtk and its judges.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// The folder of the checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A command line for any program, without standard input.
pub(crate) fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command to its end, whatever that is. A program that cannot be started fails the test by name.
pub(crate) fn run(command: &mut Command) -> Ran {
    let name = command.get_program().to_owned();
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|error| {
        panic!("cannot run {}: {error}; tests/run.sh installs what tests need", name.display())
    });
    Ran {
        code: status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

/// Runs a command that must succeed, and gives its standard output.
pub(crate) fn ok(command: &mut Command) -> String {
    let ran = run(command);
    assert_eq!(ran.code, 0, "{command:?} failed\nstdout: {}\nstderr: {}", ran.stdout, ran.stderr);
    ran.stdout
}

/// Runs a command that must fail with `code`, print nothing on standard output, and say each of `words` on standard error.
pub(crate) fn fails(command: &mut Command, code: i32, words: &[&str]) -> String {
    let ran = run(command);
    assert_eq!(ran.code, code, "{command:?}\nstdout: {}\nstderr: {}", ran.stdout, ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "{command:?} should say '{word}' but says: {}", ran.stderr);
    }
    assert!(!ran.stderr.contains("panicked"), "{command:?} panicked: {}", ran.stderr);
    ran.stderr
}

/// Parsed `--json` output of a command that must succeed.
pub(crate) fn json(command: &mut Command) -> serde_json::Value {
    let text = ok(command);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{command:?} printed no JSON: {error}\n{text}"))
}

/// A path as an argument.
pub(crate) fn arg(path: &Path) -> &str {
    path.to_str().expect("test folders have plain names")
}

/// A folder of its own for one test, with the small guest of the demo as `base.qcow2` in it.
pub(crate) struct Workshop {
    folder: tempfile::TempDir,
}

impl Workshop {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(root().join("testdata/demo-guest.qcow2"), folder.path().join("base.qcow2")).unwrap();
        Self { folder }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    /// A command in the folder, so that names in it need no path.
    pub(crate) fn sh(&self, program: &str, line: &str) -> Command {
        let words: Vec<&str> = line.split(' ').collect();
        let mut command = command(program, &words);
        command.current_dir(self.folder.path());
        command
    }

    pub(crate) fn qtk(&self, line: &str) -> Command {
        self.sh(env!("CARGO_BIN_EXE_qtk"), line)
    }

    /// Where the root partition, number 1, lies on a raw disk, in bytes.
    pub(crate) fn root_partition(&self, raw: &str) -> Range<u64> {
        let table = ok(&mut self.sh("sgdisk", &format!("-i 1 {raw}")));
        let sector = |field: &str| {
            let line = table.lines().find_map(|line| line.strip_prefix(field)).expect("partition 1");
            line.split(' ').next().and_then(|number| number.parse::<u64>().ok()).expect("a sector's number")
        };
        sector("First sector: ") * 512..(sector("Last sector: ") + 1) * 512
    }

    /// A debugfs on the root file system of a raw disk.
    pub(crate) fn debugfs(&self, raw: &str, arguments: &[&str]) -> Command {
        let device = format!("{}?offset={}", self.path(raw).display(), self.root_partition(raw).start);
        command("debugfs", &[arguments, &[&device]].concat())
    }

    /// Every judge there is for an image and the file systems in it.
    pub(crate) fn fsck(&self, image: &str) {
        fsck(&self.path(image));
    }
}

/// `qemu-img check`, and the file-system checkers on every partition.
pub(crate) fn fsck(image: &Path) {
    ok(&mut command(arg(&root().join("tests/guest/fsck.sh")), &[arg(image)]));
}

/// The folder with the real guests, made on first use.
pub(crate) fn guests() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let printed = ok(&mut command(arg(&root().join("tests/guest/build.sh")), &[]));
        PathBuf::from(printed.trim_end().lines().last().expect("build.sh prints the folder"))
    })
}

/// Bytes that no codec can shrink, the same each time.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len.div_ceil(8)).flat_map(|_| step().to_le_bytes()).take(len).collect()
}
