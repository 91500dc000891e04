//! A killed command leaves the old image or the new one.

use std::time::Duration;

use crate::support::{Workshop, fsck, guests, ok};

/// Kills an inject after a while; what is left must be sound, with the file whole or absent.
fn kill_after(image: &str, prepare: &str, delay: Duration) -> bool {
    let workshop = Workshop::new();
    std::fs::copy(guests().join("debian.qcow2"), workshop.path("guest.qcow2")).unwrap();
    if !prepare.is_empty() {
        ok(&mut workshop.sh("qemu-img", prepare));
    }
    workshop.write("agent", &vec![0x5a; 200 << 20]);
    let before = ok(&mut workshop.qtk(&format!("ls {image} /opt")));
    let mut inject = workshop.qtk(&format!("inject {image} agent /opt/agent")).spawn().unwrap();
    std::thread::sleep(delay);
    let _ = inject.kill();
    let _ = inject.wait();

    let after = ok(&mut workshop.qtk(&format!("ls {image} /opt")));
    let happened = after != before;
    if happened {
        ok(&mut workshop.qtk(&format!("extract {image} /opt/agent out")));
        ok(&mut workshop.sh("cmp", "agent out/agent"));
    }
    ok(&mut workshop.qtk(&format!("write {image} /opt/next --content x")));
    fsck(&workshop.path(image));
    happened
}

#[test]
fn a_killed_inject_into_qcow2_happened_or_did_not() {
    for milliseconds in [0, 20, 80, 200, 400, 1000, 30_000] {
        kill_after("guest.qcow2", "", Duration::from_millis(milliseconds).min(Duration::from_secs(3)));
    }
}

#[test]
fn a_killed_inject_into_raw_happened_or_did_not() {
    for milliseconds in [0, 100, 300, 600, 1000, 1500, 2500] {
        kill_after("guest.raw", "convert -O raw guest.qcow2 guest.raw", Duration::from_millis(milliseconds));
    }
}
