//! ext2, ext3 and ext4 file systems, read and edited in place on any block device, without a kernel.

mod acl;
mod attributes;
mod bitmap;
mod block_map;
mod cache;
mod check;
mod checksum;
mod dir;
mod editor;
mod error;
mod extent;
mod extent_edit;
mod features;
mod file;
mod free;
mod fs;
mod group;
mod group_bitmap;
mod ids;
mod inode;
mod journal;
mod lookup;
mod map;
mod metadata;
pub mod mkfs;
mod orphan;
mod superblock;
mod xattr;

pub use check::{CheckOptions, CheckReport, Finding, FindingKind, check};
pub use editor::{EditOptions, Editor, NewNode, NodeKind, PlacedRun, SetAttributes};
pub use error::{Error, Place, Result};
pub use fs::Ext4;
pub use ids::{BlockNr, GroupNr, Ino};
pub use lookup::DirEntry;
pub use metadata::{FileType, Metadata, Timestamp};
