//! Every command that README shows works as shown.

use std::process::Command;

use crate::support::{Workshop, ok, root};

/// The `$` lines of the `console` blocks.
fn commands(markdown: &str) -> Vec<&str> {
    let mut inside = false;
    let lines = markdown.lines().filter_map(|line| {
        if line.starts_with("```") {
            inside = line == "```console";
        }
        line.strip_prefix("$ ").filter(|_| inside)
    });
    lines.collect()
}

#[test]
fn readme_commands_run() {
    let workshop = Workshop::new();
    workshop.write("agent", b"#!/bin/sh\n");
    workshop.write("agent.service", b"[Service]\nExecStart=/usr/local/bin/agent\n");
    workshop.write("site/index.html", b"hello");
    let qtk = std::path::Path::new(env!("CARGO_BIN_EXE_qtk")).parent().unwrap().to_owned();
    let path = format!("{}:{}", qtk.display(), std::env::var("PATH").unwrap());
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let lines = commands(&readme);
    assert!(lines.len() > 10, "README shows its commands in console blocks");
    for line in lines {
        let mut shell = Command::new("bash");
        shell.args(["-euc", line]).current_dir(workshop.path("")).env("PATH", &path);
        ok(&mut shell);
    }
    workshop.fsck("vm.qcow2");
    workshop.fsck("golden.qcow2");
}

#[test]
fn the_demo_does_what_it_says() {
    let workshop = Workshop::new();
    let told = ok(&mut workshop.qtk("demo images"));
    assert!(told.contains("$ qtk flatten") && told.contains("Images are identical."), "{told}");
    workshop.fsck("images/overlay.qcow2");
    workshop.fsck("images/golden.qcow2");
    ok(&mut workshop.sh("qemu-img", "compare images/overlay.qcow2 images/golden.qcow2"));
    ok(&mut workshop.qtk("demo images"));
}
