//! Trees that mke2fs put into a guest must come out as they were, and nothing of a hostile guest may get elsewhere.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::{Guest, MIB, assert_same, describe, path, populate, run, varied_tree};
use qtk_guest::Error;
use qtk_guest::extract::{ExtractOptions, Extracted, extract};

fn take(guest: &Guest, sources: &[&str], dir: &Path) -> Result<Extracted, Error> {
    let sources: Vec<_> = sources.iter().map(|source| path(source)).collect();
    extract(&guest.open(), &sources, dir, ExtractOptions::default())
}

/// As they leave a guest without `owners`.
fn without_set_ids(folder: &Path) {
    run("chmod", &["-R", "u-s,g-s,-t", folder.to_str().unwrap()]);
}

#[test]
fn a_tree_comes_out_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    // mke2fs does not keep fractions of a second.
    varied_tree(&tree, "2021-03-04 05:06:07");
    let guest = Guest::from_folder(folder.path(), "metadata_csum");
    let out = tempfile::tempdir().unwrap();
    let done = take(&guest, &["/tree"], out.path()).unwrap();
    assert_eq!(done.skipped, []);
    without_set_ids(&tree);
    assert_same(&describe(&out.path().join("tree"), false), &describe(&tree, false));
    assert_eq!(done.files, describe(&tree, false).len() as u64 + 1);
    let sparse = out.path().join("tree/sparse").metadata().unwrap();
    assert!(sparse.len() > 30 * MIB && sparse.blocks() * 512 < MIB);
    // Once more over what is there already: directories stay, so their times change.
    take(&guest, &["/tree"], out.path()).unwrap();
    let files = |folder: &Path| -> Vec<_> {
        describe(folder, false).into_iter().filter(|line| !line.ends_with("directory")).collect()
    };
    assert_same(&files(&out.path().join("tree")), &files(&tree));
}

#[test]
fn the_whole_guest_goes_into_the_folder() {
    let guest = Guest::new(&[("etc/hostname", "guest\n"), ("bin", "->usr/bin"), ("usr/bin/tool", "x")]);
    let out = tempfile::tempdir().unwrap();
    take(&guest, &["/"], out.path()).unwrap();
    assert_eq!(std::fs::read_to_string(out.path().join("bin/tool")).unwrap(), "x");
    assert!(out.path().join("lost+found").is_dir());
}

#[test]
fn named_links_are_followed_and_keep_their_name() {
    let guest = Guest::new(&[
        ("boot/vmlinuz-6", "kernel"),
        ("vmlinuz", "->/boot/vmlinuz-6"),
        ("etc", "->usr/etc"),
        ("usr/etc/x", "y"),
    ]);
    let out = tempfile::tempdir().unwrap();
    let done = take(&guest, &["/vmlinuz", "/etc/", "/usr/etc/../etc/x"], out.path()).unwrap();
    assert_eq!((done.files, done.bytes), (4, 8));
    assert_eq!(std::fs::read_to_string(out.path().join("vmlinuz")).unwrap(), "kernel");
    assert!(out.path().join("vmlinuz").symlink_metadata().unwrap().is_file());
    assert_eq!(std::fs::read_to_string(out.path().join("etc/x")).unwrap(), "y");
    assert_eq!(std::fs::read_to_string(out.path().join("x")).unwrap(), "y");
}

#[test]
fn special_files_are_left_out_by_name() {
    let folder = tempfile::tempdir().unwrap();
    run("mkfifo", &[folder.path().join("pipe").to_str().unwrap()]);
    let guest = Guest::from_folder(folder.path(), "metadata_csum");
    let out = tempfile::tempdir().unwrap();
    assert_eq!(take(&guest, &["/pipe"], out.path()).unwrap().skipped, [path("/pipe")]);
}

#[test]
fn what_is_missing_leaves_nothing_behind() {
    let guest = Guest::new(&[("file", "x")]);
    let out = tempfile::tempdir().unwrap();
    let error = take(&guest, &["/file", "/missing"], &out.path().join("new")).unwrap_err();
    assert_eq!(error.to_string(), "cannot read /missing in the guest: no such file or directory");
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn nothing_is_written_through_what_is_there() {
    let guest = Guest::new(&[("dir/file", "from the guest"), ("file", "from the guest")]);
    let out = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let outside = elsewhere.path().to_str().unwrap();
    populate(out.path(), &[("dir", &format!("->{outside}")), ("file", &format!("->{outside}/file"))]);
    assert!(take(&guest, &["/dir"], out.path()).is_err());
    take(&guest, &["/file"], out.path()).unwrap();
    assert_eq!(std::fs::read_to_string(out.path().join("file")).unwrap(), "from the guest");
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);
}

#[test]
fn a_hostile_guest_stays_inside() {
    let elsewhere = tempfile::tempdir().unwrap();
    let outside = elsewhere.path().to_str().unwrap();
    let hostile = |files: &[(&str, &str)], from: &str, to: &str| {
        let folder = tempfile::tempdir().unwrap();
        populate(folder.path(), files);
        let guest = Guest::of_size(4 * MIB, folder.path(), "^metadata_csum,^dir_index");
        guest.replace(from.as_bytes(), to.as_bytes());
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("out");
        std::fs::create_dir(&out).unwrap();
        let result = take(&guest, &["/tree"], &out);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1, "{to}: {result:?}");
        assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0, "{to}: {result:?}");
        result
    };
    for name in ["../../evil", "a/b/c/d/e", "/etc/evil1"] {
        let placeholder = "x".repeat(name.len());
        let placed = format!("tree/{placeholder}");
        assert!(hostile(&[(placed.as_str(), "evil")], &placeholder, name).is_err(), "{name}");
    }
    // The same name twice: a link to elsewhere, then what would be written through it.
    let link = format!("->{outside}");
    for second in ["tree/bbbbbbbb/file", "tree/bbbbbbbb"] {
        let files = [("tree/aaaaaaaa", link.as_str()), (second, "evil")];
        let _ = hostile(&files, "bbbbbbbb", "aaaaaaaa");
    }
    let through_file = format!("->{outside}/evil");
    let _ = hostile(&[("tree/aaaaaaaa", through_file.as_str()), ("tree/bbbbbbbb", "evil")], "bbbbbbbb", "aaaaaaaa");
}
