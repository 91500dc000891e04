use std::fmt;
use std::io;
use std::sync::Arc;

use qtk_block::{BlockRead, is_zero};
use uuid::Uuid;

use crate::fat::Fat;

/// What a partition or a whole disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Content {
    /// Nothing but zeroes where a file system would begin.
    Empty,
    /// None of the others.
    Unknown,
    /// A GUID partition table.
    Gpt,
    /// A boot sector, perhaps with a partition table.
    Mbr,
    /// ext2: no journal.
    Ext2,
    /// ext3: a journal, and none of ext4's features.
    Ext3,
    /// ext4.
    Ext4,
    /// The journal of an ext file system elsewhere.
    ExtJournal,
    /// FAT12, FAT16 or FAT32.
    Fat,
    /// NTFS.
    Ntfs,
    /// Swap space.
    Swap,
    /// A physical volume of LVM.
    Lvm,
    /// XFS.
    Xfs,
    /// Btrfs.
    Btrfs,
    /// An encrypted volume.
    Luks,
    /// A CD or DVD image.
    Iso9660,
    /// SquashFS.
    Squashfs,
}

impl Content {
    /// Whether it is of the ext2, ext3, ext4 family.
    #[must_use]
    pub fn is_ext(self) -> bool {
        matches!(self, Self::Ext2 | Self::Ext3 | Self::Ext4)
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "nothing",
            Self::Unknown => "something unknown",
            Self::Gpt => "a GPT",
            Self::Mbr => "an MBR",
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::ExtJournal => "an external ext4 journal",
            Self::Fat => "vfat",
            Self::Ntfs => "ntfs",
            Self::Swap => "swap",
            Self::Lvm => "an LVM physical volume",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Luks => "a LUKS volume",
            Self::Iso9660 => "iso9660",
            Self::Squashfs => "squashfs",
        })
    }
}

/// What was found on a device, with the label and UUID that `fstab` may name it by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What it is.
    pub content: Content,
    /// Its label. Empty ones count as none.
    pub label: Option<Vec<u8>>,
    /// Its UUID, as `blkid` prints it.
    pub uuid: Option<String>,
}

/// Enough for every superblock but that of Btrfs.
const HEAD: usize = 64 << 10;
const BTRFS_SUPERBLOCK: u64 = 64 << 10;

impl Probe {
    /// Looks for known signatures. Sizes and checksums are left for whoever opens what was found.
    pub fn read(device: &Arc<dyn BlockRead>) -> io::Result<Self> {
        let head = read_up_to(device, 0, HEAD)?;
        let found = known_at_head(&Bytes(&head));
        if let Some(found) = found.filter(|found| !matches!(found.content, Content::Mbr | Content::Gpt)) {
            return Ok(found);
        }
        if let Ok(fat) = Fat::open(Arc::clone(device)) {
            // A broken root directory does not make the volume something else.
            let label = fat.label().ok().flatten();
            return Ok(Self { content: Content::Fat, label, uuid: Some(fat.uuid()) });
        }
        let btrfs = read_up_to(device, BTRFS_SUPERBLOCK, 4096)?;
        if let Some(found) = btrfs_superblock(&Bytes(&btrfs)) {
            return Ok(found);
        }
        let rest = if is_zero(&head) && is_zero(&btrfs) { Content::Empty } else { Content::Unknown };
        Ok(known_at_head(&Bytes(&head)).unwrap_or_else(|| Self::bare(rest)))
    }

    fn bare(content: Content) -> Self {
        Self { content, label: None, uuid: None }
    }

    fn named(content: Content, label: Option<&[u8]>, uuid: Option<[u8; 16]>) -> Self {
        let label = label.map(|label| label.split(|&byte| byte == 0).next().unwrap_or_default().to_vec());
        let uuid = uuid.filter(|uuid| *uuid != [0; 16]).map(|uuid| Uuid::from_bytes(uuid).to_string());
        Self { content, label: label.filter(|label| !label.is_empty()), uuid }
    }
}

fn read_up_to(device: &dyn BlockRead, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let left = usize::try_from(device.size().saturating_sub(offset)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; left.min(len)];
    if !bytes.is_empty() {
        device.read_at(&mut bytes, offset)?;
    }
    Ok(bytes)
}

/// Fields at fixed places of something that may be too short for them.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn holds(&self, offset: usize, magic: &[u8]) -> bool {
        self.0.get(offset..).is_some_and(|rest| rest.starts_with(magic))
    }

    fn field(&self, offset: usize, len: usize) -> Option<&'a [u8]> {
        self.0.get(offset..)?.get(..len)
    }

    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..)?.first_chunk().copied()
    }

    fn le32(&self, offset: usize) -> u32 {
        self.array(offset).map(u32::from_le_bytes).unwrap_or_default()
    }
}

fn known_at_head(head: &Bytes<'_>) -> Option<Probe> {
    const SWAP_MAGIC_OFFSETS: [usize; 5] = [4096 - 10, 8192 - 10, 16_384 - 10, 32_768 - 10, 65_536 - 10];
    if head.holds(0, b"LUKS\xba\xbe") {
        let text = head.field(168, 36).and_then(|text| std::str::from_utf8(text).ok());
        let uuid = text.and_then(|text| Uuid::try_parse(text).ok()).map(Uuid::into_bytes);
        // Only version 2 has a label.
        let label = if head.holds(6, &[0, 2]) { head.field(24, 48) } else { None };
        return Some(Probe::named(Content::Luks, label, uuid));
    }
    if head.holds(0, b"XFSB") {
        return Some(Probe::named(Content::Xfs, head.field(108, 12), head.array(32)));
    }
    if head.holds(0, b"hsqs") {
        return Some(Probe::bare(Content::Squashfs));
    }
    if head.holds(3, b"NTFS    ") {
        return Some(Probe::bare(Content::Ntfs));
    }
    if let Some(sector) = [0, 512, 1024, 1536].into_iter().find(|&at| head.holds(at, b"LABELONE")) {
        let at = sector.saturating_add(24);
        return head.holds(at, b"LVM2 001").then(|| Probe::bare(Content::Lvm));
    }
    if head.holds(0x438, &[0x53, 0xef]) {
        return Some(Probe::named(ext_version(head), head.field(0x478, 16), head.array(0x468)));
    }
    if SWAP_MAGIC_OFFSETS.iter().any(|&at| head.holds(at, b"SWAPSPACE2")) {
        return Some(Probe::named(Content::Swap, head.field(0x41c, 16), head.array(0x40c)));
    }
    if head.holds(0x8001, b"CD001") {
        let label = head.field(0x8028, 32).map(<[u8]>::trim_ascii_end);
        return Some(Probe::named(Content::Iso9660, label, None));
    }
    if head.holds(510, &[0x55, 0xaa]) {
        let is_gpt = head.holds(512, b"EFI PART") || head.holds(4096, b"EFI PART");
        return Some(Probe::bare(if is_gpt { Content::Gpt } else { Content::Mbr }));
    }
    None
}

fn ext_version(head: &Bytes<'_>) -> Content {
    const HAS_JOURNAL: u32 = 0x4;
    const JOURNAL_DEVICE: u32 = 0x8;
    /// filetype, needs_recovery, meta_bg
    const EXT3_INCOMPATIBLE: u32 = 0x2 | 0x4 | 0x10;
    /// sparse_super, large_file, btree_dir
    const EXT3_READ_ONLY: u32 = 0x1 | 0x2 | 0x4;
    let (compatible, incompatible, read_only) = (head.le32(0x45c), head.le32(0x460), head.le32(0x464));
    if incompatible & JOURNAL_DEVICE != 0 {
        Content::ExtJournal
    } else if incompatible & !EXT3_INCOMPATIBLE != 0 || read_only & !EXT3_READ_ONLY != 0 {
        Content::Ext4
    } else if compatible & HAS_JOURNAL != 0 {
        Content::Ext3
    } else {
        Content::Ext2
    }
}

fn btrfs_superblock(block: &Bytes<'_>) -> Option<Probe> {
    block.holds(0x40, b"_BHRfS_M").then(|| Probe::named(Content::Btrfs, block.field(0x12b, 256), block.array(0x20)))
}
