use crate::types::{ClusterBits, HostOffset, Version};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const SECTOR: u64 = 512;

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

    /// Whether the entry says that the table's refcount is exactly one.
    pub(crate) fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    pub(crate) fn reserved_bits(self) -> u64 {
        self.0 & !(OFFSET | COPIED)
    }
}

/// An entry of an L2 table (specification, "L2 table entry").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct L2Entry(pub(crate) u64);

/// What an L2 entry says about its guest cluster.
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

impl L2Entry {
    /// Reads through to the backing.
    pub(crate) const UNALLOCATED: Self = Self(0);
    /// Reads as zeroes; version 3 only.
    pub(crate) const PLAIN_ZERO: Self = Self(ZERO);

    /// A data cluster that nothing else refers to.
    pub(crate) fn owned(host: HostOffset) -> Self {
        Self(host.0 | COPIED)
    }

    pub(crate) fn decode(self, bits: ClusterBits, version: Version) -> Cluster {
        if self.0 & COMPRESSED != 0 {
            let length_shift = 62 - (bits.bits() - 8);
            let host = self.0 & ((1 << length_shift) - 1);
            let sectors = ((self.0 & !(COPIED | COMPRESSED)) >> length_shift) + 1;
            return Cluster::Compressed { host: HostOffset(host), len: sectors * SECTOR - host % SECTOR };
        }
        let host = Some(self.0 & OFFSET).filter(|&offset| offset != 0).map(HostOffset);
        // In version 2 the bit is reserved.
        if self.0 & ZERO != 0 && version >= Version::V3 {
            return Cluster::Zero { host };
        }
        host.map_or(Cluster::Unallocated, |host| Cluster::Data { host })
    }

    /// Whether the entry says that its cluster's refcount is exactly one.
    pub(crate) fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Reserved bits of an entry that is not compressed. The zero flag does not count, as in QEMU, even in version 2.
    pub(crate) fn reserved_bits(self) -> u64 {
        if self.0 & COMPRESSED != 0 { 0 } else { self.0 & !(OFFSET | COPIED | ZERO) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(entry: u64, bits: u32) -> Cluster {
        L2Entry(entry).decode(ClusterBits::new(bits).unwrap(), Version::V3)
    }

    #[test]
    fn decodes_every_kind() {
        assert_eq!(decode(0, 16), Cluster::Unallocated);
        assert_eq!(decode(1, 16), Cluster::Zero { host: None });
        assert_eq!(decode(COPIED | 0x5_0001, 16), Cluster::Zero { host: Some(HostOffset(0x5_0000)) });
        assert_eq!(decode(COPIED | 0x5_0000, 16), Cluster::Data { host: HostOffset(0x5_0000) });
        assert_eq!(L2Entry(1).decode(ClusterBits::default(), Version::V2), Cluster::Unallocated);
    }

    #[test]
    fn compressed_length_reaches_to_the_end_of_the_last_sector() {
        let entry = COMPRESSED | 3 << 54 | 0x1_0010;
        assert_eq!(decode(entry, 16), Cluster::Compressed { host: HostOffset(0x1_0010), len: 4 * 512 - 16 });
        let entry = COMPRESSED | 1 << 61 | 0x200;
        assert_eq!(decode(entry, 9), Cluster::Compressed { host: HostOffset(0x200), len: 1024 });
    }
}
