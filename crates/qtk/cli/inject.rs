use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use qtk_disk::GuestPath;
use qtk_guest::Mode;
use qtk_guest::inject::{InjectOptions, Source, inject};

use super::arguments::{OwnerArguments, guest_path_from};
use super::guest::GuestToEdit;
use super::text;

/// Copy files, directory trees or standard input into the guest
#[derive(Args, Debug)]
pub(crate) struct Inject {
    #[command(flatten)]
    guest: GuestToEdit,

    /// Files and directories of the host, or - for standard input; then the directory of the guest they go into, or one's new name
    #[arg(required = true, num_args = 2.., value_names = ["SOURCE", "DEST"])]
    paths: Vec<PathBuf>,

    /// Permissions of files; the source's where not given
    #[arg(long)]
    mode: Option<Mode>,

    #[command(flatten)]
    owner: OwnerArguments,

    /// Keep owners, all permission bits, times and extended attributes of the sources
    #[arg(long)]
    preserve: bool,

    /// Make missing directories above the destination
    #[arg(long)]
    parents: bool,
}

impl Inject {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let Some((dest, sources)) = self.paths.split_last() else { return Ok(ExitCode::from(2)) };
        let dest: GuestPath = guest_path_from(dest.as_os_str());
        let mut stdin = None;
        let mut sources = plan(sources, &mut stdin)?;
        self.guest.edit(|tree| {
            let options = InjectOptions {
                parents: self.parents,
                mode: self.mode.clone(),
                owner: self.owner.resolve(tree)?,
                preserve: self.preserve,
                ..InjectOptions::default()
            };
            Ok(inject(tree, &mut sources, &dest, &options)?)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// The sources; standard input goes into `stdin`.
fn plan<'a>(paths: &[PathBuf], stdin: &'a mut Option<Box<dyn Read>>) -> anyhow::Result<Vec<Source<'a>>> {
    match paths.iter().filter(|path| path.as_os_str() == "-").count() {
        0 => {}
        1 => *stdin = Some(text::input()?),
        _ => bail!("- can be given only once"),
    }
    let mut stdin = stdin.as_deref_mut();
    let source = |path: &PathBuf| match stdin.take_if(|_| path.as_os_str() == "-") {
        Some(stdin) => Source::Stream(stdin),
        None => Source::Path(path.clone()),
    };
    Ok(paths.iter().map(source).collect())
}
