//! Changes to files of a guest, judged by e2fsck and debugfs.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use common::{Guest, MIB, path, populate, run};
use qtk_disk::{Follow, GuestPath, Tree};
use qtk_guest::{
    ChownOptions, Error, LinkOptions, MkdirOptions, Mode, OwnerIds, RemoveOptions, WriteOptions, chmod, chown, link,
    make_directories, move_files, remove, stat, write,
};

fn edit<T>(guest: &Guest, change: impl FnOnce(&mut Tree) -> Result<T, Error>) -> Result<T, Error> {
    let result = guest.edit(change);
    if result.is_ok() {
        guest.check();
    }
    result
}

fn message<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    result.unwrap_err().to_string()
}

fn exists(guest: &Guest, file: &str) -> bool {
    guest.open().locate(file, Follow::NotLast).is_ok_and(|location| location.node.is_some())
}

/// Octal permissions, owner and group.
fn attributes(guest: &Guest, file: &str) -> (u16, u32, u32) {
    let (entry, _) = stat(&guest.open(), &path(file), Follow::NotLast).unwrap();
    (entry.metadata.permissions, entry.metadata.uid, entry.metadata.gid)
}

fn guest() -> Guest {
    Guest::new(&[
        ("a/b/file", "content"),
        ("a/c/", ""),
        ("a/link", "->b/file"),
        ("etc/hosts", "localhost"),
        ("to-a", "->a"),
    ])
}

#[test]
fn removes_files_and_trees() {
    let guest = guest();
    let one = |path: &str, options: RemoveOptions| edit(&guest, |tree| remove(tree, &GuestPath::from(path), options));
    let plain = RemoveOptions::default();
    let recursive = RemoveOptions { recursive: true, ..plain };
    assert_eq!(message(one("/a", plain)), "cannot remove /a in the guest: is a directory");
    assert_eq!(message(one("/missing", plain)), "cannot remove /missing in the guest: no such file or directory");
    one("/missing/deeper", RemoveOptions { force: true, ..plain }).unwrap();
    one("/to-a", recursive).unwrap();
    one("/a/link", plain).unwrap();
    assert!(exists(&guest, "/a/b/file") && !exists(&guest, "/a/link"));
    one("/a", recursive).unwrap();
    assert!(!exists(&guest, "/a"));
    assert_eq!(message(one("/", recursive)), "cannot remove / in the guest: is a mount point");
}

#[test]
fn makes_directories() {
    let guest = guest();
    let make = |path: &str, options: &MkdirOptions| {
        edit(&guest, |tree| make_directories(tree, &GuestPath::from(path), options).map(drop))
    };
    let plain = MkdirOptions::default();
    make("/new", &plain).unwrap();
    assert_eq!(attributes(&guest, "/new"), (0o755, 0, 0));
    assert_eq!(message(make("/new", &plain)), "cannot make the directory /new in the guest: already exists");
    assert_eq!(message(make("/x/y", &plain)), "cannot make the directory /x in the guest: no such file or directory");
    let owner = OwnerIds { uid: Some(5), gid: Some(6) };
    let parents = MkdirOptions { parents: true, mode: Some(Mode::exactly(0o1777)), owner };
    make("/x/y/../z//w/", &parents).unwrap();
    assert_eq!(attributes(&guest, "/x/z/w"), (0o1777, 5, 6));
    assert_eq!(attributes(&guest, "/x/z"), (0o755, 5, 6));
    make("/to-a/d", &parents).unwrap();
    make("/to-a/d", &parents).unwrap();
    assert!(exists(&guest, "/a/d"));
    assert_eq!(
        message(make("/etc/hosts/x", &parents)),
        "cannot make the directory /etc/hosts in the guest: not a directory"
    );
}

#[test]
fn moves_within_a_file_system() {
    let guest = guest();
    let to = |sources: &[&str], dest: &str| {
        let sources: Vec<_> = sources.iter().map(|source| path(source)).collect();
        edit(&guest, |tree| move_files(tree, &sources, &path(dest)))
    };
    to(&["/a/b/file"], "/etc/hosts").unwrap();
    assert_eq!(guest.content("/etc/hosts"), b"content");
    to(&["/etc/hosts", "/a/link"], "/a/c").unwrap();
    assert!(exists(&guest, "/a/c/hosts") && exists(&guest, "/a/c/link"));
    to(&["/a/c"], "/etc/d").unwrap();
    assert_eq!(guest.content("/etc/d/hosts"), b"content");
    assert_eq!(
        message(to(&["/etc"], "/etc/d/e")),
        "cannot move /etc/d/e in the guest: lies inside what is to be moved"
    );
    assert_eq!(
        message(to(&["/etc"], "/etc/d")),
        "cannot move /etc/d/etc in the guest: lies inside what is to be moved"
    );
    assert_eq!(message(to(&["/etc/d", "/a"], "/new")), "cannot move /new in the guest: not a directory");
}

#[test]
fn makes_links() {
    let guest = guest();
    let make = |target: &str, at: &str, symbolic, force| {
        edit(&guest, |tree| link(tree, target.as_bytes(), &path(at), LinkOptions { symbolic, force }))
    };
    make("/a/b/file", "/a/hard", false, false).unwrap();
    assert_eq!(guest.content("/a/hard"), b"content");
    assert_eq!(stat(&guest.open(), &path("/a/hard"), Follow::NotLast).unwrap().0.metadata.links, 2);
    make("../etc/hosts", "/a/c", true, false).unwrap();
    assert_eq!(
        guest.open().read_link(guest.open().resolve("/a/c/hosts", Follow::NotLast).unwrap()).unwrap(),
        b"../etc/hosts"
    );
    assert_eq!(message(make("x", "/to-a", true, false)), "cannot make the link /to-a in the guest: already exists");
    make("etc", "/to-a", true, true).unwrap();
    assert_eq!(guest.content("/to-a/hosts"), b"localhost");
    assert_eq!(message(make("/a", "/hard-dir", false, false)), "cannot link to /a in the guest: is a directory");
    make("/a/hard", "/a/b/file", false, true).unwrap();
}

#[test]
fn changes_modes_and_owners() {
    let guest = guest();
    edit(&guest, |tree| chmod(tree, &path("/to-a"), &"o-rx,g+s".parse().unwrap(), false)).unwrap();
    assert_eq!(attributes(&guest, "/a").0, 0o2750);
    edit(&guest, |tree| chmod(tree, &path("/a"), &"u=rwX,go=".parse().unwrap(), true)).unwrap();
    assert_eq!((attributes(&guest, "/a/c").0, attributes(&guest, "/a/b/file").0), (0o700, 0o600));
    assert_eq!(attributes(&guest, "/a/link").0, 0o777);

    let owner = OwnerIds { uid: Some(70_000), gid: None };
    edit(&guest, |tree| chmod(tree, &path("/etc/hosts"), &Mode::exactly(0o6755), false)).unwrap();
    edit(&guest, |tree| chown(tree, &path("/etc/hosts"), owner, ChownOptions::default())).unwrap();
    let (mode, uid, _) = attributes(&guest, "/etc/hosts");
    assert_eq!((mode, uid), (0o755, 70_000));
    edit(&guest, |tree| chown(tree, &path("/a"), owner, ChownOptions { recursive: true, no_dereference: false }))
        .unwrap();
    for changed in ["/a", "/a/b", "/a/b/file", "/a/link"] {
        assert_eq!(attributes(&guest, changed).1, 70_000, "{changed}");
    }
    assert_ne!(attributes(&guest, "/to-a").1, 70_000);
    edit(&guest, |tree| chown(tree, &path("/to-a"), owner, ChownOptions { recursive: false, no_dereference: true }))
        .unwrap();
    assert_eq!(attributes(&guest, "/to-a").1, 70_000);
}

#[test]
fn writes_content() {
    let guest = guest();
    let to = |file: &str, content: &str, options: &WriteOptions| {
        edit(&guest, |tree| write(tree, &path(file), &mut content.as_bytes(), options))
    };
    let plain = WriteOptions::default();
    edit(&guest, |tree| chmod(tree, &path("/a/b/file"), &Mode::exactly(0o640), false)).unwrap();
    assert_eq!(to("/a/link", "new", &plain).unwrap(), 3);
    assert_eq!(guest.content("/a/b/file"), b"new");
    assert_eq!(attributes(&guest, "/a/b/file").0, 0o640);
    to("/a/b/file", " and more", &WriteOptions { append: true, ..plain.clone() }).unwrap();
    assert_eq!(guest.content("/a/b/file"), b"new and more");
    to("/fresh", "", &plain).unwrap();
    assert_eq!(attributes(&guest, "/fresh"), (0o644, 0, 0));
    let owner = OwnerIds { uid: Some(1), gid: Some(2) };
    to("/fresh", "x", &WriteOptions { mode: Some(Mode::exactly(0o600)), owner, append: false }).unwrap();
    assert_eq!(attributes(&guest, "/fresh"), (0o600, 1, 2));
    assert_eq!(message(to("/a", "x", &plain)), "cannot write /a in the guest: is a directory");
    assert_eq!(message(to("/none/x", "x", &plain)), "cannot write /none in the guest: no such file or directory");
}

/// Root in partition 1, `/boot` in partition 2, each of 24 MiB.
fn two_file_systems() -> (Guest, impl Fn(&Guest)) {
    let disk = Guest::empty(64 * MIB);
    run("sgdisk", &["-n1:1M:+24M", "-n2:0:+24M", disk.host_path()]);
    let fill = |offset: u64, files: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        populate(folder.path(), files);
        let part = Guest::empty(24 * MIB);
        run("mke2fs", &["-q", "-t", "ext4", "-d", folder.path().to_str().unwrap(), part.host_path()]);
        disk.write(&std::fs::read(part.host_path()).unwrap(), offset);
    };
    fill(
        MIB,
        &[("etc/fstab", "/dev/vda2 /boot ext4 defaults 0 0\n"), ("boot/", ""), ("a/b/file", "x"), ("a/link", "->b")],
    );
    fill(25 * MIB, &[("vmlinuz", "kernel")]);
    let check = |disk: &Guest| {
        let image = std::fs::read(disk.host_path()).unwrap();
        for start in [MIB, 25 * MIB] {
            let part = Guest::empty(24 * MIB);
            let start = usize::try_from(start).unwrap();
            part.write(&image[start..start + (24 << 20)], 0);
            part.check();
        }
    };
    (disk, check)
}

#[test]
fn moves_across_mounts_keep_everything() {
    let (disk, check) = two_file_systems();
    disk.edit(|tree| {
        chmod(tree, &path("/a/b/file"), &Mode::exactly(0o4711), false).unwrap();
        link(tree, b"/a/b/file", &path("/a/hard"), LinkOptions::default()).unwrap();
        let file = tree.resolve("/a/b/file", Follow::All).unwrap();
        tree.set_xattr(file, b"user.note", b"kept").unwrap();
    });
    disk.edit(|tree| move_files(tree, &[path("/a")], &path("/boot"))).unwrap();
    check(&disk);
    assert!(!exists(&disk, "/a"));
    let tree = disk.open();
    let (file, xattrs) = stat(&tree, &path("/boot/a/b/file"), Follow::NotLast).unwrap();
    let (hard, _) = stat(&tree, &path("/boot/a/hard"), Follow::NotLast).unwrap();
    assert_eq!((file.metadata.permissions, file.metadata.links), (0o4711, 2));
    assert_eq!(file.metadata.number, hard.metadata.number);
    assert_eq!(xattrs, [(b"user.note".to_vec(), b"kept".to_vec())]);
    assert_eq!(stat(&tree, &path("/boot/a/link"), Follow::NotLast).unwrap().0.target.as_deref(), Some(&b"b"[..]));

    disk.edit(|tree| move_files(tree, &[path("/boot/vmlinuz")], &path("/etc/fstab.d"))).unwrap();
    check(&disk);
    assert_eq!(disk.content("/etc/fstab.d"), b"kernel");
    for (result, expected) in [
        (
            disk.edit(|tree| move_files(tree, &[path("/boot")], &path("/x"))),
            "cannot move /boot in the guest: is a mount point",
        ),
        (
            disk.edit(|tree| remove(tree, &path("/boot"), RemoveOptions { recursive: true, force: false })),
            "cannot remove /boot in the guest: is a mount point",
        ),
        (
            disk.edit(|tree| link(tree, b"/etc/fstab", &path("/boot/fstab"), LinkOptions::default())),
            "cannot make the link /boot in the guest: on another file system",
        ),
    ] {
        assert_eq!(message(result), expected);
    }
}

#[test]
fn a_fat_volume_can_only_be_read() {
    let disk = Guest::empty(64 * MIB);
    run("sgdisk", &["-n1:1M:+40M", "-n15:0:+8M", "-t15:ef00", disk.host_path()]);
    let folder = tempfile::tempdir().unwrap();
    populate(folder.path(), &[("etc/fstab", "LABEL=UEFI /boot/efi vfat umask=0077 0 1\n"), ("boot/efi/", "")]);
    let (root, esp) = (Guest::empty(40 * MIB), Guest::empty(8 * MIB));
    run("mke2fs", &["-q", "-t", "ext4", "-d", folder.path().to_str().unwrap(), root.host_path()]);
    run("mkfs.vfat", &["-n", "UEFI", esp.host_path()]);
    run("mcopy", &["-i", esp.host_path(), "/etc/passwd", "::grub.cfg"]);
    disk.write(&std::fs::read(root.host_path()).unwrap(), MIB);
    disk.write(&std::fs::read(esp.host_path()).unwrap(), 41 * MIB);
    assert_eq!(disk.content("/boot/efi/GRUB.CFG"), std::fs::read("/etc/passwd").unwrap());
    const REASON: &str = "/boot/efi in the guest: lies on a FAT file system, which qtk cannot edit yet";
    let at = |file: &str| disk.edit(|tree| write(tree, &path(file), &mut &b"x"[..], &WriteOptions::default()));
    assert_eq!(message(at("/boot/efi/new")), format!("cannot write {REASON}"));
    assert_eq!(message(at("/boot/efi/grub.cfg")), format!("cannot write {REASON}"));
    let removed = disk.edit(|tree| remove(tree, &path("/boot/efi/grub.cfg"), RemoveOptions::default()));
    assert_eq!(message(removed), format!("cannot remove {REASON}"));
    let moved = disk.edit(|tree| move_files(tree, &[path("/etc/fstab")], &path("/boot/efi")));
    assert_eq!(message(moved), format!("cannot copy {REASON}"));
}

#[test]
fn a_tree_for_reading_refuses_changes() {
    let guest = guest();
    let mut tree = guest.open();
    let result = write(&mut tree, &path("/etc/hosts"), &mut &b"x"[..], &WriteOptions::default());
    assert_eq!(message(result), "cannot write / in the guest: the image is open for reading only");
}

#[test]
fn an_edit_of_the_root_does_not_touch_boot() {
    let (disk, check) = two_file_systems();
    let boot = |disk: &Guest| std::fs::read(disk.host_path()).unwrap()[25 << 20..49 << 20].to_vec();
    let before = boot(&disk);
    disk.edit(|tree| write(tree, &path("/etc/x"), &mut &b"x"[..], &WriteOptions::default())).unwrap();
    check(&disk);
    assert!(boot(&disk) == before, "/boot has changed");
}

#[test]
fn a_slash_asks_for_a_directory_and_not_for_what_a_link_leads_to() {
    let guest = guest();
    let recursive = RemoveOptions { recursive: true, ..RemoveOptions::default() };
    for (name, problem) in [
        ("/to-a/", "not a directory"),
        ("/a/b/..", "not a valid file name"),
        ("/a/.", "not a valid file name"),
        ("/a/b/file/", "not a directory"),
    ] {
        let removed = message(edit(&guest, |tree| remove(tree, &path(name), recursive)));
        assert_eq!(removed, format!("cannot remove {name} in the guest: {problem}"));
        let moved = message(edit(&guest, |tree| move_files(tree, &[path(name)], &path("/etc"))));
        assert_eq!(moved, format!("cannot move {name} in the guest: {problem}"));
    }
    edit(&guest, |tree| move_files(tree, &[path("/a/c/")], &path("/a/d/"))).unwrap();
    assert!(exists(&guest, "/a/d") && exists(&guest, "/a/b/file"));
    let new = path("/etc/new/");
    let refused = |action: &str| format!("cannot {action} /etc/new/ in the guest: not a directory");
    let moved = edit(&guest, |tree| move_files(tree, &[path("/etc/hosts")], &new));
    assert_eq!(message(moved), refused("move"));
    let written = edit(&guest, |tree| write(tree, &new, &mut &b"x"[..], &WriteOptions::default()));
    assert_eq!(message(written), refused("write"));
    let symbolic = LinkOptions { symbolic: true, ..LinkOptions::default() };
    assert_eq!(message(edit(&guest, |tree| link(tree, b"hosts", &new, symbolic))), refused("make the link"));
}
