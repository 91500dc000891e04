use std::ops::Range;

use crate::file::table_bytes;
use crate::types::{ClusterBits, HostOffset};

/// Says that a refcount is exactly one.
pub(crate) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
pub(crate) const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// What lengths of compressed clusters count.
pub(crate) const SECTOR: u64 = 512;

/// An entry of an L1 table (specification, "L1 table entry").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L1Entry(pub(crate) u64);

impl L1Entry {
    /// The entry of an L2 table that nothing else refers to.
    pub(crate) fn owned(table: HostOffset) -> Self {
        Self(table.0 | COPIED)
    }

    /// Where the L2 table begins, if there is one.
    pub(crate) fn l2_table(self) -> Option<HostOffset> {
        Some(self.offset()).filter(|offset| offset.0 != 0)
    }

    /// The offset field, whatever it says.
    pub(crate) fn offset(self) -> HostOffset {
        HostOffset(self.0 & OFFSET)
    }

    /// The same entry for a table that lies where `to` says.
    pub(crate) fn with_table(self, to: impl FnOnce(HostOffset) -> HostOffset) -> Self {
        Self(self.0 & !OFFSET | self.l2_table().map_or(0, |table| to(table).0))
    }

    /// The same entry saying that the table's refcount is exactly one, or that it is not.
    pub(crate) fn with_copied(self, copied: bool) -> Self {
        Self(if copied { self.0 | COPIED } else { self.0 & !COPIED })
    }

    /// Whether the entry says that the table's refcount is exactly one.
    pub(crate) fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    pub(crate) fn reserved_bits(self) -> u64 {
        self.0 & !(OFFSET | COPIED)
    }
}

/// How an image stores its L2 entries, and what their bits mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct L2Format {
    pub(crate) cluster_bits: ClusterBits,
    /// An entry can make its cluster read as zeroes; in version 2 none may.
    pub(crate) zero_flag: bool,
    /// A second word describes 32 subclusters, and the zero flag is reserved.
    pub(crate) extended: bool,
    /// Guest data has a file of its own, whose offset 0 is as good as any other.
    pub(crate) data_file: bool,
}

impl L2Format {
    /// Subclusters of a cluster with an extended entry.
    pub(crate) const SUBCLUSTERS: u32 = 32;

    fn entry_words(self) -> usize {
        if self.extended { 2 } else { 1 }
    }

    fn entry_len(self) -> usize {
        self.entry_words() * 8
    }

    /// Entries of a table, which fills one cluster.
    pub(crate) fn entries(self) -> u64 {
        self.cluster_bits.words() / self.entry_words() as u64
    }

    /// Logarithm of what one state of an entry describes: a subcluster, or else the cluster.
    pub(crate) fn grain_bits(self) -> u32 {
        let halvings = if self.extended { Self::SUBCLUSTERS.ilog2() } else { 0 };
        self.cluster_bits.bits() - halvings
    }

    /// The entries of a stored table.
    pub(crate) fn decode(self, bytes: &[u8]) -> Box<[L2Entry]> {
        let words = bytes.as_chunks::<8>().0.iter().map(|&word| u64::from_be_bytes(word));
        if !self.extended {
            return words.map(|word| L2Entry { word, subclusters: 0 }).collect();
        }
        (0..bytes.len() / self.entry_len()).map(|index| self.load(bytes, index)).collect()
    }

    /// The entry at `index` of a stored table; unallocated past the table's end.
    pub(crate) fn load(self, table: &[u8], index: usize) -> L2Entry {
        let words = table.as_chunks::<8>().0;
        let word = |at: usize| words.get(at).map_or(0, |&word| u64::from_be_bytes(word));
        let first = index * self.entry_words();
        L2Entry { word: word(first), subclusters: if self.extended { word(first + 1) } else { 0 } }
    }

    /// The longest run of entries from `index` whose clusters hold plain data and follow each other in a file of `file_size` bytes.
    /// With subclusters or an external data file there is none.
    pub(crate) fn plain_run(self, table: &[u8], index: usize, file_size: u64) -> Option<PlainRun> {
        let words = table.as_chunks::<8>().0.get(index..)?;
        let first = u64::from_be_bytes(*words.first()?);
        let host = HostOffset(first & OFFSET);
        let bits = self.cluster_bits;
        let is_plain = host.0 != 0 && first & !(OFFSET | COPIED) == 0 && bits.offset_within(host.0) == 0;
        let in_file = file_size.saturating_sub(host.0) >> bits.bits();
        if !is_plain || in_file == 0 || self.extended || self.data_file {
            return None;
        }
        let expected = (0..in_file).map(|cluster| first + (cluster << bits.bits()));
        let clusters =
            words.iter().zip(expected).take_while(|(word, expected)| u64::from_be_bytes(**word) == *expected);
        Some(PlainRun { host, clusters: clusters.count(), copied: first & COPIED != 0 })
    }

    /// Puts an entry in its place in a stored table.
    pub(crate) fn store(self, table: &mut [u8], index: usize, entry: L2Entry) {
        let start = index * self.entry_len();
        if let Some(place) = table.get_mut(start..start + self.entry_len()) {
            place.copy_from_slice(&self.encode(&[entry]));
        }
    }

    /// A table as it is stored.
    pub(crate) fn encode(self, entries: &[L2Entry]) -> Vec<u8> {
        table_bytes(
            entries.iter().flat_map(|entry| [entry.word, entry.subclusters].into_iter().take(self.entry_words())),
        )
    }
}

/// Entries of an L2 table that follow each other, and so do their clusters in the file. All of them hold plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlainRun {
    /// Where the first cluster begins.
    pub(crate) host: HostOffset,
    /// How many there are.
    pub(crate) clusters: usize,
    /// Whether the entries say that the clusters' refcounts are exactly one.
    pub(crate) copied: bool,
}

impl PlainRun {
    /// Length in bytes.
    pub(crate) fn len(self, bits: ClusterBits) -> u64 {
        (self.clusters as u64) << bits.bits()
    }
}

/// An entry of an L2 table (specification, "L2 table entry").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L2Entry {
    pub(crate) word: u64,
    /// State of the subclusters (specification, "Extended L2 Entries"); zero in images that have none.
    pub(crate) subclusters: u64,
}

/// What an L2 entry says about its guest cluster as a whole.
///
/// In an extended entry a cluster with a place in the file is `Data`, and one without is `Unallocated`, whatever its
/// subclusters read as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cluster {
    Unallocated,
    Zero {
        host: Option<HostOffset>,
    },
    Data {
        host: HostOffset,
    },
    /// `len` reaches to the end of the last sector.
    Compressed {
        host: HostOffset,
        len: u64,
    },
}

/// What a subcluster reads as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subcluster {
    /// The backing.
    Unallocated,
    Zero,
    /// Its part of the host cluster.
    Data,
}

impl L2Entry {
    /// Reads through to the backing.
    pub(crate) const UNALLOCATED: Self = Self { word: 0, subclusters: 0 };
    /// All subclusters are allocated.
    pub(crate) const ALL_DATA: u64 = 0xffff_ffff;
    const ALL_ZERO: u64 = Self::ALL_DATA << 32;

    /// A data cluster that nothing else refers to.
    pub(crate) fn owned(host: HostOffset, format: L2Format) -> Self {
        Self { word: host.0 | COPIED, subclusters: if format.extended { Self::ALL_DATA } else { 0 } }
    }

    /// A cluster without a place in the file that reads as zeroes; not in version 2.
    pub(crate) fn plain_zero(format: L2Format) -> Self {
        if format.extended {
            Self { word: 0, subclusters: Self::ALL_ZERO }
        } else {
            Self { word: ZERO, subclusters: 0 }
        }
    }

    /// A compressed cluster of `len` bytes, if an entry can hold that place and length.
    pub(crate) fn compressed(host: HostOffset, len: u64, bits: ClusterBits) -> Option<Self> {
        let length_shift = compressed_length_shift(bits);
        let more_sectors = (host.0 + len.checked_sub(1)?) / SECTOR - host.0 / SECTOR;
        let fits = host.0 >> length_shift == 0 && more_sectors >> (62 - length_shift) == 0;
        fits.then_some(Self { word: COMPRESSED | more_sectors << length_shift | host.0, subclusters: 0 })
    }

    pub(crate) fn decode(self, format: L2Format) -> Cluster {
        if self.word & COMPRESSED != 0 {
            let length_shift = compressed_length_shift(format.cluster_bits);
            let host = self.word & ((1 << length_shift) - 1);
            let sectors = ((self.word & !(COPIED | COMPRESSED)) >> length_shift) + 1;
            return Cluster::Compressed { host: HostOffset(host), len: sectors * SECTOR - host % SECTOR };
        }
        let offset = self.word & OFFSET;
        if self.word & ZERO != 0 && !format.extended {
            return Cluster::Zero { host: (offset != 0).then_some(HostOffset(offset)) };
        }
        if offset != 0 || format.data_file && self.copied() {
            Cluster::Data { host: HostOffset(offset) }
        } else {
            Cluster::Unallocated
        }
    }

    /// How many of the entries that follow this one, which makes sense, do so with plain data that follows its own in a file that
    /// ends at `host_end`. With subclusters or an external data file it is not told.
    pub(crate) fn continued_by(self, following: &[Self], format: L2Format, host_end: u64) -> usize {
        let Cluster::Data { host } = self.decode(format) else { return 0 };
        if format.extended || format.data_file {
            return 0;
        }
        let bits = format.cluster_bits;
        let in_file = bits.clusters_for(host_end.saturating_sub(host.0)).saturating_sub(1);
        let expected = (1..=in_file).map(|clusters| self.word + (clusters << bits.bits()));
        following.iter().zip(expected).take_while(|(next, expected)| next.word == *expected).count()
    }

    /// What the subclusters from `first` on read as, and how many of them do alike; for extended entries that are not compressed.
    pub(crate) fn subclusters(self, first: u32) -> (Subcluster, u32) {
        let (data, zero) = (self.subclusters & Self::ALL_DATA, self.subclusters >> 32);
        let (kind, like) = if data >> first & 1 == 1 {
            (Subcluster::Data, data)
        } else if zero >> first & 1 == 1 {
            (Subcluster::Zero, zero)
        } else {
            (Subcluster::Unallocated, !(data | zero))
        };
        (kind, (like >> first).trailing_ones().min(L2Format::SUBCLUSTERS - first))
    }

    /// The same entry with some subclusters in another state; for extended entries that are not compressed.
    pub(crate) fn with_subclusters(self, range: Range<u32>, state: Subcluster) -> Self {
        let mask = range.fold(0, |mask, index| mask | 1_u64 << index);
        let (data, zero) = match state {
            Subcluster::Unallocated => (0, 0),
            Subcluster::Zero => (0, mask),
            Subcluster::Data => (mask, 0),
        };
        Self { subclusters: self.subclusters & !(mask | mask << 32) | data | zero << 32, ..self }
    }

    /// Whether all of the cluster is in its place in the file; for entries that are not compressed.
    pub(crate) fn is_all_data(self, format: L2Format) -> bool {
        !format.extended || self.subclusters == Self::ALL_DATA
    }

    /// Why the subclusters' states contradict each other or the entry, if they do; for extended entries that are not compressed.
    pub(crate) fn contradiction(self, cluster: Cluster) -> Option<&'static str> {
        let (data, zero) = (self.subclusters & Self::ALL_DATA, self.subclusters >> 32);
        if data & zero != 0 {
            Some("a subcluster is both allocated and zero")
        } else if data != 0 && cluster == Cluster::Unallocated {
            Some("a subcluster is allocated, but its cluster is not")
        } else {
            None
        }
    }

    /// The same entry saying that its cluster's refcount is exactly one, or that it is not.
    pub(crate) fn with_copied(self, copied: bool) -> Self {
        Self { word: if copied { self.word | COPIED } else { self.word & !COPIED }, ..self }
    }

    /// Whether the entry says that its cluster's refcount is exactly one.
    pub(crate) fn copied(self) -> bool {
        self.word & COPIED != 0
    }

    /// Reserved bits of an entry that is not compressed. The zero flag does not count, as in QEMU, even in version 2.
    pub(crate) fn reserved_bits(self) -> u64 {
        if self.word & COMPRESSED != 0 { 0 } else { self.word & !(OFFSET | COPIED | ZERO) }
    }
}

/// Where in an entry the number of a compressed cluster's sectors begins.
fn compressed_length_shift(bits: ClusterBits) -> u32 {
    62 - (bits.bits() - 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(bits: u32) -> L2Format {
        let cluster_bits = ClusterBits::new(bits).unwrap();
        L2Format { cluster_bits, zero_flag: true, extended: false, data_file: false }
    }

    fn decode(word: u64, bits: u32) -> Cluster {
        L2Entry { word, subclusters: 0 }.decode(format(bits))
    }

    #[test]
    fn decodes_every_kind() {
        assert_eq!(decode(0, 16), Cluster::Unallocated);
        assert_eq!(decode(1, 16), Cluster::Zero { host: None });
        assert_eq!(decode(COPIED | 0x5_0001, 16), Cluster::Zero { host: Some(HostOffset(0x5_0000)) });
        assert_eq!(decode(COPIED | 0x5_0000, 16), Cluster::Data { host: HostOffset(0x5_0000) });
        let first = L2Entry { word: COPIED, subclusters: 0 };
        assert_eq!(first.decode(format(16)), Cluster::Unallocated);
        assert_eq!(first.decode(L2Format { data_file: true, ..format(16) }), Cluster::Data { host: HostOffset(0) });
    }

    #[test]
    fn subclusters_change_alone() {
        let extended = L2Format { extended: true, ..format(16) };
        let entry = L2Entry::owned(HostOffset(0x5_0000), extended).with_subclusters(3..6, Subcluster::Zero);
        assert!(!entry.is_all_data(extended));
        assert_eq!(entry.subclusters(0), (Subcluster::Data, 3));
        assert_eq!(entry.subclusters(3), (Subcluster::Zero, 3));
        let entry = entry.with_subclusters(4..5, Subcluster::Unallocated).with_subclusters(31..32, Subcluster::Zero);
        assert_eq!(entry.subclusters(4), (Subcluster::Unallocated, 1));
        assert_eq!(entry.subclusters(31), (Subcluster::Zero, 1));
        assert!(entry.with_subclusters(0..32, Subcluster::Data).is_all_data(extended));
    }

    #[test]
    fn compressed_length_reaches_to_the_end_of_the_last_sector() {
        let entry = COMPRESSED | 3 << 54 | 0x1_0010;
        assert_eq!(decode(entry, 16), Cluster::Compressed { host: HostOffset(0x1_0010), len: 4 * 512 - 16 });
        let entry = COMPRESSED | 1 << 61 | 0x200;
        assert_eq!(decode(entry, 9), Cluster::Compressed { host: HostOffset(0x200), len: 1024 });
    }

    #[test]
    fn every_subcluster_has_a_state_of_its_own() {
        for index in 0..32 {
            let zero = L2Entry { word: 1 << 16, subclusters: 1 << (32 + index) };
            let data = L2Entry { word: 1 << 16, subclusters: 1 << index };
            assert_eq!(zero.subclusters(index), (Subcluster::Zero, 1));
            assert_eq!(data.subclusters(index), (Subcluster::Data, 1));
            assert_eq!(L2Entry::UNALLOCATED.subclusters(index), (Subcluster::Unallocated, 32 - index));
            if index > 0 {
                assert_eq!(data.subclusters(0), (Subcluster::Unallocated, index));
            }
            let extended = L2Format { extended: true, ..format(16) };
            assert_eq!(data.contradiction(data.decode(extended)), None);
            assert!(data.contradiction(Cluster::Unallocated).is_some());
            let both = L2Entry { subclusters: zero.subclusters | data.subclusters, ..zero };
            assert!(both.contradiction(both.decode(extended)).is_some());
        }
    }
}
