use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use qtk_disk::{DisplayPath, GuestPath, Tree};
use qtk_guest::{Accounts, Entry, Listing};
use serde_json::Value;

use super::arguments::guest_path;
use super::guest::GuestToRead;
use super::{entry, text};

/// List files of the guest
#[derive(Args, Debug)]
pub(crate) struct Ls {
    #[command(flatten)]
    guest: GuestToRead,

    /// Directories or files; the root directory where none is given
    #[arg(value_parser = guest_path())]
    path: Vec<GuestPath>,

    /// Permissions, owners, sizes and times (UTC) too
    #[arg(short, long)]
    long: bool,

    /// Directories below directories too
    #[arg(short = 'R', long)]
    recursive: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Ls {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let tree = self.guest.open()?;
        self.guest.name_errors(|| {
            let accounts = Accounts::read(&tree)?;
            if self.json { self.print_json(&tree, &accounts) } else { self.print_text(&tree, &accounts) }
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn each(&self, tree: &Tree, mut visit: impl FnMut(Listing) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let root = [GuestPath::from("/")];
        let paths = if self.path.is_empty() { &root[..] } else { &self.path };
        paths.iter().try_for_each(|path| qtk_guest::list(tree, path, self.recursive, &mut visit))
    }

    fn print_json(&self, tree: &Tree, accounts: &Accounts) -> anyhow::Result<()> {
        let mut all = Vec::new();
        self.each(tree, |listing| {
            all.extend(listing.entries.iter().map(|entry| entry::to_json(entry, accounts)));
            Ok(())
        })?;
        text::print_json(&Value::from(all))
    }

    fn print_text(&self, tree: &Tree, accounts: &Accounts) -> anyhow::Result<()> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        let with_titles = self.recursive || self.path.len() > 1;
        let mut first = true;
        self.each(tree, |listing| {
            if with_titles && let Some(directory) = &listing.directory {
                writeln!(out, "{}{}:", if first { "" } else { "\n" }, directory.path)?;
            }
            first = false;
            let lines = if self.long { long_lines(&listing, accounts) } else { short_lines(&listing) };
            Ok(lines.iter().try_for_each(|line| writeln!(out, "{line}"))?)
        })?;
        Ok(out.flush()?)
    }
}

/// A name where the directory is known, else the whole path.
fn name<'a>(listing: &Listing, entry: &'a Entry) -> DisplayPath<'a> {
    DisplayPath(if listing.directory.is_some() { &entry.name } else { entry.path.as_bytes() })
}

fn short_lines(listing: &Listing) -> Vec<String> {
    listing.entries.iter().map(|entry| name(listing, entry).to_string()).collect()
}

fn long_lines(listing: &Listing, accounts: &Accounts) -> Vec<String> {
    let entries = &listing.entries;
    let rows: Vec<[String; 4]> = entries.iter().map(|entry| columns(entry, accounts)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (links, user, group, size) = (width(0), width(1), width(2), width(3));
    let line = |(entry, row): (&Entry, &[String; 4])| {
        let target = entry.target.as_ref().map_or_else(String::new, |target| format!(" -> {}", DisplayPath(target)));
        format!(
            "{} {:>links$} {:user$} {:group$} {:>size$} {} {}{target}",
            entry::mode_text(&entry.metadata),
            row[0],
            row[1],
            row[2],
            row[3],
            entry::short_time(entry.metadata.mtime),
            name(listing, entry),
        )
    };
    entries.iter().zip(&rows).map(line).collect()
}

fn columns(entry: &Entry, accounts: &Accounts) -> [String; 4] {
    let metadata = &entry.metadata;
    [
        metadata.links.to_string(),
        entry::account_text(accounts.user_name(metadata.uid), metadata.uid),
        entry::account_text(accounts.group_name(metadata.gid), metadata.gid),
        entry::size_text(metadata),
    ]
}
