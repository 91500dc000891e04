//! ext2, ext3 and ext4 file systems, read and edited in place on any block device, without a kernel.

mod block_map;
mod cache;
mod checksum;
mod dir;
mod error;
mod extent;
mod features;
mod file;
mod fs;
mod group;
mod ids;
mod inode;
mod map;
mod metadata;
mod superblock;

pub use error::{Error, Place, Result};
pub use fs::Ext4;
pub use ids::{BlockNr, GroupNr, Ino};
pub use metadata::{FileType, Metadata, Timestamp};
