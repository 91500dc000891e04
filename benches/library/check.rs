//! Checks of whole images.

use std::sync::Arc;

use criterion::{Criterion, Throughput};
use qtk_block::{Access, BlockWrite, MemoryDisk, Preallocation, RawFile};
use qtk_image::{NewImage, create_image};
use qtk_qcow2::{CreateOptions, Layer, check};

use crate::images::{CLUSTER, GUEST};

const LARGE: u64 = 100 << 30;

pub(crate) fn benches(c: &mut Criterion) {
    let disk = MemoryDisk::default();
    disk.write_at(GUEST, 0).expect("memory");
    let layer = Layer::open(Arc::new(disk), "guest").expect("the small guest");
    c.bench_function("check the small guest", |b| b.iter(|| check(&layer)));

    // Every cluster has its place, and only the tables take space.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("large.qcow2");
    let qcow2 = CreateOptions { preallocation: Preallocation::Metadata, ..CreateOptions::default() };
    create_image(&path, &NewImage { size: Some(LARGE), qcow2, ..NewImage::default() }).expect("room for the tables");
    let file = RawFile::open(&path, Access::ReadOnly).expect("a new image");
    let layer = Layer::open(Arc::new(file), "large").expect("a new image");
    assert!(check(&layer).is_ok_and(|report| report.is_clean()), "a new image is sound");
    let mut group = c.benchmark_group("check");
    group.throughput(Throughput::Elements(LARGE / CLUSTER)).sample_size(20);
    group.bench_function("100 GiB, all mapped", |b| b.iter(|| check(&layer)));
    group.finish();
}
