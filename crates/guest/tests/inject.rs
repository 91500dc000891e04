//! Files put into guests, judged by e2fsck and debugfs, and by what comes out again.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use common::{Guest, MIB, NOW, assert_same, describe, path, pattern, populate, run, varied_tree};
use qtk_disk::Follow;
use qtk_guest::extract::{ExtractOptions, extract};
use qtk_guest::inject::{InjectOptions, Injected, Source, inject};
use qtk_guest::{Accounts, Error, stat};

fn put(guest: &Guest, sources: &[&Path], dest: &str, options: &InjectOptions) -> Result<Injected, Error> {
    let mut sources: Vec<_> = sources.iter().map(|source| Source::Path((*source).to_owned())).collect();
    let done = guest.edit(|tree| inject(tree, &mut sources, &path(dest), options));
    if done.is_ok() {
        guest.check();
    }
    done
}

/// "mode uid:gid size" as debugfs tells it.
fn attributes(guest: &Guest, file: &str) -> String {
    let text = guest.debugfs(&format!("stat {file}"));
    let field = |name: &str| text.split_once(name).unwrap().1.split_whitespace().next().unwrap().to_owned();
    format!("{} {}:{} {}", field("Mode:"), field("User:"), field("Group:"), field("Size:"))
}

fn host_file(folder: &Path, name: &str, content: &[u8], mode: &str) -> std::path::PathBuf {
    let file = folder.join(name);
    std::fs::write(&file, content).unwrap();
    run("chmod", &[mode, file.to_str().unwrap()]);
    run("touch", &["-d", "2021-03-04 05:06:07.891011Z", file.to_str().unwrap()]);
    file
}

const SYSTEM: [(&str, &str); 8] = [
    ("etc/passwd", "root:x:0:0::/:\ndaytona:x:1000:1001::/:\n"),
    ("etc/group", "root:x:0:\nadm:x:4:\n"),
    ("usr/bin/tool", "old content, longer than the new one"),
    ("usr/lib/", ""),
    ("bin", "->usr/bin"),
    ("lib", "->usr/lib"),
    ("etc/resolv.conf", "->../run/resolv.conf"),
    ("run/", ""),
];

#[test]
fn a_file_into_a_directory_or_to_a_name() {
    let guest = Guest::new(&SYSTEM);
    let host = tempfile::tempdir().unwrap();
    let file = host_file(host.path(), "daemon", &pattern(5_000_000), "4750");
    let plain = InjectOptions::default();
    assert_eq!(put(&guest, &[&file], "/usr/bin", &plain).unwrap(), Injected { files: 1, bytes: 5_000_000 });
    assert_eq!(guest.content("/usr/bin/daemon"), pattern(5_000_000));
    assert_eq!(attributes(&guest, "/usr/bin/daemon"), "0750 0:0 5000000");
    let tree = guest.open();
    let (entry, _) = stat(&tree, &path("/usr/bin/daemon"), Follow::NotLast).unwrap();
    assert_eq!((entry.metadata.mtime.seconds, entry.metadata.mtime.nanos), (1_614_834_367, 891_011_000));
    assert_eq!(entry.metadata.ctime.seconds, NOW);
    assert!(guest.debugfs("ex /usr/bin/daemon").lines().count() <= 4, "one extent for a file of a known size");

    // Through the guest's links, to new names.
    for dest in ["/bin/", "/bin/other", "/lib/new", "/etc/resolv.conf"] {
        put(&guest, &[&file], dest, &plain).unwrap();
    }
    for written in ["/usr/bin/other", "/usr/lib/new", "/run/resolv.conf"] {
        assert_eq!(guest.content(written).len(), 5_000_000, "{written}");
    }
    let missing = put(&guest, &[&file], "/opt/x/daemon", &plain).unwrap_err();
    assert_eq!(missing.to_string(), "cannot write /opt in the guest: no such file or directory");
    let missing = put(&guest, &[&file], "/opt/", &plain).unwrap_err();
    assert_eq!(missing.to_string(), "cannot write into /opt in the guest: no such file or directory");
    let parents = InjectOptions { parents: true, ..plain };
    put(&guest, &[&file], "/opt/x/daemon", &parents).unwrap();
    put(&guest, &[&file], "/srv/y/", &parents).unwrap();
    assert_eq!(attributes(&guest, "/opt/x/daemon"), "0750 0:0 5000000");
    assert_eq!(attributes(&guest, "/srv/y/daemon"), "0750 0:0 5000000");
    assert_eq!(guest.debugfs("stat /opt/x").split("Mode:").nth(1).unwrap().split_whitespace().next(), Some("0755"));
}

#[test]
fn replaces_one_name_and_keeps_its_label() {
    let folder = tempfile::tempdir().unwrap();
    populate(folder.path(), &SYSTEM);
    std::fs::hard_link(folder.path().join("usr/bin/tool"), folder.path().join("usr/bin/same")).unwrap();
    let guest = Guest::from_folder(folder.path(), "metadata_csum");
    run("debugfs", &["-w", "-R", "ea_set /usr/bin/tool security.selinux label", guest.host_path()]);
    run("debugfs", &["-w", "-R", "ea_set /usr/bin/tool security.capability caps", guest.host_path()]);
    let host = tempfile::tempdir().unwrap();
    let file = host_file(host.path(), "tool", b"new", "755");
    // The first time it is one of two names, the second time the only one.
    for _ in 0..2 {
        put(&guest, &[&file], "/bin/tool", &InjectOptions::default()).unwrap();
        assert_eq!(guest.content("/usr/bin/tool"), b"new");
        assert_eq!(attributes(&guest, "/usr/bin/tool"), "0755 0:0 3");
        let (_, xattrs) = stat(&guest.open(), &path("/bin/tool"), Follow::All).unwrap();
        assert_eq!(xattrs, [(b"security.selinux".to_vec(), b"label".to_vec())]);
        run("debugfs", &["-w", "-R", "ea_set /usr/bin/tool security.capability caps", guest.host_path()]);
    }
    assert_eq!(guest.content("/usr/bin/same"), SYSTEM[2].1.as_bytes());
    assert_eq!(stat(&guest.open(), &path("/bin/same"), Follow::All).unwrap().1.len(), 2);
}

#[test]
fn hard_links_survive_sources_that_replace_each_other() {
    let host = tempfile::tempdir().unwrap();
    populate(host.path(), &[("x/a", "first"), ("y/a", "second")]);
    std::fs::hard_link(host.path().join("x/a"), host.path().join("x/b")).unwrap();
    let guest = Guest::new(&SYSTEM);
    let sources = ["x/a", "y/a", "x/b"].map(|source| host.path().join(source));
    put(&guest, &sources.each_ref().map(std::path::PathBuf::as_path), "/run", &InjectOptions::default()).unwrap();
    assert_eq!((guest.content("/run/a"), guest.content("/run/b")), (b"second".to_vec(), b"first".to_vec()));
}

#[test]
fn mode_and_owner_as_asked() {
    let guest = Guest::new(&SYSTEM);
    let host = tempfile::tempdir().unwrap();
    let file = host_file(host.path(), "file", b"x", "600");
    let accounts = Accounts::read(&guest.open()).unwrap();
    let owner = |text: &str| text.parse::<qtk_guest::Owner>().unwrap().resolve(&accounts).unwrap();
    for (mode, named, expected) in [
        (Some("4755"), "daytona:", "04755 1000:1001 1"),
        (Some("go+r"), ":adm", "0644 0:4 1"),
        (None, "77:88", "0600 77:88 1"),
    ] {
        let mode = mode.map(|mode| mode.parse().unwrap());
        let options = InjectOptions { mode, owner: owner(named), ..InjectOptions::default() };
        put(&guest, &[&file], "/file", &options).unwrap();
        assert_eq!(attributes(&guest, "/file").trim_start_matches('0'), expected.trim_start_matches('0'));
    }
}

#[test]
fn a_tree_goes_in_and_comes_out_as_it_was() {
    let host = tempfile::tempdir().unwrap();
    let tree = host.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    varied_tree(&tree, "2021-03-04 05:06:07.891011");
    run("mkfifo", &[tree.join("pipe").to_str().unwrap()]);
    let guest = Guest::new(&SYSTEM);
    let options = InjectOptions { preserve: true, ..InjectOptions::default() };
    let before = guest.open().metadata(guest.open().root()).unwrap().mtime;
    let done = put(&guest, &[&tree], "/", &options).unwrap();
    assert_eq!(done.files, describe(&tree, true).len() as u64 + 1);
    assert_ne!(guest.open().metadata(guest.open().root()).unwrap().mtime, before);
    assert_eq!(attributes(&guest, "/tree/a/b/c/deep"), format!("04755 {} 4", ids(&tree)));

    let out = tempfile::tempdir().unwrap();
    extract(&guest.open(), &[path("/tree")], out.path(), ExtractOptions::default()).unwrap();
    std::fs::remove_file(tree.join("pipe")).unwrap();
    run("chmod", &["-R", "u-s,g-s,-t", tree.to_str().unwrap()]);
    run("touch", &["-d", "2021-03-04 05:06:07.891011", tree.to_str().unwrap()]);
    assert_same(&describe(&out.path().join("tree"), false), &describe(&tree, false));
    // And by somebody else's reading.
    let dumped = tempfile::tempdir().unwrap();
    guest.debugfs(&format!("rdump /tree {}", dumped.path().display()));
    let dumped = dumped.path().join("tree");
    run("diff", &["-r", "--no-dereference", "-x", "pipe", dumped.to_str().unwrap(), tree.to_str().unwrap()]);
    let sparse = guest.debugfs("stat /tree/sparse");
    let blocks: u64 = sparse.split_once("Blockcount:").unwrap().1.split_whitespace().next().unwrap().parse().unwrap();
    assert!(blocks * 512 < MIB, "{sparse}");
    assert!(guest.debugfs("stat /tree/pipe").contains("Type: FIFO"));
}

fn ids(file: &Path) -> String {
    let metadata = file.metadata().unwrap();
    format!("{}:{}", metadata.uid(), metadata.gid())
}

#[test]
fn trees_merge_with_what_is_there() {
    let host = tempfile::tempdir().unwrap();
    populate(
        host.path(),
        &[
            ("root/lib/new", "through the link"),
            ("root/etc/resolv.conf", "a file now"),
            ("root/usr/bin/tool", "replaced"),
            ("root/usr/bin/link", "->tool"),
        ],
    );
    let guest = Guest::new(&SYSTEM);
    put(&guest, &[&host.path().join("root/.")], "/", &InjectOptions::default()).unwrap();
    put(&guest, &[&host.path().join("root/.")], "/", &InjectOptions::default()).unwrap();
    assert_eq!(guest.content("/usr/lib/new"), b"through the link");
    assert_eq!(guest.content("/etc/resolv.conf"), b"a file now");
    assert_eq!(guest.content("/bin/link"), b"replaced");
    assert!(guest.debugfs("stat /etc/resolv.conf").contains("Type: regular"));
    // A copy under a new name.
    put(&guest, &[&host.path().join("root")], "/copy", &InjectOptions::default()).unwrap();
    assert_eq!(guest.content("/copy/lib/new"), b"through the link");

    let error = |dest: &str, source: &str| {
        put(&guest, &[&host.path().join(source)], dest, &InjectOptions::default()).unwrap_err().to_string()
    };
    populate(host.path(), &[("a/usr", "file over a directory"), ("b/etc/passwd/x", "directory over a file")]);
    assert_eq!(error("/", "a/."), "cannot write /usr in the guest: is a directory");
    assert_eq!(error("/", "b/."), "cannot make the directory /etc/passwd in the guest: not a directory");
}

#[test]
fn named_sources_stand_for_their_content() {
    let host = tempfile::tempdir().unwrap();
    populate(host.path(), &[("real", "content"), ("link", "->real")]);
    let guest = Guest::new(&SYSTEM);
    put(&guest, &[&host.path().join("link")], "/run", &InjectOptions::default()).unwrap();
    assert!(guest.debugfs("stat /run/link").contains("Type: regular"));
    let keep = InjectOptions { keep_links: true, ..InjectOptions::default() };
    put(&guest, &[&host.path().join("link")], "/run", &keep).unwrap();
    assert!(guest.debugfs("stat /run/link").contains("Type: symlink"));

    let mut stream = &pattern(3_000_000)[..];
    let to = |guest: &Guest, stream: &mut dyn std::io::Read, dest: &str| {
        guest.edit(|tree| inject(tree, &mut [Source::Stream(stream)], &path(dest), &InjectOptions::default()))
    };
    to(&guest, &mut stream, "/run/stream").unwrap();
    guest.check();
    assert_eq!(guest.content("/run/stream"), pattern(3_000_000));
    assert_eq!(attributes(&guest, "/run/stream"), "0644 0:0 3000000");
    assert!(to(&guest, &mut &b""[..], "/run").is_err());
}

#[test]
fn extended_attributes_are_kept_on_request() {
    let host = tempfile::tempdir().unwrap();
    let file = host_file(host.path(), "file", b"x", "644");
    rustix::fs::setxattr(&file, "user.note", b"kept", rustix::fs::XattrFlags::empty()).unwrap();
    let guest = Guest::new(&SYSTEM);
    put(&guest, &[&file], "/plain", &InjectOptions::default()).unwrap();
    put(&guest, &[&file], "/kept", &InjectOptions { preserve: true, ..InjectOptions::default() }).unwrap();
    let xattrs = |file: &str| stat(&guest.open(), &path(file), Follow::NotLast).unwrap().1;
    assert_eq!(xattrs("/plain"), []);
    assert_eq!(xattrs("/kept"), [(b"user.note".to_vec(), b"kept".to_vec())]);
    assert!(guest.debugfs("ea_list /kept").contains("user.note (4) = \"kept\""));
}

#[test]
fn a_source_that_cannot_be_read_changes_nothing() {
    let host = tempfile::tempdir().unwrap();
    let file = host_file(host.path(), "file", b"x", "644");
    let guest = Guest::new(&SYSTEM);
    let before = std::fs::read(guest.host_path()).unwrap();
    let mut sources = [Source::Path(file), Source::Path(host.path().join("missing"))];
    let error = guest.edit(|tree| inject(tree, &mut sources, &path("/run"), &InjectOptions::default())).unwrap_err();
    assert!(error.to_string().ends_with("/missing"), "{error}");
    assert!(std::fs::read(guest.host_path()).unwrap() == before, "the image has changed");
}
