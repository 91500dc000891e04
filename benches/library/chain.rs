//! Chains: their maps, single lookups, small reads, new overlays, flattening.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use qtk_block::{BlockRead, NoProgress};
use qtk_image::{FlattenOptions, flatten};
use qtk_qcow2::CompressionType;

use crate::images::{CLUSTER, GUEST, Numbers, chain, create, open};

const SIZE: u64 = 1 << 30;
/// One in so many clusters is stored in each layer.
const SHARE: u64 = 10;
const BLOCK: u64 = 4096;

pub(crate) fn benches(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for layers in [1, 3, 10] {
        let image = chain(folder.path(), layers, SIZE, SHARE);
        let mut group = c.benchmark_group(format!("chain of {layers}"));
        group.throughput(Throughput::Elements(SIZE / CLUSTER));
        group.bench_function("map", |b| b.iter(|| black_box(image.runs(0..SIZE)).count()));
        group.throughput(Throughput::Elements(1));
        let mut numbers = Numbers::new();
        let mut place = || numbers.next() % (SIZE / BLOCK) * BLOCK;
        group.bench_function("look up a cluster", |b| {
            b.iter(|| {
                let at = place();
                image.runs(at..at + BLOCK).next()
            });
        });
        let mut buffer = [0; 4096];
        group.bench_function("read 4 KiB", |b| b.iter(|| image.read_at(black_box(&mut buffer), place())));
        group.finish();
    }
    let mut count = 0;
    c.bench_function("create an overlay", |b| {
        b.iter(|| {
            count += 1;
            create(folder.path(), &format!("new-{count}.qcow2"), None, Some("0-of-1.qcow2"))
        });
    });
    small_guest(c);
}

fn small_guest(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("guest.qcow2");
    std::fs::write(&path, GUEST).expect("a folder that can be written");
    let (image, out) = (open(&path), folder.path().join("out.qcow2"));
    for compression in [CompressionType::Zlib, CompressionType::Zstd] {
        let options = FlattenOptions { compression: Some(compression), recompress: true, ..FlattenOptions::default() };
        c.bench_function(&format!("flatten the small guest, {}", compression.name()), |b| {
            b.iter(|| flatten(&image, &out, &options, &NoProgress));
        });
    }
}
