use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use qtk_disk::GuestPath;
use qtk_guest::extract::{ExtractOptions, extract};

use super::arguments::guest_path_from;
use super::guest::GuestToRead;
use super::text;

/// Copy files and directory trees out of the guest
#[derive(Args, Debug)]
pub(crate) struct Extract {
    #[command(flatten)]
    guest: GuestToRead,

    /// Files and directories of the guest, then the host directory they go into, which is made if it is missing
    #[arg(required = true, num_args = 2.., value_names = ["SOURCE", "DIR"])]
    paths: Vec<PathBuf>,

    /// Keep owners and setuid, setgid and sticky bits. Needs root
    #[arg(long)]
    preserve: bool,
}

impl Extract {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let Some((dir, sources)) = self.paths.split_last() else { return Ok(ExitCode::from(2)) };
        let sources: Vec<GuestPath> = sources.iter().map(|path| guest_path_from(path.as_os_str())).collect();
        let tree = self.guest.open()?;
        let options = ExtractOptions { owners: self.preserve };
        let extracted = self.guest.name_errors(|| Ok(extract(&tree, &sources, dir, options)?))?;
        for path in &extracted.skipped {
            text::warn(&format!("{path} is a device, pipe or socket and was left out"));
        }
        Ok(ExitCode::SUCCESS)
    }
}
