//! Listings against what mke2fs was given.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use common::{Guest, path};
use qtk_disk::{FileType, Follow};
use qtk_guest::{Accounts, Error, Listing, list, stat};

fn listings(guest: &Guest, of: &str, recursive: bool) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let text = |name: &[u8]| String::from_utf8(name.to_vec()).unwrap();
    let result: Result<(), Error> = list(&guest.open(), &path(of), recursive, &mut |listing: Listing| {
        let directory = listing.directory.map_or(String::new(), |dir| dir.path.to_string());
        found.push((directory, listing.entries.iter().map(|entry| text(&entry.name)).collect()));
        Ok(())
    });
    result.unwrap();
    found
}

#[test]
fn lists_directories_files_and_links() {
    let guest = Guest::new(&[
        ("d/b", "1"),
        ("d/a/x", "2"),
        ("d/a/y/", ""),
        ("to-dir", "->d"),
        ("to-file", "->d/b"),
        ("to-none", "->x"),
    ]);
    let strings = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let one = |directory: &str, names: &[&str]| vec![(directory.to_owned(), strings(names))];
    assert_eq!(listings(&guest, "/d", false), one("/d", &["a", "b"]));
    assert_eq!(listings(&guest, "/to-dir", false), one("/d", &["a", "b"]));
    assert_eq!(listings(&guest, "/d/b", false), one("", &["b"]));
    assert_eq!(listings(&guest, "/to-file", false), one("", &["to-file"]));
    assert_eq!(listings(&guest, "/to-none", false), one("", &["to-none"]));
    let all = [one("/d", &["a", "b"]), one("/d/a", &["x", "y"]), one("/d/a/y", &[])].concat();
    assert_eq!(listings(&guest, "/d", true), all);
    assert_eq!(listings(&guest, "/", true).len(), 5);
}

#[test]
fn tells_what_is_known_of_a_file() {
    let guest = Guest::new(&[("file", "content"), ("link", "->file")]);
    let tree = guest.open();
    let (link, _) = stat(&tree, &path("/link"), Follow::NotLast).unwrap();
    assert_eq!((link.metadata.file_type, link.target.as_deref()), (FileType::Symlink, Some(&b"file"[..])));
    let (file, xattrs) = stat(&tree, &path("/link"), Follow::All).unwrap();
    assert_eq!((file.path, file.metadata.size, xattrs.len()), (path("/file"), 7, 0));
}

#[test]
fn a_directory_that_holds_itself_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    common::populate(folder.path(), &[("outer/inner/file", "")]);
    let guest = Guest::from_folder(folder.path(), "^metadata_csum,^dir_index");
    common::run("debugfs", &["-w", "-R", "link /outer /outer/inner/again", guest.host_path()]);
    let result = list(&guest.open(), &path("/"), true, &mut |_| Ok::<(), Error>(()));
    let error = result.unwrap_err();
    assert!(error.is_corrupt(), "{error}");
}

#[test]
fn an_entry_of_an_inode_that_is_not_in_use_is_damage() {
    let guest = Guest::new(&[("dir/file", "x")]);
    common::run("debugfs", &["-w", "-R", "clri /dir/file", guest.host_path()]);
    let error = list(&guest.open(), &path("/dir"), false, &mut |_| Ok::<(), Error>(())).unwrap_err();
    assert!(error.is_corrupt(), "{error}");
}

#[test]
fn configuration_that_is_no_file_counts_as_none() {
    let folder = tempfile::tempdir().unwrap();
    common::populate(folder.path(), &[("etc/os-release", ""), ("etc/passwd", "->fstab"), ("etc/group/", "")]);
    common::run("mkfifo", &[folder.path().join("etc/fstab").to_str().unwrap()]);
    let guest = Guest::from_folder(folder.path(), "metadata_csum");
    let accounts = Accounts::read(&guest.open()).unwrap();
    assert_eq!((accounts.user_name(0), accounts.group_name(0)), (None, None));
}
