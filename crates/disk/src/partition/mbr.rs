use std::collections::BTreeSet;

use qtk_block::BlockRead;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::{DiskId, OFF_DISK, OVERLAPS, Partition, PartitionTable, PartitionType, TableKind, byte_range, overlapping};
use crate::{Error, Place};

const SECTOR_SIZE: u64 = 512;
const BOOT_SIGNATURE: u16 = 0xaa55;
const GPT_PROTECTIVE: u8 = 0xee;
const FIRST_LOGICAL: u32 = 5;
/// What Linux can name on one disk.
const MAX_PARTITIONS: u32 = 256;

/// The first sector of a disk, or of a logical partition (an extended boot record).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct BootSector {
    code: [u8; 440],
    disk_signature: U32,
    reserved: [u8; 2],
    entries: [Entry; 4],
    boot_signature: U16,
}
const _: () = assert!(size_of::<BootSector>() == 512);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Entry {
    status: u8,
    first_chs: [u8; 3],
    kind: u8,
    last_chs: [u8; 3],
    first: U32,
    count: U32,
}

impl BootSector {
    /// Sector 0 of a disk; `None` if it does not end in the boot signature.
    pub(super) fn read(device: &dyn BlockRead) -> Result<Option<Self>, Error> {
        if device.size() < SECTOR_SIZE {
            return Ok(None);
        }
        Self::read_at(device, 0).map_err(|source| Error::Io { action: "read", place: Place::Mbr, source })
    }

    fn read_at(device: &dyn BlockRead, offset: u64) -> std::io::Result<Option<Self>> {
        let mut sector = Self::new_zeroed();
        device.read_at(sector.as_mut_bytes(), offset)?;
        Ok((sector.boot_signature.get() == BOOT_SIGNATURE).then_some(sector))
    }

    /// Whether an entry protects a GPT, alone or, in a hybrid MBR, among others.
    pub(super) fn announces_gpt(&self) -> bool {
        self.entries.iter().any(|entry| entry.kind == GPT_PROTECTIVE)
    }
}

impl Entry {
    fn is_used(&self) -> bool {
        self.kind != 0 && self.count.get() != 0
    }

    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn partition(&self, number: u32, base: u64, disk: &Disk<'_>) -> Result<Partition, Error> {
        let first = u64::from(self.first.get()).saturating_add(base);
        let range = byte_range(disk.device, SECTOR_SIZE, first, self.count.get().into());
        Ok(Partition {
            number,
            range: range.ok_or(Error::Corrupt { place: Place::Partition(number), problem: OFF_DISK })?,
            kind: PartitionType::Byte(self.kind),
            part_uuid: format!("{:08x}-{number:02x}", disk.signature),
            name: None,
            bootable: self.status == 0x80,
        })
    }
}

struct Disk<'a> {
    device: &'a dyn BlockRead,
    signature: u32,
}

/// Reads the table in `sector`; `None` if the sector ends in the boot signature but holds no table.
pub(super) fn read(device: &dyn BlockRead, sector: &BootSector) -> Result<Option<PartitionTable>, Error> {
    if sector.entries.iter().any(|entry| !matches!(entry.status, 0 | 0x80)) {
        return Ok(None);
    }
    let disk = Disk { device, signature: sector.disk_signature.get() };
    let mut partitions = Vec::new();
    let mut logical = Vec::new();
    for (number, entry) in (1..).zip(&sector.entries).filter(|(_, entry)| entry.is_used()) {
        if !entry.is_extended() {
            partitions.push(entry.partition(number, 0, &disk)?);
        } else if logical.is_empty() {
            logical = disk.logical_partitions(entry.first.get().into())?;
        }
    }
    partitions.append(&mut logical);
    match overlapping(&partitions) {
        Some(number) => Err(Error::Corrupt { place: Place::Partition(number), problem: OVERLAPS }),
        None => Ok(Some(PartitionTable {
            kind: TableKind::Mbr,
            id: DiskId::Signature(disk.signature),
            sector_size: SECTOR_SIZE,
            from_backup: false,
            partitions,
        })),
    }
}

impl Disk<'_> {
    /// Follows the chain of extended boot records that starts at sector `extended`.
    ///
    /// A record describes one partition, relative to itself, and the next record, relative to the chain's start.
    fn logical_partitions(&self, extended: u64) -> Result<Vec<Partition>, Error> {
        let mut partitions = Vec::new();
        let mut seen = BTreeSet::new();
        let mut next = Some(extended);
        let mut number = FIRST_LOGICAL;
        while let Some(at) = next {
            let offset = at.saturating_mul(SECTOR_SIZE);
            let place = Place::ExtendedBootRecord(offset);
            let corrupt = |problem| Error::Corrupt { place, problem };
            if !seen.insert(at) {
                return Err(corrupt("the chain of logical partitions leads back to it"));
            }
            if seen.len() > MAX_PARTITIONS as usize {
                return Err(Error::Unsupported { place, feature: "more than 256 logical partitions" });
            }
            byte_range(self.device, SECTOR_SIZE, at, 1).ok_or_else(|| corrupt(OFF_DISK))?;
            let record = BootSector::read_at(self.device, offset)
                .map_err(|source| Error::Io { action: "read", place, source })?
                .ok_or_else(|| corrupt("its boot signature is missing"))?;
            let used = || record.entries.iter().filter(|entry| entry.is_used());
            if let Some(entry) = used().find(|entry| !entry.is_extended()) {
                partitions.push(entry.partition(number, at, self)?);
                number = number.saturating_add(1);
            }
            let link = used().find(|entry| entry.is_extended());
            next = link.map(|entry| u64::from(entry.first.get()).saturating_add(extended));
        }
        Ok(partitions)
    }
}
