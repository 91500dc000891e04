use std::io;
use std::ops::Range;

use qtk_block::BlockRead;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::dir::SLOT;

/// The boot sector up to where FAT12/16 and FAT32 part.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct BootSector {
    jump: [u8; 3],
    oem_name: [u8; 8],
    bytes_per_sector: U16,
    sectors_per_cluster: u8,
    reserved_sectors: U16,
    fats: u8,
    root_entries: U16,
    sectors_16: U16,
    media: u8,
    fat_sectors_16: U16,
    geometry: [U16; 2],
    hidden: U32,
    sectors_32: U32,
    rest: [u8; 474],
    signature: U16,
}
const _: () = assert!(size_of::<BootSector>() == 512);

/// What follows on FAT12 and FAT16, and 28 bytes later on FAT32.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Tail {
    drive: [u8; 2],
    boot_signature: u8,
    serial: U32,
    label: [u8; 11],
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Fat32 {
    fat_sectors: U32,
    flags: U16,
    version: U16,
    root_cluster: U32,
    info_sector: U16,
    backup_sector: U16,
    reserved: [u8; 12],
}
const _: () = assert!(size_of::<Fat32>() == 28);

/// Bits per entry of the allocation table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    Fat12,
    Fat16,
    Fat32,
}

impl Width {
    /// Values from here on end a chain.
    pub(super) fn end_of_chain(self) -> u32 {
        match self {
            Self::Fat12 => 0xff8,
            Self::Fat16 => 0xfff8,
            Self::Fat32 => 0x0fff_fff8,
        }
    }

    /// Bytes to read for one entry.
    pub(super) fn entry_bytes(self) -> usize {
        if self == Self::Fat32 { 4 } else { 2 }
    }

    /// The entry of `cluster` out of the bytes at its offset.
    pub(super) fn decode(self, raw: u32, cluster: u32) -> u32 {
        match self {
            Self::Fat12 if cluster % 2 == 1 => raw >> 4,
            Self::Fat12 => raw & 0xfff,
            Self::Fat16 => raw,
            Self::Fat32 => raw & 0x0fff_ffff,
        }
    }
}

/// Where things lie on a volume; all offsets in bytes and checked against the device.
#[derive(Debug)]
pub(super) struct Geometry {
    pub(super) width: Width,
    pub(super) serial: u32,
    pub(super) label: [u8; 11],
    /// Number of data clusters; the first is cluster 2.
    pub(super) clusters: u32,
    /// The root directory of FAT12 and FAT16.
    pub(super) root: Range<u64>,
    /// The root directory of FAT32.
    pub(super) root_cluster: u32,
    table: u64,
    data: u64,
    cluster_size: u64,
}

impl Geometry {
    /// Reads the boot sector; `None` if it does not describe a FAT volume that fits on the device.
    pub(super) fn read(device: &dyn BlockRead) -> io::Result<Option<Self>> {
        let mut sector = BootSector::new_zeroed();
        if device.size() < size_of::<BootSector>() as u64 {
            return Ok(None);
        }
        device.read_at(sector.as_mut_bytes(), 0)?;
        Ok(Self::from_sector(&sector).filter(|geometry| {
            let used = u64::from(geometry.clusters).saturating_mul(geometry.cluster_size);
            geometry.data.saturating_add(used) <= device.size()
        }))
    }

    fn from_sector(boot: &BootSector) -> Option<Self> {
        let sector = u64::from(boot.bytes_per_sector.get());
        let per_cluster = u64::from(boot.sectors_per_cluster);
        let jumps = matches!(boot.jump, [0xeb, _, 0x90] | [0xe9, _, _]);
        let sound = boot.signature.get() == 0xaa55
            && jumps
            && matches!(sector, 512 | 1024 | 2048 | 4096)
            && per_cluster.is_power_of_two()
            && boot.reserved_sectors.get() != 0
            && matches!(boot.fats, 1 | 2)
            && (boot.media == 0xf0 || boot.media >= 0xf8);
        if !sound {
            return None;
        }
        let (fat32, _) = Fat32::ref_from_prefix(&boot.rest).ok()?;
        let is_fat32 = boot.fat_sectors_16.get() == 0;
        let fat_sectors = if is_fat32 { fat32.fat_sectors.get() } else { boot.fat_sectors_16.get().into() };
        let sectors = if boot.sectors_16.get() == 0 { boot.sectors_32.get() } else { boot.sectors_16.get().into() };
        let tail = if is_fat32 { boot.rest.get(size_of::<Fat32>()..)? } else { &boot.rest[..] };
        let (tail, _) = Tail::ref_from_prefix(tail).ok()?;

        let table = u64::from(boot.reserved_sectors.get()).checked_mul(sector)?;
        let tables = u64::from(fat_sectors).checked_mul(boot.fats.into())?.checked_mul(sector)?;
        let root = table.checked_add(tables)?;
        let root_len = u64::from(boot.root_entries.get()).checked_mul(SLOT)?.checked_next_multiple_of(sector)?;
        let data = root.checked_add(root_len)?;
        let cluster_size = sector.checked_mul(per_cluster)?;
        let data_len = u64::from(sectors).checked_mul(sector)?.checked_sub(data)?;
        let clusters = u32::try_from(data_len.checked_div(cluster_size)?).ok()?;
        let width = match clusters {
            0 => return None,
            _ if is_fat32 => Width::Fat32,
            1..4085 => Width::Fat12,
            _ => Width::Fat16,
        };
        let geometry = Self {
            width,
            serial: tail.serial.get(),
            label: tail.label,
            clusters,
            root: root..data,
            root_cluster: fat32.root_cluster.get(),
            table,
            data,
            cluster_size,
        };
        // The table must have an entry for every cluster.
        let table_end = geometry.entry_offset(clusters.checked_add(2)?);
        (table_end <= table.checked_add(u64::from(fat_sectors).checked_mul(sector)?)?).then_some(geometry)
    }

    /// Byte offset of a cluster's entry in the first allocation table.
    pub(super) fn entry_offset(&self, cluster: u32) -> u64 {
        let cluster = u64::from(cluster);
        let within = match self.width {
            Width::Fat12 => cluster.saturating_add(cluster / 2),
            Width::Fat16 => cluster.saturating_mul(2),
            Width::Fat32 => cluster.saturating_mul(4),
        };
        self.table.saturating_add(within)
    }

    /// Where a data cluster lies; `None` if the volume does not have it.
    pub(super) fn cluster(&self, cluster: u32) -> Option<Range<u64>> {
        let index = cluster.checked_sub(2).filter(|&index| index < self.clusters)?;
        let start = self.data.checked_add(u64::from(index).checked_mul(self.cluster_size)?)?;
        Some(start..start.checked_add(self.cluster_size)?)
    }
}
