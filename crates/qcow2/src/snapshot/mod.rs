//! Internal snapshots: earlier states of the disk, each with an L1 table of its own, that share clusters with the active one.

mod edit;
mod table;

use crate::types::HostOffset;

pub use edit::NewSnapshot;
pub(crate) use table::{SnapshotEntry, SnapshotTable, encode, entry_starts, read_table};

/// An internal snapshot, as its entry in the snapshot table describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its identifier, a number by custom.
    pub id: String,
    /// The name its maker gave it.
    pub name: String,
    /// Where its L1 table begins.
    pub l1_table: HostOffset,
    /// Entries of its L1 table.
    pub l1_size: u32,
    /// When it was taken, in seconds since 1970 and nanoseconds.
    pub taken: (u32, u32),
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Size of the guest's saved memory in bytes.
    pub vm_state_size: u64,
    /// Size of the guest's disk then, if it was recorded.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, if they were counted.
    pub icount: Option<u64>,
}

impl Snapshot {
    /// Index of the snapshot that `wanted` is the identifier of, or else the name of: how QEMU finds the one to apply.
    #[must_use]
    pub fn find(snapshots: &[Self], wanted: &str) -> Option<usize> {
        let by_id = snapshots.iter().position(|snapshot| snapshot.id == wanted);
        by_id.or_else(|| Self::find_by_name(snapshots, wanted))
    }

    /// Index of the first snapshot called `name`: how `qemu-img` finds the one to delete.
    #[must_use]
    pub fn find_by_name(snapshots: &[Self], name: &str) -> Option<usize> {
        snapshots.iter().position(|snapshot| snapshot.name == name)
    }
}

/// Why what was asked of a snapshot cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotRefusal {
    /// The image has no such snapshot.
    #[error("there is no such snapshot")]
    NotFound,
    /// The image has as many snapshots as QEMU reads, or their names fill the table.
    #[error("the image has too many snapshots")]
    TooMany,
    /// Snapshots share clusters, which those of a data file cannot be.
    #[error("an image with an external data file cannot have snapshots")]
    DataFile,
    /// A name is stored with a length of 16 bits.
    #[error("its name is longer than 65535 bytes")]
    NameTooLong,
    /// Bitmaps could not tell what changes.
    #[error("an image that has bitmaps cannot go back to a snapshot; remove its bitmaps first")]
    Bitmaps,
    /// It was taken in the same transaction.
    #[error("it has not been committed yet")]
    Uncommitted,
}
