//! ext2, ext3 and ext4 file systems, read and edited in place on any block device, without a kernel.

mod checksum;
mod dir;
mod error;
mod features;
mod group;
mod ids;
mod inode;
mod metadata;
mod superblock;

pub use error::{Error, Place, Result};
pub use ids::{BlockNr, GroupNr, Ino};
pub use metadata::{FileType, Metadata, Timestamp};
