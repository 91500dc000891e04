//! What the tests share: the judges (`qemu-img`, `qemu-io`) and images to judge.
#![allow(dead_code, reason = "each test file uses a part of this")]
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

pub(crate) mod crash;
pub(crate) mod repetitive;

use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use qtk_block::{Access, BlockRead, BlockWrite, HostStorage, MemoryDisk, RawFile};
use qtk_qcow2::{CheckReport, Layer, check};
use serde_json::Value;

pub(crate) fn run<S: AsRef<OsStr>>(tool: &str, arguments: impl IntoIterator<Item = S>) -> Output {
    Command::new(tool)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {tool} ({error}): install qemu-utils"))
}

/// Runs a tool that must succeed and returns what it printed.
pub(crate) fn tool<S: AsRef<OsStr>>(tool: &str, arguments: impl IntoIterator<Item = S>) -> String {
    let output = run(tool, arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{tool}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// `qemu-img` with a line of arguments, run in `folder`.
pub(crate) fn qemu_img(folder: &Path, line: &str) -> String {
    in_folder(folder, "qemu-img", &line.split(' ').collect::<Vec<_>>())
}

/// `qemu-io` with commands on an image.
pub(crate) fn qemu_io(folder: &Path, image: &str, commands: &[&str]) -> String {
    let mut arguments: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    arguments.extend(["-f", "qcow2", image]);
    in_folder(folder, "qemu-io", &arguments)
}

fn in_folder(folder: &Path, tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {tool} ({error}): install qemu-utils"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{tool} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// `qemu-img check` as JSON; damage is in the counters.
pub(crate) fn qemu_check(image: &Path) -> Value {
    let output = run("qemu-img", ["check".as_ref(), "--output=json".as_ref(), image.as_os_str()]);
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("qemu-img check: {}", String::from_utf8_lossy(&output.stderr)))
}

pub(crate) fn counter(report: &Value, key: &str) -> u64 {
    report.get(key).and_then(Value::as_u64).unwrap_or_default()
}

/// Our check's counters, after a comparison with `qemu-img check`'s.
pub(crate) fn check_as_qemu(image: &Path) -> CheckReport {
    let judge = qemu_check(image);
    let report = check(&open(image)).unwrap();
    let ours = [
        ("image-end-offset", report.image_end_offset),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
        ("leaks", report.leaks),
        ("corruptions", report.corruptions),
        ("check-errors", report.check_errors),
    ];
    for (key, count) in ours {
        assert_eq!(count, counter(&judge, key), "{key} in {}: {report:#?} against {judge}", image.display());
    }
    report
}

/// Panics unless `qemu-img check` finds neither damage nor leaks, and we count as it does.
pub(crate) fn assert_clean(image: &Path) {
    let report = check_as_qemu(image);
    assert!(report.is_clean(), "{}: {report:#?}", image.display());
}

/// The guest's disk as QEMU reads it.
pub(crate) fn qemu_read(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("raw-by-qemu");
    tool("qemu-img", ["convert".as_ref(), "-O".as_ref(), "raw".as_ref(), image.as_os_str(), raw.as_os_str()]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(raw).unwrap();
    bytes
}

pub(crate) fn read_all(device: &dyn BlockRead) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(device.size()).unwrap()];
    device.read_at(&mut bytes, 0).unwrap();
    bytes
}

pub(crate) fn storage(image: &Path) -> Arc<dyn HostStorage> {
    Arc::new(RawFile::open(image, Access::ReadWrite).unwrap())
}

/// Opens an image to be repaired.
pub(crate) fn open_damaged(image: &Path) -> Layer {
    Layer::open_damaged(storage(image), image.display().to_string(), None).unwrap()
}

/// Opens an image, and the data file beside it if it has one.
pub(crate) fn open(image: &Path) -> Layer {
    let name = image.display().to_string();
    let layer = Layer::open(storage(image), &name).unwrap();
    match layer.header().data_file_name() {
        Some(data) => Layer::open_with(storage(image), name, Some(storage(&image.with_file_name(data)))).unwrap(),
        None => layer,
    }
}

pub(crate) fn memory(bytes: &[u8]) -> MemoryDisk {
    use qtk_block::BlockWrite;
    let disk = MemoryDisk::new(bytes.len() as u64);
    disk.write_at(bytes, 0).unwrap();
    disk
}

/// Bytes that do not compress and differ for every seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[4]
    })
    .take(len)
    .collect()
}

/// Writes a raw disk of `size` bytes: noise, text and holes in turn, in pieces of `piece` bytes.
pub(crate) fn mixed_disk(path: &Path, size: usize, piece: usize) -> PathBuf {
    let mut bytes = vec![0; size];
    for (index, part) in bytes.chunks_mut(piece).enumerate() {
        match index % 4 {
            0 => part.copy_from_slice(&noise(index as u64, part.len())),
            1 | 3 => part.fill(u8::try_from(index % 251).unwrap()),
            _ => {}
        }
    }
    std::fs::write(path, bytes).unwrap();
    path.to_owned()
}

/// The file with what lies in free clusters blanked out: a refcount table leaves its old self behind when it moves.
pub(crate) fn used_clusters(image: &Path) -> Vec<u8> {
    let mut bytes = std::fs::read(image).unwrap();
    let layer = open(image);
    let header = layer.header();
    let cluster = usize::try_from(layer.cluster_size()).unwrap();
    let word =
        |bytes: &[u8], at: usize| usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap();
    let table = usize::try_from(header.refcount_table.0).unwrap();
    let width = header.refcount_bits() as usize;
    let per_block = cluster * 8 / width;
    let is_free = |bytes: &[u8], index: usize| {
        let block = word(bytes, table + index / per_block * 8);
        let bit = index % per_block * width;
        let count = &bytes[block + bit / 8..block + (bit + width).div_ceil(8)];
        block == 0
            || if width < 8 { count[0] >> (bit % 8) & ((1 << width) - 1) == 0 } else { count.iter().all(|&b| b == 0) }
    };
    let free: Vec<usize> = (0..bytes.len().div_ceil(cluster)).filter(|&index| is_free(&bytes, index)).collect();
    for index in free {
        let end = bytes.len().min((index + 1) * cluster);
        bytes[index * cluster..end].fill(0);
    }
    bytes
}

/// A device: it has its size.
pub(crate) struct Device(pub(crate) MemoryDisk);

impl BlockRead for Device {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }
}

impl BlockWrite for Device {
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if offset + buf.len() as u64 > self.size() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.write_at(buf, offset)
    }

    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        self.0.zero(range)
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.0.discard(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
}

impl HostStorage for Device {
    fn set_size(&self, size: u64) -> io::Result<()> {
        if size > self.size() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}
