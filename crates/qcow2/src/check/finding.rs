use crate::error::Place;
use crate::types::HostOffset;

/// Something that a check found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// Clusters that nothing uses but that count as used: space is lost, data is not.
    #[error("the cluster at {offset} has refcount {refcount}, but {references} references")]
    Leak {
        /// The cluster.
        offset: HostOffset,
        /// Its refcount.
        refcount: u64,
        /// How often it is used.
        references: u64,
    },
    /// A cluster that could be taken for something else although it is in use.
    #[error("the cluster at {offset} has only refcount {refcount} for {references} references")]
    RefcountTooLow {
        /// The cluster.
        offset: HostOffset,
        /// Its refcount.
        refcount: u64,
        /// How often it is used.
        references: u64,
    },
    /// A cluster is used more often than its refcount can say.
    #[error("the cluster at {offset} has more references than a refcount of this image can hold")]
    RefcountOverflow {
        /// The cluster.
        offset: HostOffset,
    },
    /// The flag that says whether a refcount is exactly one is wrong.
    #[error("the copied flag of {place} is wrong for refcount {refcount}")]
    CopiedFlag {
        /// The entry that holds the flag.
        place: Place,
        /// The refcount of the cluster that it refers to.
        refcount: u64,
    },
    /// The copied flag of a compressed cluster, which must not have it.
    #[error("the copied flag of {0} is set, although it is compressed")]
    CompressedCopied(Place),
    /// Bits that must be zero are not.
    #[error("reserved bits {bits:#x} of {place} are set")]
    ReservedBits {
        /// The entry.
        place: Place,
        /// The bits.
        bits: u64,
    },
    /// An offset that is not a multiple of the cluster size.
    #[error("{place} points to {offset}, which is not the start of a cluster")]
    Misaligned {
        /// The structure that holds the offset.
        place: Place,
        /// The offset.
        offset: HostOffset,
    },
    /// Something lies past the end of the file.
    #[error("{place} points to {len} bytes at {offset}, past the end of the file")]
    PastEnd {
        /// The structure that holds the offset.
        place: Place,
        /// Where it should begin.
        offset: HostOffset,
        /// Its length in bytes.
        len: u64,
    },
    /// A refcount block that something else uses too.
    #[error("the cluster of {place} has {references} references")]
    SharedBlock {
        /// The block.
        place: Place,
        /// How often its cluster is used.
        references: u64,
    },
    /// A structure that cannot be read at all.
    #[error("{0} is unreadable")]
    Unreadable(Place),
}
