use std::process::ExitCode;

use clap::Args;
use qtk_disk::GuestPath;
use qtk_guest::LinkOptions;

use super::arguments::guest_path;
use super::guest::GuestToEdit;

/// Make a link in the guest
#[derive(Args, Debug)]
pub(crate) struct Ln {
    #[command(flatten)]
    guest: GuestToEdit,

    /// What the link leads to; taken as it is for a symbolic link
    #[arg(value_parser = guest_path())]
    target: GuestPath,

    /// The link's name, or the directory it goes into
    #[arg(value_parser = guest_path())]
    link: GuestPath,

    /// A symbolic link instead of a second name for the same file
    #[arg(short, long)]
    symbolic: bool,

    /// Replace what has the link's name
    #[arg(short, long)]
    force: bool,
}

impl Ln {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let options = LinkOptions { symbolic: self.symbolic, force: self.force };
        self.guest.edit(|tree| Ok(qtk_guest::link(tree, self.target.as_bytes(), &self.link, options)?))?;
        Ok(ExitCode::SUCCESS)
    }
}
