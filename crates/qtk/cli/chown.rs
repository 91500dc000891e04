use std::process::ExitCode;

use clap::Args;
use qtk_disk::GuestPath;
use qtk_guest::{Accounts, ChownOptions, Owner};

use super::arguments::guest_path;
use super::guest::GuestToEdit;

/// Change whom files in the guest belong to
#[derive(Args, Debug)]
pub(crate) struct Chown {
    #[command(flatten)]
    guest: GuestToEdit,

    /// USER, USER:GROUP, USER: or :GROUP; names are the guest's
    owner: Owner,

    /// Files to change; links are followed
    #[arg(required = true, value_parser = guest_path())]
    path: Vec<GuestPath>,

    /// Everything below directories too
    #[arg(short = 'R', long)]
    recursive: bool,

    /// Change a named link itself
    #[arg(long)]
    no_dereference: bool,
}

impl Chown {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let options = ChownOptions { recursive: self.recursive, no_dereference: self.no_dereference };
        self.guest.edit(|tree| {
            let owner = self.owner.resolve(&Accounts::read(tree)?)?;
            self.path.iter().try_for_each(|path| Ok(qtk_guest::chown(tree, path, owner, options)?))
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
