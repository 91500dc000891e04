use qtk_ext4::FileType;

use super::{Node, Tree};
use crate::{Error, GuestPath, PathProblem};

/// Linux's limit.
const MAX_LINKS: usize = 40;

/// Whether a symbolic link at the end of a path is followed. Links before the end always are, as is one with a slash behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// The file that the link leads to is meant.
    All,
    /// The link itself is meant.
    NotLast,
}

/// Where a path leads: a file, or the place where one could be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The path without links, `.` and `..`.
    pub path: GuestPath,
    /// The directory it is in.
    pub parent: Node,
    /// Its name there. Empty for the root of the tree, which is its own parent.
    pub name: Vec<u8>,
    /// The file, if there is one.
    pub node: Option<Node>,
}

impl Location {
    /// The file; `NotFound` if there is none.
    pub fn existing(&self) -> Result<Node, Error> {
        self.node.ok_or_else(|| Error::Path { path: self.path.clone(), problem: PathProblem::NotFound })
    }
}

impl Tree {
    /// Follows a path inside the guest. Absolute links start again at the tree's root, `..` stops there, relative paths start
    /// there too.
    pub fn resolve(&self, path: impl AsRef<[u8]>, follow: Follow) -> Result<Node, Error> {
        self.locate(path, follow)?.existing()
    }

    /// Follows a path whose last name need not exist.
    pub fn locate(&self, path: impl AsRef<[u8]>, follow: Follow) -> Result<Location, Error> {
        let mut walk = Walk { tree: self, at: Vec::new(), ahead: Vec::new(), links: 0 };
        walk.push(path.as_ref());
        walk.run(follow)
    }
}

struct Walk<'a> {
    tree: &'a Tree,
    /// Where the walk is: the names from the root down, so that `..` needs no entry on disk.
    at: Vec<(Vec<u8>, Node)>,
    /// Names yet to be walked, the next one last.
    ahead: Vec<Vec<u8>>,
    links: usize,
}

impl Walk<'_> {
    fn run(mut self, follow: Follow) -> Result<Location, Error> {
        while let Some(name) = self.ahead.pop() {
            match name.as_slice() {
                b"." => {}
                b".." => drop(self.at.pop()),
                _ => {
                    let dir = self.dir();
                    let Some(node) = self.tree.lookup(dir, &name)? else {
                        if self.ahead.iter().all(|name| name == b".") {
                            return Ok(Location { path: self.path(Some(&name)), parent: dir, name, node: None });
                        }
                        return Err(self.problem(&name, PathProblem::NotFound));
                    };
                    self.step(name, node, follow)?;
                }
            }
        }
        let path = self.path(None);
        let (name, node) = self.at.pop().unwrap_or_else(|| (Vec::new(), self.tree.root()));
        Ok(Location { path, parent: self.dir(), name, node: Some(node) })
    }

    fn step(&mut self, name: Vec<u8>, node: Node, follow: Follow) -> Result<(), Error> {
        let is_last = self.ahead.is_empty();
        match self.tree.metadata(node)?.file_type {
            FileType::Symlink if !is_last || follow == Follow::All => {
                self.links = self.links.saturating_add(1);
                if self.links > MAX_LINKS {
                    return Err(self.problem(&name, PathProblem::TooManyLinks));
                }
                let target = self.tree.read_link(node)?;
                if target.is_empty() {
                    return Err(self.problem(&name, PathProblem::NotFound));
                }
                if target.starts_with(b"/") {
                    self.at.clear();
                }
                self.push(&target);
            }
            FileType::Directory => self.at.push((name, node)),
            _ if is_last => self.at.push((name, node)),
            _ => return Err(self.problem(&name, PathProblem::NotADirectory)),
        }
        Ok(())
    }

    fn push(&mut self, path: &[u8]) {
        if path.ends_with(b"/") {
            // A slash at the end asks for a directory.
            self.ahead.push(b".".to_vec());
        }
        let names = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()).rev();
        self.ahead.extend(names.map(<[u8]>::to_vec));
    }

    fn dir(&self) -> Node {
        self.at.last().map_or_else(|| self.tree.root(), |&(_, node)| node)
    }

    fn path(&self, last: Option<&[u8]>) -> GuestPath {
        let names = self.at.iter().map(|(name, _)| name.as_slice()).chain(last);
        names.fold(GuestPath::from("/"), |path, name| path.join(name))
    }

    fn problem(&self, name: &[u8], problem: PathProblem) -> Error {
        Error::Path { path: self.path(Some(name)), problem }
    }
}
