//! Random lists of operations on images of many shapes, against a model, e2fsck and the kernel.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod model;
mod support;

use std::fmt::Debug;

use model::{Kind, Tree};
use proptest::prelude::*;
use proptest::sample::Index;
use qtk_ext4::{EditOptions, Editor, Error, FileType, Ino, NewNode, NodeKind, SetAttributes, Timestamp};
use support::{DISTRIBUTION, Image, noise};

#[derive(Clone, Debug)]
enum Operation {
    Create {
        dir: Index,
        name: u16,
        kind: u8,
        permissions: u16,
        owner: u32,
        time: Option<u32>,
    },
    /// Many empty files, for directories that outgrow their blocks.
    Fill {
        dir: Index,
        name: u16,
        count: u16,
    },
    /// Removes every second entry that can be removed.
    Thin {
        dir: Index,
    },
    Write {
        node: Index,
        offset: u32,
        len: u16,
    },
    Append {
        node: Index,
        len: u16,
    },
    Truncate {
        node: Index,
        size: u32,
    },
    Link {
        node: Index,
        dir: Index,
        name: u16,
    },
    Rename {
        entry: Index,
        dir: Index,
        name: u16,
    },
    /// Onto an entry that exists.
    Replace {
        entry: Index,
        target: Index,
    },
    /// By the wrong call if `wrong`: `unlink` of a directory, `remove_dir` of anything else.
    Remove {
        entry: Index,
        wrong: bool,
    },
    Attributes {
        node: Index,
        permissions: Option<u16>,
        uid: Option<u32>,
        gid: Option<u32>,
        time: Option<u32>,
    },
    SetXattr {
        node: Index,
        name: u8,
        len: u16,
    },
    RemoveXattr {
        node: Index,
        name: u8,
    },
    Commit,
    /// Commits and opens again, some time later.
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation::{
        Append, Attributes, Commit, Create, Fill, Link, Remove, RemoveXattr, Rename, Reopen, Replace, SetXattr, Thin,
        Truncate, Write,
    };
    let index = any::<Index>;
    let name = || 0..400_u16;
    let owner = prop_oneof![Just(0), Just(1000), Just(65_534), Just(3_000_000)].boxed();
    let time = || prop::option::of(0..i32::MAX.cast_unsigned());
    let permissions = || 0..0o10_000_u16;
    prop_oneof![
        12 => (index(), name(), 0..12_u8, permissions(), owner.clone(), time()).prop_map(
            |(dir, name, kind, permissions, owner, time)| Create { dir, name, kind, permissions, owner, time }),
        2 => (index(), name(), 1..150_u16).prop_map(|(dir, name, count)| Fill { dir, name, count }),
        1 => index().prop_map(|dir| Thin { dir }),
        4 => (index(), 0..300_000_u32, 1..=u16::MAX).prop_map(|(node, offset, len)| Write { node, offset, len }),
        4 => (index(), 1..=u16::MAX).prop_map(|(node, len)| Append { node, len }),
        3 => (index(), 0..400_000_u32).prop_map(|(node, size)| Truncate { node, size }),
        3 => (index(), index(), name()).prop_map(|(node, dir, name)| Link { node, dir, name }),
        5 => (index(), index(), name()).prop_map(|(entry, dir, name)| Rename { entry, dir, name }),
        3 => (index(), index()).prop_map(|(entry, target)| Replace { entry, target }),
        8 => (index(), prop::bool::weighted(0.1)).prop_map(|(entry, wrong)| Remove { entry, wrong }),
        3 => (index(), prop::option::of(permissions()), prop::option::of(owner.clone()), prop::option::of(owner), time()).prop_map(
            |(node, permissions, uid, gid, time)| Attributes { node, permissions, uid, gid, time }),
        5 => (index(), any::<u8>(), 0..1500_u16).prop_map(|(node, name, len)| SetXattr { node, name, len }),
        2 => (index(), any::<u8>()).prop_map(|(node, name)| RemoveXattr { node, name }),
        1 => Just(Commit),
        1 => Just(Reopen),
    ]
}

/// Short and long names; a long one fills a quarter of a small block.
fn entry_name(number: u16) -> Vec<u8> {
    let pad = if number.is_multiple_of(5) { 230 } else { usize::from(number % 17) };
    format!("{number:é<pad$}").into_bytes().into_iter().take(255).collect()
}

const XATTRS: [&str; 7] = [
    "user.a",
    "user.mime_type",
    "user.a-longer-name-than-others",
    "trusted.t",
    "security.selinux",
    "security.apparmor",
    "nonsense.x",
];

/// What kind of refusal an error is.
fn refusal(error: &Error) -> &'static str {
    match error {
        Error::Exists { .. } => "exists",
        Error::NotFound { .. } => "not found",
        Error::NotADirectory(_) => "not a directory",
        Error::IsADirectory(_) => "a directory",
        Error::NotAFile(_) => "not a file",
        Error::NotEmpty(_) => "not empty",
        Error::NotPermitted { .. } => "not permitted",
        Error::NoSuchAttribute { .. } => "no attribute",
        Error::Unsupported { .. } => "unsupported",
        Error::NoSpace(_) => "no space",
        other => panic!("{other}: {other:?}"),
    }
}

/// An image, its editor, and the tree that it should hold.
struct Session<'a> {
    image: &'a Image,
    editor: Editor,
    tree: Tree,
    small_inodes: bool,
}

impl<'a> Session<'a> {
    fn open(image: &'a Image, small_inodes: bool) -> Self {
        let now = Timestamp { seconds: 1_700_000_000, nanos: if small_inodes { 0 } else { 123_456_789 } };
        let editor = Self::editor(image, now);
        let tree = Tree::read(editor.fs(), now);
        Self { image, editor, tree, small_inodes }
    }

    fn editor(image: &Image, now: Timestamp) -> Editor {
        Editor::open(image.device(), EditOptions::new(now)).unwrap()
    }

    fn time(&self, seconds: u32) -> Timestamp {
        Timestamp { seconds: seconds.into(), nanos: if self.small_inodes { 0 } else { seconds % 1_000_000_000 } }
    }

    fn directory(&self, index: Index) -> Ino {
        let all: Vec<_> = self.tree.nodes.iter().filter(|(_, node)| node.is_directory()).map(|(&ino, _)| ino).collect();
        *index.get(&all)
    }

    fn node(&self, index: Index) -> Ino {
        let all: Vec<_> = self.tree.nodes.keys().copied().collect();
        *index.get(&all)
    }

    /// A regular file where there is one.
    fn file(&self, index: Index) -> Ino {
        let is_file = |ino: &Ino| self.tree.nodes[ino].file_type() == FileType::Regular;
        let all: Vec<_> = self.tree.nodes.keys().copied().filter(is_file).collect();
        if all.is_empty() { self.node(index) } else { *index.get(&all) }
    }

    fn entry(&self, index: Index) -> Option<(Ino, Vec<u8>, Ino)> {
        let all: Vec<_> = self.tree.all_entries().collect();
        (!all.is_empty()).then(|| index.get(&all)).map(|&(dir, name, ino)| (dir, name.to_vec(), ino))
    }

    /// Asserts that a result is as expected: a refusal of that kind or success. A full file system may refuse anything.
    fn agree<T: Debug>(result: Result<T, Error>, expected: Option<&str>) -> Option<T> {
        match result {
            Ok(value) => {
                assert_eq!(expected, None, "should have been refused");
                Some(value)
            }
            Err(Error::NoSpace(_)) => None,
            Err(error) => {
                assert_eq!(Some(refusal(&error)), expected, "{error}");
                None
            }
        }
    }

    fn create(&mut self, dir: Ino, name: &[u8], node: &NewNode<'_>) {
        let expected = self.tree.entries(dir).contains_key(name).then_some("exists");
        if let Some(ino) = Self::agree(self.editor.create(dir, name, node), expected) {
            self.tree.create(dir, name, ino, node);
        }
    }

    fn remove(&mut self, dir: Ino, name: &[u8], ino: Ino, wrong: bool) {
        let node = &self.tree.nodes[&ino];
        let is_directory = node.is_directory();
        let expected = match (is_directory, wrong) {
            (true, true) => Some("a directory"),
            (false, true) => Some("not a directory"),
            (true, false) if !node.entries().is_empty() => Some("not empty"),
            _ => None,
        };
        let result =
            if is_directory == wrong { self.editor.unlink(dir, name) } else { self.editor.remove_dir(dir, name) };
        if Self::agree(result, expected).is_some() {
            self.tree.unlink(dir, name);
        }
    }

    fn rename(&mut self, (from, old, ino): (Ino, Vec<u8>, Ino), to: Ino, new: &[u8]) {
        let target = self.tree.entries(to).get(new).copied();
        let moved = &self.tree.nodes[&ino];
        let expected = match target.map(|target| &self.tree.nodes[&target]) {
            _ if target == Some(ino) => None,
            _ if moved.is_directory() && self.tree.is_within(to, ino) => Some("not permitted"),
            Some(target) if moved.is_directory() && !target.is_directory() => Some("not a directory"),
            Some(target) if !moved.is_directory() && target.is_directory() => Some("a directory"),
            Some(target) if target.is_directory() && !target.entries().is_empty() => Some("not empty"),
            _ => None,
        };
        let done = Self::agree(self.editor.rename(from, &old, to, new), expected).is_some();
        if done && target != Some(ino) {
            self.tree.rename(from, &old, to, new);
        }
    }

    /// Changes a file's content, which a full file system may leave half done.
    fn change_content(
        &mut self,
        ino: Ino,
        edit: impl FnOnce(&mut Editor) -> Result<(), Error>,
        change: impl FnOnce(&mut Vec<u8>),
    ) {
        let expected = match self.tree.nodes[&ino].file_type() {
            FileType::Regular => None,
            FileType::Directory => Some("a directory"),
            _ => Some("not a file"),
        };
        let result = edit(&mut self.editor);
        let full = matches!(result, Err(Error::NoSpace(_)));
        if Self::agree(result, expected).is_some() {
            let now = self.tree.now;
            let node = self.tree.node(ino);
            (node.mtime, node.ctime) = (now, now);
            let Kind::File(content) = &mut node.kind else { panic!("{node:?}") };
            change(content);
        } else if full {
            let node = self.tree.node(ino);
            node.kind = Kind::File(support::read_all(self.editor.fs(), ino));
            let found = self.editor.fs().metadata(ino).unwrap();
            (node.mtime, node.ctime) = (found.mtime, found.ctime);
        }
    }

    fn write(&mut self, ino: Ino, offset: usize, len: usize) {
        let bytes = noise(len, offset as u64);
        self.change_content(
            ino,
            |editor| editor.write_at(ino, &bytes, offset as u64),
            |content| {
                content.resize(content.len().max(offset + len), 0);
                content[offset..offset + len].copy_from_slice(&bytes);
            },
        );
    }

    fn set_xattr(&mut self, ino: Ino, name: &str, len: usize) {
        let value = noise(len, len as u64);
        let expected = self.xattr_refusal(ino, name);
        if Self::agree(self.editor.set_xattr(ino, name.as_bytes(), &value), expected).is_some() {
            let now = self.tree.now;
            let node = self.tree.node(ino);
            node.xattrs.insert(name.into(), value);
            node.ctime = now;
        }
    }

    fn xattr_refusal(&self, ino: Ino, name: &str) -> Option<&'static str> {
        let owned = matches!(self.tree.nodes[&ino].file_type(), FileType::Regular | FileType::Directory);
        match name {
            "nonsense.x" => Some("unsupported"),
            _ if name.starts_with("user.") && !owned => Some("not permitted"),
            _ => None,
        }
    }

    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Create { dir, name, kind, permissions, owner, time } => {
                let target = "t".repeat(usize::from(name));
                let kind = match kind {
                    0..=3 => NodeKind::File,
                    4..=6 => NodeKind::Directory,
                    7 => NodeKind::CharDevice(u32::from(name), owner % 1_000_000),
                    8 => NodeKind::BlockDevice(8, u32::from(name)),
                    9 => NodeKind::Fifo,
                    10 => NodeKind::Socket,
                    _ => NodeKind::Symlink(format!("/{target}").leak().as_bytes()),
                };
                let mtime = time.map(|time| self.time(time));
                let node = NewNode { kind, permissions, uid: owner, gid: owner / 2, mtime };
                self.create(self.directory(dir), &entry_name(name), &node);
            }
            Operation::Fill { dir, name, count } => {
                let dir = self.directory(dir);
                for number in name..name + count {
                    let node = NewNode { kind: NodeKind::File, permissions: 0o644, uid: 0, gid: 0, mtime: None };
                    self.create(dir, &entry_name(number), &node);
                }
            }
            Operation::Thin { dir } => {
                let dir = self.directory(dir);
                let victims: Vec<_> =
                    self.tree.entries(dir).iter().step_by(2).map(|(name, &ino)| (name.clone(), ino)).collect();
                for (name, ino) in victims {
                    self.remove(dir, &name, ino, false);
                }
            }
            Operation::Write { node, offset, len } => self.write(self.file(node), offset as usize, len.into()),
            Operation::Append { node, len } => {
                let ino = self.file(node);
                let Kind::File(content) = &self.tree.nodes[&ino].kind else { return };
                self.write(ino, content.len(), len.into());
            }
            Operation::Truncate { node, size } => {
                let ino = self.file(node);
                self.change_content(
                    ino,
                    |editor| editor.truncate(ino, size.into()),
                    |content| content.resize(size as usize, 0),
                );
            }
            Operation::Link { node, dir, name } => {
                let (ino, dir, name) = (self.node(node), self.directory(dir), entry_name(name));
                let expected = if self.tree.nodes[&ino].is_directory() {
                    Some("a directory")
                } else {
                    self.tree.entries(dir).contains_key(&name).then_some("exists")
                };
                if Self::agree(self.editor.link(ino, dir, &name), expected).is_some() {
                    self.tree.link(dir, &name, ino);
                }
            }
            Operation::Rename { entry, dir, name } => {
                let Some(entry) = self.entry(entry) else { return };
                self.rename(entry, self.directory(dir), &entry_name(name));
            }
            Operation::Replace { entry, target } => {
                let (Some(entry), Some((dir, name, _))) = (self.entry(entry), self.entry(target)) else { return };
                self.rename(entry, dir, &name);
            }
            Operation::Remove { entry, wrong } => {
                let Some((dir, name, ino)) = self.entry(entry) else { return };
                self.remove(dir, &name, ino, wrong);
            }
            Operation::Attributes { node, permissions, uid, gid, time } => {
                let ino = self.node(node);
                let mtime = time.map(|time| self.time(time));
                let attributes = SetAttributes { permissions, uid, gid, atime: mtime, mtime };
                let is_link = self.tree.nodes[&ino].file_type() == FileType::Symlink;
                let expected = (is_link && permissions.is_some()).then_some("not permitted");
                if Self::agree(self.editor.set_attributes(ino, &attributes), expected).is_some() {
                    let now = self.tree.now;
                    let node = self.tree.node(ino);
                    node.permissions = permissions.unwrap_or(node.permissions);
                    (node.uid, node.gid) = (uid.unwrap_or(node.uid), gid.unwrap_or(node.gid));
                    (node.atime, node.mtime) = (mtime.unwrap_or(node.atime), mtime.unwrap_or(node.mtime));
                    node.ctime = now;
                }
            }
            Operation::SetXattr { node, name, len } => {
                self.set_xattr(self.node(node), XATTRS[usize::from(name) % XATTRS.len()], len.into());
            }
            Operation::RemoveXattr { node, name } => {
                let (ino, name) = (self.node(node), XATTRS[usize::from(name) % XATTRS.len()]);
                let present = self.tree.nodes[&ino].xattrs.contains_key(name.as_bytes());
                let expected = self.xattr_refusal(ino, name).or((!present).then_some("no attribute"));
                if Self::agree(self.editor.remove_xattr(ino, name.as_bytes()), expected).is_some() {
                    let now = self.tree.now;
                    let node = self.tree.node(ino);
                    node.xattrs.remove(name.as_bytes());
                    node.ctime = now;
                }
            }
            Operation::Commit => self.editor.commit().unwrap(),
            Operation::Reopen => {
                self.editor.commit().unwrap();
                self.tree.now.seconds += 1000;
                self.editor = Self::editor(self.image, self.tree.now);
            }
        }
    }

    /// Commits, and compares what our reader, e2fsck and the kernel find.
    fn finish(mut self) {
        self.tree.assert_same(self.editor.fs());
        self.editor.commit().unwrap();
        drop(self.editor);
        self.image.assert_clean();
        let fs = self.image.open();
        self.tree.assert_same(&fs);
        self.tree.assert_seen_by_others(self.image, fs.block_size());
    }
}

/// Runs operation lists on images of one shape.
fn check(size: &str, shape: &[&str], cases: u32) {
    check_on(&Image::make(size, shape, None), shape.contains(&"128"), cases);
}

fn check_on(image: &Image, small_inodes: bool, cases: u32) {
    let config =
        ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::default() };
    proptest!(config, |(operations in prop::collection::vec(operation(), 50..400))| {
        let image = image.copy();
        let mut session = Session::open(&image, small_inodes);
        for operation in operations {
            session.apply(operation);
        }
        session.finish();
    });
}

const CASES: u32 = 4;

#[test]
fn on_the_shape_of_distributions() {
    check("64M", DISTRIBUTION, CASES);
}

#[test]
fn with_small_blocks() {
    check("32M", &["-b", "1024", "-O", "orphan_file,metadata_csum_seed"], CASES);
    check("32M", &["-b", "1024", "-I", "128"], CASES);
    check("32M", &["-b", "1024", "-O", "^metadata_csum,^64bit"], CASES);
}

#[test]
fn with_large_blocks_and_inodes() {
    check("64M", &["-b", "65536"], CASES);
    check("64M", &["-I", "1024", "-O", "^metadata_csum,uninit_bg"], CASES);
    check("64M", &["-b", "2048", "-I", "512"], CASES);
}

#[test]
fn without_an_index() {
    check("32M", &["-b", "1024", "-O", "^dir_index"], CASES);
    check("32M", &["-O", "^dir_index,^metadata_csum,^flex_bg"], CASES);
}

#[test]
fn on_older_file_systems() {
    check("32M", &["-t", "ext2", "-b", "1024", "-I", "128"], CASES);
    check("32M", &["-t", "ext3"], CASES);
    check("32M", &["-t", "ext2", "-O", "none"], CASES);
}

/// Fills the file system with files of one block and removes every second one, so that no two free blocks lie together.
fn fragmented(shape: &[&str], size: &str, keep_free: u64) -> Image {
    let image = Image::make(size, shape, None);
    let now = Timestamp { seconds: 1_600_000_000, nanos: 0 };
    let mut editor = Editor::open(image.device(), EditOptions::new(now)).unwrap();
    let folder = NewNode { kind: NodeKind::Directory, permissions: 0o755, uid: 0, gid: 0, mtime: None };
    let file = NewNode { kind: NodeKind::File, permissions: 0o644, ..folder };
    let dir = editor.create(Ino::ROOT, b"filler", &folder).unwrap();
    let name = |number: u32| format!("{number:08}").into_bytes();
    let mut count = 0;
    while editor.fs().free_blocks() > keep_free && editor.fs().free_inodes() > 100 {
        let ino = editor.create(dir, &name(count), &file).unwrap();
        let len = usize::try_from(editor.fs().block_size()).unwrap();
        editor.write_at(ino, &noise(len, count.into()), 0).unwrap();
        count += 1;
    }
    for number in (0..count).step_by(2) {
        editor.unlink(dir, &name(number)).unwrap();
    }
    editor.commit().unwrap();
    image.assert_clean();
    image
}

#[test]
fn on_fragments() {
    check_on(&fragmented(&["-b", "1024", "-N", "4096"], "8M", 1000), false, CASES);
    check_on(&fragmented(&["-b", "4096", "-N", "2048"], "8M", 100), false, CASES);
}

#[test]
fn on_full_file_systems() {
    check("2M", &["-b", "1024", "-O", "^has_journal"], CASES);
    check("3M", &["-b", "4096", "-N", "64", "-O", "^has_journal"], CASES);
    check("2M", &["-b", "1024", "-N", "32", "-I", "1024", "-O", "^has_journal,^metadata_csum"], CASES);
}
