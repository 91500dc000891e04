//! Every verb on the small guest, judged by debugfs and the file-system checkers.

use std::process::Stdio;

use crate::support::{Workshop, fails, json, ok, run};

/// What debugfs says about a path on the guest's root file system.
fn debugfs(workshop: &Workshop, image: &str, request: &str) -> String {
    ok(&mut workshop.sh("qemu-img", &format!("convert -O raw {image} judge.raw")));
    ok(&mut workshop.debugfs("judge.raw", &["-R", request]))
}

#[test]
fn files_arrive_as_asked() {
    let workshop = Workshop::new();
    workshop.write("tool", b"#!/bin/sh\n");
    workshop.write("site/a/index.html", b"<p>hello");
    std::os::unix::fs::symlink("a/index.html", workshop.path("site/start")).unwrap();
    ok(&mut workshop.qtk("inject --parents --mode 4755 --owner 33:44 base.qcow2 tool /opt/bin/"));
    ok(&mut workshop.qtk("inject base.qcow2 site /srv"));
    ok(&mut workshop.qtk("inject base.qcow2 tool /etc/renamed"));
    workshop.fsck("base.qcow2");

    let stat = debugfs(&workshop, "base.qcow2", "stat /opt/bin/tool");
    assert!(stat.contains("Mode:  04755") && stat.contains("User:    33   Group:    44"), "{stat}");
    assert_eq!(debugfs(&workshop, "base.qcow2", "cat /srv/site/a/index.html"), "<p>hello");
    assert_eq!(debugfs(&workshop, "base.qcow2", "cat /etc/renamed"), "#!/bin/sh\n");
    assert!(debugfs(&workshop, "base.qcow2", "stat /srv/site/start").contains("Fast link dest: \"a/index.html\""));
    let stat = debugfs(&workshop, "base.qcow2", "stat /srv/site");
    assert!(stat.contains("Mode:  0755") && stat.contains("User:     0   Group:     0"), "{stat}");
}

#[test]
fn standard_input_is_a_source() {
    let workshop = Workshop::new();
    workshop.write("input", b"from a pipe\n");
    let input = || std::fs::File::open(workshop.path("input")).unwrap();
    ok(workshop.qtk("inject base.qcow2 - /etc/piped").stdin(input()));
    ok(workshop.qtk("write base.qcow2 /etc/written --mode 0600").stdin(input()));
    ok(workshop.qtk("write base.qcow2 /etc/written --append").stdin(input()));
    ok(&mut workshop.qtk("write base.qcow2 /etc/hostname --content golden"));
    assert_eq!(ok(&mut workshop.qtk("cat base.qcow2 /etc/piped /etc/written")), "from a pipe\n".repeat(3));
    assert_eq!(debugfs(&workshop, "base.qcow2", "cat /etc/hostname"), "golden");
    assert!(debugfs(&workshop, "base.qcow2", "stat /etc/written").contains("Mode:  0600"));
    workshop.fsck("base.qcow2");
}

#[test]
fn the_tree_changes_as_with_coreutils() {
    let workshop = Workshop::new();
    for line in [
        "mkdir --parents --mode 0750 base.qcow2 /var/lib/a/b",
        "write base.qcow2 /var/lib/a/b/one --content 1",
        "ln base.qcow2 /var/lib/a/b/one /var/lib/a/two",
        "ln -s base.qcow2 b/four /var/lib/a/three",
        "ln -sf base.qcow2 b/one /var/lib/a/three",
        "mv base.qcow2 /var/lib/a/b/one /var/lib/a/b/four",
        "chmod base.qcow2 u+x,go-r /var/lib/a/two",
        "chown -R base.qcow2 4321:4322 /var/lib/a",
        "mkdir base.qcow2 /var/lib/gone",
        "write base.qcow2 /var/lib/gone/file --content x",
        "rm -r base.qcow2 /var/lib/gone",
        "rm -rf base.qcow2 /var/lib/gone",
    ] {
        ok(&mut workshop.qtk(line));
    }
    workshop.fsck("base.qcow2");
    let listing = ok(&mut workshop.qtk("ls -lR base.qcow2 /var/lib/a"));
    let columns: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
    let has = |start: &[&str], end: &[&str]| columns.iter().any(|line| line.starts_with(start) && line.ends_with(end));
    assert!(has(&["drwxr-x---", "2", "4321", "4322"], &["b"]), "{listing}");
    assert!(has(&["-rwx------", "2", "4321", "4322", "1"], &["two"]), "{listing}");
    assert!(has(&["lrwxrwxrwx", "1", "4321", "4322", "5"], &["three", "->", "b/one"]), "{listing}");
    assert!(has(&["-rwx------", "2"], &["four"]), "{listing}");
    fails(&mut workshop.qtk("stat base.qcow2 /var/lib/gone"), 1, &["base.qcow2", "/var/lib/gone", "no such file"]);
    fails(&mut workshop.qtk("rm base.qcow2 /var/lib/a"), 1, &["/var/lib/a", "is a directory"]);
    fails(&mut workshop.qtk("mv base.qcow2 /var/lib /var/lib/a"), 1, &["/var/lib"]);
}

#[test]
fn owners_are_the_guests() {
    let workshop = Workshop::new();
    workshop.write("file", b"x");
    ok(&mut workshop.qtk("inject --owner root:root base.qcow2 file /etc/by-name"));
    let stat = &json(&mut workshop.qtk("stat --json base.qcow2 /etc/by-name"))[0];
    assert_eq!((&stat["user"], &stat["uid"]), (&"root".into(), &0.into()));
    fails(
        &mut workshop.qtk("inject --owner nobody-here base.qcow2 file /etc/by-name"),
        1,
        &["base.qcow2", "no user", "nobody-here"],
    );
}

#[test]
fn three_file_systems_are_one_tree() {
    let workshop = Workshop::new();
    let roots = json(&mut workshop.qtk("ls --json base.qcow2 /boot"));
    assert!(
        roots.as_array().is_some_and(|entries| entries.iter().any(|entry| entry["path"] == "/boot/efi")),
        "{roots}"
    );
    ok(&mut workshop.qtk("write base.qcow2 /boot/marker --content boot"));
    workshop.fsck("base.qcow2");
    assert_eq!(ok(&mut workshop.qtk("cat base.qcow2 /boot/marker")), "boot");
    let on_root = debugfs(&workshop, "base.qcow2", "ls -p /boot");
    assert!(!on_root.contains("marker"), "the file went to the root file system: {on_root}");
    assert!(ok(&mut workshop.qtk("ls -R base.qcow2 /boot/efi")).contains("EFI"));
    fails(&mut workshop.qtk("write base.qcow2 /boot/efi/new --content x"), 1, &["/boot/efi", "FAT", "cannot edit"]);
}

#[test]
fn extract_follows_named_links_and_keeps_trees() {
    let workshop = Workshop::new();
    workshop.write("tree/file", b"content");
    std::os::unix::fs::symlink("/etc/passwd", workshop.path("tree/absolute")).unwrap();
    std::fs::hard_link(workshop.path("tree/file"), workshop.path("tree/again")).unwrap();
    let sparse = std::fs::File::create(workshop.path("tree/sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    ok(&mut workshop.qtk("inject base.qcow2 tree /srv"));
    ok(&mut workshop.qtk("ln -s base.qcow2 tree/file /srv/named"));
    workshop.fsck("base.qcow2");
    ok(&mut workshop.qtk("extract base.qcow2 /srv/named /srv/tree out"));

    assert_eq!(std::fs::read(workshop.path("out/named")).unwrap(), b"content");
    assert_eq!(std::fs::read_link(workshop.path("out/tree/absolute")).unwrap().to_str(), Some("/etc/passwd"));
    ok(&mut workshop.sh("diff", "-r --no-dereference tree out/tree"));
    let metadata = |name: &str| std::fs::metadata(workshop.path(name)).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(metadata("out/tree/file").ino(), metadata("out/tree/again").ino());
    assert!(metadata("out/tree/sparse").blocks() < 64, "holes became data");
}

#[test]
fn a_pipeline_can_change_a_file_in_place() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("write base.qcow2 /etc/motto --content old"));
    for verb in ["write base.qcow2", "inject base.qcow2 -"] {
        let mut reader = workshop.qtk("cat base.qcow2 /etc/motto").stdout(Stdio::piped()).spawn().unwrap();
        ok(workshop.qtk(&format!("{verb} /etc/motto")).stdin(reader.stdout.take().unwrap()));
        assert!(reader.wait().unwrap().success());
        assert_eq!(ok(&mut workshop.qtk("cat base.qcow2 /etc/motto")), "old", "{verb}");
    }
}

#[test]
fn what_a_guest_says_is_safe_on_a_terminal() {
    let workshop = Workshop::new();
    let passwd = workshop.write("passwd", b"\x1b[2Jroot:x:0:0::/:/bin/sh\n");
    ok(&mut workshop.qtk(&format!("inject base.qcow2 {} /etc/passwd", passwd.display())));
    for line in ["ls -l base.qcow2 /etc", "stat base.qcow2 /etc/passwd"] {
        let shown = ok(&mut workshop.qtk(line));
        assert!(shown.contains("\\u{1b}[2Jroot") && !shown.contains('\x1b'), "{shown}");
    }
    let error = fails(&mut workshop.qtk("cat base.qcow2 \x1b[2J"), 1, &["no such file"]);
    assert!(!error.contains('\x1b'), "{error}");
}

#[test]
fn files_are_listed_by_their_path() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("write base.qcow2 /srv/hostname --content x"));
    let listing = ok(&mut workshop.qtk("ls base.qcow2 /etc/hostname srv/hostname"));
    assert_eq!(listing, "/etc/hostname\n/srv/hostname\n");
}

#[test]
fn content_that_cannot_be_printed_is_an_error() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("write base.qcow2 /etc/short --content x"));
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let status = workshop.qtk("cat base.qcow2 /etc/short").stdout(full).stderr(Stdio::null()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_partition_of_its_own_kind_can_be_read() {
    let workshop = Workshop::new();
    assert!(ok(&mut workshop.qtk("ls base.qcow2 --partition 15")).contains("EFI"));
    fails(&mut workshop.qtk("mkdir base.qcow2 --partition 15 /new"), 1, &["FAT", "cannot edit"]);
}

#[test]
fn the_same_edit_gives_the_same_bytes() {
    let workshop = Workshop::new();
    workshop.write("file", &[7; 300_000]);
    for copy in ["one", "two"] {
        std::fs::copy(workshop.path("base.qcow2"), workshop.path(copy)).unwrap();
        ok(workshop.qtk(&format!("inject {copy} file /etc/file")).env("SOURCE_DATE_EPOCH", "1700000000"));
        ok(workshop.qtk(&format!("mkdir {copy} /etc/directory")).env("SOURCE_DATE_EPOCH", "1700000000"));
    }
    ok(&mut workshop.sh("cmp", "one two"));
    let stat = &json(&mut workshop.qtk("stat --json one /etc/directory"))[0];
    assert_eq!(stat["mtime"], "2023-11-14T22:13:20Z");
}

#[test]
fn usage_errors_exit_with_2() {
    let workshop = Workshop::new();
    for line in
        ["nonsense", "inject base.qcow2 only-one", "flatten base.qcow2", "create new.qcow2", "chmod base.qcow2 9 /etc"]
    {
        fails(&mut workshop.qtk(line), 2, &[]);
    }
}

#[test]
fn create_refuses_to_replace_an_image() {
    let workshop = Workshop::new();
    fails(&mut workshop.qtk("create --size 1G base.qcow2"), 1, &["base.qcow2", "exists", "--force"]);
    ok(&mut workshop.qtk("create --size 1G --cluster-size 4K --force base.qcow2"));
    let info = json(&mut workshop.qtk("info --json base.qcow2"));
    assert_eq!((&info["virtual-size"], &info["cluster-size"]), (&(1 << 30).into(), &4096.into()));
}

#[test]
fn file_systems_are_checked_where_they_lie() {
    let workshop = Workshop::new();
    let text = ok(&mut workshop.qtk("fsck base.qcow2"));
    for partition in [1, 16] {
        assert!(text.contains(&format!("partition {partition}: ext4, clean: ")), "{text}");
    }
    let report = json(&mut workshop.qtk("fsck base.qcow2 --partition 1 --json"));
    let found = &report["file-systems"][0];
    assert_eq!((&found["verdict"], &found["complete"]), (&"clean".into(), &true.into()), "{report}");

    ok(&mut workshop.sh("qemu-img", "convert -O raw base.qcow2 bad.raw"));
    ok(&mut workshop.debugfs("bad.raw", &["-w", "-R", "set_inode_field /etc links_count 77"]));
    let ran = run(&mut workshop.qtk("fsck bad.raw"));
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.stdout.contains("it has 77 links") && ran.stdout.contains("damaged"), "{ran:?}");
    let ran = run(&mut workshop.qtk("fsck bad.raw --json"));
    assert!(ran.code == 3 && ran.stdout.contains("\"kind\": \"links\""), "{ran:?}");

    workshop.write("nothing.raw", &[0; 1 << 20]);
    fails(&mut workshop.qtk("fsck nothing.raw"), 1, &["nothing.raw", "no ext file system found"]);
    fails(&mut workshop.qtk("fsck base.qcow2 --partition 77"), 1, &["no partition 77"]);
}
