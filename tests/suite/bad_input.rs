//! Bad images and bad wishes: one clear error, the right exit code, and an image that stays as it was.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::support::{Workshop, fails, guests, ok, run};

/// The file's bytes before, to be compared with those after.
fn bytes(workshop: &Workshop, name: &str) -> Vec<u8> {
    std::fs::read(workshop.path(name)).unwrap()
}

fn patch(workshop: &Workshop, name: &str, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(workshop.path(name)).unwrap().write_all_at(bytes, offset).unwrap();
}

fn be64(workshop: &Workshop, name: &str, offset: u64) -> u64 {
    let mut field = [0; 8];
    File::open(workshop.path(name)).unwrap().read_exact_at(&mut field, offset).unwrap();
    u64::from_be_bytes(field)
}

const L1_SIZE: u64 = 36;
const L1_TABLE_OFFSET: u64 = 40;
const REFCOUNT_TABLE_OFFSET: u64 = 48;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Every verb that reads fails on the image with `code` and `words`; so does one that writes, and nothing changes.
fn refused(workshop: &Workshop, image: &str, code: i32, words: &[&str]) {
    let before = bytes(workshop, image);
    for line in ["ls -R IMAGE /", "flatten IMAGE -o out.qcow2", "write IMAGE /etc/hostname --content x"] {
        let line = line.replace("IMAGE", image);
        fails(&mut workshop.qtk(&line), code, words);
        assert!(!workshop.path("out.qcow2").exists(), "'{line}' left an output behind");
    }
    assert!(bytes(workshop, image) == before, "{image} was changed");
}

#[test]
fn damaged_qcow2_tables_are_corruption() {
    let workshop = Workshop::new();
    let l1 = be64(&workshop, "base.qcow2", L1_TABLE_OFFSET);
    let l2 = be64(&workshop, "base.qcow2", l1) & OFFSET_MASK;
    let far = u64::to_be_bytes(0x8000_7fff_ffff_0000);
    let cases: [(&str, u64, Vec<u8>); 6] = [
        ("an L1 table larger than the file", L1_SIZE, u32::to_be_bytes(0x0040_0000).to_vec()),
        ("an L1 table past the end", L1_TABLE_OFFSET, u64::to_be_bytes(1 << 40).to_vec()),
        ("an L1 table off a cluster boundary", L1_TABLE_OFFSET, u64::to_be_bytes(l1 + 8).to_vec()),
        ("an L2 table past the end", l1, far.to_vec()),
        ("a cluster past the end", l2, far.to_vec()),
        ("an L2 table off a cluster boundary", l1, u64::to_be_bytes((1 << 63) | (l2 + 512)).to_vec()),
    ];
    for (what, offset, value) in cases {
        std::fs::copy(workshop.path("base.qcow2"), workshop.path("bad.qcow2")).unwrap();
        patch(&workshop, "bad.qcow2", offset, &value);
        println!("{what}");
        refused(&workshop, "bad.qcow2", 3, &["bad.qcow2", "L"]);
    }
}

#[test]
fn overlapping_metadata_is_found_before_a_write() {
    let workshop = Workshop::new();
    let l1 = be64(&workshop, "base.qcow2", L1_TABLE_OFFSET);
    let refcount_table = be64(&workshop, "base.qcow2", REFCOUNT_TABLE_OFFSET);
    patch(&workshop, "base.qcow2", refcount_table, &l1.to_be_bytes());
    let before = bytes(&workshop, "base.qcow2");
    fails(&mut workshop.qtk("write base.qcow2 /etc/hostname --content x"), 3, &["base.qcow2", "overlap"]);
    assert!(bytes(&workshop, "base.qcow2") == before);
    assert_eq!(run(&mut workshop.qtk("check base.qcow2")).code, 3);
}

#[test]
fn a_truncated_image_is_corrupt() {
    let workshop = Workshop::new();
    let len = workshop.path("base.qcow2").metadata().unwrap().len();
    File::options().write(true).open(workshop.path("base.qcow2")).unwrap().set_len(len / 2).unwrap();
    refused(&workshop, "base.qcow2", 3, &["base.qcow2", "past"]);
    for len in [0, 3, 71] {
        File::options().write(true).open(workshop.path("base.qcow2")).unwrap().set_len(len).unwrap();
        let ran = run(&mut workshop.qtk("ls --image-format qcow2 base.qcow2 /"));
        assert!(matches!(ran.code, 1 | 3) && ran.stderr.contains("base.qcow2"), "{len} bytes: {}", ran.stderr);
    }
}

#[test]
fn chains_that_cannot_be_followed_are_named() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("create -b base.qcow2 -F qcow2 a.qcow2"));
    ok(&mut workshop.qtk("create -b a.qcow2 -F qcow2 b.qcow2"));
    ok(&mut workshop.sh("qemu-img", "rebase -u -b b.qcow2 -F qcow2 a.qcow2"));
    refused(&workshop, "b.qcow2", 1, &["a.qcow2", "comes back to", "b.qcow2", "rebase"]);
    ok(&mut workshop.sh("qemu-img", "rebase -u -b gone.qcow2 -F qcow2 a.qcow2"));
    refused(&workshop, "b.qcow2", 1, &["a.qcow2", "gone.qcow2", "No such file"]);
    for name in ["nbd://localhost/disk", "json:{\"driver\":\"raw\"}"] {
        ok(workshop.sh("qemu-img", "rebase -u -F raw a.qcow2 -b").arg(name));
        refused(&workshop, "b.qcow2", 1, &["a.qcow2", "not a local file"]);
    }
    fails(&mut workshop.qtk("create -b gone.qcow2 new.qcow2"), 1, &["gone.qcow2", "No such file"]);
    assert!(!workshop.path("new.qcow2").exists());
}

#[test]
fn unsupported_images_are_refused_by_name() {
    let workshop = Workshop::new();
    let secret = "-o encrypt.format=luks,encrypt.key-secret=s --object secret,id=s,data=pw";
    ok(&mut workshop.sh("qemu-img", &format!("create -q -f qcow2 {secret} odd.qcow2 64M")));
    refused(&workshop, "odd.qcow2", 1, &["odd.qcow2", "encrypt"]);
    patch(&workshop, "base.qcow2", 72, &(1_u64 << 40).to_be_bytes());
    refused(&workshop, "base.qcow2", 1, &["base.qcow2", "40"]);
    ok(&mut workshop.sh("qemu-img", "create -q -f vmdk disk.vmdk 64M"));
    fails(&mut workshop.qtk("ls disk.vmdk /"), 1, &["disk.vmdk"]);
}

#[test]
fn paths_that_lead_nowhere() {
    let workshop = Workshop::new();
    let before = bytes(&workshop, "base.qcow2");
    workshop.write("file", b"x");
    fails(&mut workshop.qtk("ls missing.qcow2 /"), 1, &["missing.qcow2", "No such file"]);
    fails(&mut workshop.qtk("ls . /"), 1, &["."]);
    for (line, words) in [
        ("cat base.qcow2 /etc/nothing", &["base.qcow2", "/etc/nothing", "no such file"][..]),
        ("cat base.qcow2 /etc", &["/etc", "is a directory"]),
        ("cat base.qcow2 /etc/hostname/x", &["/etc/hostname", "not a directory"]),
        ("inject base.qcow2 missing /etc", &["missing", "No such file"]),
        ("inject base.qcow2 file /no/such/directory/", &["/no", "no such file"]),
        ("inject base.qcow2 file missing /etc", &["missing"]),
        ("inject base.qcow2 . /etc/hostname", &["/etc/hostname"]),
        ("mkdir base.qcow2 /etc", &["/etc", "exists"]),
        ("ln base.qcow2 /etc /linked", &["/etc", "is a directory"]),
        ("rm base.qcow2 /nothing", &["/nothing", "no such file"]),
        ("ls --partition 7 base.qcow2 /", &["partition 7", "15"]),
        ("ls --partition 14 base.qcow2 /etc", &["partition 14", "holds nothing"]),
    ] {
        fails(&mut workshop.qtk(line), 1, words);
    }
    assert!(bytes(&workshop, "base.qcow2") == before);
}

#[test]
fn links_in_a_circle_end() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("ln -s base.qcow2 /etc/b /etc/a"));
    ok(&mut workshop.qtk("ln -s base.qcow2 /etc/a /etc/b"));
    fails(&mut workshop.qtk("cat base.qcow2 /etc/a"), 1, &["/etc/", "too many symbolic links"]);
}

/// Corrupts one structure of the root file system of a raw copy of the small guest.
fn with_damage(workshop: &Workshop, request: &str) {
    ok(&mut workshop.sh("qemu-img", "convert -O raw base.qcow2 bad.raw"));
    ok(&mut workshop.debugfs("bad.raw", &["-w", "-R", request]));
}

#[test]
fn a_damaged_file_system_is_corruption_and_not_written() {
    let workshop = Workshop::new();
    for (request, read, words) in [
        ("sif /etc/hostname block[0] 0", "cat bad.raw /etc/hostname", &["inode"][..]),
        ("sif /etc checksum 1", "ls bad.raw /etc", &["inode", "checksum"]),
        ("zap_block -f /etc 0", "ls bad.raw /etc", &["director"]),
        ("ssv inodes_per_group 7", "ls bad.raw /", &["superblock"]),
    ] {
        with_damage(&workshop, request);
        let before = bytes(&workshop, "bad.raw");
        fails(&mut workshop.qtk(read), 3, &[&["bad.raw", "partition 1"], words].concat());
        let write = if read.ends_with("hostname") { "write bad.raw /etc/hostname" } else { "write bad.raw /etc/new" };
        fails(&mut workshop.qtk(&format!("{write} --content x")), 3, &["bad.raw"]);
        assert!(bytes(&workshop, "bad.raw") == before, "{request}");
    }
}

#[test]
fn a_full_guest_is_an_error_and_no_change() {
    let workshop = Workshop::new();
    let before = bytes(&workshop, "base.qcow2");
    let large = File::create(workshop.path("large")).unwrap();
    large.write_all_at(&[1], (1 << 30) - 1).unwrap();
    for offset in (0..1 << 30).step_by(4096) {
        large.write_all_at(&[7], offset).unwrap();
    }
    fails(
        &mut workshop.qtk("inject base.qcow2 large /large"),
        1,
        &["base.qcow2", "/large", "no blocks left", "remove files"],
    );
    assert!(bytes(&workshop, "base.qcow2") == before, "a failed edit changed the image");
}

#[test]
fn a_full_host_is_an_error_and_no_change() {
    let workshop = Workshop::new();
    std::fs::copy(guests().join("debian.qcow2"), workshop.path("guest.qcow2")).unwrap();
    let before = bytes(&workshop, "guest.qcow2");
    workshop.write("large", &vec![b'x'; 64 << 20]);
    let blocks = before.len() / 512 + 20_000;
    // The limit stands for a full disk; with its signal ignored, writes fail as they do there.
    let limited = |line: &str| {
        let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec {} {line}", env!("CARGO_BIN_EXE_qtk"));
        let mut command = Command::new("sh");
        command.args(["-c", &script]).current_dir(workshop.path(""));
        command
    };
    fails(&mut limited("inject guest.qcow2 large /large"), 1, &["guest.qcow2", "File too large"]);
    fails(&mut limited("flatten guest.qcow2 -o out.qcow2"), 1, &["out.qcow2", "File too large"]);
    assert!(!workshop.path("out.qcow2").exists());
    assert!(bytes(&workshop, "guest.qcow2") == before, "a failed edit changed the image");
    ok(&mut workshop.sh("qemu-img", "check guest.qcow2"));
}
