//! The qcow2 image format: one file of a chain, read in place and written in transactions.
//!
//! [`Layer`] is one image file as it was last committed. [`create()`] makes an empty one, a [`Transaction`] changes one
//! so that a crash leaves the old state or the new one, and [`check()`] looks for damage. Backing files are only named here;
//! the crate `qtk-image` opens chains.

mod allocator;
mod amend;
mod bitmap;
mod cache;
mod check;
pub mod codec;
mod create;
mod entry;
mod error;
pub mod extension;
pub mod features;
mod fields;
mod file;
mod header;
mod layer;
mod mapping;
mod refcount;
mod repair;
mod snapshot;
mod transaction;
mod types;
mod writer;

pub use amend::{Amend, AmendRefusal};
pub use bitmap::{Bitmap, BitmapContents, BitmapRefusal, NewBitmap};
pub use check::{CheckFailure, CheckReport, Finding, check, check_each};
pub use create::{Backing, CreateOptions, create, create_with};
pub use error::{Action, Corruption, Error, OptionProblem, Place, WriteObstacle};
pub use extension::Extension;
pub use features::Features;
pub use header::{Encryption, Header, MAGIC, MAX_BACKING_NAME, MAX_L1_SIZE, MAX_REFCOUNT_TABLE_SIZE, MAX_SNAPSHOTS};
pub use layer::Layer;
pub use mapping::{Mapping, MappingKind};
pub use qtk_block::Preallocation;
pub use repair::{Repair, RepairReport, repair, repair_dirty};
pub use snapshot::{NewSnapshot, Snapshot, SnapshotRefusal};
pub use transaction::Transaction;
pub use types::{ClusterBits, CompressionType, GuestCluster, GuestOffset, HostCluster, HostOffset, Version};
pub use writer::{Contents, Digest, ImageWriter, PackedCluster, Placed, Tally};
