//! Copies without what no guest needs: smaller, and the same to every guest.

use std::os::unix::fs::MetadataExt;

use crate::support::{Workshop, arg, command, fails, fsck, guests, json, noise, ok, root, run};

const MIB: u64 = 1 << 20;

/// Both hold the same files.
fn agree(workshop: &Workshop, before: &str, after: &str) {
    let script = root().join("tests/guest/compare.sh");
    ok(&mut command(arg(&script), &[arg(&workshop.path(before)), arg(&workshop.path(after))]));
}

fn size(workshop: &Workshop, name: &str) -> u64 {
    workshop.path(name).metadata().unwrap().len()
}

/// A real guest with 100 MiB of deleted files in a raw base, and more in an overlay on it.
fn guest_with_deleted_files(workshop: &Workshop) {
    ok(&mut command(
        "qemu-img",
        &["convert", "-O", "raw", arg(&guests().join("ubuntu.qcow2")), arg(&workshop.path("base.raw"))],
    ));
    workshop.write("noise", &noise(50 << 20));
    let mut script = String::new();
    for at in 0..2 {
        script += &format!("write {} kept-{at}\nwrite {0} noise-{at}\n", arg(&workshop.path("noise")));
    }
    script += "rm noise-0\nrm noise-1\nrm kept-1\n";
    let script = workshop.write("script", script.as_bytes());
    ok(&mut workshop.debugfs("base.raw", &["-w", "-f", arg(&script)]));
    fsck(&workshop.path("base.raw"));
    ok(&mut workshop.sh("qemu-img", "create -q -f qcow2 -b base.raw -F raw top.qcow2"));
}

#[test]
fn deleted_files_are_left_out() {
    let workshop = Workshop::new();
    guest_with_deleted_files(&workshop);
    ok(&mut workshop.qtk("flatten top.qcow2 -o whole.qcow2 -c zlib"));
    for (line, copied) in [
        ("flatten top.qcow2 -o sparse --format raw --threads 1", 0),
        // Compressed clusters stay as they are where all of them is needed.
        ("convert whole.qcow2 -o sparse -c zlib", 7000),
    ] {
        let facts = json(&mut workshop.qtk(&format!("{line} --sparsify --json")));
        assert!(facts["left-out-bytes"].as_u64().unwrap() >= 150 * MIB, "{facts}");
        assert!(facts["copied-clusters"].as_u64().unwrap() >= copied, "{facts}");
        fsck(&workshop.path("sparse"));
        agree(&workshop, "base.raw", "sparse");
        if copied == 0 {
            let used = |name: &str| workshop.path(name).metadata().unwrap().blocks() * 512;
            assert!(used("sparse") + 150 * MIB <= used("base.raw"));
            std::fs::remove_file(workshop.path("sparse")).unwrap();
        }
    }
    assert!(size(&workshop, "sparse") + 150 * MIB <= size(&workshop, "whole.qcow2"));
}

#[test]
fn a_journal_left_dirty_by_a_crash_counts() {
    let workshop = Workshop::new();
    for guest in ["ubuntu-dirty.qcow2", "debian-dirty.qcow2"] {
        let source = guests().join(guest);
        let facts = json(&mut workshop.qtk(&format!("flatten {} -o sparse.qcow2 --sparsify --json", arg(&source))));
        assert!(facts["volumes"][0]["unused-bytes"].as_u64().unwrap() > 1 << 30, "{facts}");
        ok(&mut workshop.sh("qemu-img", "check sparse.qcow2"));
        let script = root().join("tests/guest/compare.sh");
        ok(&mut command(arg(&script), &[arg(&source), arg(&workshop.path("sparse.qcow2"))]));
    }
}

#[test]
fn what_is_in_doubt_is_copied_and_said() {
    let workshop = Workshop::new();
    fails(&mut workshop.qtk("flatten base.qcow2 -o out.qcow2 --sparsify -U"), 2, &["--sparsify", "--force-share"]);
    ok(&mut workshop.sh("truncate", "-s 8M empty.raw"));
    let ran = run(&mut workshop.qtk("convert empty.raw -f raw -o out.qcow2 --sparsify"));
    assert_eq!((ran.code, ran.stdout.as_str()), (0, "left out 0 B that no guest needs\n"));
    assert!(ran.stderr.contains("empty.raw: neither an ext file system nor a swap space was found"), "{}", ran.stderr);

    ok(&mut workshop.sh("qemu-img", "convert -O raw base.qcow2 damaged.raw"));
    ok(&mut workshop.debugfs("damaged.raw", &["-w", "-R", "ssv state 2"]));
    let ran = run(&mut workshop.qtk("convert damaged.raw -f raw -o whole.qcow2 --sparsify --json"));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let words = "damaged.raw: partition 1 is copied with all that is free in it: superblock: the file system is marked as damaged";
    assert!(ran.stderr.contains(words), "{}", ran.stderr);
    let facts: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(facts["left-out-bytes"], 0);
    assert!(facts["volumes"][0]["kept-because"].as_str().unwrap().contains("marked as damaged"), "{facts}");
    ok(&mut workshop.sh("qemu-img", "compare -f raw -F qcow2 damaged.raw whole.qcow2"));
}

/// One disk in two files.
#[test]
fn several_sources_are_one_disk() {
    let workshop = Workshop::new();
    ok(&mut workshop.sh("qemu-img", "convert -O raw base.qcow2 base.raw"));
    let half = (size(&workshop, "base.raw") / 2).next_multiple_of(512) + 512;
    ok(&mut workshop.sh("split", &format!("-b {half} base.raw part-")));
    let facts = json(&mut workshop.qtk("convert -f raw part-aa part-ab -o out.qcow2 --sparsify --json"));
    assert!(facts["volumes"][0]["unused-bytes"].as_u64().unwrap() > 0, "{facts}");
}
