//! The daily job on a real guest: inject into base, overlay and raw copy; flatten; boot the result.

use std::ops::Range;
use std::path::Path;

use crate::support::{Workshop, arg, command, fsck, guests, noise, ok, root, run};

const MARKER: &str = "qtk-injected-service-ran";

const UNIT: &str = "\
[Unit]
Description=Proof that an injected service runs

[Service]
Type=oneshot
ExecStart=/usr/local/bin/announce
StandardOutput=tty
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
";

/// What a test puts into a guest.
struct Payload {
    workshop: Workshop,
}

/// Every path that injecting the payload makes or changes.
const TOUCHED: [&str; 5] = [
    "/usr/local/bin/agent",
    "/usr/local/bin/announce",
    "/etc/systemd/system/announce.service",
    "/etc/systemd/system/multi-user.target.wants/announce.service",
    "/opt/tree",
];

impl Payload {
    fn new() -> Self {
        let workshop = Workshop::new();
        workshop.write("agent", &noise(60 << 20));
        workshop.write("announce", format!("#!/bin/sh\necho {MARKER}\n").as_bytes());
        workshop.write("announce.service", UNIT.as_bytes());
        for index in 0..1000 {
            let name = format!("tree/{}/file-{index}", index % 10);
            workshop.write(&name, format!("{index}\n").repeat(index % 700).as_bytes());
        }
        Self { workshop }
    }

    fn inject_into(&self, image: &str) {
        for line in [
            "inject --mode 0755 IMAGE agent announce /usr/local/bin/",
            "inject IMAGE announce.service /etc/systemd/system/",
            "ln -s IMAGE /etc/systemd/system/announce.service /etc/systemd/system/multi-user.target.wants/announce.service",
            "inject IMAGE tree /opt",
        ] {
            ok(&mut self.workshop.qtk(&line.replace("IMAGE", image)));
        }
    }

    /// The image is sound, holds the payload, and every other file is as it was in `before`.
    fn judge(&self, before: &Path, image: &str) {
        let after = self.workshop.path(image);
        fsck(&after);
        let mut compare = command(arg(&root().join("tests/guest/compare.sh")), &[arg(before), arg(&after)]);
        for path in TOUCHED {
            compare.args(["--ignore", path]);
        }
        ok(&mut compare);
        ok(&mut self.workshop.qtk(&format!("extract {image} /opt/tree /usr/local/bin/agent out-{image}")));
        ok(&mut self.workshop.sh("diff", &format!("-r tree out-{image}/tree")));
        ok(&mut self.workshop.sh("cmp", &format!("agent out-{image}/agent")));
    }

    /// A copy of a guest to edit.
    fn copy(&self, guest: &str, name: &str) {
        std::fs::copy(guests().join(guest), self.workshop.path(name)).unwrap();
    }
}

#[test]
fn inject_into_a_compressed_base() {
    for guest in ["ubuntu.qcow2", "debian.qcow2"] {
        let payload = Payload::new();
        payload.copy(guest, "image.qcow2");
        payload.inject_into("image.qcow2");
        payload.judge(&guests().join(guest), "image.qcow2");
    }
}

#[test]
fn inject_into_a_raw_copy() {
    let payload = Payload::new();
    let guest = guests().join("ubuntu.qcow2");
    let raw = payload.workshop.path("image.raw");
    ok(&mut command("qemu-img", &["convert", "-O", "raw", arg(&guest), arg(&raw)]));
    payload.inject_into("--image-format raw image.raw");
    assert!(!payload.workshop.path("image.raw.qtk-txn").exists(), "the redo log stays only after a crash");
    payload.judge(&guest, "image.raw");
}

#[test]
fn inject_into_an_overlay_then_flatten_and_boot() {
    let payload = Payload::new();
    payload.copy("ubuntu.qcow2", "base.qcow2");
    ok(&mut payload.workshop.qtk("create -b base.qcow2 -F qcow2 overlay.qcow2"));
    payload.inject_into("overlay.qcow2");
    let guest = guests().join("ubuntu.qcow2");
    payload.judge(&guest, "overlay.qcow2");
    assert_eq!(
        std::fs::read(payload.workshop.path("base.qcow2")).unwrap(),
        std::fs::read(&guest).unwrap(),
        "the base of an overlay is never written"
    );

    ok(&mut payload.workshop.sh("qemu-img", "convert -O qcow2 overlay.qcow2 expected.qcow2"));
    for (name, options) in [
        ("plain.qcow2", ""),
        ("zlib.qcow2", " -c zlib"),
        ("recompressed.qcow2", " -c zlib --recompress --threads 1"),
        ("zstd.qcow2", " -c zstd"),
        ("flat.raw", " --format raw"),
    ] {
        ok(&mut payload.workshop.qtk(&format!("flatten overlay.qcow2 -o {name}{options}")));
        ok(&mut payload.workshop.sh("qemu-img", &format!("compare expected.qcow2 {name}")));
    }
    for name in ["plain.qcow2", "zlib.qcow2", "recompressed.qcow2", "zstd.qcow2"] {
        ok(&mut payload.workshop.sh("qemu-img", &format!("check {name}")));
    }
    ok(&mut payload.workshop.qtk("flatten overlay.qcow2 -o sparse.qcow2 -c zstd --sparsify"));
    payload.judge(&guest, "sparse.qcow2");
    boots(&payload.workshop, "sparse.qcow2");
}

/// The guest comes up in QEMU with the kernel that qtk takes out of it, and the injected service has written to the console.
fn boots(workshop: &Workshop, image: &str) {
    ok(&mut workshop.qtk(&format!("extract {image} /vmlinuz /initrd.img kernel")));
    let kernel = |name: &str| workshop.path("kernel").join(name);
    let script = root().join("tests/guest/boot.sh");
    let mut boot = command(arg(&script), &[arg(&workshop.path(image)), "--until", MARKER]);
    boot.arg("--kernel").arg(kernel("vmlinuz")).arg("--initrd").arg(kernel("initrd.img"));
    let ran = run(&mut boot);
    assert_eq!(ran.code, 0, "the guest did not announce itself\n{}\n{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains(MARKER));
}

#[test]
fn flatten_gives_the_same_bytes_on_any_number_of_threads() {
    let payload = Payload::new();
    payload.copy("debian.qcow2", "base.qcow2");
    let digest = |threads: u32| {
        let name = format!("threads-{threads}.qcow2");
        let line = format!("flatten base.qcow2 -o {name} -c zstd --level 1 --threads {threads}");
        ok(&mut payload.workshop.qtk(&line));
        ok(&mut payload.workshop.sh("sha256sum", &name)).split(' ').next().map(str::to_owned)
    };
    let one = digest(1);
    assert_eq!(digest(2), one);
    assert_eq!(digest(7), one);
}

#[test]
fn a_journal_left_dirty_by_a_crash_is_replayed_before_the_edit() {
    let payload = Payload::new();
    payload.copy("ubuntu.qcow2", "ubuntu.qcow2");
    payload.copy("ubuntu-dirty.qcow2", "dirty.qcow2");
    let workshop = &payload.workshop;
    let files = |image: &str| ok(&mut workshop.qtk(&format!("ls -lR {image} /")));
    let seen_in_memory = files("dirty.qcow2");

    ok(&mut workshop.sh("qemu-img", "convert -O raw dirty.qcow2 judge.raw"));
    replay_with_e2fsck(workshop, "judge.raw");
    assert!(seen_in_memory == files("judge.raw"), "a replay in memory and e2fsck's differ");

    payload.inject_into("dirty.qcow2");
    payload.judge(&workshop.path("judge.raw"), "dirty.qcow2");
}

/// Lets e2fsck do to the root file system what the kernel does on mount. On a file of its own: e2fsck 1.47.0 loses an offset
/// when it opens the device again after the replay.
fn replay_with_e2fsck(workshop: &Workshop, image: &str) {
    let Range { start, end } = workshop.root_partition(image);
    let count = end - start;
    ok(&mut workshop.sh(
        "dd",
        &format!("if={image} of=root.img bs=1M iflag=skip_bytes,count_bytes skip={start} count={count} conv=sparse"),
    ));
    ok(&mut workshop.sh("truncate", &format!("-s {count} root.img")));
    let ran = run(&mut workshop.sh("e2fsck", "-fy root.img"));
    assert!(ran.code <= 1, "e2fsck found more than a dirty journal: {}", ran.stdout);
    ok(&mut workshop.sh("dd", &format!("if=root.img of={image} bs=1M oflag=seek_bytes seek={start} conv=notrunc")));
}
