use std::process::ExitCode;

use clap::Args;
use qtk_disk::GuestPath;
use qtk_guest::{MkdirOptions, Mode, make_directories};

use super::arguments::{OwnerArguments, guest_path};
use super::guest::GuestToEdit;

/// Make directories in the guest
#[derive(Args, Debug)]
pub(crate) struct Mkdir {
    #[command(flatten)]
    guest: GuestToEdit,

    /// Directories to make
    #[arg(required = true, value_parser = guest_path())]
    path: Vec<GuestPath>,

    /// Make missing parents too, and accept directories that exist
    #[arg(short, long)]
    parents: bool,

    /// Permissions; 0755 where not given
    #[arg(short, long)]
    mode: Option<Mode>,

    #[command(flatten)]
    owner: OwnerArguments,
}

impl Mkdir {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        self.guest.edit(|tree| {
            let owner = self.owner.resolve(tree)?;
            let options = MkdirOptions { parents: self.parents, mode: self.mode.clone(), owner };
            self.path.iter().try_for_each(|path| Ok(make_directories(tree, path, &options).map(drop)?))
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
