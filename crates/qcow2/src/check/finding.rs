use std::fmt;

use crate::types::{HostCluster, HostOffset};

/// Something that a check found, or that a repair did about it. Displayed in the words of `qemu-img check`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// The header's snapshot table is not at the start of a cluster, or does not fit before the end of all offsets.
    SnapshotTableOffset,
    /// There are more snapshots than QEMU opens.
    TooManySnapshots {
        /// Those over the limit.
        overhanging: u32,
        /// Whether they were dropped.
        dropped: bool,
    },
    /// An entry of the snapshot table has more extra data than QEMU takes.
    SnapshotExtraData {
        /// The entry.
        index: u32,
        /// Bytes of extra data.
        len: u32,
        /// Whether what is over the limit was dropped.
        dropped: bool,
    },
    /// The snapshot table is longer than QEMU takes.
    SnapshotTableTooLong {
        /// Snapshots from there on.
        overhanging: u32,
        /// Whether they were dropped.
        dropped: bool,
    },
    /// An entry of the snapshot table lacks the fields that version 3 demands.
    SnapshotIncomplete {
        /// The entry.
        index: u32,
        /// Whether they were added.
        repaired: bool,
    },
    /// The L1 table of a snapshot does not begin where a cluster does.
    SnapshotL1Misaligned {
        /// The snapshot's identifier.
        id: String,
        /// Its name.
        name: String,
        /// Where the table is said to begin.
        offset: HostOffset,
    },
    /// The L1 table of a snapshot is larger than QEMU takes.
    SnapshotL1TooLarge {
        /// The snapshot's identifier.
        id: String,
        /// Its name.
        name: String,
        /// Entries of the table.
        entries: u32,
    },
    /// The L1 table of a snapshot is said to lie beyond all files.
    L1OutOfReach,
    /// L1 tables overlap, or refer to the same L2 tables over and over.
    TablesOverlap,
    /// An image whose data lies in another file cannot have snapshots.
    SnapshotsWithDataFile(u32),
    /// An L1 entry has bits set that must be zero.
    L1ReservedBits(u64),
    /// An L2 table does not begin where a cluster does.
    L2TableMisaligned(HostOffset),
    /// An L2 entry has bits set that must be zero.
    L2ReservedBits(u64),
    /// The copied flag of a compressed cluster, which must not have it.
    CompressedCopied(HostOffset),
    /// A compressed cluster in an image whose data lies in another file.
    CompressedInDataFile {
        /// Index in its L2 table.
        index: u64,
        /// The entry without its copied flag.
        entry: u64,
    },
    /// A compressed cluster whose entry has subclusters.
    CompressedSubclusters {
        /// Index in its L2 table.
        index: u64,
        /// The entry without its copied flag.
        entry: u64,
    },
    /// A subcluster is both allocated and zero.
    SubclusterStates(HostOffset),
    /// A subcluster is allocated, but its cluster is not.
    SubclustersUnallocated,
    /// A cluster that reads as zeroes is reserved at an offset where no cluster begins.
    PreallocatedMisaligned {
        /// The offset.
        offset: HostOffset,
        /// Whether the reservation was given up.
        repaired: bool,
    },
    /// Data lies at an offset where no cluster begins.
    DataMisaligned(HostOffset),
    /// Something lies past the end of the file by a cluster or more.
    PastEnd {
        /// Where it begins.
        offset: HostOffset,
        /// Its length in bytes.
        len: u64,
    },
    /// A cluster is used more often than its refcount can say.
    RefcountOverflow(HostOffset),
    /// An entry of the refcount table has bits set that must be zero.
    RefcountTableReservedBits(u64),
    /// A refcount block does not begin where a cluster does.
    RefcountBlockMisaligned(u64),
    /// A refcount block lies past the end of the file.
    RefcountBlockPastEnd {
        /// Its index in the refcount table.
        index: u64,
        /// Whether the file was extended to hold it.
        repaired: bool,
    },
    /// The file cannot be extended so far that it would hold a refcount block.
    CannotExtend {
        /// Whether files do not get that large; else the block's offset is no offset at all.
        too_large: bool,
    },
    /// Something else uses the cluster of a refcount block.
    RefcountBlockShared {
        /// Its index in the refcount table.
        index: u64,
        /// How often its cluster is used.
        references: u64,
    },
    /// The bitmap directory cannot be read.
    BitmapDirectory,
    /// A bitmap's table, or an entry of it, breaks the specification.
    BitmapTable(u64),
    /// No refcount can be read where a block is misaligned; said once.
    RefcountsUnreadable {
        /// The block's index in the refcount table.
        block: u64,
        /// Where it is said to begin.
        offset: HostOffset,
    },
    /// The refcount of a cluster cannot be told.
    UnknownRefcount(HostCluster),
    /// A cluster's refcount is not the number of its users: space is lost if it is larger, data at risk if it is smaller.
    Refcount {
        /// The cluster.
        cluster: HostCluster,
        /// Its refcount.
        refcount: u64,
        /// How often it is used.
        references: u64,
        /// Whether the refcount was corrected.
        repaired: bool,
    },
    /// The flag of an L1 entry that says whether the refcount of its L2 table is exactly one is wrong.
    L1Copied {
        /// Index of the entry.
        index: u64,
        /// The entry.
        entry: u64,
        /// The table's refcount.
        refcount: u64,
        /// Whether the flag was corrected.
        repaired: bool,
    },
    /// The flag of an L2 entry that says whether the refcount of its cluster is exactly one is wrong.
    L2Copied {
        /// The entry.
        entry: u64,
        /// The cluster's refcount.
        refcount: u64,
        /// Whether the flag was corrected.
        repaired: bool,
    },
    /// The refcounts are written anew.
    Rebuilding,
    /// The refcounts must be written anew, which was not asked for.
    NeedsRebuild,
}

/// What a finding counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    Leak,
    Corruption,
    CheckError,
    /// Said, but not counted.
    Note,
}

impl Finding {
    pub(crate) fn severity(&self) -> Severity {
        match self {
            Self::Refcount { refcount, references, .. } if refcount > references => Severity::Leak,
            Self::SnapshotTableOffset
            | Self::TooManySnapshots { dropped: false, .. }
            | Self::SnapshotExtraData { dropped: false, .. }
            | Self::SnapshotTableTooLong { dropped: false, .. }
            | Self::L1OutOfReach
            | Self::TablesOverlap
            | Self::BitmapDirectory
            | Self::UnknownRefcount(_) => Severity::CheckError,
            Self::RefcountsUnreadable { .. } | Self::CannotExtend { .. } | Self::Rebuilding | Self::NeedsRebuild => {
                Severity::Note
            }
            _ => Severity::Corruption,
        }
    }

    /// Whether a repair did away with it.
    #[must_use]
    pub fn repaired(&self) -> bool {
        match *self {
            Self::TooManySnapshots { dropped, .. }
            | Self::SnapshotExtraData { dropped, .. }
            | Self::SnapshotTableTooLong { dropped, .. } => dropped,
            Self::SnapshotIncomplete { repaired, .. }
            | Self::PreallocatedMisaligned { repaired, .. }
            | Self::RefcountBlockPastEnd { repaired, .. }
            | Self::Refcount { repaired, .. }
            | Self::L1Copied { repaired, .. }
            | Self::L2Copied { repaired, .. } => repaired,
            _ => false,
        }
    }

    /// Whether `qemu-img check` counts it without a word.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        matches!(self, Self::BitmapDirectory | Self::BitmapTable(_))
    }

    /// Whether `qemu-img check` begins the line with its own name.
    #[must_use]
    pub fn is_error_report(&self) -> bool {
        match self {
            Self::CannotExtend { too_large } => *too_large,
            Self::L1OutOfReach | Self::TablesOverlap | Self::UnknownRefcount(_) => false,
            _ => self.severity() == Severity::CheckError && !self.is_silent(),
        }
    }
}

fn attempt(repaired: bool) -> &'static str {
    if repaired { "Repairing" } else { "ERROR" }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SnapshotTableOffset => f.write_str("ERROR snapshot table offset invalid"),
            Self::TooManySnapshots { overhanging, dropped: false } => write!(
                f,
                "ERROR snapshot table too large\nYou can force-remove all {overhanging} overhanging snapshots with qemu-img \
                 check -r all"
            ),
            Self::TooManySnapshots { overhanging, dropped: true } => {
                write!(f, "Discarding {overhanging} overhanging snapshots")
            }
            Self::SnapshotExtraData { index, dropped: false, .. } => write!(
                f,
                "ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry {index}\nYou can \
                 force-remove this extra metadata with qemu-img check -r all"
            ),
            Self::SnapshotExtraData { index, len, dropped: true } => {
                let limit = super::snapshots::MAX_EXTRA;
                write!(f, "Discarding too much extra metadata in snapshot table entry {index} ({len} > {limit})")
            }
            Self::SnapshotTableTooLong { overhanging, dropped: false } => write!(
                f,
                "ERROR failed to read the snapshot table: Snapshot table is too big\nYou can force-remove all {overhanging} \
                 overhanging snapshots with qemu-img check -r all"
            ),
            Self::SnapshotTableTooLong { overhanging, dropped: true } => {
                write!(f, "Discarding {overhanging} overhanging snapshots (snapshot table is too big)")
            }
            Self::SnapshotIncomplete { index, repaired } => {
                write!(f, "{} snapshot table entry {index} is incomplete", attempt(*repaired))
            }
            Self::SnapshotL1Misaligned { id, name, offset } => write!(
                f,
                "ERROR snapshot {id} ({name}) l1_offset={offset}: L1 table is not cluster aligned; snapshot table entry \
                 corrupted"
            ),
            Self::SnapshotL1TooLarge { id, name, entries } => write!(
                f,
                "ERROR snapshot {id} ({name}) l1_size={entries:#x}: L1 table is too large; snapshot table entry corrupted"
            ),
            Self::L1OutOfReach => f.write_str("ERROR: I/O error in check_refcounts_l1"),
            Self::TablesOverlap => f.write_str("ERROR the tables overlap too often to be followed"),
            Self::SnapshotsWithDataFile(count) => write!(f, "ERROR {count} snapshots in image with data file"),
            Self::L1ReservedBits(entry) => write!(f, "ERROR found L1 entry with reserved bits set: {entry:x}"),
            Self::L2TableMisaligned(HostOffset(offset)) => {
                write!(f, "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
            }
            Self::L2ReservedBits(entry) => write!(f, "ERROR found l2 entry with reserved bits set: {entry:x}"),
            Self::CompressedCopied(HostOffset(offset)) => {
                write!(f, "ERROR: coffset=0x{offset:x}: copied flag must never be set for compressed clusters")
            }
            Self::CompressedInDataFile { index, entry } => {
                write!(f, "ERROR compressed cluster {index} with data file, entry=0x{entry:x}")
            }
            Self::CompressedSubclusters { index, entry } => write!(
                f,
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry=0x{entry:x}"
            ),
            Self::SubclusterStates(HostOffset(offset)) => {
                write!(f, "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap")
            }
            Self::SubclustersUnallocated => {
                f.write_str("ERROR: Unallocated cluster has non-zero subcluster allocation map")
            }
            Self::PreallocatedMisaligned { offset: HostOffset(offset), repaired } => write!(
                f,
                "{} offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.",
                attempt(*repaired)
            ),
            Self::DataMisaligned(HostOffset(offset)) => {
                write!(f, "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted.")
            }
            Self::PastEnd { offset: HostOffset(offset), len } => write!(
                f,
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset \
                 0x{offset:x} size 0x{len:x}"
            ),
            Self::RefcountOverflow(HostOffset(offset)) => write!(
                f,
                "ERROR: overflow cluster offset=0x{offset:x}\nUse qemu-img amend to increase the refcount entry width or \
                 qemu-img convert to create a clean copy if the image cannot be opened for writing"
            ),
            Self::RefcountTableReservedBits(index) => {
                write!(f, "ERROR refcount table entry {index} has reserved bits set")
            }
            Self::RefcountBlockMisaligned(index) => {
                write!(f, "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
            }
            Self::RefcountBlockPastEnd { index, repaired } => {
                write!(f, "{} refcount block {index} is outside image", attempt(*repaired))
            }
            Self::CannotExtend { too_large: true } => {
                f.write_str("Could not resize file: File too large\nERROR could not resize image: File too large")
            }
            Self::CannotExtend { too_large: false } => f.write_str("ERROR could not resize image: Invalid argument"),
            Self::RefcountBlockShared { index, references } => {
                write!(f, "ERROR refcount block {index} refcount={references}")
            }
            Self::BitmapDirectory => f.write_str("ERROR the bitmap directory is unreadable"),
            Self::BitmapTable(index) => write!(f, "ERROR the table of bitmap {index} is corrupted"),
            Self::RefcountsUnreadable { block, offset } => write!(
                f,
                "qcow2: Image is corrupt: Refblock offset {offset} unaligned (reftable index: {}); further non-fatal \
                 corruption events will be suppressed",
                CStyleHex(*block)
            ),
            Self::UnknownRefcount(HostCluster(cluster)) => {
                write!(f, "Can't get refcount for cluster {cluster}: Input/output error")
            }
            Self::Refcount { cluster: HostCluster(cluster), refcount, references, repaired } => {
                let what = match (*repaired, refcount < references) {
                    (true, _) => "Repairing",
                    (false, true) => "ERROR",
                    (false, false) => "Leaked",
                };
                write!(f, "{what} cluster {cluster} refcount={refcount} reference={references}")
            }
            Self::L1Copied { index, entry, refcount, repaired } => write!(
                f,
                "{} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}",
                attempt(*repaired)
            ),
            Self::L2Copied { entry, refcount, repaired } => {
                write!(f, "{} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}", attempt(*repaired))
            }
            Self::Rebuilding => f.write_str("Rebuilding refcount structure"),
            Self::NeedsRebuild => f.write_str("ERROR need to rebuild refcount structures"),
        }
    }
}

/// A number as C's `%#x` writes it: zero has no prefix.
struct CStyleHex(u64);

impl fmt::Display for CStyleHex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { f.write_str("0") } else { write!(f, "{:#x}", self.0) }
    }
}
