//! From the manifest to the file system.

use std::collections::HashMap;

use qtk_block::BlockWrite;
use qtk_ext4::{Editor, Error, FileType, Ino, NewNode, NodeKind, SetAttributes, Timestamp};

use super::content::{Job, Queue, copy_beside, data_ranges};
use super::manifest::{Attributes, Id, Kind, Manifest};
use super::{PopulateError, Result};

/// How a manifest is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// Times past this one become this one, as `SOURCE_DATE_EPOCH` asks for.
    pub latest: Option<Timestamp>,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Populated {
    /// Files, links, devices and directories.
    pub files: u64,
    /// Bytes of content, holes included.
    pub bytes: u64,
}

impl Manifest {
    /// Makes everything in an empty file system. `device` is the one that `editor` works on: content goes to it from threads
    /// of its own. Nothing is committed.
    pub fn write(&self, editor: &mut Editor, device: &dyn BlockWrite, options: &WriteOptions) -> Result<Populated> {
        copy_beside(device, |queue| {
            let mut writer = Writer {
                manifest: self,
                editor,
                queue,
                options,
                made: HashMap::new(),
                directories: Vec::new(),
                done: Populated::default(),
            };
            writer.everything()?;
            Ok(writer.done)
        })
    }
}

struct Writer<'a, 'q> {
    manifest: &'a Manifest,
    editor: &'q mut Editor,
    queue: &'q mut Queue<'a>,
    options: &'q WriteOptions,
    /// What became of files with several names.
    made: HashMap<Id, Ino>,
    /// Directories get their attributes last: what is made in them changes their times, and would inherit from them.
    directories: Vec<Directory>,
    done: Populated,
}

struct Directory {
    id: Id,
    ino: Ino,
    path: Vec<u8>,
}

impl<'a> Writer<'a, '_> {
    fn everything(&mut self) -> Result<()> {
        let mut left = vec![Directory { id: Manifest::ROOT, ino: Ino::ROOT, path: Vec::new() }];
        while let Some(directory) = left.pop() {
            let first = left.len();
            for (name, &id) in self.manifest.children(directory.id).into_iter().flatten() {
                let path = [directory.path.as_slice(), b"/", name].concat();
                if let Some(made) = self.name(&directory, name, id, path)? {
                    left.push(made);
                }
            }
            left[first..].reverse();
            self.directories.push(directory);
        }
        for directory in std::mem::take(&mut self.directories) {
            if directory.id != Manifest::ROOT || self.manifest.has_root {
                self.finish_directory(&directory).map_err(failed(&directory.path))?;
            }
        }
        Ok(())
    }

    /// Makes what has the name in a directory; gives it back if it is a directory itself.
    fn name(&mut self, parent: &Directory, name: &[u8], id: Id, path: Vec<u8>) -> Result<Option<Directory>> {
        if let Some(&ino) = self.made.get(&id) {
            self.editor.link(ino, parent.ino, name).map_err(failed(&path))?;
            return Ok(None);
        }
        let node = self.manifest.node(id);
        self.done.files += 1;
        let ino = match self.existing_directory(parent.ino, name, &node.kind).map_err(failed(&path))? {
            Some(ino) => ino,
            None => self.create(parent.ino, name, &node.kind, &node.attributes).map_err(failed(&path))?,
        };
        if matches!(node.kind, Kind::Directory(_)) {
            return Ok(Some(Directory { id, ino, path }));
        }
        self.made.insert(id, ino);
        self.set_xattrs(ino, &node.attributes).map_err(failed(&path))?;
        self.content(ino, &node.kind, &path)?;
        Ok(None)
    }

    /// `lost+found` is there already.
    fn existing_directory(&self, parent: Ino, name: &[u8], kind: &Kind) -> Result<Option<Ino>, Error> {
        let may_exist = parent == Ino::ROOT && matches!(kind, Kind::Directory(_));
        let Some(ino) = (if may_exist { self.editor.fs().lookup(parent, name)? } else { None }) else {
            return Ok(None);
        };
        let is_directory = self.editor.fs().metadata(ino)?.file_type == FileType::Directory;
        Ok(Some(ino).filter(|_| is_directory))
    }

    fn create(&mut self, parent: Ino, name: &[u8], kind: &Kind, attributes: &Attributes) -> Result<Ino, Error> {
        let node = NewNode {
            kind: match kind {
                Kind::Directory(_) => NodeKind::Directory,
                Kind::File { .. } => NodeKind::File,
                Kind::Symlink(target) => NodeKind::Symlink(target),
                Kind::CharDevice(major, minor) => NodeKind::CharDevice(*major, *minor),
                Kind::BlockDevice(major, minor) => NodeKind::BlockDevice(*major, *minor),
                Kind::Fifo => NodeKind::Fifo,
                Kind::Socket => NodeKind::Socket,
            },
            permissions: attributes.permissions,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: self.time(attributes),
        };
        self.editor.create(parent, name, &node)
    }

    fn content(&mut self, ino: Ino, kind: &'a Kind, path: &[u8]) -> Result<()> {
        let Kind::File { size, content, sparse } = kind else { return Ok(()) };
        if *size == 0 {
            return Ok(());
        }
        self.done.bytes += size;
        let data = data_ranges(content, *size, *sparse)?;
        let runs = self.editor.place_content(ino, *size, &data).map_err(failed(path))?;
        if runs.is_empty() || self.queue.push(Job { content, size: *size, runs }) {
            return Ok(());
        }
        // The thread that stopped has the reason.
        Err(PopulateError::Name { name: path.to_vec(), problem: "its content could not be copied" })
    }

    fn finish_directory(&mut self, directory: &Directory) -> Result<(), Error> {
        let attributes = &self.manifest.node(directory.id).attributes;
        self.set_xattrs(directory.ino, attributes)?;
        let time = self.time(attributes);
        self.editor.set_attributes(
            directory.ino,
            &SetAttributes {
                permissions: Some(attributes.permissions),
                uid: Some(attributes.uid),
                gid: Some(attributes.gid),
                atime: time,
                mtime: time,
            },
        )
    }

    fn set_xattrs(&mut self, ino: Ino, attributes: &Attributes) -> Result<(), Error> {
        attributes.xattrs.iter().try_for_each(|(name, value)| self.editor.set_xattr(ino, name, value))
    }

    fn time(&self, attributes: &Attributes) -> Option<Timestamp> {
        let time = attributes.mtime?;
        Some(self.options.latest.map_or(time, |latest| time.min(latest)))
    }
}

fn failed(path: &[u8]) -> impl FnOnce(Error) -> PopulateError {
    let name = path.to_vec();
    move |source| PopulateError::FileSystem { name, source }
}
