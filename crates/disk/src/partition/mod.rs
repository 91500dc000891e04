mod gpt;
mod mbr;

use std::ops::Range;

use qtk_block::BlockRead;
use uuid::Uuid;

use crate::{Error, Place, fat};

/// Which kind of table a disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// GUID partition table (UEFI specification, section 5.3).
    Gpt,
    /// Master boot record, with extended boot records for logical partitions.
    Mbr,
}

/// What tells one disk from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskId {
    /// A GPT's disk GUID.
    Guid(Uuid),
    /// An MBR's disk signature.
    Signature(u32),
}

/// What a partition says it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionType {
    /// A GPT's type GUID.
    Guid(Uuid),
    /// An MBR's type byte.
    Byte(u8),
}

/// One partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// The number that Linux gives it: 1 for `/dev/sda1`. Logical partitions start at 5.
    pub number: u32,
    /// Where it lies on the disk, in bytes. Never empty, always on the disk.
    pub range: Range<u64>,
    /// Its declared purpose.
    pub kind: PartitionType,
    /// Its PARTUUID, as `blkid` prints it: a GUID in lower case, or `signature-number` on an MBR.
    pub part_uuid: String,
    /// Its PARTLABEL. An MBR has none.
    pub name: Option<String>,
    /// Whether the table marks it for BIOS boot.
    pub bootable: bool,
}

/// A disk's partition table, checked: partitions lie on the disk and do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionTable {
    /// Kind of table.
    pub kind: TableKind,
    /// Identity of the disk.
    pub id: DiskId,
    /// Bytes per logical sector.
    pub sector_size: u64,
    /// Whether the GPT's primary copy was unusable, so that this is the backup at the disk's end.
    pub from_backup: bool,
    /// The partitions in use, by number. An extended partition is not one of them, only those in it.
    pub partitions: Vec<Partition>,
}

impl PartitionTable {
    /// Reads the table of a disk; `None` if it has none, as a disk that is one big file system.
    ///
    /// As in Linux, a GPT counts only where the MBR announces it, so that the remains of one on a disk that was given a
    /// new purpose do not come back to life. A GPT is found with sectors of 512 or 4096 bytes; an MBR's are taken to be 512.
    pub fn read(device: &dyn BlockRead) -> Result<Option<Self>, Error> {
        let Some(sector) = mbr::BootSector::read(device)? else { return Ok(None) };
        let mut table = if sector.announces_gpt() {
            gpt::read(device)?
        } else if fat::is_fat(device).map_err(|source| Error::Io { action: "read", place: Place::Mbr, source })? {
            return Ok(None);
        } else {
            match mbr::read(device, &sector)? {
                Some(table) => table,
                None => return Ok(None),
            }
        };
        table.partitions.sort_by_key(|partition| partition.number);
        Ok(Some(table))
    }

    /// The partition of a number.
    #[must_use]
    pub fn partition(&self, number: u32) -> Option<&Partition> {
        self.partitions.iter().find(|partition| partition.number == number)
    }
}

/// `first..first + count` sectors in bytes, if that is not empty and lies on the device.
fn byte_range(device: &dyn BlockRead, sector_size: u64, first: u64, count: u64) -> Option<Range<u64>> {
    let start = first.checked_mul(sector_size)?;
    let end = start.checked_add(count.checked_mul(sector_size)?)?;
    (start < end && end <= device.size()).then_some(start..end)
}

/// The first partition, by place on the disk, that begins before its neighbour ends.
fn overlapping(partitions: &[Partition]) -> Option<u32> {
    let mut by_start: Vec<_> = partitions.iter().collect();
    by_start.sort_by_key(|partition| partition.range.start);
    by_start.windows(2).find_map(|pair| match pair {
        [left, right] if left.range.end > right.range.start => Some(right.number),
        _ => None,
    })
}

const OFF_DISK: &str = "it reaches past the end of the disk; the image may be cut off";
const OVERLAPS: &str = "it overlaps the partition before it";
