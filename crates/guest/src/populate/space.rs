//! How large a file system must be for a manifest.

use std::collections::HashSet;

use super::manifest::{Attributes, Content, Kind, Manifest};

/// What a manifest needs of a file system, the file system's own metadata aside. Blocks are an upper bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Inodes, the root's left out.
    pub inodes: u64,
    /// Blocks.
    pub blocks: u64,
}

/// Bytes of an inode that hold no attributes: its fields, and a magic number.
const INODE_FIELDS: usize = 128 + 32 + 4;
const ENTRY_FIELDS: u64 = 8;
/// The longest link that needs no block.
const SHORT_LINK: usize = 59;

impl Manifest {
    /// What everything needs where blocks have `block_size` bytes and inodes `inode_size`.
    #[must_use]
    pub fn needs(&self, block_size: u32, inode_size: u16) -> Needs {
        let block_size = u64::from(block_size);
        let mut needs = Needs::default();
        let mut seen = HashSet::new();
        let mut left = vec![Self::ROOT];
        while let Some(id) = left.pop() {
            if !seen.insert(id) {
                continue;
            }
            let node = self.node(id);
            needs.inodes += u64::from(id != Self::ROOT);
            needs.blocks += attribute_blocks(&node.attributes, inode_size.into());
            needs.blocks += match &node.kind {
                Kind::Directory(children) => {
                    left.extend(children.values());
                    directory_blocks(children.keys(), block_size)
                }
                Kind::File { size, content, .. } => file_blocks(*size, content, block_size),
                Kind::Symlink(target) => u64::from(target.len() > SHORT_LINK),
                Kind::CharDevice(..) | Kind::BlockDevice(..) | Kind::Fifo | Kind::Socket => 0,
            };
        }
        needs
    }
}

/// Attributes that do not fit in the inode have a block.
fn attribute_blocks(attributes: &Attributes, inode_size: usize) -> u64 {
    let each = |(name, value): &(Vec<u8>, Vec<u8>)| 16 + name.len() + value.len() + 8;
    let len: usize = attributes.xattrs.iter().map(each).sum();
    u64::from(len > inode_size.saturating_sub(INODE_FIELDS))
}

/// Blocks of an indexed directory are at least half full.
fn directory_blocks<'a>(names: impl Iterator<Item = &'a Vec<u8>>, block_size: u64) -> u64 {
    let bytes: u64 = names.map(|name| (ENTRY_FIELDS + name.len() as u64).next_multiple_of(4)).sum();
    let usable = block_size - 64;
    if bytes <= usable { 1 } else { 2 + (2 * bytes).div_ceil(usable) }
}

/// Data, and what maps it: by pointers, which take the most.
fn file_blocks(size: u64, content: &Content, block_size: u64) -> u64 {
    let data = match content {
        Content::File(_) => size.div_ceil(block_size),
        Content::Pieces(_, pieces) => {
            pieces.iter().map(|(range, _)| range.end.div_ceil(block_size) - range.start / block_size).sum()
        }
    };
    data + if data > 12 { 3 + data.div_ceil(block_size / 4) } else { 0 }
}
