//! A host that runs out of room, acted out by a limit on the size of files.

use std::process::Command;

use qtk_block::{BlockWrite, NoProgress};
use qtk_image::{Error, FlattenOptions, Format, Image, NewImage, OpenOptions, create_image, flatten};

use crate::common::{Folder, noise};

/// Set in the process that works under the limit.
const LIMITED: &str = "QTK_TEST_LIMITED";

/// Runs a test once more where nothing can be written beyond the first 4 MiB of a file: there, `work` is done, in a folder that
/// `prepare` has filled. Gives the folder afterwards; nothing in the limited process.
fn where_the_disk_is_full(test: &str, prepare: impl FnOnce(&Folder), work: impl FnOnce()) -> Option<Folder> {
    if std::env::var_os(LIMITED).is_some() {
        work();
        return None;
    }
    let folder = Folder::new();
    prepare(&folder);
    // With the signal ignored, a write that is too long fails like one to a full disk.
    let script = "trap '' XFSZ; ulimit -f 8192; exec \"$0\" --exact \"$1\"";
    let mut limited = Command::new("sh");
    limited.args(["-c", script]).arg(std::env::current_exe().unwrap()).arg(format!("full_disk::{test}"));
    let output = limited.env(LIMITED, "yes").current_dir(folder.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    Some(folder)
}

#[test]
fn nothing_is_left_of_a_flatten() {
    where_the_disk_is_full("nothing_is_left_of_a_flatten", |_| {}, limited_flatten);
}

#[test]
fn a_raw_image_is_left_as_it_was() {
    where_the_disk_is_full("a_raw_image_is_left_as_it_was", |_| {}, limited_raw_transaction);
}

#[test]
fn a_qcow2_image_is_left_as_it_was() {
    where_the_disk_is_full("a_qcow2_image_is_left_as_it_was", |_| {}, limited_qcow2_transaction);
}

#[test]
fn a_copy_of_the_log_that_fails_can_be_finished() {
    let sparse = |folder: &Folder| std::fs::File::create(folder.file("disk.raw")).unwrap().set_len(8 << 20).unwrap();
    let test = "a_copy_of_the_log_that_fails_can_be_finished";
    let Some(folder) = where_the_disk_is_full(test, sparse, limited_copy_of_the_log) else { return };
    assert_eq!(folder.names(), ["disk.raw", "disk.raw.qtk-txn"]);
    drop(Image::open(folder.file("disk.raw"), &OpenOptions::writable()).unwrap());
    assert_eq!(folder.names(), ["disk.raw"]);
    assert!(std::fs::read(folder.file("disk.raw")).unwrap()[6 << 20..][..100_000] == noise(4, 100_000));
}

fn limited_copy_of_the_log() {
    let transaction = Image::open("disk.raw", &OpenOptions::writable()).unwrap().begin().unwrap();
    transaction.write_at(&noise(4, 100_000), 6 << 20).unwrap();
    for _ in 0..2 {
        let error = transaction.commit().unwrap_err();
        assert!(matches!(error, Error::Unfinished { .. }), "{error}");
    }
}

fn raw_disk(folder: &Folder) -> Vec<u8> {
    let content = noise(1, 7 << 19);
    std::fs::write(folder.file("disk.raw"), &content).unwrap();
    content
}

fn limited_flatten() {
    let folder = Folder::new();
    raw_disk(&folder);
    let overlay = NewImage { base: Some("disk.raw".into()), size: Some(8 << 20), ..NewImage::default() };
    create_image(&folder.file("top.qcow2"), &overlay).unwrap();
    let transaction = Image::open(folder.file("top.qcow2"), &OpenOptions::writable()).unwrap().begin().unwrap();
    transaction.write_at(&noise(2, 2 << 20), 5 << 20).unwrap();
    transaction.commit().unwrap();
    drop(transaction);
    let image = Image::open(folder.file("top.qcow2"), &OpenOptions::default()).unwrap();
    for format in [Format::Raw, Format::Qcow2] {
        let options = FlattenOptions { format, ..FlattenOptions::default() };
        let error = flatten(&image, &folder.file("out"), &options, &NoProgress).unwrap_err();
        assert!(matches!(error, Error::Io { .. } | Error::Write { .. }), "{error}");
        assert!(error.to_string().contains("out"), "{error}");
    }
    assert_eq!(folder.names(), ["disk.raw", "top.qcow2"]);
}

fn limited_raw_transaction() {
    let folder = Folder::new();
    let before = raw_disk(&folder);
    let transaction = Image::open(folder.file("disk.raw"), &OpenOptions::writable()).unwrap().begin().unwrap();
    // The log has room for the disk, its tables and most of its trailer.
    transaction.write_at(&noise(3, 7 << 19), 0).unwrap();
    transaction.commit().unwrap_err();
    drop(transaction);
    assert!(std::fs::read(folder.file("disk.raw")).unwrap() == before);
    assert_eq!(folder.names(), ["disk.raw"]);
}

fn limited_qcow2_transaction() {
    let folder = Folder::new();
    create_image(&folder.file("top.qcow2"), &NewImage { size: Some(16 << 20), ..NewImage::default() }).unwrap();
    let before = std::fs::read(folder.file("top.qcow2")).unwrap();
    let transaction = Image::open(folder.file("top.qcow2"), &OpenOptions::writable()).unwrap().begin().unwrap();
    transaction.write_at(&noise(3, 8 << 20), 0).unwrap_err();
    drop(transaction);
    assert!(std::fs::read(folder.file("top.qcow2")).unwrap() == before);
    folder.check("top.qcow2");
}
