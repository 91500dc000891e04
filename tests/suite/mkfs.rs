//! `qtk mkfs`: what goes in is what the kernel finds, and nothing else is touched.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{Workshop, arg, command, fails, json, ok, run};

/// A loop mount, for reading.
struct Mount(PathBuf);

impl Mount {
    fn new(shop: &Workshop, image: &str) -> Self {
        let point = shop.path(&format!("{image}.mount"));
        fs::create_dir_all(&point).unwrap();
        ok(&mut command("mount", &["-o", "loop,ro", arg(&shop.path(image)), arg(&point)]));
        Self(point)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Somebody may look at a new mount for a moment.
        for _ in 0..50 {
            if run(&mut command("umount", &[arg(&self.0)])).code == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

/// Names, kinds, owners, permissions, times, attributes, links and content below a folder, as GNU tar records them.
fn recorded(folder: &Path) -> Vec<u8> {
    let line = "--sort=name --numeric-owner --xattrs --xattrs-include=* --format=pax --exclude=./lost+found \
                --pax-option=delete=atime,delete=ctime,exthdr.name=x -c . -C";
    let words: Vec<&str> = line.split_whitespace().collect();
    // `-C` must come before the name it holds for.
    let (options, _) = words.split_at(words.len() - 3);
    let output = command("tar", &[options, &["-C", arg(folder), "-c", "."]].concat()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

fn assert_clean(shop: &Workshop, image: &str) {
    ok(&mut shop.sh("e2fsck", &format!("-fn {image}")));
}

fn assert_holds(shop: &Workshop, image: &str, folder: &str) {
    assert_clean(shop, image);
    let mount = Mount::new(shop, image);
    let (found, wanted) = (recorded(&mount.0), recorded(&shop.path(folder)));
    if found != wanted {
        let listed = |path: &Path| ok(&mut command("find", &[arg(path), "-printf", "%P %y %m %U:%G %s %n %T@ %l\n"]));
        panic!("{image} differs:\n{}\nfrom {folder}:\n{}", listed(&mount.0), listed(&shop.path(folder)));
    }
}

/// A folder with some of everything.
fn furnish(shop: &Workshop, folder: &str) {
    shop.write(&format!("{folder}/etc/hostname"), b"guest\n");
    shop.write(&format!("{folder}/usr/bin/su"), &[7; 70_000]);
    shop.write(&format!("{folder}/empty"), b"");
    for at in 0..300 {
        shop.write(&format!("{folder}/many/file number {at} with a long name"), format!("{at}").repeat(at).as_bytes());
    }
    let script = format!(
        "cd {folder}; chmod 4755 usr/bin/su; chmod 0 empty; chown 12:70000 etc/hostname; ln usr/bin/su usr/bin/su2; \
         ln -s usr/bin bin; ln -s $(printf 'x%.0s' $(seq 200)) long-link; ln bin bin2; mkfifo pipe; mknod null c 1 3; \
         mknod disk b 259 70000; mkdir -m 1777 tmp; mkdir -p a/b/c/d; truncate -s 20M sparse; \
         printf middle | dd of=sparse bs=1 seek=12345678 conv=notrunc status=none; truncate -s 3M holes; \
         printf end | dd of=holes bs=1 seek=3000000 conv=notrunc status=none; \
         touch $(printf 'n%.0s' $(seq 255)); touch -d '2021-02-03 04:05:06.789012345Z' etc/hostname a; touch -hd '1999-01-01Z' bin; touch -d '1960-01-01Z' empty"
    );
    ok(shop.sh("sh", "-ec").arg(script));
    for (name, attribute, value) in attributes() {
        let path = shop.path(folder).join(name);
        rustix::fs::setxattr(path, attribute, &value, rustix::fs::XattrFlags::empty()).unwrap();
    }
}

/// Extended attributes: in the inode, in a block of its own, of a directory, and of a kind that programs live by.
fn attributes() -> [(&'static str, &'static str, Vec<u8>); 4] {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    [
        ("etc/hostname", "user.note", b"hello".to_vec()),
        ("usr/bin/su", "trusted.long", vec![b'v'; 900]),
        ("usr/bin/su", "security.capability", capability.to_vec()),
        ("a", "user.dir", b"yes".to_vec()),
    ]
}

#[test]
fn a_folder_arrives_whole() {
    let shop = Workshop::new();
    furnish(&shop, "tree");
    for options in ["", "-b 1024", "-t ext2 -b 1024", "-t ext3", "-I 128 -t ext2", "--profile debian-12 -b 65536"] {
        let image = "made.raw";
        let made = ok(&mut shop.qtk(format!("mkfs --force -d tree {image} {options}").trim_end()));
        assert!(made.contains("inodes"), "{made}");
        assert_clean(&shop, image);
        if options.contains("128") {
            // Such inodes have neither nanoseconds nor room for attributes; the rest is compared above.
            continue;
        }
        if !options.contains("65536") {
            assert_holds(&shop, image, "tree");
        }
    }
}

#[test]
fn archives_of_every_kind_arrive_whole() {
    let shop = Workshop::new();
    furnish(&shop, "tree");
    let xattrs = "--xattrs --xattrs-include=*";
    let kinds = [
        format!("--format=pax {xattrs}"),
        format!("--format=pax -S {xattrs}"),
        format!("--format=pax -S --sparse-version=0.0 {xattrs}"),
        format!("--format=pax -S --sparse-version=0.1 {xattrs}"),
        "--format=gnu -S".to_owned(),
        "--format=gnu".to_owned(),
    ];
    for kind in &kinds {
        if !kind.contains("-S") {
            ok(&mut shop.sh("rm", "-f tree/sparse"));
        }
        if kind.contains("gnu") {
            // That format has neither attributes nor fractions of seconds.
            for (name, attribute, _) in attributes() {
                // Gone already the second time.
                let _ = rustix::fs::removexattr(shop.path("tree").join(name), attribute);
            }
            ok(&mut shop.sh("find", "tree -exec touch -hd @1600000000 {} +"));
        }
        ok(&mut shop.sh("tar", &format!("{kind} -cf tree.tar -C tree .")));
        ok(&mut shop.qtk("mkfs --force -d tree.tar made.raw"));
        assert_holds(&shop, "made.raw", "tree");
        if !kind.contains("-S") {
            ok(&mut shop.sh("truncate", "-s 20M tree/sparse"));
        }
    }
}

#[test]
fn layers_remove_what_lies_beneath() {
    let shop = Workshop::new();
    for path in ["base/keep", "base/gone", "base/dir/old", "base/dir/sub/old", "base/replaced/inside", "base/lib/x"] {
        shop.write(path, b"base");
    }
    for path in ["top/.wh.gone", "top/dir/.wh..wh..opq", "top/dir/new", "top/dir/sub/new", "top/replaced", "top/lib/y"]
    {
        shop.write(path, b"top");
    }
    ok(&mut shop.sh("tar", "-cf base.tar -C base ."));
    ok(&mut shop.sh("tar", "-cf top.tar -C top ."));
    ok(&mut shop.qtk("mkfs --layer base.tar --layer top.tar made.raw"));
    assert_clean(&shop, "made.raw");
    let mount = Mount::new(&shop, "made.raw");
    let found = ok(&mut command("find", &[arg(&mount.0), "-type", "f", "-printf", "%P\n"]));
    let mut found: Vec<&str> = found.lines().collect();
    found.sort_unstable();
    assert_eq!(found, ["dir/new", "dir/sub/new", "keep", "lib/x", "lib/y", "replaced"]);
    drop(mount);
    // Without layers such names are names.
    ok(&mut shop.qtk("mkfs --force -d top.tar made.raw"));
    assert!(ok(&mut shop.sh("debugfs", "-R ls made.raw")).contains(".wh.gone"));
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let shop = Workshop::new();
    furnish(&shop, "tree");
    for image in ["one.raw", "two.raw"] {
        ok(shop.qtk(&format!("mkfs -L root -d tree {image}")).env("SOURCE_DATE_EPOCH", "1600000000"));
    }
    ok(&mut shop.sh("cmp", "one.raw two.raw"));
    let stat = ok(shop.sh("debugfs", "-R").args(["stat /etc/hostname", "one.raw"]));
    assert!(!stat.contains("2021"), "times past the epoch become it: {stat}");
}

#[test]
fn a_partition_of_an_image_gets_it_and_the_rest_stays() {
    let shop = Workshop::new();
    shop.write("tree/hello", b"hello");
    ok(&mut shop.sh("truncate", "-s 200M disk.raw"));
    ok(&mut shop.sh("sgdisk", "-n 1:2048:206847 -n 2:206848:0 disk.raw"));
    fails(&mut shop.qtk("mkfs disk.raw"), 1, &["--partition"]);
    ok(&mut shop.qtk("mkfs -d tree --partition 2 disk.raw"));
    fails(&mut shop.qtk("mkfs --partition 2 disk.raw"), 1, &["ext4", "--force"]);
    fails(&mut shop.qtk("mkfs --partition 3 disk.raw"), 1, &["no partition 3"]);
    let second = format!("disk.raw?offset={}", 206_848 * 512);
    assert!(ok(&mut shop.sh("debugfs", &format!("-R ls {second}"))).contains("hello"));
    ok(&mut shop.sh("sgdisk", "-v disk.raw"));
    ok(&mut shop.sh("qemu-img", "convert -O qcow2 disk.raw disk.qcow2"));
    ok(&mut shop.qtk("mkfs --partition 1 -t ext2 -L first disk.qcow2"));
    ok(&mut shop.sh("qemu-img", "check disk.qcow2"));
    ok(&mut shop.sh("qemu-img", "convert -O raw disk.qcow2 back.raw"));
    ok(&mut shop.sh("dd", "if=back.raw of=part.raw bs=512 skip=2048 count=204800 status=none"));
    assert_clean(&shop, "part.raw");
}

#[test]
fn a_new_qcow2_image_is_sound() {
    let shop = Workshop::new();
    furnish(&shop, "tree");
    let made = json(&mut shop.qtk("mkfs --json --format qcow2 --size 1G -d tree made.qcow2"));
    assert!(made["files"].as_u64().is_some_and(|files| files > 300), "{made}");
    ok(&mut shop.sh("qemu-img", "check made.qcow2"));
    ok(&mut shop.sh("qemu-img", "convert -O raw made.qcow2 made.raw"));
    assert_holds(&shop, "made.raw", "tree");
}

#[test]
fn room_is_found_for_what_goes_in() {
    let shop = Workshop::new();
    shop.write("tree/large", &vec![1; 5_000_000]);
    ok(&mut shop.qtk("mkfs -m 0 -d tree tight.raw"));
    assert!(shop.path("tight.raw").metadata().unwrap().len() < 16 << 20);
    let made = json(&mut shop.qtk("mkfs --json -d tree --free 100M roomy.raw"));
    let free = made["free-blocks"].as_u64().unwrap() - made["reserved-blocks"].as_u64().unwrap();
    assert!((25_600..27_000).contains(&free), "{made}");
    for at in 0..3000 {
        shop.write(&format!("tree/{at}"), b"");
    }
    ok(&mut shop.qtk("mkfs -d tree --size 20M many.raw"));
    assert_clean(&shop, "many.raw");
    fails(&mut shop.qtk("mkfs -d tree --size 4M small.raw"), 1, &["no blocks left"]);
    assert!(!shop.path("small.raw").exists(), "nothing is left of what failed");
}

#[test]
fn hostile_archives_are_refused_or_stay_inside() {
    let shop = Workshop::new();
    shop.write("x/file", b"content");
    ok(&mut shop.sh("tar", "-P --transform=s,^,../../abs/, -cf up.tar -C x file"));
    ok(&mut shop.qtk("mkfs -d up.tar made.raw"));
    assert!(ok(shop.sh("debugfs", "-R").args(["ls /abs", "made.raw"])).contains("file"));
    let good = fs::read(shop.path("up.tar")).unwrap();
    for cut in [1, 511, 513] {
        shop.write("cut.tar", &good[..cut]);
        fails(&mut shop.qtk("mkfs --force -d cut.tar made.raw"), 1, &["cut.tar"]);
    }
    for at in (0..512).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 0x55;
        shop.write("bad.tar", &bad);
        let ran = run(&mut shop.qtk("mkfs --force -d bad.tar made.raw"));
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    }
    shop.write("no.tar", &[b'x'; 2000]);
    fails(&mut shop.qtk("mkfs --force -d no.tar made.raw"), 1, &["no tar archive"]);
}

#[test]
fn refusals_say_what_to_do() {
    let shop = Workshop::new();
    fails(&mut shop.qtk("mkfs new.raw"), 1, &["--size"]);
    fails(&mut shop.qtk("mkfs --size 1G -O bigalloc new.raw"), 1, &["bigalloc"]);
    fails(&mut shop.qtk("mkfs --size 1G -E nonsense=1 new.raw"), 1, &["nonsense"]);
    fails(&mut shop.qtk("mkfs --size 1G -U 12 new.raw"), 2, &["UUID"]);
    fails(&mut shop.qtk("mkfs --size 1G -b 3000 new.raw"), 1, &["power of two"]);
    fails(&mut shop.qtk("mkfs --size 1G -d missing new.raw"), 1, &["missing"]);
    shop.write("there", b"something");
    fails(&mut shop.qtk("mkfs --size 1G there"), 1, &["--force"]);
    assert_eq!(fs::read(shop.path("there")).unwrap(), b"something");
    assert!(!shop.path("new.raw").exists());
}
