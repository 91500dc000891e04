//! The classes of qcow2's recorded vulnerabilities, each with the image that provokes it: one clear error, in bounded time and
//! memory. What an opener does with the names of other files is tested where images are opened.
#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use qtk_block::{BlockRead, BlockWrite, HostStorage, MemoryDisk};
use qtk_qcow2::{
    CheckFailure, ClusterBits, CreateOptions, Error, Layer, Repair, Transaction, check, check_each, create, repair,
};

/// No image here has more than a few hundred KiB in it.
const MEMORY: u64 = 400 << 20;
const TIME: Duration = Duration::from_secs(20);

/// An empty image of a megabyte with clusters of 64 KiB.
fn image(change: impl FnOnce(&MemoryDisk)) -> Arc<MemoryDisk> {
    image_of(CreateOptions { size: 1 << 20, ..CreateOptions::default() }, change)
}

fn image_of(options: CreateOptions, change: impl FnOnce(&MemoryDisk)) -> Arc<MemoryDisk> {
    let disk = Arc::new(MemoryDisk::new(0));
    create(disk.clone(), "hostile.qcow2", &options).unwrap();
    disk.set_size(disk.size().next_multiple_of(1 << 16)).unwrap();
    change(&disk);
    disk
}

fn put(disk: &MemoryDisk, at: u64, bytes: &[u8]) {
    disk.write_at(bytes, at).unwrap();
}

/// What an image says when it is opened, read, checked, repaired and written.
fn first_error(disk: &Arc<MemoryDisk>) -> String {
    let started = Instant::now();
    let error = use_image(disk).err();
    // Damage may be reported instead; nothing may panic, and both roads end in time.
    if let Ok(layer) = Layer::open_damaged(disk.clone(), "hostile.qcow2", None) {
        let _ = check(&layer);
        let _ = repair(&layer, Repair::All, &mut |_| ());
    }
    assert!(started.elapsed() < TIME, "took {:?}", started.elapsed());
    let peak = peak_memory();
    assert!(peak < MEMORY, "took {peak} bytes");
    let text = error.expect("not noticed").to_string();
    assert!(text.contains("hostile.qcow2"), "{text}");
    text
}

fn use_image(disk: &Arc<MemoryDisk>) -> Result<(), Error> {
    let layer = Arc::new(Layer::open(disk.clone(), "hostile.qcow2")?);
    let own = |error: std::io::Error| *error.into_inner().unwrap().downcast::<Error>().unwrap();
    layer.read_at(&mut [0; 4096], 0).map_err(own)?;
    for index in 0..layer.snapshots()?.len().min(3) {
        layer.at_snapshot(index)?;
    }
    layer.bitmaps()?;
    let transaction = Transaction::begin(layer, None)?;
    transaction.write_at(&[1; 100], 5).map_err(own)?;
    transaction.commit()
}

/// The most memory that the process has had, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

fn assert_refused(class: &str, named: &str, change: impl FnOnce(&MemoryDisk)) {
    let text = first_error(&image(change));
    assert!(named.split('|').any(|named| text.contains(named)), "{class}: {text}");
}

/// Lengths that overflow a multiplication, or an allocation, before they are compared with anything.
#[test]
fn oversized_tables() {
    let refused = |class, named, at, bytes: &[u8]| assert_refused(class, named, |disk| put(disk, at, bytes));
    let max = [0xff; 4];
    refused("L1 size whose bytes overflow 32 bits", "l1_size", 36, &[0x20, 0, 0, 1]);
    refused("L1 size over the limit", "l1_size", 36, &max);
    refused("L1 table within the limit and past the end", "the L1 table lies at", 36, &[0, 0x40, 0, 0]);
    refused("disk larger than its L1 table", "l1_size", 24, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0]);
    refused("refcount table whose bytes overflow", "refcount_table_clusters", 56, &[0x80, 0, 0, 1]);
    refused("refcount table over the limit", "refcount_table_clusters", 56, &[0, 0, 0, 129]);
    refused("refcount table past the end", "the refcount table lies at", 56, &[0, 0, 0, 128]);
    refused("clusters of 2^31 bytes", "cluster_bits", 20, &[0, 0, 0, 31]);
    refused("clusters of less than a sector", "cluster_bits", 20, &[0; 4]);
    refused("refcounts of 2^32 bits", "refcount_order", 96, &[0, 0, 0, 32]);
}

#[test]
fn header_extensions() {
    let extension = |magic: u32, len: u32| [magic.to_be_bytes(), len.to_be_bytes()].concat();
    for (magic, name) in [(0xe279_2aca_u32, "0xe2792aca"), (0x6803_f857, "0x6803f857"), (0x1234_5678, "0x12345678")] {
        for len in [u32::MAX, u32::MAX - 7, 0x7fff_fff8, 65536] {
            assert_refused("an extension's length", name, |disk| put(disk, 112, &extension(magic, len)));
        }
    }
    assert_refused("a header longer than its cluster", "header_length", |disk| {
        put(disk, 100, &[0xff, 0xff, 0xff, 0xf8])
    });
    assert_refused("a header shorter than its fields", "header_length", |disk| put(disk, 100, &[0, 0, 0, 72]));
    let bitmaps = |directory_size: u64, offset: u64| {
        let fields = [1_u64 << 32, directory_size, offset].map(u64::to_be_bytes).concat();
        move |disk: &MemoryDisk| {
            put(disk, 95, &[1]);
            put(disk, 112, &[extension(0x2385_2875, 24), fields, vec![0; 8]].concat());
        }
    };
    assert_refused("a bitmap directory of 2^63 bytes", "bitmap directory", bitmaps(1 << 63, 0x5_0000));
    assert_refused("a bitmap directory past the end", "bitmap directory", bitmaps(4096, 1 << 62));
    assert_refused("a backing name of 4 GiB", "backing_file_size", |disk| {
        put(disk, 8, &[0, 0, 0, 0, 0, 0, 1, 0, 0xff, 0xff, 0xff, 0xff]);
    });
}

#[test]
fn snapshot_tables() {
    let entry = |l1: u64, l1_size: u32, id: u16, name: u16, extra: u32| {
        let mut entry =
            [&l1.to_be_bytes()[..], &l1_size.to_be_bytes(), &id.to_be_bytes(), &name.to_be_bytes()].concat();
        entry.extend([0; 20]);
        entry.extend(extra.to_be_bytes());
        entry
    };
    let with = |count: u32, offset: u64, entry: Vec<u8>| {
        move |disk: &MemoryDisk| {
            put(disk, 60, &[&count.to_be_bytes()[..], &offset.to_be_bytes()].concat());
            put(disk, 0x8_0000, &entry);
            disk.set_size(0xa_0000).unwrap();
        }
    };
    let table = 0x8_0000;
    let refused = |class, named, change: Box<dyn FnOnce(&MemoryDisk)>| assert_refused(class, named, change);
    refused("2^32 snapshots", "nb_snapshots", Box::new(with(u32::MAX, table, vec![])));
    refused("a table past the end", "the snapshot table lies at", Box::new(with(1, 1 << 40, vec![])));
    refused("a table that wraps around", "snapshot table", Box::new(with(2, u64::MAX << 16, vec![])));
    refused("a table within a cluster", "the snapshot table points to", Box::new(with(1, table + 8, vec![])));
    refused("extra data of 4 GiB", "extra_data_size", Box::new(with(1, table, entry(0x3_0000, 1, 1, 1, u32::MAX))));
    let many = entry(0x3_0000, u32::MAX, 1, 1, 16);
    refused("an L1 table over the limit", "the L1 table of snapshot 0", Box::new(with(1, table, many)));
    let far = entry(1 << 55, 1, 1, 1, 16);
    refused("an L1 table past the end", "the L1 table of snapshot 0", Box::new(with(1, table, far)));
    let header = entry(0, 1, 1, 1, 16);
    refused("an L1 table in the header", "overlap", Box::new(with(1, table, header)));
    let entries = (0..2000).flat_map(|_| entry(0x3_0000, 1, 0xffff, 0xffff, 0)).collect();
    refused("names past the end", "snapshot", Box::new(with(65536, table, entries)));
}

#[test]
fn refcounts_that_overlap() {
    let refused = |class, named, at, word: u64| assert_refused(class, named, |disk| put(disk, at, &word.to_be_bytes()));
    refused("the refcount table is the header", "overlap", 48, 0);
    refused("the refcount table is the L1 table", "overlap", 48, 0x3_0000);
    refused("a refcount block is the header", "refcount", 0x1_0000, 0);
    refused("a refcount block is the refcount table", "overlap", 0x1_0000, 0x1_0000);
    refused("a refcount block is the L1 table", "overlap", 0x1_0000, 0x3_0000);
    refused("the L1 table is a refcount block", "overlap|past the file's end", 40, 0x2_0000);
    refused("the L1 table is the header", "overlap", 40, 0);
    refused("an L2 table is the header's neighbour", "overlap", 0x3_0000, 1 << 63 | 0x1_0000);
}

#[test]
fn compressed_clusters_past_the_end() {
    let with = |entry: u64| {
        move |disk: &MemoryDisk| {
            put(disk, 0x3_0000, &(1_u64 << 63 | 0x4_0000).to_be_bytes());
            put(disk, 0x4_0000, &entry.to_be_bytes());
            disk.set_size(0x5_0000).unwrap();
        }
    };
    let named = "guest offset 0x0";
    assert_refused("a start past the end", named, with(1 << 62 | 0x3f_ffff_ffff_ffff));
    assert_refused("all sectors at the end", named, with(1 << 62 | 0xff << 54 | 0x4_fff0));
    assert_refused("the file's last byte", named, with(1 << 62 | 0xff << 54 | 0x4_ffff));
    assert_refused("what is no stream", named, with(1 << 62 | 0xff << 54));
}

/// Snapshots that share an L1 table whose entries all name one L2 table: few bytes that would be followed for years.
#[test]
fn tables_that_multiply() {
    let cluster_bits = ClusterBits::new(16).unwrap();
    let options = CreateOptions { size: 1 << 20, cluster_bits, ..CreateOptions::default() };
    let disk = image_of(options, |disk| {
        let (l1, l2, table) = (0x10_0000_u64, 0x5_0000_u64, 0x300_0000_u64);
        put(disk, l2, &(1_u64 << 63 | 0x6_0000).to_be_bytes().repeat(8192));
        put(disk, l1, &(1_u64 << 63 | l2).to_be_bytes().repeat(4 << 20));
        let entry = [&l1.to_be_bytes()[..], &(4_u32 << 20).to_be_bytes(), &[0; 28]].concat();
        put(disk, table, &entry.repeat(65536));
        put(disk, 60, &[&65536_u32.to_be_bytes()[..], &table.to_be_bytes()].concat());
    });
    let started = Instant::now();
    let layer = Layer::open(disk, "hostile.qcow2").unwrap();
    let report = check_each(&layer, &mut |_| ()).unwrap();
    assert_eq!(report.failure, Some(CheckFailure::FileTooLarge));
    assert!(started.elapsed() < TIME, "took {:?}", started.elapsed());
    assert!(peak_memory() < MEMORY);
}
