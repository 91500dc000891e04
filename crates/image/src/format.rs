use std::fmt;

use qtk_block::BlockRead;

/// The format of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The guest's disk, byte by byte.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl Format {
    /// The name that `qemu-img` has for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of that name, if qtk handles it.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Raw, Self::Qcow2].into_iter().find(|format| format.name() == name)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a file's content looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    Known(Format),
    /// A format that QEMU would recognise and qtk does not handle.
    Foreign(&'static str),
}

impl Probe {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Known(format) => format.name(),
            Self::Foreign(name) => name,
        }
    }
}

const FOREIGN: [(&[u8], &str); 8] = [
    (b"QFI\xfb\0\0\0\x01", "qcow"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
    (b"QED\0", "qed"),
    (b"LUKS\xba\xbe", "luks"),
    (b"WithoutFreeSpace", "parallels"),
];

/// The format that QEMU would guess from a file's first bytes.
pub(crate) fn probe(device: &dyn BlockRead) -> std::io::Result<Probe> {
    let mut head = [0; 512];
    let len = usize::try_from(device.size()).unwrap_or(head.len()).min(head.len());
    let head = &mut head[..len];
    device.read_at(head, 0)?;
    Ok(probe_bytes(head))
}

pub(crate) fn probe_bytes(head: &[u8]) -> Probe {
    const VDI_SIGNATURE: &[u8] = &[0x7f, 0x10, 0xda, 0xbe];
    if let Some((_, name)) = FOREIGN.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Probe::Foreign(name);
    }
    if head.get(64..68) == Some(VDI_SIGNATURE) {
        return Probe::Foreign("vdi");
    }
    match head.starts_with(&qtk_qcow2::MAGIC.to_be_bytes()) {
        true => Probe::Known(Format::Qcow2),
        false => Probe::Known(Format::Raw),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_what_qemu_guesses() {
        for (head, expected) in [
            (&b"QFI\xfb\0\0\0\x03"[..], Probe::Known(Format::Qcow2)),
            (b"QFI\xfb\0\0\0\x01", Probe::Foreign("qcow")),
            (b"KDMV and more", Probe::Foreign("vmdk")),
            (b"", Probe::Known(Format::Raw)),
            (b"\xeb\x3c\x90", Probe::Known(Format::Raw)),
        ] {
            assert_eq!(probe_bytes(head), expected);
        }
    }
}
