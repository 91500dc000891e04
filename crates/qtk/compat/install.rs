use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};

use super::TOOLS;

/// Answer to the names of other tools, such as qemu-img
#[derive(Args, Debug)]
pub(crate) struct Compat {
    #[command(subcommand)]
    verb: CompatVerb,
}

#[derive(Debug, Subcommand)]
enum CompatVerb {
    Install(Install),
}

/// Put links named after the tools into a folder. Ahead of the tools' own in PATH, scripts then call qtk
#[derive(Args, Debug)]
struct Install {
    /// The folder; made if it does not exist
    folder: PathBuf,
}

impl Compat {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        match &self.verb {
            CompatVerb::Install(install) => install.run(),
        }
    }
}

impl Install {
    fn run(&self) -> anyhow::Result<ExitCode> {
        let program = std::env::current_exe().context("cannot find the running program")?;
        fs::create_dir_all(&self.folder).with_context(|| format!("{}: cannot make it", self.folder.display()))?;
        for tool in TOOLS {
            link(&program, &self.folder.join(tool.name))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Makes the link, unless it is there already. Another file of that name is left alone.
fn link(program: &Path, link: &Path) -> anyhow::Result<()> {
    match symlink(program, link) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => match fs::read_link(link) {
            Ok(target) if target == program => Ok(()),
            _ => bail!("{}: something else has that name; remove it first", link.display()),
        },
        result => result.with_context(|| format!("{}: cannot make the link", link.display())),
    }
}
