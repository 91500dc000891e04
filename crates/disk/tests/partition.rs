//! Partition tables made by sgdisk and sfdisk, and what a hostile hand can do to them.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::ops::Range;

use common::{Image, MIB, run};
use proptest::prelude::*;
use qtk_block::{BlockWrite, MemoryDisk};
use qtk_disk::{DiskId, Error, Partition, PartitionTable, PartitionType, Place, TableKind};

const ROOT_GUID: &str = "0fc63daf-8483-4772-8e79-3d69d8477de4";

fn read(image: &Image) -> Result<Option<PartitionTable>, Error> {
    PartitionTable::read(&image.reader())
}

fn ranges(table: &PartitionTable) -> Vec<(u32, Range<u64>)> {
    table.partitions.iter().map(|partition| (partition.number, partition.range.clone())).collect()
}

/// Ubuntu's cloud image layout.
fn ubuntu() -> Image {
    let image = Image::new(64 * MIB);
    run(
        "sgdisk",
        &[
            "-n14:2048:+4M",
            "-t14:ef02",
            "-n15:0:+16M",
            "-t15:ef00",
            "-n16:0:+16M",
            "-t16:ea00",
            "-n1:0:0",
            "-t1:8300",
            "-c1:root é",
            "-u1:11111111-2222-3333-4444-555555555555",
            "-U99999999-8888-7777-6666-555555555555",
            "-A14:set:2",
            image.path(),
        ],
    );
    image
}

#[test]
fn reads_a_gpt_with_numbers_out_of_order() {
    let table = read(&ubuntu()).unwrap().unwrap();
    assert_eq!(table.kind, TableKind::Gpt);
    assert_eq!((table.sector_size, table.from_backup), (512, false));
    assert_eq!(table.id, DiskId::Guid("99999999-8888-7777-6666-555555555555".parse().unwrap()));
    let end = 64 * MIB - 33 * 512;
    let expected = [(1, 37 * MIB..end), (14, MIB..5 * MIB), (15, 5 * MIB..21 * MIB), (16, 21 * MIB..37 * MIB)];
    assert_eq!(ranges(&table), expected);
    let root = table.partition(1).unwrap();
    assert_eq!(root.kind, PartitionType::Guid(ROOT_GUID.parse().unwrap()));
    assert_eq!(root.part_uuid, "11111111-2222-3333-4444-555555555555");
    assert_eq!(root.name.as_deref(), Some("root é"));
    assert!(!root.bootable && table.partition(14).unwrap().bootable);
}

#[test]
fn falls_back_to_the_backup_gpt() {
    let image = ubuntu();
    let good = read(&image).unwrap().unwrap();
    // The header's CRC no longer fits; then an entry's.
    for damaged in [512 + 56, 1024 + 40] {
        let original = image.read(1, damaged);
        image.write(&[original[0] ^ 1], damaged);
        let table = read(&image).unwrap().unwrap();
        assert_eq!(table, PartitionTable { from_backup: true, ..good.clone() });
        image.write(&original, damaged);
    }
    image.write(&[0; 512], 512);
    assert!(read(&image).unwrap().unwrap().from_backup);
    image.write(&[0; 512], 64 * MIB - 512);
    assert!(matches!(read(&image), Err(Error::Corrupt { place: Place::Mbr, .. })));
}

#[test]
fn a_gpt_that_the_mbr_does_not_announce_is_history() {
    let image = ubuntu();
    image.write(&[0; 512], 0);
    assert_eq!(read(&image).unwrap(), None);
}

#[test]
fn a_hybrid_mbr_does_not_hide_the_gpt() {
    let image = ubuntu();
    let before = read(&image).unwrap();
    run("sgdisk", &["-h15", image.path()]);
    assert_eq!(read(&image).unwrap(), before);
}

/// Writes a GPT by hand: for sectors that sgdisk makes on real devices only, and for values that it never writes.
struct HandMade {
    sector: u64,
    entry_size: u32,
    entry_count: u32,
    entries: Vec<(u64, u64)>,
}

impl HandMade {
    fn sound() -> Self {
        Self { sector: 512, entry_size: 128, entry_count: 128, entries: vec![(64, 127), (128, 200)] }
    }

    fn read(&self) -> Result<Option<PartitionTable>, Error> {
        let sector = usize::try_from(self.sector).unwrap();
        let mut disk = vec![0; 1024 * sector];
        disk[446 + 4] = 0xee;
        disk[446 + 12] = 0xff;
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        let table = 2 * sector;
        for (index, &(first, last)) in self.entries.iter().enumerate() {
            let at = table + index * usize::try_from(self.entry_size).unwrap();
            disk[at..at + 16].fill(0xaa);
            disk[at + 16] = u8::try_from(index).unwrap();
            disk[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
            disk[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
        }
        let len = usize::try_from(self.entry_size).unwrap().saturating_mul(usize::try_from(self.entry_count).unwrap());
        let crc = crc32fast::hash(disk.get(table..table + len).unwrap_or_default());
        let header = &mut disk[sector..sector + 92];
        header[..8].copy_from_slice(b"EFI PART");
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(8, &0x0001_0000_u32.to_le_bytes());
        put(12, &92_u32.to_le_bytes());
        put(24, &1_u64.to_le_bytes());
        put(72, &2_u64.to_le_bytes());
        put(80, &self.entry_count.to_le_bytes());
        put(84, &self.entry_size.to_le_bytes());
        put(88, &crc.to_le_bytes());
        let crc = crc32fast::hash(header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        let device = MemoryDisk::new(disk.len() as u64);
        device.write_at(&disk, 0).unwrap();
        PartitionTable::read(&device)
    }
}

#[test]
fn reads_sectors_of_4_kib_and_wide_entries() {
    for (sector, entry_size) in [(512, 128), (512, 256), (4096, 128), (4096, 512)] {
        let table = HandMade { sector, entry_size, ..HandMade::sound() }.read().unwrap().unwrap();
        assert_eq!(table.sector_size, sector);
        assert_eq!(ranges(&table), [(1, 64 * sector..128 * sector), (2, 128 * sector..201 * sector)]);
    }
}

#[test]
fn refuses_impossible_gpts() {
    let sound = HandMade::sound;
    let cases = [
        ("overlap", HandMade { entries: vec![(64, 128), (128, 200)], ..sound() }),
        ("ends before it starts", HandMade { entries: vec![(64, 63)], ..sound() }),
        ("past the end", HandMade { entries: vec![(64, 1 << 40)], ..sound() }),
        ("past the end", HandMade { entries: vec![(u64::MAX - 1, u64::MAX)], ..sound() }),
        ("impossible", HandMade { entries: vec![(0, u64::MAX)], ..sound() }),
        ("power of two", HandMade { entry_size: 0, entries: vec![], ..sound() }),
        ("power of two", HandMade { entry_size: 64, entries: vec![], ..sound() }),
        ("power of two", HandMade { entry_size: 192, entries: vec![], ..sound() }),
        ("4 MiB", HandMade { entry_count: u32::MAX, ..sound() }),
        ("past the disk's end", HandMade { entry_count: 1 << 15, ..sound() }),
    ];
    for (expected, case) in cases {
        let error = case.read().unwrap_err().to_string();
        let ends_nowhere = expected == "impossible" && error.contains("ends before");
        assert!(error.contains(expected) || ends_nowhere, "{expected}: {error}");
    }
}

/// Three primary partitions, and three logical ones in an extended one.
fn logical() -> Image {
    let image = Image::new(128 * MIB);
    let script = Image::new(0);
    script.write(
        b"label: dos\nlabel-id: 0xdeadbeef\n1M 10M L *\n11M 10M S\n21M 10M U\n31M 90M E\n32M 10M L\n43M 20M L\n64M 30M L\n",
        0,
    );
    run("sh", &["-c", &format!("sfdisk -q {} < {}", image.path(), script.path())]);
    image
}

#[test]
fn reads_logical_partitions_as_sfdisk_does() {
    let image = logical();
    let table = read(&image).unwrap().unwrap();
    assert_eq!((table.kind, table.id), (TableKind::Mbr, DiskId::Signature(0xdead_beef)));
    let listed = run("sfdisk", &["-d", image.path()]);
    let field = |line: &str, name: &str| -> u64 {
        let rest = line.split_once(name).unwrap().1;
        rest.split(',').next().unwrap().trim().parse().unwrap()
    };
    let expected: Vec<(u32, Range<u64>)> = listed
        .lines()
        .filter(|line| line.contains("start=") && !line.contains("type=5"))
        .map(|line| {
            // sfdisk puts a `p` behind a name that ends in a digit.
            let number = line.split(" :").next().unwrap().trim_start_matches(image.path()).trim_start_matches('p');
            let start = field(line, "start=") * 512;
            (number.parse().unwrap(), start..start + field(line, "size=") * 512)
        })
        .collect();
    assert_eq!(expected.len(), 6);
    assert_eq!(ranges(&table), expected);
    let by_number = |number| -> Partition { table.partition(number).unwrap().clone() };
    assert_eq!(by_number(1).part_uuid, "deadbeef-01");
    assert_eq!(by_number(7).part_uuid, "deadbeef-07");
    assert_eq!(by_number(2).kind, PartitionType::Byte(0x82));
    assert!(by_number(1).bootable && !by_number(5).bootable);
}

#[test]
fn refuses_broken_chains_of_logical_partitions() {
    let image = logical();
    let is_record = |&at: &u64| image.read(2, at + 510) == [0x55, 0xaa];
    let records: Vec<u64> = (31 * MIB..64 * MIB).step_by(512).filter(is_record).collect();
    let [first, second, _third] = records[..] else { panic!("found records at {records:?}") };
    let itself = u32::try_from((second - first) / 512).unwrap().to_le_bytes();
    // The first entry of a record, its partition, starts at 446; the second, its successor, at 462.
    let cases: [(&str, u64, &[u8]); 5] = [
        ("leads back", 462 + 8, &itself),
        ("past the end", 462 + 8, &u32::MAX.to_le_bytes()),
        ("past the end", 446 + 12, &u32::MAX.to_le_bytes()),
        ("overlaps", 446 + 12, &(50 * MIB / 512).to_le_bytes()[..4]),
        ("boot signature", 510, &[0, 0]),
    ];
    for (expected, at, bytes) in cases {
        let image = logical();
        image.write(bytes, second + at);
        let error = read(&image).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn what_is_no_table_is_none() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(read(&Image::new(MIB)).unwrap(), None);
    assert_eq!(read(&Image::new(100)).unwrap(), None);
    assert_eq!(read(&Image::fat(8 * MIB, 12, "ESP")).unwrap(), None);
    assert_eq!(read(&Image::ext4(8 * MIB, "root", folder.path())).unwrap(), None);
}

fn mutate(image: &Image, changes: &[(u64, u8)]) -> MemoryDisk {
    let bytes = image.read(2 * usize::try_from(MIB).unwrap(), 0);
    let disk = MemoryDisk::new(bytes.len() as u64);
    disk.write_at(&bytes, 0).unwrap();
    for &(at, byte) in changes {
        disk.write_at(&[byte], at).unwrap();
    }
    disk
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn survives_any_mbr(sector in prop::collection::vec(any::<u8>(), 64), low in any::<bool>()) {
        let disk = MemoryDisk::new(MIB);
        let at = if low { 0 } else { 512 };
        disk.write_at(&sector, 446).unwrap();
        disk.write_at(&[0x55, 0xaa], 510).unwrap();
        disk.write_at(&sector, at + 446).unwrap();
        disk.write_at(&[0x55, 0xaa], at + 510).unwrap();
        if let Ok(Some(table)) = PartitionTable::read(&disk) {
            for partition in table.partitions {
                prop_assert!(partition.range.start < partition.range.end && partition.range.end <= MIB);
            }
        }
    }

    #[test]
    fn survives_any_gpt(changes in prop::collection::vec((0_u64..4096, any::<u8>()), 1..20)) {
        let _ = PartitionTable::read(&mutate(ubuntu_once(), &changes));
    }
}

fn ubuntu_once() -> &'static Image {
    static IMAGE: std::sync::OnceLock<Image> = std::sync::OnceLock::new();
    IMAGE.get_or_init(ubuntu)
}
