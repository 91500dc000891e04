use std::io::Read;
use std::process::ExitCode;

use clap::Args;
use qtk_disk::GuestPath;
use qtk_guest::{Mode, WriteOptions};

use super::arguments::{OwnerArguments, guest_path};
use super::guest::GuestToEdit;
use super::text;

/// Write a file of the guest, from --content or standard input
#[derive(Args, Debug)]
pub(crate) struct Write {
    #[command(flatten)]
    guest: GuestToEdit,

    /// The file; links are followed
    #[arg(value_parser = guest_path())]
    path: GuestPath,

    /// The content, written as it is without a newline; standard input where not given
    #[arg(long, value_name = "TEXT")]
    content: Option<String>,

    /// Add to the end of the file
    #[arg(long)]
    append: bool,

    /// Permissions; those of the file that exists, else 0644
    #[arg(long)]
    mode: Option<Mode>,

    #[command(flatten)]
    owner: OwnerArguments,
}

impl Write {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let mut content: Box<dyn Read> = match &self.content {
            Some(content) => Box::new(content.as_bytes()),
            None => text::input()?,
        };
        self.guest.edit(|tree| {
            let owner = self.owner.resolve(tree)?;
            let options = WriteOptions { mode: self.mode.clone(), owner, append: self.append };
            Ok(qtk_guest::write(tree, &self.path, &mut *content, &options)?)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
