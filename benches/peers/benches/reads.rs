//! Random 4 KiB reads through chains of qcow2 images: qtk, imago and qcow2-rs, which first must all read the same disk.
//!
//! `cargo bench --manifest-path benches/peers/Cargo.toml`

use std::hint::black_box;
use std::path::{Path, PathBuf};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_setup_dev_sync;
use qtk_block::{BlockRead, BlockWrite, NoProgress};
use qtk_image::{FlattenOptions, Image, NewImage, OpenOptions, create_image, flatten};
use qtk_qcow2::CompressionType;

const CLUSTER: usize = 64 << 10;
const DISK: u64 = 512 << 20;
const BLOCK: usize = 4 << 10;
/// Reads between two looks at the clock.
const BATCH: usize = 1024;

/// Numbers that look random and are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// The start of a piece of `len` bytes of the disk.
    fn offset(&mut self, len: usize) -> u64 {
        let len = len as u64;
        self.next() % (DISK / len) * len
    }
}

/// Bytes that compress about as well as programs do: half of them repeat what came shortly before.
fn cluster(numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(CLUSTER + 256);
    while bytes.len() < CLUSTER {
        let [low, high, distance, choice, ..] = numbers.next().to_le_bytes();
        match choice & 1 == 0 && bytes.len() > 512 {
            true => bytes.extend_from_within(bytes.len() - 256 - usize::from(distance)..bytes.len() - 200),
            false => bytes.extend([low, high, low ^ high]),
        }
    }
    bytes.truncate(CLUSTER);
    bytes
}

/// Writes a share of the disk's clusters, here and there, into an image.
fn fill(image: &Path, share: u64, numbers: &mut Numbers) {
    let image = Image::open(image, &OpenOptions::writable()).expect("a new image");
    let transaction = image.begin().expect("an image that can be written");
    for _ in 0..DISK / CLUSTER as u64 / share {
        transaction.write_at(&cluster(numbers), numbers.offset(CLUSTER)).expect("room on the disk");
    }
    transaction.commit().expect("room on the disk");
}

/// A chain of `layers` images: the lowest stores half of the disk's clusters, each other one a tenth.
fn chain(folder: &Path, layers: usize, compression: Option<CompressionType>) -> PathBuf {
    let mut numbers = Numbers(1);
    let mut top = folder.join("plain.qcow2");
    let new = NewImage { size: Some(DISK), ..NewImage::default() };
    create_image(&top, &new).expect("a new image");
    fill(&top, 2, &mut numbers);
    if let Some(compression) = compression {
        let image = Image::open(&top, &OpenOptions::default()).expect("a sound image");
        top = folder.join("packed.qcow2");
        let options = FlattenOptions { compression: Some(compression), ..FlattenOptions::default() };
        flatten(&image, &top, &options, &NoProgress).expect("room on the disk");
    }
    for layer in 1..layers {
        // A name from the root, since qcow2-rs takes relative ones from the working directory.
        let new = NewImage { base: Some(top), ..NewImage::default() };
        top = folder.join(format!("{layer}.qcow2"));
        create_image(&top, &new).expect("a new overlay");
        fill(&top, 10, &mut numbers);
    }
    top
}

/// A library that reads a chain.
trait Reader {
    fn read(&mut self, buffer: &mut [u8], offsets: &[u64]);
}

struct Qtk(Image);

impl Reader for Qtk {
    fn read(&mut self, buffer: &mut [u8], offsets: &[u64]) {
        for &offset in offsets {
            self.0.read_at(black_box(buffer), offset).expect("qtk reads the chain");
        }
    }
}

struct Imago(FormatAccess<File>);

impl Imago {
    fn open(path: &Path) -> Self {
        let image = Qcow2::<File>::builder_path(path).open(PermissiveImplicitOpenGate::default());
        Self(FormatAccess::new(image.expect("imago opens the chain")))
    }
}

impl Reader for Imago {
    fn read(&mut self, buffer: &mut [u8], offsets: &[u64]) {
        for &offset in offsets {
            self.0.read(black_box(&mut *buffer), offset).expect("imago reads the chain");
        }
    }
}

/// Reads with pread, as the others do, and not with its io_uring, of which one read at a time makes no use.
struct Qcow2Rs {
    device: Qcow2Dev<Qcow2IoSync>,
    runtime: tokio::runtime::Runtime,
    buffer: Qcow2IoBuf<u8>,
}

impl Qcow2Rs {
    fn open(path: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let params = Qcow2DevParams::new(9, None, None, true, false);
        let device = qcow2_setup_dev_sync(path, &params).expect("qcow2-rs opens the chain");
        runtime.block_on(device.qcow2_prep_io()).expect("qcow2-rs reads the tables");
        Self { device, runtime, buffer: Qcow2IoBuf::new(CLUSTER) }
    }
}

impl Reader for Qcow2Rs {
    fn read(&mut self, buffer: &mut [u8], offsets: &[u64]) {
        let aligned = &mut self.buffer[..buffer.len()];
        self.runtime.block_on(async {
            for &offset in offsets {
                self.device.read_at(black_box(aligned), offset).await.expect("qcow2-rs reads the chain");
            }
        });
        buffer.copy_from_slice(aligned);
    }
}

/// Both must read every cluster alike.
fn agree(name: &str, reader: &mut dyn Reader, qtk: &mut dyn Reader) {
    let (mut ours, mut theirs) = (vec![0; CLUSTER], vec![1; CLUSTER]);
    for offset in (0..DISK).step_by(CLUSTER) {
        qtk.read(&mut ours, &[offset]);
        reader.read(&mut theirs, &[offset]);
        assert!(ours == theirs, "{name} and qtk differ in the cluster at {offset:#x}");
    }
}

fn reads(c: &mut Criterion) {
    for (layers, compression) in [(1, None), (3, None), (10, None), (3, Some(CompressionType::Zlib))] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let top = chain(folder.path(), layers, compression);
        let mut qtk = Qtk(Image::open(&top, &OpenOptions::default()).expect("qtk opens the chain"));
        let mut imago = Imago::open(&top);
        let mut qcow2_rs = Qcow2Rs::open(&top);
        agree("imago", &mut imago, &mut qtk);
        agree("qcow2-rs", &mut qcow2_rs, &mut qtk);

        let base = compression.map_or("plain", CompressionType::name);
        let mut group = c.benchmark_group(format!("4 KiB from a chain of {layers}, {base} base"));
        group.throughput(Throughput::Elements(BATCH as u64)).sample_size(20);
        let readers: [(&str, &mut dyn Reader); 3] =
            [("qtk", &mut qtk), ("imago", &mut imago), ("qcow2-rs", &mut qcow2_rs)];
        for (name, reader) in readers {
            let mut numbers = Numbers(2);
            let mut buffer = vec![0; BLOCK];
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter_batched(
                    || (0..BATCH).map(|_| numbers.offset(BLOCK)).collect::<Vec<u64>>(),
                    |offsets| reader.read(&mut buffer, &offsets),
                    criterion::BatchSize::SmallInput,
                );
            });
        }
        group.finish();
    }
}

criterion_group!(benches, reads);
criterion_main!(benches);
