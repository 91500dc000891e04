//! `/etc/fstab`: which file system belongs where (fstab(5)).

use std::fmt;

use crate::DisplayPath;

/// What an entry mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// `LABEL=`, `/dev/disk/by-label/`.
    Label(Vec<u8>),
    /// `UUID=`, `/dev/disk/by-uuid/`.
    Uuid(String),
    /// `PARTUUID=`, `/dev/disk/by-partuuid/`.
    PartUuid(String),
    /// `PARTLABEL=`, `/dev/disk/by-partlabel/`.
    PartLabel(Vec<u8>),
    /// A partition, by number, of the guest's first disk: `/dev/sda1`, `/dev/vda15`, `/dev/nvme0n1p2`.
    Partition(u32),
    /// The guest's first disk as a whole: `/dev/vda`.
    Disk,
    /// What the kernel booted from: `/dev/root`, `rootfs`.
    Root,
    /// Anything else: a network share, `tmpfs`, another disk, a volume of LVM.
    Other(Vec<u8>),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label(label) => write!(f, "LABEL={}", DisplayPath(label)),
            Self::Uuid(uuid) => write!(f, "UUID={}", DisplayPath(uuid.as_bytes())),
            Self::PartUuid(uuid) => write!(f, "PARTUUID={}", DisplayPath(uuid.as_bytes())),
            Self::PartLabel(label) => write!(f, "PARTLABEL={}", DisplayPath(label)),
            Self::Partition(number) => write!(f, "partition {number}"),
            Self::Disk => write!(f, "the whole disk"),
            Self::Root => write!(f, "/dev/root"),
            Self::Other(device) => DisplayPath(device).fmt(f),
        }
    }
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What is mounted.
    pub source: Source,
    /// Where.
    pub mount_point: Vec<u8>,
    /// Its type: `ext4`, `vfat`, `swap`, `auto`.
    pub kind: Vec<u8>,
    /// Mount options, separated by commas.
    pub options: Vec<u8>,
}

impl Entry {
    /// Whether the options hold this one.
    #[must_use]
    pub fn has_option(&self, option: &str) -> bool {
        self.options.split(|&byte| byte == b',').any(|found| found == option.as_bytes())
    }
}

/// The entries of an fstab, in order. Lines that are not entries are skipped, as mount(8) does.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Entry> {
    text.split(|&byte| byte == b'\n').filter_map(entry).collect()
}

fn entry(line: &[u8]) -> Option<Entry> {
    let line = line.trim_ascii();
    if line.starts_with(b"#") {
        return None;
    }
    let mut fields = line.split(|byte| matches!(byte, b' ' | b'\t' | b'\r')).filter(|field| !field.is_empty());
    Some(Entry {
        source: source(&unescape(fields.next()?)),
        mount_point: unescape(fields.next()?),
        kind: unescape(fields.next().unwrap_or(b"auto")),
        options: unescape(fields.next().unwrap_or(b"defaults")),
    })
}

/// Resolves `\040` and the like: a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    replace_escapes(field, b"\\", |digits: &[u8; 3]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok())
}

/// Resolves `\x20` and the like, as udev writes them into names of links.
fn unescape_udev(name: &[u8]) -> Vec<u8> {
    replace_escapes(name, b"\\x", |digits: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok())
}

/// Replaces every `prefix` followed by `N` digits by the byte they stand for; others stay as they are.
fn replace_escapes<const N: usize>(text: &[u8], prefix: &[u8], byte: impl Fn(&[u8; N]) -> Option<u8>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let escape = rest.strip_prefix(prefix).and_then(<[u8]>::split_first_chunk);
        let (found, after) = match escape.and_then(|(digits, after)| Some((byte(digits)?, after))) {
            Some(escaped) => escaped,
            None => (first, tail),
        };
        bytes.push(found);
        rest = after;
    }
    bytes
}

fn source(field: &[u8]) -> Source {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if let Some(at) = field.iter().position(|&byte| byte == b'=')
        && let Some((tag, value)) = field.split_at_checked(at)
    {
        let value = unquote(value.strip_prefix(b"=").unwrap_or(value));
        match tag {
            b"LABEL" => return Source::Label(value.to_vec()),
            b"UUID" => return Source::Uuid(text(value)),
            b"PARTUUID" => return Source::PartUuid(text(value)),
            b"PARTLABEL" => return Source::PartLabel(value.to_vec()),
            _ => {}
        }
    }
    let Some(name) = field.strip_prefix(b"/dev/") else {
        return if field == b"rootfs" { Source::Root } else { Source::Other(field.to_vec()) };
    };
    if let Some(label) = name.strip_prefix(b"disk/by-label/") {
        return Source::Label(unescape_udev(label));
    }
    if let Some(uuid) = name.strip_prefix(b"disk/by-uuid/") {
        return Source::Uuid(text(uuid));
    }
    if let Some(uuid) = name.strip_prefix(b"disk/by-partuuid/") {
        return Source::PartUuid(text(uuid));
    }
    if let Some(label) = name.strip_prefix(b"disk/by-partlabel/") {
        return Source::PartLabel(unescape_udev(label));
    }
    std::str::from_utf8(name).ok().and_then(device).unwrap_or_else(|| Source::Other(field.to_vec()))
}

fn unquote(value: &[u8]) -> &[u8] {
    [b"\"", b"'"].into_iter().find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote)).unwrap_or(value)
}

/// The part of the guest's first disk that a name below `/dev` stands for.
fn device(name: &str) -> Option<Source> {
    if name == "root" {
        return Some(Source::Root);
    }
    let number = |digits: &str| digits.parse().ok().filter(|&number| number > 0).map(Source::Partition);
    if name.starts_with("disk/by-id/") || name.starts_with("disk/by-path/") {
        return number(name.rsplit_once("-part")?.1);
    }
    for (disk, separator) in [("sda", ""), ("vda", ""), ("xvda", ""), ("hda", ""), ("nvme0n1", "p"), ("mmcblk0", "p")] {
        let Some(rest) = name.strip_prefix(disk) else { continue };
        return if rest.is_empty() { Some(Source::Disk) } else { number(rest.strip_prefix(separator)?) };
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_distributions_write() {
        let text = b"# comment\n\nLABEL=cloudimg-rootfs\t/\t ext4\tdiscard,commit=30,errors=remount-ro\t0 1\n  \
            UUID=\"AB12-34CD\" /boot/efi vfat umask=0077 0 1\nonly-one-field\n/dev/sdb1 /data\\040disk auto defaults,nofail 0 2\r\n";
        let entries = parse(text);
        assert_eq!(entries.len(), 3);
        assert_eq!(entries[0].source, Source::Label(b"cloudimg-rootfs".to_vec()));
        assert_eq!((entries[0].mount_point.as_slice(), entries[0].kind.as_slice()), (&b"/"[..], &b"ext4"[..]));
        assert!(entries[0].has_option("discard") && !entries[0].has_option("commit"));
        assert_eq!(entries[1].source, Source::Uuid("AB12-34CD".to_owned()));
        assert_eq!(entries[2].mount_point, b"/data disk");
        assert!(entries[2].has_option("nofail"));
    }

    #[test]
    fn knows_the_names_of_devices() {
        let other = |name: &str| Source::Other(name.as_bytes().to_vec());
        let cases = [
            ("/dev/sda1", Source::Partition(1)),
            ("/dev/vda15", Source::Partition(15)),
            ("/dev/xvda2", Source::Partition(2)),
            ("/dev/nvme0n1p2", Source::Partition(2)),
            ("/dev/mmcblk0p1", Source::Partition(1)),
            ("/dev/vda", Source::Disk),
            ("/dev/nvme0n1", Source::Disk),
            ("/dev/root", Source::Root),
            ("/dev/sdb1", other("/dev/sdb1")),
            ("/dev/sda0", other("/dev/sda0")),
            ("/dev/sda99999999999", other("/dev/sda99999999999")),
            ("/dev/nvme0n12", other("/dev/nvme0n12")),
            ("/dev/mapper/vg-root", other("/dev/mapper/vg-root")),
            ("/dev/disk/by-label/my\\x20disk", Source::Label(b"my disk".to_vec())),
            ("/dev/disk/by-uuid/1234-ABCD", Source::Uuid("1234-ABCD".into())),
            ("/dev/disk/by-partuuid/deadbeef-01", Source::PartUuid("deadbeef-01".into())),
            ("/dev/disk/by-partlabel/root", Source::PartLabel(b"root".to_vec())),
            ("/dev/disk/by-id/virtio-x-part16", Source::Partition(16)),
            ("PARTUUID=deadbeef-01", Source::PartUuid("deadbeef-01".into())),
            ("PARTLABEL='EFI\\040System'", Source::PartLabel(b"EFI System".to_vec())),
            ("LABEL=", Source::Label(Vec::new())),
            ("tmpfs", other("tmpfs")),
            ("server:/export", other("server:/export")),
        ];
        for (name, expected) in cases {
            assert_eq!(source(&unescape(name.as_bytes())), expected, "{name}");
        }
    }

    #[test]
    fn escapes_that_are_none_stay() {
        for (escaped, plain) in
            [("a\\040b", "a b"), ("\\134", "\\"), ("a\\04", "a\\04"), ("\\999", "\\999"), ("\\", "\\")]
        {
            assert_eq!(unescape(escaped.as_bytes()), plain.as_bytes());
        }
    }
}
