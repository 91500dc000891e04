use crate::error::{Error, Place};
use crate::file::ImageFile;
use crate::header::Header;
use crate::types::{ClusterBits, HostOffset, in_memory};

/// Mask of the offset in a refcount table entry.
const OFFSET: u64 = !0x1ff;

/// Clusters within the file whose refcount is not zero; stops counting at `limit`.
pub(crate) fn count_used(file: &ImageFile, header: &Header, limit: u64) -> Result<u64, Error> {
    let bits = header.cluster_bits;
    let width = RefcountWidth::new(header.refcount_order);
    let end = bits.clusters_for(file.storage.size());
    let entries = u64::from(header.refcount_table_clusters) * bits.words();
    let table = file.read_table(Place::RefcountTable, header.refcount_table, entries)?;
    let mut used = 0;
    let mut block = vec![0; bits.buffer_len()];
    for (index, entry) in (0..).zip(table) {
        let first = index * width.per_block(bits);
        if first >= end || used >= limit {
            break;
        }
        if entry & OFFSET != 0 {
            file.read_padded(&mut block, HostOffset(entry & OFFSET))?;
            let counts = (0..width.per_block(bits).min(end - first)).map(|index| width.get(&block, index));
            used += counts.filter(|&count| count > 0).count() as u64;
        }
    }
    Ok(used.min(limit))
}

/// The width of an image's refcounts: a block is an array of big-endian numbers, or of bit fields from the lowest bit up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RefcountWidth {
    order: u8,
}

impl RefcountWidth {
    /// Counts of `1 << order` bits; `order` is at most 6.
    pub(crate) fn new(order: u8) -> Self {
        Self { order: order.min(6) }
    }

    fn bits(self) -> u32 {
        1 << self.order
    }

    /// The largest count.
    pub(crate) fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Counts in a block, which fills one cluster.
    pub(crate) fn per_block(self, bits: ClusterBits) -> u64 {
        1 << self.per_block_bits(bits)
    }

    /// The logarithm of that.
    pub(crate) fn per_block_bits(self, bits: ClusterBits) -> u32 {
        bits.bits() + 3 - u32::from(self.order)
    }

    /// The count at `index`, or zero past the end of `block`.
    pub(crate) fn get(self, block: &[u8], index: u64) -> u64 {
        let Some(bytes) = block.get(self.bytes_of(index)) else {
            return 0;
        };
        match *bytes {
            [byte] if self.order < 3 => u64::from(byte) >> self.shift(index) & self.max(),
            // What most images have.
            [high, low] => u16::from_be_bytes([high, low]).into(),
            ref bytes => bytes.iter().fold(0, |count, &byte| count << 8 | u64::from(byte)),
        }
    }

    /// Stores `count`, which must not exceed [`max`](Self::max).
    pub(crate) fn set(self, block: &mut [u8], index: u64, count: u64) {
        let shift = self.shift(index);
        let Some(bytes) = block.get_mut(self.bytes_of(index)) else {
            return;
        };
        let stored = count.to_be_bytes();
        match bytes {
            [byte] if self.order < 3 => {
                let [.., mask] = self.max().to_be_bytes();
                *byte = *byte & !(mask << shift) | (stored[7] & mask) << shift;
            }
            bytes => bytes.copy_from_slice(&stored[8 - bytes.len()..]),
        }
    }

    /// Where in a block the count at `index` lies; narrow ones share a byte.
    pub(crate) fn bytes_of(self, index: u64) -> std::ops::Range<usize> {
        if self.order < 3 {
            let byte = in_memory(index >> (3 - self.order));
            return byte..byte + 1;
        }
        let len = 1 << (self.order - 3);
        let start = in_memory(index << (self.order - 3));
        start..start + len
    }

    fn shift(self, index: u64) -> u32 {
        if self.order >= 3 { 0 } else { u32::from(index.to_be_bytes()[7] & ((8 >> self.order) - 1)) << self.order }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let width = RefcountWidth::new(order);
            let mut block = vec![0; 512];
            for index in [0, 1, 5, 8, 63] {
                width.set(&mut block, index, width.max());
            }
            for index in 0..64 {
                let expected = if [0, 1, 5, 8, 63].contains(&index) { width.max() } else { 0 };
                assert_eq!(width.get(&block, index), expected, "count {index} at order {order}");
            }
            width.set(&mut block, 5, 1);
            assert_eq!((width.get(&block, 4), width.get(&block, 5), width.get(&block, 6)), (0, 1, 0));
            assert_eq!(width.get(&block, width.per_block(ClusterBits::new(9).unwrap())), 0);
        }
    }

    #[test]
    fn narrow_counts_begin_at_the_lowest_bit() {
        let mut block = [0; 2];
        RefcountWidth::new(0).set(&mut block, 1, 1);
        RefcountWidth::new(2).set(&mut block, 3, 9);
        assert_eq!(block, [0b10, 0x90]);
    }
}
