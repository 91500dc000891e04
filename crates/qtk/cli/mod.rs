//! One module a verb: its arguments, and what it does with them.

mod amend;
mod arguments;
mod bench;
mod bitmap;
mod cat;
mod check;
mod chmod;
mod chown;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod demo;
mod entry;
mod extract;
mod flatten;
mod fsck;
mod guest;
mod info;
mod inject;
mod level;
mod ln;
mod ls;
mod map;
mod measure;
mod mkdir;
mod mkfs;
mod mkfs_options;
mod mv;
mod new_image;
mod rebase;
mod resize;
mod rm;
mod size;
mod snapshot;
mod sparsify;
mod stat;
mod text;
mod write;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::compat::Compat;

/// VM disk images: look inside, edit, flatten, compress. Without root, a hypervisor or a kernel module.
#[derive(Debug, Parser)]
#[command(name = "qtk", version, arg_required_else_help = true, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 corruption found; compare: 0 same, 1 different, 2 failed.\n\
    Every verb that prints facts takes --json. Every edit is a transaction: it happens whole, or the image stays as it was."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Create(create::Create),
    Flatten(flatten::Flatten),
    Convert(convert::Convert),
    Dd(dd::Dd),
    Measure(measure::Measure),
    Commit(commit::Commit),
    Rebase(rebase::Rebase),
    Resize(resize::Resize),
    #[command(name = "snapshot")]
    Snapshot(snapshot::SnapshotVerb),
    #[command(name = "bitmap")]
    Bitmap(bitmap::BitmapVerb),
    #[command(name = "amend")]
    Amend(amend::AmendVerb),
    Info(info::Info),
    Check(check::Check),
    Fsck(fsck::Fsck),
    Map(map::Map),
    Compare(compare::Compare),
    Bench(bench::Bench),
    Inject(inject::Inject),
    Extract(extract::Extract),
    Ls(ls::Ls),
    Cat(cat::Cat),
    Stat(stat::Stat),
    Write(write::Write),
    Mkdir(mkdir::Mkdir),
    Mkfs(mkfs::Mkfs),
    Mv(mv::Mv),
    Ln(ln::Ln),
    Rm(rm::Rm),
    Chmod(chmod::Chmod),
    Chown(chown::Chown),
    Compat(Compat),
    Demo(demo::Demo),
}

/// The exit code of a failure. Where 1 is an answer, as in cmp(1), failures have another.
pub(crate) fn failure_code(verb: &Verb) -> u8 {
    match verb {
        Verb::Compare(_) => 2,
        _ => 1,
    }
}

/// Does what the command line asked for.
pub(crate) fn run(verb: &Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Create(verb) => verb.run(),
        Verb::Flatten(verb) => verb.run(),
        Verb::Convert(verb) => verb.run(),
        Verb::Dd(verb) => verb.run(),
        Verb::Measure(verb) => verb.run(),
        Verb::Commit(verb) => verb.run(),
        Verb::Rebase(verb) => verb.run(),
        Verb::Resize(verb) => verb.run(),
        Verb::Snapshot(verb) => verb.run(),
        Verb::Bitmap(verb) => verb.run(),
        Verb::Amend(verb) => verb.run(),
        Verb::Info(verb) => verb.run(),
        Verb::Check(verb) => verb.run(),
        Verb::Fsck(verb) => verb.run(),
        Verb::Map(verb) => verb.run(),
        Verb::Compare(verb) => verb.run(),
        Verb::Bench(verb) => verb.run(),
        Verb::Inject(verb) => verb.run(),
        Verb::Extract(verb) => verb.run(),
        Verb::Ls(verb) => verb.run(),
        Verb::Cat(verb) => verb.run(),
        Verb::Stat(verb) => verb.run(),
        Verb::Write(verb) => verb.run(),
        Verb::Mkdir(verb) => verb.run(),
        Verb::Mkfs(verb) => verb.run(),
        Verb::Mv(verb) => verb.run(),
        Verb::Ln(verb) => verb.run(),
        Verb::Rm(verb) => verb.run(),
        Verb::Chmod(verb) => verb.run(),
        Verb::Chown(verb) => verb.run(),
        Verb::Compat(verb) => verb.run(),
        Verb::Demo(verb) => verb.run(),
    }
}
