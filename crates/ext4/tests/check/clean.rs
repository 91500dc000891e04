//! What mke2fs and the kernel make is clean.

use crate::corpus::{BY_MKE2FS, MOUNTABLE, e2fsck, our_verdict, populated};
use crate::support::Image;

/// What either checker finds, if anything.
fn complaints(image: &Image, shape: &[&str]) -> Option<String> {
    let (clean, words) = e2fsck(image.path());
    if !clean {
        return Some(format!("{shape:?}: e2fsck: {words}"));
    }
    let report = our_verdict(image).unwrap();
    let lines: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    (!report.is_clean() || !report.is_complete).then(|| format!("{shape:?}: {lines:#?}"))
}

#[test]
fn fresh_file_systems() {
    let shapes = MOUNTABLE.iter().chain(BY_MKE2FS);
    let found: Vec<_> = shapes.filter_map(|shape| complaints(&Image::make("40M", shape, None), shape)).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn filled_file_systems() {
    // mke2fs 1.47 writes quota files before it writes other files.
    let shapes = MOUNTABLE.iter().chain(BY_MKE2FS).filter(|shape| !shape.iter().any(|word| word.contains("quota")));
    let found: Vec<_> = shapes.filter_map(|shape| complaints(&populated(shape, "48M"), shape)).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}
