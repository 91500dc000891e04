//! qtk and QEMU keep out of each other's way.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Stdio};

use crate::support::{Workshop, fails, ok};

/// A qemu-io that holds an image open, as a running VM would.
struct Holder(Child);

impl Holder {
    fn new(workshop: &Workshop, line: &str) -> Self {
        let mut command = workshop.sh("qemu-io", line);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // It answers once the image is open.
        writeln!(child.stdin.as_mut().unwrap(), "length").unwrap();
        let mut answer = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut answer).unwrap();
        assert!(!answer.is_empty(), "qemu-io could not open the image");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_in_use_is_refused_and_stays_as_it_is() {
    let workshop = Workshop::new();
    let before = std::fs::read(workshop.path("base.qcow2")).unwrap();
    let holder = Holder::new(&workshop, "base.qcow2");
    for line in [
        "write base.qcow2 /etc/x --content x",
        "ls base.qcow2 /",
        "info base.qcow2",
        "flatten base.qcow2 -o out.qcow2",
        "flatten -U base.qcow2 -o base.qcow2",
        "create --size 1G --force base.qcow2",
    ] {
        fails(&mut workshop.qtk(line), 1, &["base.qcow2"]);
    }
    let words = fails(&mut workshop.qtk("write base.qcow2 /etc/x --content x"), 1, &["in use", "lock", "stop the VM"]);
    assert!(!words.contains("-U"), "there is no way to write into a running VM's image: {words}");
    fails(&mut workshop.qtk("ls base.qcow2 /"), 1, &["-U"]);
    ok(&mut workshop.qtk("ls -U base.qcow2 /"));
    ok(&mut workshop.qtk("info --force-share base.qcow2"));
    fails(&mut workshop.qtk("write -U base.qcow2 /etc/x --content x"), 2, &["-U"]);
    drop(holder);
    assert_eq!(std::fs::read(workshop.path("base.qcow2")).unwrap(), before);
    ok(&mut workshop.qtk("write base.qcow2 /etc/x --content x"));
}

#[test]
fn a_base_that_a_vm_writes_is_refused_too() {
    let workshop = Workshop::new();
    ok(&mut workshop.qtk("create -b base.qcow2 -F qcow2 overlay.qcow2"));
    let _holder = Holder::new(&workshop, "base.qcow2");
    fails(&mut workshop.qtk("ls overlay.qcow2 /"), 1, &["overlay.qcow2", "base.qcow2", "in use"]);
}

#[test]
fn readers_share() {
    let workshop = Workshop::new();
    let _holder = Holder::new(&workshop, "-r base.qcow2");
    ok(&mut workshop.qtk("ls base.qcow2 /"));
    fails(&mut workshop.qtk("write base.qcow2 /etc/x --content x"), 1, &["in use"]);
}

#[test]
fn qemu_refuses_what_qtk_writes() {
    let workshop = Workshop::new();
    let mut writer = workshop.qtk("write base.qcow2 /etc/x");
    let mut writer = writer.stdin(Stdio::piped()).spawn().unwrap();
    // Once qtk has taken more than it reads ahead, it holds the image.
    writer.stdin.as_mut().unwrap().write_all(&vec![1; 40 << 20]).unwrap();
    let refused = |line: &str| fails(&mut workshop.sh("qemu-img", line), 1, &["lock"]);
    refused("info base.qcow2");
    refused("snapshot -c no base.qcow2");
    drop(writer.stdin.take());
    assert!(writer.wait().unwrap().success());
    ok(&mut workshop.sh("qemu-img", "info base.qcow2"));
    workshop.fsck("base.qcow2");
}
