use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::entry::L2Format;
use crate::error::{Corruption, Error, Place};
use crate::extension::{self, BitmapsExtension, Extension};
use crate::features::{self, FeatureKind, Features};
use crate::file::ImageFile;
use crate::types::{ClusterBits, CompressionType, HostOffset, Version, in_memory};

/// First bytes of every qcow2 file.
pub const MAGIC: u32 = 0x5146_49fb;
/// Largest L1 table that QEMU opens, in bytes.
pub const MAX_L1_SIZE: u64 = 32 << 20;
/// Largest refcount table that QEMU opens, in bytes.
pub const MAX_REFCOUNT_TABLE_SIZE: u64 = 8 << 20;
/// Longest name of a backing file in bytes.
pub const MAX_BACKING_NAME: u64 = 1023;
/// Longest name of a backing file's format that QEMU opens, in bytes.
pub(crate) const MAX_BACKING_FORMAT: u64 = 15;
/// Most snapshots that QEMU opens.
pub const MAX_SNAPSHOTS: u64 = 65536;

/// Subclusters have at least 512 bytes.
pub(crate) const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
const V2_LEN: u64 = 72;
const V3_MIN_LEN: u64 = 104;
const FULL_LEN: u64 = size_of::<RawHeader>() as u64;

/// The header as stored (specification, "Header").
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
    compression_type: u8,
    padding: [u8; 7],
}

const _: () = assert!(size_of::<RawHeader>() == 112);

/// How an image's guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// QEMU's old AES-CBC.
    Aes = 1,
    /// A LUKS header, which the extension [`extension::FULL_DISK_ENCRYPTION`] points to.
    Luks = 2,
}

impl Encryption {
    /// The name that `qemu-img` has for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Luks => "luks",
        }
    }
}

/// An image's header, checked: every number is within the format's limits, and tables lie at cluster borders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of the format.
    pub version: Version,
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Cluster size.
    pub cluster_bits: ClusterBits,
    /// Name of the backing file, as stored.
    pub backing_name: Option<String>,
    /// Where the active L1 table begins.
    pub l1_table: HostOffset,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where the refcount table begins.
    pub refcount_table: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Base-two logarithm of the width of a refcount in bits.
    pub refcount_order: u8,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table begins.
    pub snapshot_table: HostOffset,
    /// Feature bits; all zero in version 2.
    pub features: Features,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// How guest data is encrypted, if it is.
    pub encryption: Option<Encryption>,
    /// Length of the fixed part in bytes; extensions follow it.
    pub header_length: u32,
    /// Fields of a fixed part that is longer than this crate knows, kept verbatim.
    pub unknown_fields: Vec<u8>,
    /// All header extensions in order, unknown ones included.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// Reads and checks the header of an image file.
    pub(crate) fn read(file: &ImageFile) -> Result<Self, Error> {
        let header = Self::read_damaged(file)?;
        header.check_repairable().map_err(|what| file.corrupt(what))?;
        Ok(header)
    }

    /// The same without a check of what a repair would mend.
    pub(crate) fn read_damaged(file: &ImageFile) -> Result<Self, Error> {
        let mut raw = RawHeader::new_zeroed();
        let corrupt = |what| file.corrupt(what);
        let file_size = file.storage.size();
        if file_size < V2_LEN {
            return Err(corrupt(Corruption::NotQcow2));
        }
        file.read_padded(raw.as_mut_bytes(), HostOffset(0))?;
        if raw.magic.get() != MAGIC {
            return Err(corrupt(Corruption::NotQcow2));
        }
        let version = match raw.version.get() {
            2 => Version::V2,
            3 => Version::V3,
            other => return Err(file.unsupported(format!("qcow2 version {other}"))),
        };
        let cluster_bits = ClusterBits::new(raw.cluster_bits.get()).ok_or_else(|| {
            let allowed = u64::from(ClusterBits::MIN)..=u64::from(ClusterBits::MAX);
            corrupt(out_of_bounds("cluster_bits", raw.cluster_bits.get().into(), allowed))
        })?;
        let header_length = header_length(&raw, version, cluster_bits).map_err(corrupt)?;
        raw.clear_from(header_length);
        let area = file.read_structure(Place::Header, HostOffset(0), file_size.min(cluster_bits.size()))?;
        let (backing_name, extensions_end) = backing_name(&raw, &area).map_err(corrupt)?;
        let extensions = area
            .get(in_memory(header_length)..in_memory(extensions_end))
            .map_or(Ok(Vec::new()), |bytes| Extension::parse_all(bytes, header_length))
            .map_err(corrupt)?;
        let header = Self {
            version,
            size: raw.size.get(),
            cluster_bits,
            backing_name,
            l1_table: HostOffset(raw.l1_table_offset.get()),
            l1_size: raw.l1_size.get(),
            refcount_table: HostOffset(raw.refcount_table_offset.get()),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            refcount_order: match version {
                Version::V2 => 4,
                Version::V3 => {
                    bounded("refcount_order", raw.refcount_order.get().into(), 0..=6).map_err(corrupt)?.to_be_bytes()[7]
                }
            },
            snapshots: raw.nb_snapshots.get(),
            snapshot_table: HostOffset(raw.snapshots_offset.get()),
            features: Features {
                incompatible: raw.incompatible_features.get(),
                compatible: raw.compatible_features.get(),
                autoclear: raw.autoclear_features.get(),
            },
            compression: CompressionType::default(),
            encryption: encryption(raw.crypt_method.get()).map_err(corrupt)?,
            header_length: u32::try_from(header_length).unwrap_or(u32::MAX),
            unknown_fields: area.get(in_memory(FULL_LEN)..in_memory(header_length)).unwrap_or_default().to_vec(),
            extensions,
        };
        header.refuse_unsupported(file)?;
        let compression = compression_type(raw.compression_type, header.features).map_err(|refusal| match refusal {
            Refusal::Corrupt(what) => corrupt(what),
            Refusal::Unsupported(feature) => file.unsupported(feature),
        })?;
        let header = Self { compression, ..header };
        header.check_tables().map_err(corrupt)?;
        Ok(header)
    }

    fn refuse_unsupported(&self, file: &ImageFile) -> Result<(), Error> {
        const KNOWN: u64 = features::DIRTY
            | features::CORRUPT
            | features::EXTERNAL_DATA_FILE
            | features::COMPRESSION_TYPE
            | features::EXTENDED_L2;
        let unknown = self.features.incompatible & !KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let names: Vec<String> = (0..64)
            .filter(|bit| unknown >> bit & 1 == 1)
            .map(|bit| self.feature_name(FeatureKind::Incompatible, bit))
            .collect();
        Err(file.unsupported(names.join(", ")))
    }

    fn feature_name(&self, kind: FeatureKind, bit: u32) -> String {
        let specified = features::NAMES.iter().find(|(k, b, _)| *k == kind && u32::from(*b) == bit);
        match (self.extension(extension::FEATURE_NAMES).and_then(|table| table.feature_name(kind, bit)), specified) {
            (Some(name), _) => format!("feature \"{name}\""),
            (None, Some((_, _, name))) => format!("feature \"{name}\""),
            (None, None) => format!("unknown feature bit {bit}"),
        }
    }

    fn check_tables(&self) -> Result<(), Corruption> {
        let malformed = |problem| Err(Corruption::Malformed { place: Place::Header, problem });
        if self.encryption == Some(Encryption::Luks) && self.extension(extension::FULL_DISK_ENCRYPTION).is_none() {
            return malformed("it has LUKS encryption but no LUKS header");
        }
        if self.extended_l2() && self.cluster_bits.bits() < MIN_EXTENDED_CLUSTER_BITS {
            return malformed("its clusters are too small for subclusters");
        }
        if let Some(format) = self.extension(extension::BACKING_FORMAT) {
            let (place, value) = (Place::Extension(format.magic), format.data.len() as u64);
            let allowed = 0..=MAX_BACKING_FORMAT;
            if !allowed.contains(&value) {
                return Err(Corruption::OutOfBounds { place, field: "length", value, allowed });
            }
        }
        let max_clusters = MAX_REFCOUNT_TABLE_SIZE / self.cluster_bits.size();
        bounded("refcount_table_clusters", self.refcount_table_clusters.into(), 0..=max_clusters)?;
        bounded("l1_size", self.l1_size.into(), self.l1_entries_needed()..=MAX_L1_SIZE / 8)?;
        self.cluster_aligned(Place::L1Table, self.l1_table)?;
        self.cluster_aligned(Place::RefcountTable, self.refcount_table)
    }

    fn check_repairable(&self) -> Result<(), Corruption> {
        let max_clusters = MAX_REFCOUNT_TABLE_SIZE / self.cluster_bits.size();
        bounded("refcount_table_clusters", self.refcount_table_clusters.into(), 1..=max_clusters)?;
        self.check_l1(Place::L1Table)?;
        self.aligned(Place::RefcountTable, self.refcount_table)?;
        bounded("nb_snapshots", self.snapshots.into(), 0..=MAX_SNAPSHOTS)?;
        if self.snapshots > 0 { self.aligned(Place::SnapshotTable, self.snapshot_table) } else { Ok(()) }
    }

    /// Checks the L1 table, which is that of `place`. One shorter than the disk needs leaves the rest unallocated.
    pub(crate) fn check_l1(&self, place: Place) -> Result<(), Corruption> {
        let allowed = 0..=MAX_L1_SIZE / 8;
        if !allowed.contains(&self.l1_size.into()) {
            return Err(Corruption::OutOfBounds { place, field: "l1_size", value: self.l1_size.into(), allowed });
        }
        if self.l1_size > 0 { self.aligned(place, self.l1_table) } else { Ok(()) }
    }

    /// Fails unless `offset` is the start of a cluster other than the header's.
    fn aligned(&self, place: Place, offset: HostOffset) -> Result<(), Corruption> {
        if offset.0 == 0 {
            return Err(Corruption::Overlap { first: Place::Header, second: place, offset });
        }
        self.cluster_aligned(place, offset)
    }

    fn cluster_aligned(&self, place: Place, offset: HostOffset) -> Result<(), Corruption> {
        match self.cluster_bits.offset_within(offset.0) {
            0 => Ok(()),
            _ => Err(Corruption::Misaligned { place, offset }),
        }
    }

    /// L1 entries that the guest's disk needs.
    #[must_use]
    pub fn l1_entries_needed(&self) -> u64 {
        self.size.div_ceil(self.cluster_bits.size()).div_ceil(self.l2_entries())
    }

    /// Entries of an L2 table.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        self.l2_format().entries()
    }

    pub(crate) fn l2_format(&self) -> L2Format {
        L2Format {
            cluster_bits: self.cluster_bits,
            zero_flag: self.version >= Version::V3,
            extended: self.extended_l2(),
            data_file: self.has_data_file(),
        }
    }

    /// Whether L2 entries have two words, of which the second describes subclusters.
    #[must_use]
    pub fn extended_l2(&self) -> bool {
        self.features.incompatible & features::EXTENDED_L2 != 0
    }

    /// What an L2 entry describes one by one, in bytes: a subcluster, or the cluster where there are none.
    #[must_use]
    pub fn subcluster_size(&self) -> u64 {
        1 << self.l2_format().grain_bits()
    }

    /// Whether guest data lies in a file of its own.
    #[must_use]
    pub fn has_data_file(&self) -> bool {
        self.features.incompatible & features::EXTERNAL_DATA_FILE != 0
    }

    /// Whether the data file is a raw image of the guest's disk.
    #[must_use]
    pub fn data_file_raw(&self) -> bool {
        self.features.autoclear & features::DATA_FILE_RAW != 0
    }

    /// Name of the data file, if the header has one.
    #[must_use]
    pub fn data_file_name(&self) -> Option<String> {
        let extension = self.extension(extension::EXTERNAL_DATA_FILE).filter(|_| self.has_data_file())?;
        Some(String::from_utf8_lossy(&extension.data).into_owned())
    }

    /// Where the LUKS header lies in the file, and its length in bytes.
    pub(crate) fn encryption_header(&self) -> Option<(HostOffset, u64)> {
        let data = &self.extension(extension::FULL_DISK_ENCRYPTION)?.data;
        let &[offset, len] = data.as_chunks::<8>().0.first_chunk()?;
        Some((HostOffset(u64::from_be_bytes(offset)), u64::from_be_bytes(len)))
    }

    /// Width of a refcount in bits.
    #[must_use]
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The first extension of a kind.
    #[must_use]
    pub fn extension(&self, magic: u32) -> Option<&Extension> {
        self.extensions.iter().find(|extension| extension.magic == magic)
    }

    /// Format of the backing file, if the header names it.
    #[must_use]
    pub fn backing_format(&self) -> Option<String> {
        let extension = self.extension(extension::BACKING_FORMAT)?;
        Some(String::from_utf8_lossy(&extension.data).into_owned())
    }

    /// The bitmaps extension, unless a writer that does not know it has changed the image since.
    pub fn bitmaps(&self) -> Result<Option<BitmapsExtension>, Corruption> {
        match self.extension(extension::BITMAPS) {
            Some(extension) if self.features.autoclear & features::BITMAPS != 0 => {
                BitmapsExtension::decode(&extension.data).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Lets the header point to a bitmap directory, or say that there are no bitmaps.
    pub(crate) fn set_bitmaps(&mut self, bitmaps: Option<BitmapsExtension>) {
        self.extensions.retain(|extension| extension.magic != extension::BITMAPS);
        self.features.autoclear &= !features::BITMAPS;
        if let Some(bitmaps) = bitmaps {
            self.extensions.push(Extension::new(extension::BITMAPS, bitmaps.encode().to_vec()));
            self.features.autoclear |= features::BITMAPS;
        }
    }

    /// The header as stored: fixed part, extensions in QEMU's order, backing name. `None` if that does not fit in a cluster.
    pub(crate) fn encode(&self) -> Option<Vec<u8>> {
        let (known, unknown) = match self.version {
            Version::V2 => (V2_LEN, &[][..]),
            Version::V3 => (FULL_LEN, &self.unknown_fields[..]),
        };
        let length = known + unknown.len() as u64;
        let mut extensions: Vec<&Extension> = self.extensions.iter().collect();
        extensions.sort_by_key(|extension| extension.rank());
        let mut tail = unknown.to_vec();
        extensions.iter().for_each(|extension| extension.encode(&mut tail));
        tail.extend([0; 8]);
        let name = self.backing_name.as_deref().unwrap_or_default();
        let name_offset = known + tail.len() as u64;
        let raw = RawHeader {
            magic: MAGIC.into(),
            version: (self.version as u32).into(),
            backing_file_offset: if name.is_empty() { 0 } else { name_offset }.into(),
            backing_file_size: u32::try_from(name.len()).ok()?.into(),
            cluster_bits: self.cluster_bits.bits().into(),
            size: self.size.into(),
            crypt_method: self.encryption.map_or(0, |encryption| encryption as u32).into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_table.0.into(),
            refcount_table_offset: self.refcount_table.0.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.snapshots.into(),
            snapshots_offset: self.snapshot_table.0.into(),
            incompatible_features: self.features.incompatible.into(),
            compatible_features: self.features.compatible.into(),
            autoclear_features: self.features.autoclear.into(),
            refcount_order: u32::from(self.refcount_order).into(),
            header_length: u32::try_from(length).ok()?.into(),
            compression_type: self.compression as u8,
            padding: [0; 7],
        };
        let mut bytes = raw.as_bytes()[..in_memory(known)].to_vec();
        bytes.extend(tail);
        bytes.extend(name.as_bytes());
        (bytes.len() as u64 <= self.cluster_bits.size()).then_some(bytes)
    }
}

impl RawHeader {
    /// Zeroes what lies past the header's length: it belongs to extensions.
    fn clear_from(&mut self, length: u64) {
        if let Some(rest) = self.as_mut_bytes().get_mut(in_memory(length)..) {
            rest.fill(0);
        }
    }
}

enum Refusal {
    Corrupt(Corruption),
    Unsupported(String),
}

fn out_of_bounds(field: &'static str, value: u64, allowed: std::ops::RangeInclusive<u64>) -> Corruption {
    Corruption::OutOfBounds { place: Place::Header, field, value, allowed }
}

fn bounded(field: &'static str, value: u64, allowed: std::ops::RangeInclusive<u64>) -> Result<u64, Corruption> {
    if allowed.contains(&value) { Ok(value) } else { Err(out_of_bounds(field, value, allowed)) }
}

fn header_length(raw: &RawHeader, version: Version, cluster_bits: ClusterBits) -> Result<u64, Corruption> {
    if version == Version::V2 {
        return Ok(V2_LEN);
    }
    let length = bounded("header_length", raw.header_length.get().into(), V3_MIN_LEN..=cluster_bits.size())?;
    if length % 8 != 0 {
        return Err(Corruption::Malformed { place: Place::Header, problem: "header_length is not a multiple of 8" });
    }
    Ok(length)
}

fn encryption(crypt_method: u32) -> Result<Option<Encryption>, Corruption> {
    match crypt_method {
        0 => Ok(None),
        1 => Ok(Some(Encryption::Aes)),
        2 => Ok(Some(Encryption::Luks)),
        other => Err(out_of_bounds("crypt_method", other.into(), 0..=2)),
    }
}

/// The backing file's name, and where the area of header extensions ends.
fn backing_name(raw: &RawHeader, area: &[u8]) -> Result<(Option<String>, u64), Corruption> {
    let (offset, len) = (raw.backing_file_offset.get(), u64::from(raw.backing_file_size.get()));
    if offset == 0 {
        return Ok((None, area.len() as u64));
    }
    bounded("backing_file_offset", offset, 0..=area.len() as u64)?;
    bounded("backing_file_size", len, 0..=MAX_BACKING_NAME.min(area.len() as u64 - offset))?;
    let bytes = &area[in_memory(offset)..in_memory(offset + len)];
    let bytes = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    let name = std::str::from_utf8(bytes)
        .map_err(|_| Corruption::Malformed { place: Place::BackingName, problem: "it is not UTF-8" })?;
    Ok(((!name.is_empty()).then(|| name.to_owned()), offset))
}

fn compression_type(byte: u8, features: Features) -> Result<CompressionType, Refusal> {
    let flagged = features.incompatible & features::COMPRESSION_TYPE != 0;
    match (byte, flagged) {
        (0, false) => Ok(CompressionType::Zlib),
        (1, true) => Ok(CompressionType::Zstd),
        (0, true) | (1, false) => Err(Refusal::Corrupt(Corruption::Malformed {
            place: Place::Header,
            problem: "the compression type and its feature bit disagree",
        })),
        (other, _) => Err(Refusal::Unsupported(format!("compression type {other}"))),
    }
}
