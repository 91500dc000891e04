use std::process::ExitCode;

use clap::Args;
use qtk_disk::GuestPath;
use qtk_guest::Mode;

use super::arguments::guest_path;
use super::guest::GuestToEdit;

/// Change the permissions of files in the guest
#[derive(Args, Debug)]
pub(crate) struct Chmod {
    #[command(flatten)]
    guest: GuestToEdit,

    /// Octal permissions, or changes such as u+x,go-w
    #[arg(allow_hyphen_values = true)]
    mode: Mode,

    /// Files to change; links are followed
    #[arg(required = true, value_parser = guest_path())]
    path: Vec<GuestPath>,

    /// Everything below directories too, except links
    #[arg(short = 'R', long)]
    recursive: bool,
}

impl Chmod {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let change = |tree: &mut _, path| Ok(qtk_guest::chmod(tree, path, &self.mode, self.recursive)?);
        self.guest.edit(|tree| self.path.iter().try_for_each(|path| change(tree, path)))?;
        Ok(ExitCode::SUCCESS)
    }
}
