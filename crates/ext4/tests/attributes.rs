//! Extended attributes and access control lists, changed by us and by the kernel alike.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod model;
mod support;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use model::kernel_xattrs;
use qtk_ext4::{EditOptions, Editor, Error, Ext4, FileType, Ino, NewNode, NodeKind, SetAttributes, Timestamp};
use rustix::fs::XattrFlags;
use support::{DISTRIBUTION, Image, noise, resolve};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";
const SHAPES: [&[&str]; 4] =
    [DISTRIBUTION, &["-b", "1024", "-I", "128"], &["-b", "1024", "-O", "^metadata_csum"], &["-I", "1024"]];

fn edit(image: &Image) -> Editor {
    Editor::open(image.device(), EditOptions::new(Timestamp { seconds: 1_700_000_000, nanos: 0 })).unwrap()
}

fn node(kind: NodeKind<'static>, permissions: u16) -> NewNode<'static> {
    NewNode { kind, permissions, uid: 0, gid: 0, mtime: None }
}

/// What `setxattr` takes: owner, named users, owning group, named groups, mask, others.
fn acl(owner: u16, users: &[(u32, u16)], group: u16, groups: &[(u32, u16)], mask: Option<u16>, other: u16) -> Vec<u8> {
    let none = u32::MAX;
    let mut entries = vec![(1_u16, owner, none)];
    entries.extend(users.iter().map(|&(id, permissions)| (2, permissions, id)));
    entries.push((4, group, none));
    entries.extend(groups.iter().map(|&(id, permissions)| (8, permissions, id)));
    entries.extend(mask.map(|mask| (0x10, mask, none)));
    entries.push((0x20, other, none));
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// One step, for the kernel and for us.
enum Step {
    Make(&'static str, NodeKind<'static>, u16),
    Set(&'static str, &'static str, Vec<u8>),
    Remove(&'static str, &'static str),
    Chmod(&'static str, u16),
}

impl Step {
    fn by_kernel(&self, root: &Path) {
        match self {
            Self::Make(path, kind, permissions) => {
                let path = root.join(path);
                match kind {
                    NodeKind::Directory => {
                        rustix::fs::mkdir(&path, rustix::fs::Mode::from_raw_mode((*permissions).into()))
                    }
                    NodeKind::File => {
                        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
                        rustix::fs::open(&path, flags, rustix::fs::Mode::from_raw_mode((*permissions).into())).map(drop)
                    }
                    NodeKind::Symlink(target) => rustix::fs::symlink(*target, &path),
                    other => panic!("{other:?}"),
                }
                .unwrap();
            }
            Self::Set(path, name, value) => {
                rustix::fs::lsetxattr(root.join(path), *name, value, XattrFlags::empty()).unwrap();
            }
            Self::Remove(path, name) => rustix::fs::lremovexattr(root.join(path), *name).unwrap(),
            Self::Chmod(path, mode) => {
                std::fs::set_permissions(root.join(path), std::fs::Permissions::from_mode((*mode).into())).unwrap();
            }
        }
    }

    fn by_us(&self, editor: &mut Editor) {
        let ino = |editor: &Editor, path: &str| resolve(editor.fs(), path);
        match self {
            Self::Make(path, kind, permissions) => {
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
                let parent = ino(editor, parent);
                editor.create(parent, name.as_bytes(), &node(*kind, *permissions)).unwrap();
            }
            Self::Set(path, name, value) => {
                editor.set_xattr(ino(editor, path), name.as_bytes(), value).unwrap();
            }
            Self::Remove(path, name) => editor.remove_xattr(ino(editor, path), name.as_bytes()).unwrap(),
            Self::Chmod(path, mode) => {
                let attributes = SetAttributes { permissions: Some(*mode), ..SetAttributes::default() };
                editor.set_attributes(ino(editor, path), &attributes).unwrap();
            }
        }
    }
}

/// Modes and attributes by path.
type Seen = BTreeMap<Vec<u8>, (u32, BTreeMap<Vec<u8>, Vec<u8>>)>;

fn seen_by_kernel(root: &Path) -> Seen {
    fn walk(path: &Path, name: &[u8], seen: &mut Seen) {
        let mode = path.symlink_metadata().unwrap().mode() & 0o7777;
        seen.insert(name.to_vec(), (mode, kernel_xattrs(path)));
        for entry in std::fs::read_dir(path).into_iter().flatten() {
            let entry = entry.unwrap();
            walk(&entry.path(), &[name, b"/", entry.file_name().as_bytes()].concat(), seen);
        }
    }
    let mut seen = Seen::new();
    walk(root, b"", &mut seen);
    seen
}

fn seen_by_us(fs: &Ext4) -> Seen {
    fn walk(fs: &Ext4, ino: Ino, name: &[u8], seen: &mut Seen) {
        let metadata = fs.metadata(ino).unwrap();
        let xattrs = fs.xattrs(ino).unwrap().into_iter().collect();
        seen.insert(name.to_vec(), (metadata.permissions.into(), xattrs));
        if metadata.file_type == FileType::Directory {
            for entry in fs.read_dir(ino).unwrap() {
                walk(fs, entry.ino, &[name, b"/", &entry.name[..]].concat(), seen);
            }
        }
    }
    let mut seen = Seen::new();
    walk(fs, Ino::ROOT, b"", &mut seen);
    seen
}

fn steps() -> Vec<Step> {
    use NodeKind::{Directory, File, Symlink};
    use Step::{Chmod, Make, Remove, Set};
    let rich = || acl(7, &[(1000, 6), (70_000, 7)], 5, &[(100, 4)], Some(7), 1);
    vec![
        Make("plain", Directory, 0o755),
        Make("plain/file", File, 0o666),
        Set("plain/file", ACCESS, rich()),
        Chmod("plain/file", 0o640),
        Make("plain/other", File, 0o600),
        Set("plain/other", ACCESS, acl(6, &[], 4, &[], None, 4)),
        Make("plain/masked", File, 0o4711),
        Set("plain/masked", ACCESS, acl(7, &[], 7, &[], Some(5), 0)),
        Set("plain/masked", "user.note", b"kept".to_vec()),
        Remove("plain/masked", ACCESS),
        Make("shared", Directory, 0o775),
        Set("shared", DEFAULT, rich()),
        Make("shared/file", File, 0o666),
        Make("shared/private", File, 0o600),
        Make("shared/script", File, 0o777),
        Make("shared/link", Symlink(b"file"), 0o777),
        Make("shared/sub", Directory, 0o770),
        Make("shared/sub/deep", File, 0o644),
        Chmod("shared/sub", 0o2750),
        Make("simple", Directory, 0o755),
        Set("simple", DEFAULT, acl(7, &[], 5, &[], None, 0)),
        Make("simple/file", File, 0o666),
        Make("simple/sub", Directory, 0o777),
        Remove("simple/sub", DEFAULT),
        Make("simple/sub/file", File, 0o666),
        Set("simple", ACCESS, acl(7, &[(5, 7)], 7, &[], Some(7), 7)),
        Chmod("simple", 0o1700),
        Set(
            "shared/file",
            "security.capability",
            [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec(),
        ),
        Set("shared/file", "trusted.overlay.opaque", b"y".to_vec()),
        Set("shared/link", "trusted.x", noise(300, 1)),
        Set("shared/link", "trusted.x", noise(20, 2)),
        Set("shared/sub", "user.empty", Vec::new()),
    ]
}

#[test]
fn agrees_with_the_kernel_on_access_control_lists() {
    for shape in SHAPES {
        let (theirs, ours) = (Image::make("16M", shape, None), Image::make("16M", shape, None));
        let expected = theirs.mounted(|root| {
            // The process's own mask would take permissions away where no default list applies.
            let mask = rustix::process::umask(rustix::fs::Mode::empty());
            steps().iter().for_each(|step| step.by_kernel(root));
            rustix::process::umask(mask);
            seen_by_kernel(root)
        });
        assert_eq!(seen_by_us(&theirs.open()), expected);
        let mut editor = edit(&ours);
        steps().iter().for_each(|step| step.by_us(&mut editor));
        editor.commit().unwrap();
        ours.assert_clean();
        assert_eq!(seen_by_us(editor.fs()), expected);
        assert_eq!(ours.mounted(seen_by_kernel), expected);
    }
}

/// Without room in their inodes, the kernel lets inodes with equal attributes share a block.
#[test]
fn a_shared_block_is_copied_before_it_is_changed() {
    let image = Image::make("16M", &["-I", "128"], None);
    let names = ["a", "b", "c", "d"];
    let value = noise(200, 1);
    image.mounted(|root| {
        for name in names {
            std::fs::write(root.join(name), name).unwrap();
            rustix::fs::lsetxattr(root.join(name), "user.same", &value, XattrFlags::empty()).unwrap();
        }
    });
    let blocks = names.map(|name| {
        let shown = image.debugfs(&format!("stat /{name}"));
        let (_, block) = shown.split_once("File ACL: ").unwrap_or_else(|| panic!("{shown}"));
        block.lines().next().unwrap_or_default().to_owned()
    });
    assert!(blocks.iter().all(|block| *block == blocks[0] && block != "0"), "{blocks:?}");
    let mut editor = edit(&image);
    let ino = |name| resolve(editor.fs(), name);
    let [a, b, c, d] = names.map(ino);
    editor.set_xattr(a, b"user.own", b"1").unwrap();
    editor.remove_xattr(b, b"user.same").unwrap();
    editor.unlink(Ino::ROOT, b"c").unwrap();
    editor.commit().unwrap();
    image.assert_clean();
    let fs = image.open();
    let same = (b"user.same".to_vec(), value);
    assert_eq!(fs.xattrs(a).unwrap(), [(b"user.own".to_vec(), b"1".to_vec()), same.clone()]);
    assert_eq!(fs.xattrs(b).unwrap(), []);
    assert!(fs.metadata(c).is_err());
    assert_eq!(fs.xattrs(d).unwrap(), [same]);
    let mut editor = edit(&image);
    for name in [&b"a"[..], b"b", b"d"] {
        editor.unlink(Ino::ROOT, name).unwrap();
    }
    editor.commit().unwrap();
    image.assert_clean();
}

#[test]
fn fills_the_inode_first_and_then_the_block() {
    for shape in SHAPES {
        let image = Image::make("16M", shape, None);
        let mut editor = edit(&image);
        let file = editor.create(Ino::ROOT, b"file", &node(NodeKind::File, 0o644)).unwrap();
        let mut expected = BTreeMap::new();
        let error = (0..).find_map(|number: usize| {
            let name = format!("user.{number:x<12}é").into_bytes();
            let value = noise(number % 90, number as u64);
            let refused = editor.set_xattr(file, &name, &value).err();
            if refused.is_none() {
                expected.insert(name, value);
            }
            refused
        });
        assert!(matches!(error, Some(Error::NoSpace(_))), "{error:?}");
        assert!(expected.len() > 8);
        editor.commit().unwrap();
        image.assert_clean();
        image.mounted(|root| assert_eq!(kernel_xattrs(&root.join("file")), expected));
        for name in expected.keys() {
            editor.remove_xattr(file, name).unwrap();
        }
        assert!(matches!(editor.remove_xattr(file, b"user.a"), Err(Error::NoSuchAttribute { .. })));
        assert_eq!(editor.fs().xattrs(file).unwrap(), []);
        assert_eq!(editor.fs().metadata(file).unwrap().allocated, 0);
        editor.commit().unwrap();
        image.assert_clean();
    }
}

#[test]
fn refuses_what_the_kernel_refuses() {
    let image = Image::make("16M", DISTRIBUTION, None);
    let mut editor = edit(&image);
    let file = editor.create(Ino::ROOT, b"file", &node(NodeKind::File, 0o644)).unwrap();
    let link = editor.create(Ino::ROOT, b"link", &node(NodeKind::Symlink(b"file"), 0o777)).unwrap();
    let list = acl(7, &[], 5, &[], None, 5);
    for (ino, name, value) in [
        (file, DEFAULT, &list[..]),
        (file, ACCESS, &list[..8]),
        (link, ACCESS, &list),
        (link, "user.x", b"1"),
        (file, "system.data", b"1"),
        (file, "user.", b"1"),
        (file, "unknown.x", b"1"),
    ] {
        let refused = editor.set_xattr(ino, name.as_bytes(), value);
        assert!(matches!(refused, Err(Error::NotPermitted { .. } | Error::Unsupported { .. })), "{name}: {refused:?}");
    }
    let path = OsStr::new("protected");
    image.mounted(|root| {
        std::fs::write(root.join(path), b"").unwrap();
        support::tool("chattr", &["+i", root.join(path).to_str().unwrap()]);
    });
    let mut editor = edit(&image);
    let protected = resolve(editor.fs(), "protected");
    for refused in [
        editor.unlink(Ino::ROOT, b"protected"),
        editor.rename(Ino::ROOT, b"protected", Ino::ROOT, b"other"),
        editor.link(protected, Ino::ROOT, b"other"),
        editor.set_attributes(protected, &SetAttributes::default()),
        editor.write_at(protected, b"x", 0),
    ] {
        assert!(matches!(refused, Err(Error::NotPermitted { .. })), "{refused:?}");
    }
}
