//! What mke2fs and the kernel make is clean.

use crate::corpus::{BY_MKE2FS, MOUNTABLE, e2fsck, our_verdict, populated};
use crate::support::Image;

fn assert_both_clean(image: &Image, shape: &[&str]) {
    let (clean, words) = e2fsck(image.path());
    assert!(clean, "{shape:?}: e2fsck: {words}");
    let report = our_verdict(&std::fs::read(image.path()).unwrap()).unwrap();
    let lines: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    assert!(report.is_clean() && report.is_complete, "{shape:?}: {lines:#?}");
}

#[test]
fn fresh_file_systems() {
    for shape in MOUNTABLE.iter().chain(BY_MKE2FS) {
        assert_both_clean(&Image::make("40M", shape, None), shape);
    }
}

#[test]
fn filled_file_systems() {
    for shape in MOUNTABLE.iter().chain(BY_MKE2FS) {
        let image = populated(shape, "24M");
        // mke2fs 1.47 writes quota files before it writes files.
        if !shape.iter().any(|word| word.contains("quota")) {
            assert_both_clean(&image, shape);
        }
    }
}
