//! GUID partition tables (UEFI specification 2.10, section 5.3).
//!
//! A parser of our own: the `gpt` crate (4.1) asserts that entries are 128 bytes long, so that a hostile header ends the
//! process, does not check the entry array's CRC, and reads any number of entries that a header claims.

use qtk_block::BlockRead;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::{DiskId, OFF_DISK, OVERLAPS, Partition, PartitionTable, PartitionType, TableKind, byte_range, overlapping};
use crate::{Error, Place};

const SIGNATURE: &[u8; 8] = b"EFI PART";
const SECTOR_SIZES: [u64; 2] = [512, 4096];
/// Far above the 16 KiB that every tool writes, and little to hold in memory.
const MAX_ENTRY_BYTES: u64 = 4 << 20;
const LEGACY_BOOTABLE: u64 = 1 << 2;

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    signature: [u8; 8],
    revision: U32,
    header_size: U32,
    header_crc: U32,
    reserved: U32,
    own_lba: U64,
    alternate_lba: U64,
    first_usable: U64,
    last_usable: U64,
    disk_guid: [u8; 16],
    entries_lba: U64,
    entry_count: U32,
    entry_size: U32,
    entries_crc: U32,
}
const _: () = assert!(size_of::<Header>() == 92);

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Entry {
    type_guid: [u8; 16],
    guid: [u8; 16],
    first_lba: U64,
    last_lba: U64,
    attributes: U64,
    name: [U16; 36],
}
const _: () = assert!(size_of::<Entry>() == 128);

/// Reads the primary table, or the backup where the primary is damaged.
pub(super) fn read(device: &dyn BlockRead) -> Result<PartitionTable, Error> {
    let mut damage = None;
    for backup in [false, true] {
        for sector_size in SECTOR_SIZES {
            let last = device.size().checked_div(sector_size).and_then(|sectors| sectors.checked_sub(1));
            let Some(lba) = (if backup { last } else { Some(1) }) else { continue };
            let Some(offset) = byte_range(device, sector_size, lba, 1).map(|range| range.start) else { continue };
            match (Copy { device, sector_size, lba, place: Place::Gpt(offset), offset }).read() {
                Ok(Some(table)) => return Ok(PartitionTable { from_backup: backup, ..table }),
                Ok(None) => {}
                Err(error) => damage = damage.or(Some(error)),
            }
        }
    }
    let missing = "the MBR announces a GPT, but neither its header nor the backup is there; the image may be cut off";
    Err(damage.unwrap_or(Error::Corrupt { place: Place::Mbr, problem: missing }))
}

/// One of the two copies of the table.
struct Copy<'a> {
    device: &'a dyn BlockRead,
    sector_size: u64,
    lba: u64,
    offset: u64,
    place: Place,
}

impl Copy<'_> {
    fn corrupt(&self, problem: &'static str) -> Error {
        Error::Corrupt { place: self.place, problem }
    }

    fn read_bytes(&self, len: u64, offset: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| self.corrupt("its size is impossible"))?];
        self.device.read_at(&mut bytes, offset).map_err(|source| Error::Io {
            action: "read",
            place: self.place,
            source,
        })?;
        Ok(bytes)
    }

    fn read(&self) -> Result<Option<PartitionTable>, Error> {
        let mut sector = self.read_bytes(self.sector_size, self.offset)?;
        let Ok((header, _)) = Header::read_from_prefix(&sector) else { return Ok(None) };
        if &header.signature != SIGNATURE {
            return Ok(None);
        }
        if let Some(crc) = sector.get_mut(16..20) {
            crc.fill(0);
        }
        let covered = usize::try_from(header.header_size.get()).ok().filter(|&size| size >= size_of::<Header>());
        let covered = covered.and_then(|size| sector.get(..size));
        let covered = covered.ok_or_else(|| self.corrupt("its header's size is impossible"))?;
        if crc32fast::hash(covered) != header.header_crc.get() {
            return Err(self.corrupt("its header's checksum is wrong; `sgdisk -v` tells more"));
        }
        if header.own_lba.get() != self.lba {
            return Err(self.corrupt("its header names another sector as its own"));
        }
        let partitions = self.partitions(&header)?;
        if let Some(number) = overlapping(&partitions) {
            return Err(Error::Corrupt { place: Place::Partition(number), problem: OVERLAPS });
        }
        Ok(Some(PartitionTable {
            kind: TableKind::Gpt,
            id: DiskId::Guid(Uuid::from_bytes_le(header.disk_guid)),
            sector_size: self.sector_size,
            from_backup: false,
            partitions,
        }))
    }

    fn partitions(&self, header: &Header) -> Result<Vec<Partition>, Error> {
        let entry_size = u64::from(header.entry_size.get());
        if entry_size < size_of::<Entry>() as u64 || !entry_size.is_power_of_two() {
            return Err(self.corrupt("its entries' size is not 128 times a power of two"));
        }
        let len = entry_size.saturating_mul(u64::from(header.entry_count.get()));
        if len > MAX_ENTRY_BYTES {
            return Err(Error::Unsupported { place: self.place, feature: "it has more than 4 MiB of entries" });
        }
        let start = header.entries_lba.get().checked_mul(self.sector_size);
        let start = start.filter(|start| start.checked_add(len).is_some_and(|end| end <= self.device.size()));
        let bytes = self.read_bytes(len, start.ok_or_else(|| self.corrupt("its entries lie past the disk's end"))?)?;
        if crc32fast::hash(&bytes) != header.entries_crc.get() {
            return Err(self.corrupt("its entries' checksum is wrong; `sgdisk -v` tells more"));
        }
        // A size that fits in 4 MiB fits in a usize.
        let entry_size = usize::try_from(entry_size).unwrap_or(usize::MAX);
        (1..)
            .zip(bytes.chunks_exact(entry_size))
            .filter_map(|(number, bytes)| Some((number, Entry::read_from_prefix(bytes).ok()?.0)))
            .filter(|(_, entry)| entry.type_guid != [0; 16])
            .map(|(number, entry)| self.partition(number, &entry))
            .collect()
    }

    fn partition(&self, number: u32, entry: &Entry) -> Result<Partition, Error> {
        let corrupt = |problem| Error::Corrupt { place: Place::Partition(number), problem };
        let count = entry.last_lba.get().checked_sub(entry.first_lba.get()).and_then(|last| last.checked_add(1));
        let count = count.ok_or_else(|| corrupt("it ends before it starts"))?;
        let range = byte_range(self.device, self.sector_size, entry.first_lba.get(), count);
        let name: Vec<u16> = entry.name.iter().map(|unit| unit.get()).take_while(|&unit| unit != 0).collect();
        Ok(Partition {
            number,
            range: range.ok_or_else(|| corrupt(OFF_DISK))?,
            kind: PartitionType::Guid(Uuid::from_bytes_le(entry.type_guid)),
            part_uuid: Uuid::from_bytes_le(entry.guid).to_string(),
            name: (!name.is_empty()).then(|| String::from_utf16_lossy(&name)),
            bootable: entry.attributes.get() & LEGACY_BOOTABLE != 0,
        })
    }
}
