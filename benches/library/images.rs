//! The images that are measured.

use std::path::{Path, PathBuf};

use qtk_block::BlockWrite;
use qtk_image::{Image, NewImage, OpenOptions, create_image};

pub(crate) const CLUSTER: u64 = 64 << 10;
/// A small guest.
pub(crate) const GUEST: &[u8] = include_bytes!("../../testdata/demo-guest.qcow2");

/// Numbers that look random and are the same in every run.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new() -> Self {
        Self(1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
}

/// An image of `size` bytes in `folder`, or an overlay on `base`.
pub(crate) fn create(folder: &Path, name: &str, size: Option<u64>, base: Option<&str>) -> PathBuf {
    let path = folder.join(name);
    let new = NewImage { size, base: base.map(PathBuf::from), ..NewImage::default() };
    create_image(&path, &new).expect("a folder that can be written");
    path
}

pub(crate) fn open(path: &Path) -> Image {
    Image::open(path, &OpenOptions::default()).expect("a sound image")
}

/// A chain of `layers` images with a disk of `size` bytes: each layer stores one in `share` of its clusters, here and there.
pub(crate) fn chain(folder: &Path, layers: usize, size: u64, share: u64) -> Image {
    let mut numbers = Numbers::new();
    let data: Vec<u8> = (0..CLUSTER).map(|_| numbers.next().to_le_bytes()[0]).collect();
    let mut base: Option<String> = None;
    for layer in 0..layers {
        let name = format!("{layer}-of-{layers}.qcow2");
        let path = create(folder, &name, Some(size), base.as_deref());
        let writable = Image::open(&path, &OpenOptions::writable()).expect("a sound image");
        let transaction = writable.begin().expect("an image that can be written");
        for _ in 0..size / CLUSTER / share {
            let offset = numbers.next() % (size / CLUSTER) * CLUSTER;
            transaction.write_at(&data, offset).expect("room on the disk");
        }
        transaction.commit().expect("room on the disk");
        base = Some(name);
    }
    open(&folder.join(base.expect("a chain has a layer")))
}
