//! Traces of something that may own a volume whose superblock is only a left-over.

use std::io;

use qtk_block::{BlockRead, read_padded};

/// Bytes at an offset that something else begins with.
const AT_START: &[(u64, &[u8], &str)] = &[
    (0, b"bluestore block device", "Ceph"),
    (0, b"dmvdo001", "VDO"),
    (0, b"\xfc\x4e\x2b\xa9", "a RAID"),
    (3, b"EXFAT   ", "exFAT"),
    (32, b"ORCLDISK", "Oracle ASM"),
    (512, b"!Stra0tis\x86\xff\x02^\x41rh", "Stratis"),
    (4096, b"\xfc\x4e\x2b\xa9", "a RAID"),
    (4096 + 24, b"\xc6\x85\x73\xf6", "bcache"),
    (32 << 10, b"JFS1", "JFS"),
    ((32 << 10) + 1, b"CD001", "ISO 9660"),
    ((64 << 10) + 0x34, b"ReIsEr", "ReiserFS"),
    ((64 << 10) + 0x40, b"_BHRfS_M", "Btrfs"),
];
const RAID_MAGIC: [u8; 4] = *b"\xfc\x4e\x2b\xa9";
const ZFS_MAGIC: u64 = 0x00ba_b10c;
/// The uberblocks of the first label.
const ZFS_START: u64 = 128 << 10;
const ZFS_LEN: usize = 128 << 10;
const ZFS_STEP: usize = 1024;

/// What else may own the device, which holds an ext file system or a swap space by its first pages.
pub(super) fn find(device: &dyn BlockRead) -> io::Result<Option<&'static str>> {
    for &(offset, magic, name) in AT_START {
        if holds(device, offset, magic)? {
            return Ok(Some(name));
        }
    }
    for offset in raid_at_end(device.size()) {
        if holds(device, offset, &RAID_MAGIC)? {
            return Ok(Some("a RAID"));
        }
    }
    Ok(has_uberblock(device)?.then_some("ZFS"))
}

fn holds(device: &dyn BlockRead, offset: u64, magic: &[u8]) -> io::Result<bool> {
    let mut bytes = vec![0; magic.len()];
    read_padded(device, &mut bytes, offset)?;
    Ok(bytes == magic)
}

/// Where md keeps its superblock at the end of a device: versions 1.0 and 0.90.
fn raid_at_end(size: u64) -> impl Iterator<Item = u64> {
    let v1 = size.checked_sub(8192).map(|offset| offset & !4095);
    let v0 = (size & !65_535).checked_sub(65_536);
    [v1, v0].into_iter().flatten()
}

fn has_uberblock(device: &dyn BlockRead) -> io::Result<bool> {
    let mut label = vec![0; ZFS_LEN];
    read_padded(device, &mut label, ZFS_START)?;
    let magic = |block: &[u8]| {
        block.first_chunk() == Some(&ZFS_MAGIC.to_le_bytes()) || block.first_chunk() == Some(&ZFS_MAGIC.to_be_bytes())
    };
    Ok(label.chunks(ZFS_STEP).any(magic))
}
