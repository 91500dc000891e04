//! The guest's file systems.

use std::path::Path;
use std::sync::Arc;

use criterion::{BatchSize, Criterion};
use qtk_block::{BlockRead, BlockWrite, MemoryDisk, is_zero};
use qtk_disk::{EditOptions, GuestPath, Timestamp, Tree};
use qtk_guest::inject::{InjectOptions, Source, inject};
use qtk_image::Image;

use crate::images::{GUEST, open};

pub(crate) fn benches(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("guest.qcow2");
    std::fs::write(&path, GUEST).expect("a folder that can be written");
    let image = Arc::new(open(&path));
    c.bench_function("open the guest's tree", |b| b.iter(|| Tree::open(Arc::clone(&image) as _, None)));
    let many = folder.path().join("many");
    std::fs::create_dir(&many).expect("a new folder");
    for index in 0..1000 {
        std::fs::write(many.join(index.to_string()), [7; 100]).expect("a small file");
    }
    let mut group = c.benchmark_group("guest");
    group.sample_size(20);
    group.bench_function("inject 1,000 small files", |b| {
        b.iter_batched(|| raw_guest(&image), |disk| inject_all(disk, &many), BatchSize::PerIteration);
    });
    group.finish();
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

fn inject_all(disk: MemoryDisk, folder: &Path) -> qtk_guest::Result<()> {
    let now = Timestamp { seconds: 1_700_000_000, nanos: 0 };
    let mut tree = Tree::open_rw(Arc::new(disk), None, EditOptions::new(now)).expect("the small guest");
    let mut sources = [Source::Path(folder.to_owned())];
    inject(&mut tree, &mut sources, &GuestPath::from("/srv"), &InjectOptions::default())?;
    tree.commit().expect("room in the guest");
    Ok(())
}
