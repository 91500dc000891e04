use qtk_ext4::{Editor, Ino, NewNode, SetAttributes};

use super::{FileId, Node, Tree, Volume};
use crate::{Error, PathProblem, Place};

/// Changes. Each is complete in memory when the call returns, and on the device after [`Tree::commit`].
impl Tree {
    /// Makes a file, directory, link or device in a directory; `Exists` if the name is taken.
    pub fn create(&mut self, parent: Node, name: &[u8], node: &NewNode<'_>) -> Result<Node, Error> {
        let ino = self.edit_entry(parent, name, |editor, parent| editor.create(parent, name, node))?;
        Ok(Node { mount: parent.mount, file: FileId::Ext4(ino) })
    }

    /// Writes content, extending the file where it ends too early.
    pub fn write_at(&mut self, file: Node, data: &[u8], offset: u64) -> Result<(), Error> {
        self.edit(file, |editor, ino| editor.write_at(ino, data, offset))
    }

    /// Announces that a file will have this size, so that it gets its blocks in one piece.
    pub fn reserve(&mut self, file: Node, size: u64) -> Result<(), Error> {
        self.edit(file, |editor, ino| editor.reserve(ino, size))
    }

    /// Cuts a file off, or extends it with a hole.
    pub fn truncate(&mut self, file: Node, size: u64) -> Result<(), Error> {
        self.edit(file, |editor, ino| editor.truncate(ino, size))
    }

    /// Gives a file another name. It must lie on the same file system.
    pub fn link(&mut self, file: Node, parent: Node, name: &[u8]) -> Result<(), Error> {
        let ino = self.on_same(file, parent)?;
        self.edit_entry(parent, name, |editor, parent| editor.link(ino, parent, name))
    }

    /// Removes a name, and the file with its last one.
    pub fn unlink(&mut self, parent: Node, name: &[u8]) -> Result<(), Error> {
        self.edit_entry(parent, name, |editor, parent| editor.unlink(parent, name))
    }

    /// Removes an empty directory.
    pub fn remove_dir(&mut self, parent: Node, name: &[u8]) -> Result<(), Error> {
        self.check_not_mount_point(parent, name)?;
        self.edit_entry(parent, name, |editor, parent| editor.remove_dir(parent, name))
    }

    /// Moves and renames within one file system, replacing what has the new name as rename(2) does.
    pub fn rename(&mut self, from_parent: Node, from: &[u8], to_parent: Node, to: &[u8]) -> Result<(), Error> {
        let from_dir = self.on_same(from_parent, to_parent)?;
        self.check_available(from_parent)?;
        check_name(from)?;
        self.check_not_mount_point(from_parent, from)?;
        self.check_not_mount_point(to_parent, to)?;
        self.edit_entry(to_parent, to, |editor, to_dir| editor.rename(from_dir, from, to_dir, to))
    }

    /// Sets permissions, owner and times.
    pub fn set_attributes(&mut self, node: Node, attributes: &SetAttributes) -> Result<(), Error> {
        self.edit(node, |editor, ino| editor.set_attributes(ino, attributes))
    }

    /// Sets an extended attribute by its full name.
    pub fn set_xattr(&mut self, node: Node, name: &[u8], value: &[u8]) -> Result<(), Error> {
        self.edit(node, |editor, ino| editor.set_xattr(ino, name, value))
    }

    /// Removes an extended attribute by its full name.
    pub fn remove_xattr(&mut self, node: Node, name: &[u8]) -> Result<(), Error> {
        self.edit(node, |editor, ino| editor.remove_xattr(ino, name))
    }

    /// Brings every changed file system to the device, each ending in a flush. Further edits may follow.
    pub fn commit(&mut self) -> Result<(), Error> {
        for mount in &mut self.mounts {
            let place = mount.place;
            if let Volume::Ext4Edited(editor) = &mut mount.volume {
                editor.commit().map_err(|source| Error::ext4(place, source))?;
            }
        }
        Ok(())
    }

    fn edit_entry<T>(
        &mut self,
        parent: Node,
        name: &[u8],
        change: impl FnOnce(&mut Editor, Ino) -> Result<T, qtk_ext4::Error>,
    ) -> Result<T, Error> {
        check_name(name)?;
        self.check_available(parent)?;
        self.edit(parent, change)
    }

    fn edit<T>(
        &mut self,
        node: Node,
        change: impl FnOnce(&mut Editor, Ino) -> Result<T, qtk_ext4::Error>,
    ) -> Result<T, Error> {
        let (editor, ino, place) = self.editor(node)?;
        change(editor, ino).map_err(|source| Error::ext4(place, source))
    }

    fn editor(&mut self, node: Node) -> Result<(&mut Editor, Ino, Place), Error> {
        let options = self.options;
        let mount = self.mounts.get_mut(node.mount).ok_or_else(|| Error::path("", PathProblem::NotFound))?;
        let FileId::Ext4(ino) = node.file else {
            return Err(Error::Path { path: mount.path.clone(), problem: PathProblem::ReadOnlyFat });
        };
        let read_only = || Error::Path { path: mount.path.clone(), problem: PathProblem::ReadOnly };
        let options = options.ok_or_else(read_only)?;
        let editor = mount.volume.edit(mount.place, options)?;
        let editor = editor.ok_or(Error::Path { path: mount.path.clone(), problem: PathProblem::ReadOnly })?;
        Ok((editor, ino, mount.place))
    }

    /// The inode of `node`, if it lies on the same file system as `other`.
    fn on_same(&self, node: Node, other: Node) -> Result<Ino, Error> {
        let path = || self.mounts.get(other.mount).map_or_else(|| "/".into(), |mount| mount.path.clone());
        match node.file {
            FileId::Ext4(ino) if node.shares_file_system_with(other) => Ok(ino),
            FileId::Ext4(_) => Err(Error::Path { path: path(), problem: PathProblem::AcrossMounts }),
            FileId::Fat(_) => Err(Error::Path { path: path(), problem: PathProblem::ReadOnlyFat }),
        }
    }

    fn check_not_mount_point(&self, parent: Node, name: &[u8]) -> Result<(), Error> {
        let Some(file) = self.at(parent)?.lookup(name)? else { return Ok(()) };
        let node = Node { mount: parent.mount, file };
        if self.covered.contains_key(&node) || self.blocked.contains_key(&node) {
            return Err(Error::path(name, PathProblem::MountPoint));
        }
        Ok(())
    }
}

fn check_name(name: &[u8]) -> Result<(), Error> {
    match name {
        b"" | b"." | b".." => Err(Error::path(name, PathProblem::BadName)),
        _ if name.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(Error::path(name, PathProblem::BadName)),
        _ => Ok(()),
    }
}
