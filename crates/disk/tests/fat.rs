//! FAT volumes made by mkfs.vfat and filled by mtools.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::sync::Arc;

use common::{Image, MIB, run};
use proptest::prelude::*;
use qtk_block::{BlockWrite, MemoryDisk};
use qtk_disk::fat::{Error, Fat, Handle};

const LONG_NAME: &str = "A long näme with spaces.and.dots – ☃.efi";

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at * 7 % 251).unwrap()).collect()
}

/// `/EFI/BOOT/BOOTX64.EFI` and 200 files with long names in a directory of several clusters.
fn filled(bits: u32, size: u64) -> Image {
    let image = Image::fat(size, bits, "UEFI");
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let on_volume = |path: &str| format!("::{path}");
    run("mmd", &["-i", image.path(), "::EFI", "::EFI/BOOT", "::EFI/many"]);
    run("mcopy", &["-i", image.path(), &file("a", &content(300_001)), &on_volume("EFI/BOOT/BOOTX64.EFI")]);
    run("mcopy", &["-i", image.path(), &file("b", b"lower"), &on_volume("EFI/BOOT/grub.cfg")]);
    run("mcopy", &["-i", image.path(), &file("c", b""), &on_volume("empty")]);
    run("mcopy", &["-i", image.path(), &file(LONG_NAME, b"long"), &on_volume("EFI/")]);
    let many: Vec<String> =
        (0..200).map(|n| file(&format!("a file with number {n}.txt"), n.to_string().as_bytes())).collect();
    let mut args = vec!["-i", image.path()];
    args.extend(many.iter().map(String::as_str));
    args.push("::EFI/many/");
    run("mcopy", &args);
    run("mdel", &["-i", image.path(), "::EFI/many/a file with number 100.txt"]);
    run("fsck.vfat", &["-n", image.path()]);
    image
}

fn resolve(fat: &Fat, path: &str) -> Option<Handle> {
    path.split('/').try_fold(Handle::ROOT, |dir, name| fat.lookup(dir, name.as_bytes()).unwrap())
}

fn read(fat: &Fat, path: &str) -> Vec<u8> {
    let file = resolve(fat, path).unwrap_or_else(|| panic!("no {path}"));
    let mut bytes = vec![0; usize::try_from(fat.metadata(file).unwrap().size).unwrap()];
    assert_eq!(fat.read_at(file, &mut bytes, 0).unwrap(), bytes.len());
    bytes
}

#[test]
fn reads_what_mtools_wrote() {
    for (bits, size) in [(12, 4 * MIB), (16, 32 * MIB), (32, 64 * MIB)] {
        let image = filled(bits, size);
        let fat = Fat::open(image.reader()).unwrap();
        assert_eq!(fat.uuid(), "1234-ABCD");
        assert_eq!(fat.label().unwrap().as_deref(), Some(&b"UEFI"[..]));
        assert_eq!(read(&fat, "efi/boot/bootx64.efi"), content(300_001), "FAT{bits}");
        assert_eq!(read(&fat, "EFI/BOOT/GRUB.CFG"), b"lower");
        assert_eq!(read(&fat, &format!("EFI/{LONG_NAME}")), b"long");
        assert_eq!(read(&fat, "empty"), b"");
        let mut tail = [0; 100];
        let efi = resolve(&fat, "EFI/BOOT/BOOTX64.EFI").unwrap();
        assert_eq!(fat.read_at(efi, &mut tail, 299_950).unwrap(), 51);
        assert_eq!(tail[..51], content(300_001)[299_950..]);
        assert_eq!(fat.read_at(efi, &mut tail, 400_000).unwrap(), 0);

        let many = fat.read_dir(resolve(&fat, "EFI/many").unwrap()).unwrap();
        let mut names: Vec<_> = many.iter().map(|entry| entry.name.clone()).collect();
        let mut expected: Vec<_> =
            (0..200).filter(|&n| n != 100).map(|n| format!("a file with number {n}.txt")).collect();
        names.sort();
        expected.sort();
        assert_eq!(names, expected, "FAT{bits}");
        let boot = fat.read_dir(resolve(&fat, "EFI/BOOT").unwrap()).unwrap();
        let names: Vec<_> = boot.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["BOOTX64.EFI", "grub.cfg"]);
        assert!(resolve(&fat, "EFI/none").is_none());
    }
}

#[test]
fn dates_are_those_of_the_volume() {
    let image = Image::fat(4 * MIB, 12, "D");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    for (date, seconds) in [("2024-02-29T23:59:58Z", 1_709_251_198), ("1999-12-31T00:00:00Z", 946_598_400)] {
        std::fs::write(&path, "x").unwrap();
        run("touch", &["-d", date, path.to_str().unwrap()]);
        run("env", &["TZ=UTC", "mcopy", "-o", "-m", "-i", image.path(), path.to_str().unwrap(), "::file"]);
        let fat = Fat::open(image.reader()).unwrap();
        let file = resolve(&fat, "file").unwrap();
        assert_eq!(fat.metadata(file).unwrap().modified.seconds, seconds, "{date}");
    }
}

#[test]
fn a_chain_in_a_circle_is_corrupt() {
    let image = filled(16, 32 * MIB);
    let fat = Fat::open(image.reader()).unwrap();
    let word = |at| u64::from(u16::from_le_bytes(image.read(2, at).try_into().unwrap()));
    let (reserved, table, roots) = (word(14) * 512, word(22) * 512, word(17) * 32);
    let cluster_size = usize::from(image.read(1, 13)[0]) * 512;
    // Cluster 2 is the first directory's. It shall have deleted entries only, and be followed by itself.
    assert_eq!(resolve(&fat, "EFI").map(|dir| fat.read_dir(dir).unwrap().len()), Some(3));
    image.write(&vec![0xe5; cluster_size], reserved + 2 * table + roots);
    image.write(&[2, 0], reserved + 4);
    let error = fat.read_dir(resolve(&fat, "EFI").unwrap()).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
}

#[test]
fn refuses_what_is_no_fat() {
    assert!(matches!(Fat::open(Image::new(MIB).reader()), Err(Error::NotFat)));
    let image = filled(16, 32 * MIB);
    // A volume that claims to be larger than its device.
    image.write(&0_u16.to_le_bytes(), 19);
    image.write(&u32::MAX.to_le_bytes(), 32);
    assert!(matches!(Fat::open(image.reader()), Err(Error::NotFat)));
}

/// Visits everything; gives up at the first error.
fn walk(fat: &Fat, dir: Handle, depth: usize, left: &mut usize) -> Result<(), Error> {
    for entry in fat.read_dir(dir)? {
        let Some(rest) = left.checked_sub(1) else { return Ok(()) };
        *left = rest;
        if entry.is_dir && depth < 8 {
            walk(fat, entry.handle, depth + 1, left)?;
        } else if !entry.is_dir {
            fat.read_at(entry.handle, &mut [0; 100], 70_000)?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn survives_any_damage(changes in prop::collection::vec((0_usize..100_000, any::<u8>()), 1..60), boot in any::<bool>()) {
        static IMAGE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let bytes = IMAGE.get_or_init(|| filled(12, 4 * MIB).read(4 << 20, 0));
        let disk = MemoryDisk::new(bytes.len() as u64);
        disk.write_at(bytes, 0).unwrap();
        for (at, byte) in changes {
            let at = if boot { at % 90 } else { at };
            disk.write_at(&[byte], at as u64).unwrap();
        }
        if let Ok(fat) = Fat::open(Arc::new(disk)) {
            let _ = fat.label();
            let _ = walk(&fat, Handle::ROOT, 0, &mut 2000);
        }
    }
}
