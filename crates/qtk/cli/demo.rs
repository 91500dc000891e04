use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;

use super::size;

/// A small Debian-like guest, made by mke2fs, sgdisk and qemu-img (`testdata/make.sh`).
const GUEST: &[u8] = include_bytes!("../../../testdata/demo-guest.qcow2");

const SERVICE: &str = "\
[Unit]
Description=Says hello once per boot

[Service]
Type=oneshot
ExecStart=/usr/local/bin/hello

[Install]
WantedBy=multi-user.target
";

const PROGRAM: &str = "#!/bin/sh\necho 'hello from a golden image'\n";

/// Run the main job on a small built-in guest: overlay, inject, look inside, flatten, check
#[derive(Args, Debug)]
pub(crate) struct Demo {
    /// Where to leave the images; made if it does not exist
    #[arg(default_value = "qtk-demo")]
    folder: PathBuf,
}

impl Demo {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        prepare(&self.folder)?;
        let started = Instant::now();
        for (purpose, line) in STEPS {
            run_step(&self.folder, purpose, line)?;
        }
        let mut out = io::stdout().lock();
        writeln!(out, "\nDone in {:.0?}. In {}:", started.elapsed(), self.folder.display())?;
        for (name, what) in [
            ("base.qcow2", "the guest as it was"),
            ("overlay.qcow2", "only what changed, on top of it"),
            ("golden.qcow2", "both in one compressed file, ready to boot or publish"),
        ] {
            let bytes = self.folder.join(name).metadata().with_context(|| name.to_owned())?.len();
            writeln!(out, "  {name:<14} {:>9}  {what}", size::human(bytes))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn prepare(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, content) in [("base.qcow2", GUEST), ("hello", PROGRAM.as_bytes()), ("hello.service", SERVICE.as_bytes())]
    {
        let path = folder.join(name);
        std::fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let overlay = folder.join("overlay.qcow2");
    match std::fs::remove_file(&overlay) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot replace {}", overlay.display()))
        }
        _ => Ok(()),
    }
}

/// The commands a user would type in the folder, each after its purpose.
const STEPS: [(&str, &str); 9] = [
    ("put an overlay on the guest, so that it stays as it is", "create -b base.qcow2 -F qcow2 overlay.qcow2"),
    ("inject a program", "inject --parents --mode 0755 overlay.qcow2 hello /usr/local/bin/"),
    ("and a service", "inject overlay.qcow2 hello.service /etc/systemd/system/"),
    (
        "that starts at boot",
        "ln -s overlay.qcow2 /etc/systemd/system/hello.service /etc/systemd/system/multi-user.target.wants/",
    ),
    ("look inside", "ls -l overlay.qcow2 /etc/systemd/system /usr/local/bin"),
    ("see what the image is made of", "info --chain overlay.qcow2"),
    ("make one compressed file of the chain", "flatten overlay.qcow2 -o golden.qcow2 -c zstd"),
    ("is it sound?", "check golden.qcow2"),
    ("and the same disk?", "compare overlay.qcow2 golden.qcow2"),
];

fn run_step(folder: &Path, purpose: &str, line: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "\n# {purpose}\n$ qtk {line}")?;
    out.flush()?;
    let program = std::env::current_exe().context("cannot find qtk itself")?;
    let started = Instant::now();
    let status =
        Command::new(program).args(line.split(' ')).current_dir(folder).status().context("cannot start qtk")?;
    let elapsed = started.elapsed();
    if !status.success() {
        bail!("'qtk {line}' failed ({status}) in {}", folder.display());
    }
    writeln!(out, "  [{:.1} ms]", elapsed.as_secs_f64() * 1000.0)?;
    Ok(())
}
