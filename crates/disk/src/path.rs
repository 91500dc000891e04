use std::fmt::{self, Write};

/// A path inside the guest: bytes, as Linux has them, which need not be UTF-8.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPath(pub Vec<u8>);

impl GuestPath {
    /// The path's bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path of `name` in the directory that this path names.
    #[must_use]
    pub fn join(&self, name: &[u8]) -> Self {
        let mut path = self.0.clone();
        if !path.ends_with(b"/") {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Self(path)
    }
}

impl<T: AsRef<[u8]> + ?Sized> From<&T> for GuestPath {
    fn from(path: &T) -> Self {
        Self(path.as_ref().to_vec())
    }
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        DisplayPath(&self.0).fmt(f)
    }
}

impl fmt::Debug for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Shows bytes from a guest as text that is safe on a terminal: control characters and bytes that are not UTF-8 are escaped.
#[derive(Clone, Copy, Debug)]
pub struct DisplayPath<'a>(pub &'a [u8]);

impl fmt::Display for DisplayPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for char in chunk.valid().chars() {
                if char.is_control() {
                    write!(f, "{}", char.escape_default())?;
                } else {
                    f.write_char(char)?;
                }
            }
            write!(f, "{}", chunk.invalid().escape_ascii())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_what_a_terminal_may_see() {
        assert_eq!(GuestPath::from("/a b/é").to_string(), "/a b/é");
        assert_eq!(GuestPath::from(b"/\x1b[2J\xff\n").to_string(), "/\\u{1b}[2J\\xff\\n");
        assert_eq!(GuestPath::from("/").join(b"etc").join(b"fstab"), GuestPath::from("/etc/fstab"));
    }
}
