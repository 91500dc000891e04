//! Addresses and sizes, each kind a type of its own.

use std::fmt;

macro_rules! address {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}

address! {
    /// A byte offset on the guest's disk.
    GuestOffset;
    /// A byte offset in the image file.
    HostOffset;
    /// A cluster of the guest's disk, by index.
    GuestCluster;
    /// A cluster of the image file, by index.
    HostCluster;
}

impl HostOffset {
    /// The offset `bytes` further on. Offsets in entries have 56 bits, and lengths come from memory or the file.
    pub(crate) fn plus(self, bytes: u64) -> Self {
        Self(self.0.saturating_add(bytes))
    }
}

/// Version of the format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// QEMU before 1.1 (`compat=0.10`): no feature bits, no zero clusters.
    V2 = 2,
    /// Since QEMU 1.1 (`compat=1.1`).
    #[default]
    V3 = 3,
}

/// How an image's compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressionType {
    /// Raw deflate (RFC 1951).
    #[default]
    Zlib,
    /// Zstandard (RFC 8878).
    Zstd,
}

impl CompressionType {
    /// The name that `qemu-img` has for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

impl fmt::Display for CompressionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The base-two logarithm of an image's cluster size: 9 (512 bytes) to 21 (2 MiB).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterBits(u8);

impl Default for ClusterBits {
    fn default() -> Self {
        Self(16)
    }
}

impl ClusterBits {
    /// Smallest legal value.
    pub const MIN: u32 = 9;
    /// Largest value that QEMU accepts.
    pub const MAX: u32 = 21;

    /// `bits`, if clusters can have that size.
    #[must_use]
    pub fn new(bits: u32) -> Option<Self> {
        (Self::MIN..=Self::MAX).contains(&bits).then_some(bits).and_then(|bits| u8::try_from(bits).ok()).map(Self)
    }

    /// The logarithm of a cluster size in bytes, if clusters can have that size.
    #[must_use]
    pub fn from_size(size: u64) -> Option<Self> {
        size.is_power_of_two().then(|| size.trailing_zeros()).and_then(Self::new)
    }

    /// The logarithm itself.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0.into()
    }

    /// Cluster size in bytes.
    #[must_use]
    pub fn size(self) -> u64 {
        1 << self.0
    }

    /// Cluster size in bytes, as a length in memory.
    #[must_use]
    pub fn buffer_len(self) -> usize {
        1 << self.0
    }

    /// Words of eight bytes in a cluster: entries of a table that fills one.
    #[must_use]
    pub fn words(self) -> u64 {
        self.size() / 8
    }

    /// The cluster that holds a guest offset.
    #[must_use]
    pub fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.0)
    }

    /// The first byte of a guest cluster.
    #[must_use]
    pub fn guest_offset(self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.0)
    }

    /// The cluster that holds a host offset.
    #[must_use]
    pub fn host_cluster(self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.0)
    }

    /// The first byte of a host cluster.
    #[must_use]
    pub fn host_offset(self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.0)
    }

    /// How far into its cluster an offset lies.
    #[must_use]
    pub fn offset_within(self, offset: u64) -> u64 {
        offset & (self.size() - 1)
    }

    /// Clusters that `bytes` fill, the last one perhaps in part.
    #[must_use]
    pub fn clusters_for(self, bytes: u64) -> u64 {
        // A shift: the divisor of a division is not known to be a power of two.
        (bytes >> self.0) + u64::from(self.offset_within(bytes) != 0)
    }
}

/// A length that is known to fit in memory, because what it measures is there or is bounded by a cluster or a checked table.
pub(crate) fn in_memory(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
