//! What lies on a guest's disk: partition tables, FAT and ext4 volumes, `/etc/fstab`, and one [`Tree`] over all of it.
//!
//! The crate sees a disk as a [`BlockRead`](qtk_block::BlockRead) or [`BlockWrite`](qtk_block::BlockWrite) and knows nothing
//! of image formats. Every byte it reads may be hostile: numbers are checked before use, chains are followed a bounded number
//! of times, and memory grows with what is there, not with what a field claims.

#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

mod check;
mod error;
pub mod fat;
pub mod fstab;
mod layout;
mod partition;
mod path;
mod probe;
mod tree;
mod unused;

pub use check::{Checked, check_file_systems};
pub use error::{Error, PathProblem, Place};
pub use layout::{Layout, Slot};
pub use partition::{DiskId, Partition, PartitionTable, PartitionType, TableKind};
pub use path::{DisplayPath, GuestPath};
pub use probe::{Content, Probe};
pub use qtk_ext4::{CheckOptions, CheckReport, EditOptions, FileType, NewNode, NodeKind, SetAttributes, Timestamp};
pub use tree::{DirEntry, Follow, Location, Metadata, MountInfo, Node, Tree, Warning, Xattr};
pub use unused::{Needed, Unused, UnusedOfVolume};
