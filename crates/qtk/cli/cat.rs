use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use qtk_disk::GuestPath;

use super::arguments::guest_path;
use super::guest::GuestToRead;

/// Print files of the guest
#[derive(Args, Debug)]
pub(crate) struct Cat {
    #[command(flatten)]
    guest: GuestToRead,

    /// Files in the guest
    #[arg(required = true, value_parser = guest_path())]
    path: Vec<GuestPath>,
}

impl Cat {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let tree = self.guest.open()?;
        let mut out = io::stdout().lock();
        self.guest.name_errors(|| self.path.iter().try_for_each(|path| Ok(qtk_guest::cat(&tree, path, &mut out)?)))?;
        // What follows the last newline still waits, and at exit a failure would go unnoticed.
        out.flush().context("cannot write the output")?;
        Ok(ExitCode::SUCCESS)
    }
}
