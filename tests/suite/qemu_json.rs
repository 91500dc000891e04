//! `--json` of info, check, map and compare has qemu-img's keys and values.

use crate::support::{Workshop, fails, json, ok};

/// Images of every kind that differ in what the verbs say about them.
fn images(workshop: &Workshop) -> Vec<&'static str> {
    for line in [
        "create -f qcow2 empty.qcow2 100M",
        "create -f qcow2 -o compat=0.10 v2.qcow2 70000K",
        "create -f qcow2 -o compression_type=zstd,cluster_size=4k,lazy_refcounts=on,refcount_bits=64 odd.qcow2 1G",
        "create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
        "create -f qcow2 -b overlay.qcow2 -F qcow2 top.qcow2 512M",
        "create -f raw flat.raw 3M",
        "create -f qcow2 -b flat.raw -F raw on-raw.qcow2",
        "create -f qcow2 snapshots.qcow2 8M",
    ] {
        ok(&mut workshop.sh("qemu-img", line));
    }
    for (image, commands) in [
        ("odd.qcow2", &["write -P 1 0 64k", "write -P 2 1M 3M", "write -z 5M 1M"][..]),
        ("overlay.qcow2", &["write -P 3 3M 200k", "write -z -u 20M 1M", "discard 30M 1M"]),
        ("top.qcow2", &["write -P 4 300M 1M", "write -P 5 3100k 4k"]),
        ("snapshots.qcow2", &["write -P 6 0 2M"]),
    ] {
        let mut qemu_io = workshop.sh("qemu-io", image);
        for command in commands {
            qemu_io.args(["-c", command]);
        }
        ok(&mut qemu_io);
    }
    ok(workshop.sh("qemu-io", "-f raw flat.raw -c").arg("write -P 7 1M 64k"));
    ok(&mut workshop.sh("qemu-img", "snapshot -c first snapshots.qcow2"));
    vec![
        "base.qcow2",
        "empty.qcow2",
        "v2.qcow2",
        "odd.qcow2",
        "overlay.qcow2",
        "top.qcow2",
        "flat.raw",
        "on-raw.qcow2",
        "snapshots.qcow2",
    ]
}

#[test]
fn info_map_and_check_agree() {
    let workshop = Workshop::new();
    for image in images(&workshop) {
        let judge = |verb: &str| json(&mut workshop.sh("qemu-img", &format!("{verb} --output=json {image}")));
        let ours = |verb: &str| json(&mut workshop.qtk(&format!("{verb} --json {image}")));
        assert_eq!(ours("info"), judge("info"), "info {image}");
        assert_eq!(ours("info --chain"), judge("info --backing-chain"), "info --chain {image}");
        assert_eq!(ours("map"), judge("map"), "map {image}");
        if image.ends_with(".qcow2") {
            assert_eq!(ours("check"), judge("check"), "check {image}");
        } else {
            fails(&mut workshop.qtk(&format!("check {image}")), 1, &[image, "raw"]);
        }
    }
}

#[test]
fn compare_tells_with_its_exit_code() {
    let workshop = Workshop::new();
    images(&workshop);
    assert_eq!(json(&mut workshop.qtk("compare --json base.qcow2 base.qcow2"))["identical"], true);
    let differing = crate::support::run(&mut workshop.qtk("compare base.qcow2 overlay.qcow2"));
    let judge = crate::support::run(&mut workshop.sh("qemu-img", "compare base.qcow2 overlay.qcow2"));
    assert_eq!((differing.code, differing.stdout), (1, judge.stdout));
    // 1 is an answer, so a failure must be something else; it is 2 in qemu-img too.
    fails(&mut workshop.qtk("compare base.qcow2 missing.qcow2"), 2, &["missing.qcow2"]);
}
