//! Feature bits of version 3 headers (specification, "Header", bytes 72 to 95).

/// Which of the header's three feature fields a bit belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// An image with an unknown bit of this kind must not be opened.
    Incompatible = 0,
    /// Unknown bits of this kind do no harm.
    Compatible = 1,
    /// A writer clears the bits of this kind that it does not know.
    Autoclear = 2,
}

/// Incompatible: refcounts may be stale.
pub const DIRTY: u64 = 1 << 0;
/// Incompatible: some writer found the image damaged.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible: guest data lies in another file.
pub const EXTERNAL_DATA_FILE: u64 = 1 << 2;
/// Incompatible: the header's compression type is not deflate.
pub const COMPRESSION_TYPE: u64 = 1 << 3;
/// Incompatible: L2 entries are 128 bits wide and map subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Compatible: a writer may postpone refcount updates and set [`DIRTY`] meanwhile.
pub const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear: the bitmaps extension is consistent.
pub const BITMAPS: u64 = 1 << 0;
/// Autoclear: the external data file is a raw image of the guest's disk.
pub const DATA_FILE_RAW: u64 = 1 << 1;

/// The autoclear bits that hold after our writes.
pub(crate) const KNOWN_AUTOCLEAR: u64 = BITMAPS | DATA_FILE_RAW;

/// The bits that the specification names, for a feature name table.
pub const NAMES: [(FeatureKind, u8, &str); 8] = [
    (FeatureKind::Incompatible, 0, "dirty bit"),
    (FeatureKind::Incompatible, 1, "corrupt bit"),
    (FeatureKind::Incompatible, 2, "external data file"),
    (FeatureKind::Incompatible, 3, "compression type"),
    (FeatureKind::Incompatible, 4, "extended L2 entries"),
    (FeatureKind::Compatible, 0, "lazy refcounts"),
    (FeatureKind::Autoclear, 0, "bitmaps"),
    (FeatureKind::Autoclear, 1, "raw external data"),
];

/// A header's feature fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// See [`FeatureKind::Incompatible`].
    pub incompatible: u64,
    /// See [`FeatureKind::Compatible`].
    pub compatible: u64,
    /// See [`FeatureKind::Autoclear`].
    pub autoclear: u64,
}
