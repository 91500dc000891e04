use std::io::{self, Write};
use std::process::ExitCode;

use clap::Args;
use qtk_disk::{DisplayPath, Follow, GuestPath, Xattr};
use qtk_guest::{Accounts, Entry};
use serde_json::{Value, json};

use super::arguments::guest_path;
use super::guest::GuestToRead;
use super::{entry, text};

/// Show everything that is known of files in the guest
#[derive(Args, Debug)]
pub(crate) struct Stat {
    #[command(flatten)]
    guest: GuestToRead,

    /// Files in the guest
    #[arg(required = true, value_parser = guest_path())]
    path: Vec<GuestPath>,

    /// Show what a link leads to instead of the link
    #[arg(short = 'L', long)]
    dereference: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Stat {
    pub(crate) fn run(&self) -> anyhow::Result<ExitCode> {
        let tree = self.guest.open()?;
        let follow = if self.dereference { Follow::All } else { Follow::NotLast };
        self.guest.name_errors(|| {
            let accounts = Accounts::read(&tree)?;
            let found = self.path.iter().map(|path| qtk_guest::stat(&tree, path, follow));
            let found = found.collect::<Result<Vec<_>, _>>()?;
            if self.json {
                let objects = found.iter().map(|(entry, xattrs)| to_json(entry, xattrs, &accounts));
                return text::print_json(&objects.collect());
            }
            let mut out = io::stdout().lock();
            found.iter().try_for_each(|(entry, xattrs)| Ok(print(&mut out, entry, xattrs, &accounts)?))
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

fn to_json(entry: &Entry, xattrs: &[Xattr], accounts: &Accounts) -> Value {
    let mut object = entry::to_json(entry, accounts);
    let attribute = |(name, value): &Xattr| json!({ "name": text::lossy(name), "value": hex(value) });
    object["xattrs"] = xattrs.iter().map(attribute).collect();
    object
}

fn print(out: &mut impl Write, entry: &Entry, xattrs: &[Xattr], accounts: &Accounts) -> io::Result<()> {
    let metadata = &entry.metadata;
    let target = entry.target.as_ref().map_or_else(String::new, |target| format!(" -> {}", DisplayPath(target)));
    writeln!(out, "  Path: {}{target}", entry.path)?;
    writeln!(out, "  Type: {}", entry::type_name(metadata.file_type))?;
    writeln!(out, "  Size: {} ({} allocated)", entry::size_text(metadata), metadata.allocated)?;
    writeln!(out, "  Mode: {:04o} {}", metadata.permissions, entry::mode_text(metadata))?;
    let user = entry::account_text(accounts.user_name(metadata.uid), metadata.uid);
    let group = entry::account_text(accounts.group_name(metadata.gid), metadata.gid);
    writeln!(out, " Owner: {user}:{group} ({}:{})", metadata.uid, metadata.gid)?;
    writeln!(out, " Inode: {}, {} links", metadata.number, metadata.links)?;
    writeln!(out, "Access: {}", entry::rfc3339(metadata.atime))?;
    writeln!(out, "Modify: {}", entry::rfc3339(metadata.mtime))?;
    writeln!(out, "Change: {}", entry::rfc3339(metadata.ctime))?;
    if let Some(birth) = metadata.crtime {
        writeln!(out, " Birth: {}", entry::rfc3339(birth))?;
    }
    xattrs.iter().try_for_each(|(name, value)| writeln!(out, " Xattr: {}=0x{}", DisplayPath(name), hex(value)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
