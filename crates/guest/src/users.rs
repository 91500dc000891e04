use qtk_disk::{GuestPath, Tree};

use crate::error::{Error, InGuest, Result};

/// The users and groups of a guest, from its `/etc/passwd` and `/etc/group`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounts {
    users: Vec<Account>,
    groups: Vec<Account>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Account {
    name: Vec<u8>,
    id: u32,
    /// A user's group; a group's own id.
    group: u32,
}

/// Whom a file shall belong to, by name or number, as it is written on a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    user: Option<String>,
    group: Option<Group>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Group {
    /// The user's own.
    Login,
    Named(String),
}

/// Numeric owner and group; `None` leaves a file's own as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnerIds {
    /// User.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

impl std::str::FromStr for Owner {
    type Err = Error;

    /// Reads `USER`, `USER:GROUP`, `USER:` (with the user's login group) or `:GROUP`.
    fn from_str(text: &str) -> Result<Self> {
        let (user, group) = match text.split_once(':') {
            Some((user, "")) => (user, (!user.is_empty()).then_some(Group::Login)),
            Some((user, group)) => (user, Some(Group::Named(group.to_owned()))),
            None => (text, None),
        };
        if (user.is_empty() && group.is_none()) || text.matches(':').count() > 1 {
            return Err(Error::BadOwner(text.to_owned()));
        }
        Ok(Self { user: (!user.is_empty()).then(|| user.to_owned()), group })
    }
}

impl Owner {
    /// Looks the names up. A name goes before a number, and `+1000` is always a number, as chown(1) has it.
    pub fn resolve(&self, accounts: &Accounts) -> Result<OwnerIds> {
        let uid = self.user.as_deref().map(|user| accounts.user(user)).transpose()?;
        let gid = match &self.group {
            None => None,
            Some(Group::Named(name)) => Some(accounts.group(name)?),
            Some(Group::Login) => {
                let user = accounts.users.iter().find(|user| Some(user.id) == uid);
                let unknown = || Error::Unknown { kind: "user", name: self.user.clone().unwrap_or_default() };
                Some(user.ok_or_else(unknown)?.group)
            }
        };
        Ok(OwnerIds { uid, gid })
    }
}

impl Accounts {
    /// Reads the guest's files. What is no file, such as a link to `/dev/null`, holds nobody.
    pub fn read(tree: &Tree) -> Result<Self> {
        Ok(Self {
            users: accounts(&read_if_present(tree, "/etc/passwd")?, 3),
            groups: accounts(&read_if_present(tree, "/etc/group")?, 2),
        })
    }

    /// The number of a user.
    pub fn user(&self, name: &str) -> Result<u32> {
        id_of(&self.users, "user", name)
    }

    /// The number of a group.
    pub fn group(&self, name: &str) -> Result<u32> {
        id_of(&self.groups, "group", name)
    }

    /// The name of a user.
    #[must_use]
    pub fn user_name(&self, uid: u32) -> Option<&[u8]> {
        name_of(&self.users, uid)
    }

    /// The name of a group.
    #[must_use]
    pub fn group_name(&self, gid: u32) -> Option<&[u8]> {
        name_of(&self.groups, gid)
    }
}

fn read_if_present(tree: &Tree, path: &str) -> Result<Vec<u8>> {
    match tree.read_small(path) {
        Err(qtk_disk::Error::Path { .. }) => Ok(Vec::new()),
        read => read.in_guest("read", &GuestPath::from(path)),
    }
}

/// Lines of `name:password:id`, and for users the group behind it. Others are skipped, as the C library does.
fn accounts(text: &[u8], group_field: usize) -> Vec<Account> {
    let account = |line: &[u8]| {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b':').collect();
        let number = |at: usize| std::str::from_utf8(fields.get(at)?).ok()?.parse().ok();
        Some(Account { name: fields.first()?.to_vec(), id: number(2)?, group: number(group_field)? })
    };
    text.split(|&byte| byte == b'\n').filter_map(account).collect()
}

fn id_of(accounts: &[Account], kind: &'static str, name: &str) -> Result<u32> {
    let found = accounts.iter().find(|account| account.name == name.as_bytes()).map(|account| account.id);
    let number = || name.strip_prefix('+').unwrap_or(name).parse().ok().filter(|&id| id != u32::MAX);
    found.or_else(number).ok_or_else(|| Error::Unknown { kind, name: name.to_owned() })
}

fn name_of(accounts: &[Account], id: u32) -> Option<&[u8]> {
    accounts.iter().find(|account| account.id == id).map(|account| account.name.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(owner: &str) -> Result<(Option<u32>, Option<u32>)> {
        let accounts = Accounts {
            users: accounts(
                b"root:x:0:0:root:/root:/bin/sh\n\nbroken\ndaytona:x:1000:1001::/home:\n5:x:77:78::/:\n",
                3,
            ),
            groups: accounts(b"root:x:0:\nadm:x:4:syslog,daytona\n", 2),
        };
        let ids = owner.parse::<Owner>()?.resolve(&accounts)?;
        Ok((ids.uid, ids.gid))
    }

    #[test]
    fn reads_owners_as_chown_does() {
        let cases = [
            ("root", (Some(0), None)),
            ("daytona:adm", (Some(1000), Some(4))),
            ("daytona:", (Some(1000), Some(1001))),
            (":adm", (None, Some(4))),
            ("1000:4", (Some(1000), Some(4))),
            ("1000:", (Some(1000), Some(1001))),
            ("5", (Some(77), None)),
            ("+5", (Some(5), None)),
        ];
        for (owner, expected) in cases {
            assert_eq!(resolve(owner).unwrap(), expected, "{owner}");
        }
        for bad in ["", ":", "a:b:c", "nobody", ":nogroup", "2000:", "-1", "4294967295"] {
            assert!(resolve(bad).is_err(), "{bad}");
        }
    }
}
