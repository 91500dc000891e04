//! One tree over the file systems of a disk that the real tools made.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use common::{Image, MIB, populate, run};
use qtk_disk::{Error, FileType, Follow, GuestPath, PathProblem, Place, Tree, Warning};

const FSTAB: &str = "LABEL=cloudimg-rootfs / ext4 defaults 0 1\n\
    LABEL=UEFI\t/boot/efi\tvfat\tumask=0077\t0 1\n\
    LABEL=BOOT /boot ext4 defaults 0 2\n\
    /dev/sdb1 /data ext4 nofail 0 2\n\
    tmpfs /tmp tmpfs defaults 0 0\n/swap.img none swap sw 0 0\n";

const ROOT: [(&str, &str); 18] = [
    ("etc/os-release", "->../usr/lib/os-release"),
    ("usr/lib/os-release", "ID=test\n"),
    ("usr/bin/tool", "tool"),
    ("bin", "->usr/bin"),
    ("boot/hidden", "below the mount"),
    ("vmlinuz", "->boot/vmlinuz"),
    ("data/", ""),
    ("tmp/absolute", "->/etc/os-release"),
    ("tmp/relative", "->../../../../etc/os-release"),
    ("tmp/dangling", "->/nowhere/at/all"),
    ("tmp/new", "->../data/new"),
    ("tmp/loop1", "->loop2"),
    ("tmp/loop2", "->loop1"),
    ("tmp/dir", "->/usr/"),
    ("tmp/up", "->.."),
    ("tmp/efi", "->/boot/efi/EFI"),
    ("tmp/chain/0", "file"),
    ("deep/down/", ""),
];

/// Ubuntu's layout: root, BIOS boot, ESP, `/boot`.
fn ubuntu(fstab: &str) -> Image {
    let image = Image::new(96 * MIB);
    run(
        "sgdisk",
        &[
            "-n14:2048:+4M",
            "-t14:ef02",
            "-n15:0:+8M",
            "-t15:ef00",
            "-n16:0:+16M",
            "-t16:ea00",
            "-n1:0:0",
            "-t1:8300",
            "-c1:rootfs",
            "-u1:11111111-2222-3333-4444-555555555555",
            image.path(),
        ],
    );
    let folder = tempfile::tempdir().unwrap();
    populate(folder.path(), &ROOT);
    populate(folder.path(), &[("etc/fstab", fstab)]);
    for link in 1..=60 {
        let target = (link - 1).to_string();
        std::os::unix::fs::symlink(target, folder.path().join(format!("tmp/chain/{link}"))).unwrap();
    }
    image.insert(&Image::ext4(66 * MIB, "cloudimg-rootfs", folder.path()), 29 * MIB);
    let folder = tempfile::tempdir().unwrap();
    populate(
        folder.path(),
        &[("vmlinuz", "->vmlinuz-6"), ("vmlinuz-6", "kernel"), ("efi/", ""), ("back", "->/usr/bin")],
    );
    image.insert(&Image::ext4(16 * MIB, "BOOT", folder.path()), 13 * MIB);
    let esp = Image::fat(8 * MIB, 12, "UEFI");
    let file = Image::new(0);
    file.write(b"loader", 0);
    run("mmd", &["-i", esp.path(), "::EFI", "::EFI/BOOT"]);
    run("mcopy", &["-i", esp.path(), file.path(), "::EFI/BOOT/BOOTX64.EFI"]);
    image.insert(&esp, 5 * MIB);
    image
}

fn open(image: &Image) -> Tree {
    Tree::open(image.reader(), None).unwrap()
}

fn content(tree: &Tree, path: &str) -> String {
    String::from_utf8(tree.read_small(path).unwrap_or_else(|error| panic!("{path}: {error}"))).unwrap()
}

fn problem<T: std::fmt::Debug>(result: Result<T, Error>) -> (String, PathProblem) {
    match result.unwrap_err() {
        Error::Path { path, problem } => (path.to_string(), problem),
        other => panic!("{other}"),
    }
}

#[test]
fn joins_ubuntus_partitions() {
    let image = ubuntu(FSTAB);
    let tree = open(&image);
    let mounts: Vec<_> = tree.mounts().map(|mount| (mount.path.to_string(), mount.place)).collect();
    let expected = [("/", 1), ("/boot", 16), ("/boot/efi", 15)];
    assert_eq!(mounts, expected.map(|(path, number)| (path.to_owned(), Place::Partition(number))));
    assert!(tree.warnings().is_empty(), "{:?}", tree.warnings());
    for (path, expected) in [
        ("/vmlinuz", "kernel"),
        ("boot//vmlinuz", "kernel"),
        ("/boot/back/tool", "tool"),
        ("/boot/../etc/os-release", "ID=test\n"),
        ("/boot/efi/../../bin/tool", "tool"),
        ("/boot/efi/efi/boot/bootx64.efi", "loader"),
        ("/tmp/efi/BOOT/BOOTX64.EFI", "loader"),
        ("/tmp/absolute", "ID=test\n"),
        ("/tmp/relative", "ID=test\n"),
        ("/tmp/dir/bin/tool", "tool"),
        ("/tmp/up/tmp/up/bin/tool", "tool"),
        ("/../../bin/tool", "tool"),
    ] {
        assert_eq!(content(&tree, path), expected, "{path}");
    }
    let names = |path: &str| -> Vec<String> {
        let entries = tree.read_dir(tree.resolve(path, Follow::All).unwrap()).unwrap();
        let mut names: Vec<_> = entries.into_iter().map(|entry| String::from_utf8(entry.name).unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names("/boot"), ["back", "efi", "lost+found", "vmlinuz", "vmlinuz-6"]);
    assert_eq!(names("/boot/efi"), ["EFI"]);
    // A directory's entry for a mount point leads into what is mounted.
    let boot = tree.read_dir(tree.root()).unwrap().into_iter().find(|entry| entry.name == b"boot").unwrap();
    assert_eq!(boot.node, tree.resolve("/boot", Follow::All).unwrap());
    assert!(!boot.node.shares_file_system_with(tree.root()));
}

#[test]
fn resolves_as_linux_does() {
    let image = ubuntu(FSTAB);
    let tree = open(&image);
    let locate = |path: &str, follow| tree.locate(path, follow);
    for (path, followed) in [
        ("/bin/tool", "/usr/bin/tool"),
        ("/tmp/new", "/data/new"),
        ("/etc/../vmlinuz", "/boot/vmlinuz-6"),
        ("/", "/"),
        ("/tmp/up", "/"),
        ("", "/"),
        ("/usr/.", "/usr"),
        ("/tmp/dir/", "/usr"),
        ("/data/missing/", "/data/missing"),
    ] {
        assert_eq!(locate(path, Follow::All).unwrap().path, GuestPath::from(followed), "{path}");
    }
    assert_eq!(locate("/tmp/dir", Follow::NotLast).unwrap().path, GuestPath::from("/tmp/dir"));
    assert_eq!(locate("/tmp/dir/", Follow::NotLast).unwrap().path, GuestPath::from("/usr"));
    let new = locate("/tmp/new", Follow::All).unwrap();
    assert_eq!((new.node, new.name.as_slice()), (None, &b"new"[..]));
    assert_eq!(new.parent, tree.resolve("/data", Follow::All).unwrap());

    let expected = |path: &str, problem| (path.to_owned(), problem);
    assert_eq!(problem(locate("/tmp/dangling", Follow::All)), expected("/nowhere", PathProblem::NotFound));
    assert_eq!(problem(locate("/no/file", Follow::All)), expected("/no", PathProblem::NotFound));
    assert_eq!(problem(locate("/bin/tool/x", Follow::All)), expected("/usr/bin/tool", PathProblem::NotADirectory));
    assert_eq!(problem(locate("/bin/tool/", Follow::All)), expected("/usr/bin/tool", PathProblem::NotADirectory));
    assert_eq!(problem(locate("/bin/tool/..", Follow::All)), expected("/usr/bin/tool", PathProblem::NotADirectory));
    assert_eq!(problem(locate("/tmp/loop1", Follow::All)).1, PathProblem::TooManyLinks);
    assert!(locate("/tmp/loop1", Follow::NotLast).is_ok());
    assert_eq!(content(&tree, "/tmp/chain/40"), "file");
    assert_eq!(problem(locate("/tmp/chain/41", Follow::All)).1, PathProblem::TooManyLinks);
    assert_eq!(problem(tree.resolve("/data/missing", Follow::All)).1, PathProblem::NotFound);
}

#[test]
fn finds_partitions_by_every_kind_of_name() {
    let uuid = |image: &Image, offset: u64| {
        let raw = image.read(16, offset + 1024 + 0x68);
        raw.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let with_dashes =
        |hex: &str| format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    let template = ubuntu(FSTAB);
    let listed = run("sgdisk", &["-i16", template.path()]);
    let guid = listed.lines().find_map(|line| line.strip_prefix("Partition unique GUID: ")).unwrap();
    for source in [
        format!("UUID={}", with_dashes(&uuid(&template, 13 * MIB))),
        format!("PARTUUID={guid}"),
        format!("/dev/disk/by-partuuid/{}", guid.to_lowercase()),
        "/dev/vda16".to_owned(),
        "/dev/nvme0n1p16".to_owned(),
        "/dev/disk/by-label/BOOT".to_owned(),
        "LABEL=\"BOOT\"".to_owned(),
    ] {
        // The same disk with another fstab: debugfs keeps the identities.
        let root = template.cut(29 * MIB, 66 * MIB);
        let fstab = Image::new(0);
        fstab.write(
            format!("{source} /boot ext4 defaults 0 2\nUUID=1234-abcd /boot/efi vfat defaults 0 1\n").as_bytes(),
            0,
        );
        run("debugfs", &["-w", "-R", "rm /etc/fstab", root.path()]);
        run("debugfs", &["-w", "-R", &format!("write {} /etc/fstab", fstab.path()), root.path()]);
        let image = Image::new(96 * MIB);
        image.insert(&template, 0);
        image.write(&root.read(66 << 20, 0), 29 * MIB);
        let tree = open(&image);
        assert_eq!(tree.mounts().count(), 3, "{source}: {:?}", tree.warnings());
        assert_eq!(content(&tree, "/boot/vmlinuz"), "kernel", "{source}");
    }
}

#[test]
fn what_cannot_be_mounted_is_a_warning() {
    let image = ubuntu(
        "LABEL=GONE /boot ext4 defaults 0 2\n/dev/sda14 /data auto defaults 0 0\nLABEL=X /deep ext4 nofail 0 0\n",
    );
    image.write(b"XFSB", 1 << 20);
    let tree = open(&image);
    assert_eq!(tree.mounts().count(), 1);
    let warnings: Vec<_> = tree.warnings().iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "/boot: /etc/fstab mounts LABEL=GONE here, which is not on this disk",
            "/data: partition 14 holds xfs, which qtk cannot edit yet",
        ]
    );
    assert!(matches!(tree.warnings()[0], Warning::Missing { .. }));
    // What lies below a missing mount shows, what lies below an unreadable one must not be taken for the real thing.
    assert_eq!(content(&tree, "/boot/hidden"), "below the mount");
    let error = tree.locate("/data/file", Follow::All).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert!(tree.read_dir(tree.root()).is_ok());
}

#[test]
fn mbr_with_logical_partitions() {
    let image = Image::new(80 * MIB);
    let script = Image::new(0);
    script.write(b"label: dos\nlabel-id: 0xdeadbeef\n1M 70M E\n2M 32M L\n35M 16M L\n", 0);
    run("sh", &["-c", &format!("PATH=$PATH:/sbin:/usr/sbin sfdisk -q {} < {}", image.path(), script.path())]);
    let folder = tempfile::tempdir().unwrap();
    populate(folder.path(), &[("etc/fstab", "PARTUUID=DEADBEEF-06 /srv auto defaults 0 0\n"), ("srv/", "")]);
    image.insert(&Image::ext4(32 * MIB, "", folder.path()), 2 * MIB);
    let folder = tempfile::tempdir().unwrap();
    populate(folder.path(), &[("file", "on the second")]);
    image.insert(&Image::ext4(16 * MIB, "", folder.path()), 35 * MIB);
    let tree = open(&image);
    assert_eq!(tree.mounts().map(|mount| mount.place).collect::<Vec<_>>(), [Place::Partition(5), Place::Partition(6)]);
    assert_eq!(content(&tree, "/srv/file"), "on the second");
    let other = Tree::open(image.reader(), Some(6)).unwrap();
    assert_eq!(content(&other, "/file"), "on the second");
    assert!(matches!(Tree::open(image.reader(), Some(7)), Err(Error::NoSuchPartition { number: 7, .. })));
}

#[test]
fn a_partition_far_out_on_a_large_disk() {
    const START: u64 = 5 << 40;
    let image = Image::new(6 << 40);
    run("sgdisk", &[&format!("-n1:{}:+16M", START / 512), image.path()]);
    let folder = tempfile::tempdir().unwrap();
    populate(folder.path(), &[("file", "far out")]);
    image.insert(&Image::ext4(16 * MIB, "", folder.path()), START);
    assert_eq!(content(&open(&image), "/file"), "far out");
}

#[test]
fn a_disk_without_partitions_is_a_tree() {
    let folder = tempfile::tempdir().unwrap();
    populate(folder.path(), &[("just/a/file", "x")]);
    let image = Image::ext4(32 * MIB, "", folder.path());
    let tree = open(&image);
    assert_eq!(content(&tree, "just/a/file"), "x");
    assert_eq!(tree.mounts().next().unwrap().place, Place::Disk);
    let metadata = tree.metadata(tree.resolve("/just", Follow::All).unwrap()).unwrap();
    assert_eq!((metadata.file_type, metadata.links), (FileType::Directory, 3));
}

/// A disk with these contents in partitions of 16 MiB.
fn disk(parts: &[Option<&[(&str, &str)]>]) -> Image {
    let image = Image::new(100 * MIB);
    let mut args = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        args.push(format!("-n{}:{}M:+16M", index + 1, 1 + 16 * index));
        let Some(files) = part else { continue };
        let folder = tempfile::tempdir().unwrap();
        populate(folder.path(), files);
        image.insert(&Image::ext4(16 * MIB, "", folder.path()), (1 + 16 * index as u64) * MIB);
    }
    args.push(image.path().to_owned());
    run("sgdisk", &args.iter().map(String::as_str).collect::<Vec<_>>());
    image
}

#[test]
fn chooses_the_root_or_says_what_there_is() {
    let data: &[(&str, &str)] = &[("file", "")];
    let system: &[(&str, &str)] = &[("etc/os-release", ""), ("usr/", "")];
    let bare: &[(&str, &str)] = &[("usr/", "")];
    let place = |image: &Image| open(image).mounts().next().unwrap().place;
    assert_eq!(place(&disk(&[Some(data), Some(system), Some(bare)])), Place::Partition(2));
    assert_eq!(place(&disk(&[Some(data), Some(bare)])), Place::Partition(2));
    assert_eq!(place(&disk(&[None, Some(data)])), Place::Partition(2));

    let error = |image: &Image| Tree::open(image.reader(), None).unwrap_err().to_string();
    let several = disk(&[Some(system), None, Some(system)]);
    assert_eq!(
        error(&several),
        "more than one file system looks like a root: partition 1 holds ext4, partition 3 holds ext4; choose a partition by its number"
    );
    assert!(Tree::open(several.reader(), Some(3)).is_ok());
    assert!(error(&disk(&[Some(data), Some(data)])).starts_with("no root file system found: partition 1 holds ext4"));
    let foreign = disk(&[None, None]);
    foreign.write(b"XFSB", 17 * MIB);
    assert_eq!(
        error(&foreign),
        "no root file system found: partition 1 holds nothing, partition 2 holds xfs; qtk edits ext4"
    );
    let asked = Tree::open(foreign.reader(), Some(2)).unwrap_err().to_string();
    assert_eq!(asked, "partition 2 holds xfs, which qtk cannot edit yet");
    assert_eq!(error(&Image::new(MIB)), "no root file system found: the disk holds nothing; qtk edits ext4");
}
