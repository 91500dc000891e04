use std::process::ExitCode;

use clap::Args;
use qtk_disk::GuestPath;
use qtk_guest::RemoveOptions;

use super::arguments::guest_path;
use super::guest::GuestToEdit;

/// Remove files from the guest
#[derive(Args, Debug)]
pub(crate) struct Rm {
    #[command(flatten)]
    guest: GuestToEdit,

    /// Files to remove
    #[arg(required = true, value_parser = guest_path())]
    path: Vec<GuestPath>,

    /// Directories too, with everything in them
    #[arg(short, long)]
    recursive: bool,

    /// Files that do not exist are no error
    #[arg(short, long)]
    force: bool,
}

impl Rm {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let options = RemoveOptions { recursive: self.recursive, force: self.force };
        self.guest.edit(|tree| self.path.iter().try_for_each(|path| Ok(qtk_guest::remove(tree, path, options)?)))?;
        Ok(ExitCode::SUCCESS)
    }
}
