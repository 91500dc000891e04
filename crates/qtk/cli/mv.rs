use std::process::ExitCode;

use clap::Args;
use qtk_disk::GuestPath;

use super::arguments::guest_path;
use super::guest::GuestToEdit;

/// Move or rename files in the guest
#[derive(Args, Debug)]
pub(crate) struct Mv {
    #[command(flatten)]
    guest: GuestToEdit,

    /// Files to move, then their new name or the directory they go into
    #[arg(required = true, num_args = 2.., value_names = ["SOURCE", "DEST"], value_parser = guest_path())]
    paths: Vec<GuestPath>,
}

impl Mv {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        if let Some((dest, sources)) = self.paths.split_last() {
            self.guest.edit(|tree| Ok(qtk_guest::move_files(tree, sources, dest)?))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
