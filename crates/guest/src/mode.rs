use crate::error::{Error, Result};

/// A file mode as chmod(1) reads it: an octal number, or changes to the mode a file has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mode(Vec<Change>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Change {
    operation: Operation,
    /// The bits that the operation may touch.
    scope: u16,
    /// The bits that it names; `rwx` for everyone, cut down to the scope.
    bits: u16,
    /// `X`: execution for directories, and for files that somebody may execute already.
    execute_if_any: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Set,
    Add,
    Remove,
}

const ALL: u16 = 0o7777;
const SETUID: u16 = 0o4000;
const SETGID: u16 = 0o2000;
const STICKY: u16 = 0o1000;
const EXECUTE: u16 = 0o111;

impl Mode {
    /// Exactly these permissions.
    #[must_use]
    pub fn exactly(permissions: u16) -> Self {
        let bits = permissions & ALL;
        Self(vec![Change { operation: Operation::Set, scope: ALL, bits, execute_if_any: false }])
    }

    /// The permissions of a file that has `current` ones.
    #[must_use]
    pub fn apply(&self, current: u16, is_dir: bool) -> u16 {
        self.0.iter().fold(current, |current, change| {
            let execute = change.execute_if_any && (is_dir || current & EXECUTE != 0);
            let bits = (change.bits | if execute { EXECUTE } else { 0 }) & change.scope;
            match change.operation {
                Operation::Set => current & !change.scope | bits,
                Operation::Add => current | bits,
                Operation::Remove => current & !bits,
            }
        })
    }
}

impl std::str::FromStr for Mode {
    type Err = Error;

    /// Reads `0755`, `755`, `u+x`, `a=rX,u+w`. Where a change names nobody it is for everyone, whatever the umask.
    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::BadMode(text.to_owned());
        if text.starts_with(|first: char| first.is_ascii_digit()) {
            let mode = u16::from_str_radix(text, 8).ok().filter(|&mode| mode <= ALL);
            return mode.map(Self::exactly).ok_or_else(bad);
        }
        let mut changes = Vec::new();
        for clause in text.split(',') {
            let start = clause.find(['+', '-', '=']).ok_or_else(bad)?;
            let (who, mut rest) = clause.split_at(start);
            let scope = scope(who).ok_or_else(bad)?;
            while let Some(sign) = rest.chars().next() {
                let end = rest[1..].find(['+', '-', '=']).map_or(rest.len(), |at| at + 1);
                changes.push(change(sign, &rest[1..end], scope).ok_or_else(bad)?);
                rest = &rest[end..];
            }
        }
        Ok(Self(changes))
    }
}

fn scope(who: &str) -> Option<u16> {
    if who.is_empty() {
        return Some(ALL);
    }
    who.chars().try_fold(0, |scope, who| {
        Some(
            scope
                | match who {
                    'u' => SETUID | 0o700,
                    'g' => SETGID | 0o070,
                    'o' => STICKY | 0o007,
                    'a' => ALL,
                    _ => return None,
                },
        )
    })
}

fn change(sign: char, permissions: &str, scope: u16) -> Option<Change> {
    let operation = match sign {
        '=' => Operation::Set,
        '+' => Operation::Add,
        _ => Operation::Remove,
    };
    let mut change = Change { operation, scope, bits: 0, execute_if_any: false };
    for permission in permissions.chars() {
        match permission {
            'r' => change.bits |= 0o444,
            'w' => change.bits |= 0o222,
            'x' => change.bits |= EXECUTE,
            's' => change.bits |= SETUID | SETGID,
            't' => {
                change.bits |= STICKY;
                change.scope |= STICKY;
            }
            'X' => change.execute_if_any = true,
            _ => return None,
        }
    }
    Some(change)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_modes_as_chmod_does() {
        let cases = [
            ("755", 0o644, false, 0o755),
            ("0644", 0o4755, false, 0o644),
            ("4755", 0o600, false, 0o4755),
            ("u+x", 0o644, false, 0o744),
            ("+x", 0o644, false, 0o755),
            ("go-rwx", 0o755, false, 0o700),
            ("a=r,u+w", 0o777, false, 0o644),
            ("u=rwx,go=", 0o644, false, 0o700),
            ("a+X", 0o644, false, 0o644),
            ("a+X", 0o644, true, 0o755),
            ("a+X", 0o744, false, 0o755),
            ("u+s", 0o755, false, 0o4755),
            ("g+s", 0o755, true, 0o2755),
            ("+t", 0o777, true, 0o1777),
            ("u+rw-x", 0o100, false, 0o600),
        ];
        for (mode, current, is_dir, expected) in cases {
            assert_eq!(mode.parse::<Mode>().unwrap().apply(current, is_dir), expected, "{mode} on {current:o}");
        }
        for bad in ["", "8", "10000", "u", "u+q", "z+x", "u+x,", "0x1ff", "-1é"] {
            assert!(bad.parse::<Mode>().is_err(), "{bad}");
        }
    }
}
