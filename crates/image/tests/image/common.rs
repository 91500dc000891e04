//! What the tests share: a folder, QEMU's tools, and content that is awkward to store.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use qtk_block::Preallocation;
use qtk_image::{Format, NewImage};
use qtk_qcow2::{CompressionType, CreateOptions, Version};

/// A folder that goes away at the end of the test.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Runs a program in the folder.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let output = Command::new(program).args(arguments).current_dir(self.path()).output();
        output.unwrap_or_else(|error| panic!("{program} must be installed to run these tests: {error}"))
    }

    /// Runs `qemu-img`, which must succeed, in the folder.
    pub(crate) fn qemu_img(&self, arguments: &[&str]) -> String {
        succeeded(&format!("qemu-img {arguments:?}"), &self.run("qemu-img", arguments))
    }

    /// Runs commands of `qemu-io` on an image.
    pub(crate) fn qemu_io(&self, image: &str, commands: &[&str]) {
        let arguments: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).chain([image]).collect();
        let text = succeeded(&format!("qemu-io {arguments:?}"), &self.run("qemu-io", &arguments));
        assert!(!text.contains("failed"), "{text}");
    }

    /// Fails unless `qemu-img check` finds neither damage nor leaks.
    pub(crate) fn check(&self, image: &str) {
        let report = self.qemu_img(&["check", "--output=json", image]);
        assert!(!report.contains("leaks") && !report.contains("corruptions"), "{image}: {report}");
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn succeeded(what: &str, output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{what}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Bytes that no codec makes smaller.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[5]
    };
    (0..len).map(|_| next()).collect()
}

/// A disk of `len` bytes in blocks of 48 KiB, so off every cluster border: holes, text, noise, zeroes, and mixtures.
pub(crate) fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut disk = vec![0; len];
    for (index, block) in disk.chunks_mut(48 << 10).enumerate() {
        let text = format!("block {index} of {seed}. ").into_bytes();
        let text = text.into_iter().cycle().take(block.len());
        match (index as u64 + seed) % 9 {
            0 | 1 => {}
            2 | 3 => block.copy_from_slice(&noise(seed + index as u64, block.len())),
            4 => block[..1000].copy_from_slice(&noise(seed + index as u64, 1000)),
            _ => block.iter_mut().zip(text).for_each(|(to, from)| *to = from),
        }
    }
    disk
}

/// A new image, from options as `qemu-img -o` has them.
pub(crate) fn new_image(format: Format, options: &str) -> NewImage {
    let mut new = NewImage { format, ..NewImage::default() };
    for word in options.split(',').filter(|word| !word.is_empty()) {
        let (key, value) = word.split_once('=').unwrap();
        let qcow2: &mut CreateOptions = &mut new.qcow2;
        match key {
            "cluster_size" => new.cluster_size = Some(value.parse().unwrap()),
            "refcount_bits" => qcow2.refcount_bits = value.parse().unwrap(),
            "extended_l2" => qcow2.extended_l2 = value == "on",
            "compat" => qcow2.version = if value == "0.10" { Version::V2 } else { Version::V3 },
            "compression_type" => {
                qcow2.compression = if value == "zstd" { CompressionType::Zstd } else { CompressionType::Zlib }
            }
            "data_file" => qcow2.data_file = Some(value.to_owned()),
            "data_file_raw" => qcow2.data_file_raw = value == "on",
            "lazy_refcounts" => qcow2.lazy_refcounts = value == "on",
            "backing_fmt" => new.base_format = Some(value.to_owned()),
            "backing_file" => new.base = Some(value.into()),
            "preallocation" => {
                qcow2.preallocation = match value {
                    "metadata" => Preallocation::Metadata,
                    "falloc" => Preallocation::Falloc,
                    "full" => Preallocation::Full,
                    _ => Preallocation::Off,
                }
            }
            other => panic!("{other}"),
        }
    }
    new
}
