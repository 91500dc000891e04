//! Rates of the parts that whole commands are made of. `cargo bench`; `benches/peers.sh` measures the commands.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qtk_block::{BlockRead, BlockWrite, MemoryDisk, NoProgress, is_zero};
use qtk_disk::{EditOptions, GuestPath, Timestamp, Tree};
use qtk_guest::inject::{InjectOptions, Source, inject};
use qtk_image::{FlattenOptions, Image, NewImage, OpenOptions, create_image, flatten};
use qtk_qcow2::codec::{Compressor, decompress};
use qtk_qcow2::{CompressionType, Layer, check};

const CLUSTER: usize = 64 << 10;
const GUEST: &[u8] = include_bytes!("../testdata/demo-guest.qcow2");

/// Bytes that compress about as well as programs do: half of them repeat what came shortly before.
fn cluster() -> Vec<u8> {
    let mut state = 1_u32;
    let mut bytes = Vec::with_capacity(CLUSTER);
    while bytes.len() < CLUSTER {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let [low, high, distance, choice] = state.to_be_bytes();
        match choice & 1 == 0 && bytes.len() > 512 {
            true => bytes.extend_from_within(bytes.len() - 256 - usize::from(distance)..bytes.len() - 200),
            false => bytes.extend([low, high, low ^ high]),
        }
    }
    bytes.truncate(CLUSTER);
    bytes
}

fn codecs(c: &mut Criterion) {
    let plain = cluster();
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Bytes(CLUSTER as u64));
    for (kind, levels) in [(CompressionType::Zlib, [1, 4, 6]), (CompressionType::Zstd, [1, 3, 9])] {
        for level in levels {
            let mut compressor = Compressor::new(kind, Some(level)).expect("a valid level");
            let mut out = vec![0; CLUSTER];
            let name = format!("compress {}", kind.name());
            group.bench_function(BenchmarkId::new(name, level), |b| {
                b.iter(|| compressor.compress(black_box(&plain), &mut out))
            });
        }
        let mut compressor = Compressor::new(kind, None).expect("the default level");
        let mut packed = vec![0; CLUSTER];
        let len = compressor.compress(&plain, &mut packed).ok().flatten().expect("a cluster that shrinks");
        let mut out = vec![0; CLUSTER];
        group.bench_function(format!("decompress {}", kind.name()), |b| {
            b.iter(|| decompress(kind, black_box(&packed[..len]), &mut out));
        });
    }
    group.finish();
}

fn zero_detection(c: &mut Criterion) {
    let zeroes = vec![0; CLUSTER];
    let mut group = c.benchmark_group("zero detection");
    group.throughput(Throughput::Bytes(CLUSTER as u64));
    group.bench_function("64 KiB of zeroes", |b| b.iter(|| is_zero(black_box(&zeroes))));
    group.finish();
}

/// The small guest, under `layers - 1` empty overlays.
fn chain(folder: &Path, layers: usize) -> Image {
    let mut name = "0.qcow2".to_owned();
    std::fs::write(folder.join(&name), GUEST).expect("a folder that can be written");
    for layer in 1..layers {
        let next = format!("{layer}.qcow2");
        let new = NewImage { base: Some(name.into()), ..NewImage::default() };
        create_image(&folder.join(&next), &new).expect("a new overlay");
        name = next;
    }
    Image::open(folder.join(name), &OpenOptions::default()).expect("the chain")
}

fn images(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for layers in [1, 3, 10] {
        let image = chain(folder.path(), layers);
        let size = image.size();
        c.bench_function(&format!("map a chain of {layers}"), |b| b.iter(|| image.runs(0..size).count()));
        let mut buffer = [0; 4096];
        let mut offset = 0;
        c.bench_function(&format!("read 4 KiB from a chain of {layers}"), |b| {
            b.iter(|| {
                offset = (offset + 7_340_033 * 4096) % size;
                image.read_at(&mut buffer, offset)
            });
        });
    }
    c.bench_function("create an overlay", |b| b.iter(|| chain(folder.path(), 2)));
    let image = chain(folder.path(), 1);
    let out = folder.path().join("out.qcow2");
    for compression in [CompressionType::Zlib, CompressionType::Zstd] {
        let options = FlattenOptions { compression: Some(compression), recompress: true, ..FlattenOptions::default() };
        c.bench_function(&format!("flatten the small guest, {}", compression.name()), |b| {
            b.iter(|| flatten(&image, &out, &options, &NoProgress));
        });
    }
}

fn checks(c: &mut Criterion) {
    let disk = MemoryDisk::default();
    disk.write_at(GUEST, 0).expect("memory");
    let layer = Layer::open(Arc::new(disk), "guest").expect("the small guest");
    c.bench_function("check the small guest", |b| b.iter(|| check(&layer)));
}

/// A raw copy of the small guest in memory.
fn raw_guest(image: &Image) -> MemoryDisk {
    let disk = MemoryDisk::new(image.size());
    for run in image.runs(0..image.size()) {
        let run = run.expect("a sound image");
        let mut bytes = vec![0; usize::try_from(run.range.end - run.range.start).expect("a small guest")];
        image.read_at(&mut bytes, run.range.start).expect("a sound image");
        if !is_zero(&bytes) {
            disk.write_at(&bytes, run.range.start).expect("memory");
        }
    }
    disk
}

fn guests(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let image = Arc::new(chain(folder.path(), 1));
    c.bench_function("open the guest's tree", |b| b.iter(|| Tree::open(Arc::clone(&image) as _, None)));
    let many = folder.path().join("many");
    std::fs::create_dir(&many).expect("a new folder");
    for index in 0..1000 {
        std::fs::write(many.join(index.to_string()), [7; 100]).expect("a small file");
    }
    let mut group = c.benchmark_group("guest");
    group.sample_size(20);
    group.bench_function("inject 1,000 small files", |b| {
        b.iter_batched(|| raw_guest(&image), |disk| inject_all(disk, &many), criterion::BatchSize::PerIteration);
    });
    group.finish();
}

fn inject_all(disk: MemoryDisk, folder: &Path) -> qtk_guest::Result<()> {
    let now = Timestamp { seconds: 1_700_000_000, nanos: 0 };
    let mut tree = Tree::open_rw(Arc::new(disk), None, EditOptions::new(now)).expect("the small guest");
    let mut sources = [Source::Path(folder.to_owned())];
    inject(&mut tree, &mut sources, &GuestPath::from("/srv"), &InjectOptions::default())?;
    tree.commit().expect("room in the guest");
    Ok(())
}

criterion_group!(benches, codecs, zero_detection, images, checks, guests);
criterion_main!(benches);
