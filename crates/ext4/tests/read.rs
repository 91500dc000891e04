//! Reading images of all shapes, compared with the trees they were made from.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod support;

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use qtk_ext4::{Ext4, FileType, Ino};
use support::{DISTRIBUTION, Image, noise, read_all, resolve};

/// A tree with every kind of file, sizes around block borders, and a directory of `names` entries.
fn make_tree(root: &Path, names: usize) {
    let write = |name: &str, bytes: &[u8]| std::fs::write(root.join(name), bytes).unwrap();
    for (at, size) in
        [0, 1, 59, 60, 61, 1023, 1024, 4095, 4096, 4097, 65_536, 300_000, 3_000_001].into_iter().enumerate()
    {
        write(&format!("size-{size}"), &noise(size, at as u64));
    }
    let sparse = std::fs::File::create(root.join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &noise(10_000, 7), 5_000_000).unwrap();
    sparse.set_len(9_000_000).unwrap();
    std::fs::create_dir_all(root.join("a/b/c/d")).unwrap();
    write("a/b/c/d/deep", b"deep");
    for len in [1, 59, 60, 61, 200, 900] {
        symlink("t".repeat(len), root.join(format!("link-{len}"))).unwrap();
    }
    std::fs::hard_link(root.join("size-4097"), root.join("a/hard")).unwrap();
    std::fs::set_permissions(root.join("size-1"), std::fs::Permissions::from_mode(0o4751)).unwrap();
    support::tool("mkfifo", &[root.join("fifo").to_str().unwrap()]);
    std::fs::create_dir(root.join("many")).unwrap();
    for at in 0..names {
        write(&format!("many/entry number {at:06}"), b"");
    }
}

/// Compares a directory with its source, and everything below.
fn compare(fs: &Ext4, dir: Ino, source: &Path) {
    let mut expected: Vec<_> = std::fs::read_dir(source).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    expected.sort();
    let mut entries = fs.read_dir(dir).unwrap();
    entries.retain(|entry| entry.name != b"lost+found");
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let names: Vec<_> = entries.iter().map(|entry| entry.name.as_slice()).collect();
    assert_eq!(names, expected.iter().map(|name| name.as_encoded_bytes()).collect::<Vec<_>>());
    for (entry, name) in entries.iter().zip(&expected) {
        let path = source.join(name);
        assert_eq!(fs.lookup(dir, &entry.name).unwrap(), Some(entry.ino), "{}", path.display());
        compare_inode(fs, entry.ino, &path);
        let file_type = fs.metadata(entry.ino).unwrap().file_type;
        assert!(entry.file_type.is_none_or(|hint| hint == file_type));
    }
    assert_eq!(fs.lookup(dir, b"no such name").unwrap(), None);
}

fn compare_inode(fs: &Ext4, ino: Ino, path: &Path) {
    let wanted = path.symlink_metadata().unwrap();
    let found = fs.metadata(ino).unwrap();
    let described = path.display();
    assert_eq!(u32::from(found.permissions), wanted.mode() & 0o7777, "{described}");
    assert_eq!((found.uid, found.gid), (wanted.uid(), wanted.gid()), "{described}");
    assert_eq!(found.mtime.seconds, wanted.mtime(), "{described}");
    match found.file_type {
        FileType::Directory => compare(fs, ino, path),
        FileType::Symlink => {
            let target = std::fs::read_link(path).unwrap();
            assert_eq!(fs.read_link(ino).unwrap(), target.as_os_str().as_encoded_bytes(), "{described}");
        }
        FileType::Regular => {
            assert_eq!(u64::from(found.links), wanted.nlink(), "{described}");
            assert!(read_all(fs, ino) == std::fs::read(path).unwrap(), "{described}");
        }
        FileType::Fifo => assert!(std::os::unix::fs::FileTypeExt::is_fifo(&wanted.file_type())),
        other => panic!("{described}: {other:?}"),
    }
}

#[test]
fn trees_read_as_they_were_written() {
    let source = tempfile::tempdir().unwrap();
    make_tree(source.path(), 1500);
    let shapes: &[&[&str]] = &[
        DISTRIBUTION,
        &["-b", "1024"],
        &["-b", "2048", "-I", "512"],
        &["-b", "65536", "-N", "8192"],
        &["-I", "128"],
        &["-I", "1024", "-O", "^metadata_csum"],
        &["-O", "^metadata_csum,uninit_bg,^64bit"],
        &["-O", "^flex_bg,^resize_inode"],
        &["-O", "meta_bg,^resize_inode", "-b", "1024"],
        &["-O", "bigalloc", "-C", "16384"],
        &["-t", "ext2"],
        &["-t", "ext3", "-b", "1024"],
        &["-t", "ext2", "-r", "0", "-I", "128", "-O", "none"],
        &["-O", "sparse_super2,large_dir,^has_journal"],
    ];
    for shape in shapes {
        let image = Image::make("128M", shape, Some(source.path()));
        compare(&image.open(), Ino::ROOT, source.path());
    }
}

#[test]
fn content_within_inodes_reads_too() {
    let source = tempfile::tempdir().unwrap();
    make_tree(source.path(), 20);
    // mke2fs 1.47 cuts sparse files off where files may lie within inodes.
    std::fs::remove_file(source.path().join("sparse")).unwrap();
    for shape in [["-O", "inline_data", "-I", "256"], ["-O", "inline_data", "-I", "1024"]] {
        let image = Image::make("64M", &shape, Some(source.path()));
        compare(&image.open(), Ino::ROOT, source.path());
    }
}

#[test]
fn finds_the_data_of_sparse_files() {
    let source = tempfile::tempdir().unwrap();
    make_tree(source.path(), 0);
    for shape in [DISTRIBUTION, &["-t", "ext2"]] {
        let fs = Image::make("64M", shape, Some(source.path())).open();
        let sparse = resolve(&fs, "sparse");
        let start = 5_000_000 / 4096 * 4096;
        let end = 5_010_000_u64.next_multiple_of(4096);
        for offset in [0, 1, start - 1, start] {
            let found = fs.data_range(sparse, offset).unwrap().unwrap();
            assert_eq!(found, start..end, "from {offset}");
        }
        assert_eq!(fs.data_range(sparse, start + 5).unwrap(), Some(start + 5..end));
        assert_eq!(fs.data_range(sparse, end).unwrap(), None);
        assert_eq!(fs.data_range(resolve(&fs, "size-0"), 0).unwrap(), None);
        let mut buf = [1; 10];
        assert_eq!(fs.read_at(sparse, &mut buf, 8_999_995).unwrap(), 5);
        assert_eq!(fs.read_at(sparse, &mut buf, u64::MAX).unwrap(), 0);
    }
}

#[test]
fn names_what_it_cannot_read() {
    let source = tempfile::tempdir().unwrap();
    let fs = Image::make("16M", DISTRIBUTION, Some(source.path())).open();
    assert_eq!(fs.read_at(Ino::ROOT, &mut [], 0).unwrap_err().to_string(), "inode 2 is a directory");
    assert!(fs.read_link(Ino::ROOT).is_err());
    let unused = Ino::new(fs.total_inodes()).unwrap();
    assert_eq!(fs.metadata(unused).unwrap_err().to_string(), format!("inode {unused} is not in use"));
    assert!(fs.metadata(Ino::new(u32::MAX).unwrap()).is_err());
}

#[test]
fn names_read_whatever_their_index_is_made_of() {
    let source = tempfile::tempdir().unwrap();
    let dir = source.path().join("dir");
    std::fs::create_dir(&dir).unwrap();
    let names: Vec<String> = (0..300).map(|at| format!("A rather Long Name to fill Blocks {at}")).collect();
    names.iter().for_each(|name| std::fs::write(dir.join(name), b"x").unwrap());
    let shape = ["-b", "1024", "-O", "casefold,encrypt", "-E", "encoding=utf8"];
    let image = Image::make("16M", &shape, Some(source.path()));
    // This kernel has no casefolding; e2fsck makes the index.
    image.debugfs_write("set_inode_field /dir flags 0x40080000\n");
    image.rebuild_indexes();
    image.assert_clean();
    let fs = image.open();
    let dir = resolve(&fs, "dir");
    assert_eq!(fs.metadata(dir).unwrap().flags, 0x4008_1000);
    assert_eq!(fs.read_dir(dir).unwrap().len(), names.len());
    assert!(names.iter().all(|name| fs.lookup(dir, name.as_bytes()).unwrap().is_some()));

    image.debugfs_write("set_inode_field /dir flags 0x80800\n");
    let fs = image.open();
    let refused = format!("the encryption of inode {dir} is not supported");
    assert_eq!(fs.read_dir(dir).unwrap_err().to_string(), refused);
    assert_eq!(fs.lookup(dir, b"any").unwrap_err().to_string(), refused);
}
