use std::collections::BTreeMap;
use std::ops::Range;

use crate::types::in_memory;

/// The bits of a dirty bitmap, in pages of which those without a set bit take no memory.
///
/// Ranges are in bytes of the disk. A bit covers its granularity's worth of bytes, the last one perhaps less.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapContents {
    disk_size: u64,
    granularity: u64,
    /// Bytes of a page: a cluster of the image.
    page_len: usize,
    pages: BTreeMap<u64, Page>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Page {
    AllOnes,
    /// The lowest bit of the first byte comes first.
    Bits(Box<[u8]>),
}

impl Page {
    /// The first bit from `from` on whose value is `set`, or `len` if there is none.
    fn find(&self, from: u64, len: u64, set: bool) -> u64 {
        let Self::Bits(bytes) = self else {
            return if set { from } else { len };
        };
        let skipped = if set { 0 } else { u8::MAX };
        let mut at = from;
        while at < len {
            let byte = bytes.get(in_memory(at / 8)).copied().unwrap_or_default();
            if at.is_multiple_of(8) && byte == skipped {
                at += 8;
            } else if (byte >> (at % 8) & 1 == 1) == set {
                return at;
            } else {
                at += 1;
            }
        }
        len
    }

    fn bytes_mut(&mut self, len: usize) -> &mut [u8] {
        if matches!(self, Self::AllOnes) {
            *self = Self::Bits(vec![u8::MAX; len].into());
        }
        match self {
            Self::Bits(bytes) => bytes,
            Self::AllOnes => &mut [],
        }
    }
}

impl BitmapContents {
    /// No bit set, for a disk of `disk_size` bytes.
    pub(super) fn new(disk_size: u64, granularity: u64, page_len: usize) -> Self {
        Self { disk_size, granularity, page_len, pages: BTreeMap::new() }
    }

    /// Size in bytes of the disk that the bitmap describes.
    #[must_use]
    pub fn disk_size(&self) -> u64 {
        self.disk_size
    }

    /// Bytes of the disk that one bit stands for.
    #[must_use]
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// The dirty ranges of the disk, in order, each as long as it can be.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = self.next_set(next)?;
            let end = self.next_clear(start);
            next = end;
            let bytes = |bit: u64| bit.saturating_mul(self.granularity).min(self.disk_size);
            Some(bytes(start)..bytes(end))
        })
    }

    /// Bytes of the disk that are dirty.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.ranges().map(|range| range.end - range.start).sum()
    }

    /// Sets the bits that a range of the disk touches.
    pub(crate) fn mark(&mut self, range: Range<u64>) {
        let end = range.end.min(self.disk_size);
        if range.start < end {
            self.mark_bits(range.start / self.granularity..end.div_ceil(self.granularity));
        }
    }

    /// Sets the bits of all that `other`, which may have another granularity, calls dirty.
    pub(super) fn merge(&mut self, other: &Self) {
        other.ranges().for_each(|range| self.mark(range));
    }

    pub(super) fn clear(&mut self) {
        self.pages.clear();
    }

    /// Follows the disk to another size; what it gains is clean.
    pub(super) fn resize(&mut self, disk_size: u64) {
        self.disk_size = disk_size;
        self.trim();
    }

    /// Bytes that the bits take.
    pub(super) fn byte_len(&self) -> u64 {
        self.bits().div_ceil(8)
    }

    /// Pages that the bitmap has, with or without set bits.
    pub(super) fn page_count(&self) -> u64 {
        self.bits().div_ceil(self.page_bits())
    }

    /// The pages that have set bits, as they are stored.
    pub(super) fn stored_pages(&self) -> impl Iterator<Item = (u64, Vec<u8>)> {
        self.pages.iter().filter_map(|(&index, page)| {
            let bytes = match page {
                Page::AllOnes => vec![u8::MAX; self.page_len],
                Page::Bits(bytes) => bytes.to_vec(),
            };
            bytes.iter().any(|&byte| byte != 0).then_some((index, bytes))
        })
    }

    /// Takes in a page as it is stored; `None` is one of ones.
    pub(super) fn load_page(&mut self, index: u64, bytes: Option<Vec<u8>>) {
        let page = bytes.map_or(Page::AllOnes, |bytes| Page::Bits(bytes.into()));
        self.pages.insert(index, page);
    }

    /// Clears what lies past the disk's end.
    pub(super) fn trim(&mut self) {
        let (count, page_bits) = (self.page_count(), self.page_bits());
        self.pages.split_off(&count);
        let used = self.bits() - count.saturating_sub(1) * page_bits;
        if used < page_bits
            && let Some(last) = self.pages.get_mut(&count.saturating_sub(1))
        {
            fill(last.bytes_mut(self.page_len), used..page_bits, false);
        }
    }

    fn bits(&self) -> u64 {
        self.disk_size.div_ceil(self.granularity)
    }

    fn page_bits(&self) -> u64 {
        self.page_len as u64 * 8
    }

    fn mark_bits(&mut self, bits: Range<u64>) {
        let (page_bits, page_len) = (self.page_bits(), self.page_len);
        let mut next = bits.start;
        while next < bits.end {
            let (index, first) = (next / page_bits, next % page_bits);
            let last = (bits.end - index * page_bits).min(page_bits);
            if first == 0 && last == page_bits {
                self.pages.insert(index, Page::AllOnes);
            } else {
                let page = self.pages.entry(index).or_insert_with(|| Page::Bits(vec![0; page_len].into()));
                if let Page::Bits(bytes) = page {
                    fill(bytes, first..last, true);
                }
            }
            next = index * page_bits + last;
        }
    }

    fn next_set(&self, from: u64) -> Option<u64> {
        let page_bits = self.page_bits();
        self.pages.range(from / page_bits..).find_map(|(&index, page)| {
            let start = index * page_bits;
            let found = page.find(from.saturating_sub(start), page_bits, true);
            (found < page_bits).then_some(start + found)
        })
    }

    /// The first clear bit from `from` on, which lies past the disk if all are set.
    fn next_clear(&self, from: u64) -> u64 {
        let page_bits = self.page_bits();
        let mut at = from;
        while let Some(page) = self.pages.get(&(at / page_bits)) {
            let start = at / page_bits * page_bits;
            let found = page.find(at - start, page_bits, false);
            at = start + found;
            if found < page_bits {
                break;
            }
        }
        at
    }
}

/// Sets or clears a range of bits.
fn fill(bytes: &mut [u8], bits: Range<u64>, set: bool) {
    let mut at = bits.start;
    while at < bits.end {
        let Some(byte) = bytes.get_mut(in_memory(at / 8)) else {
            return;
        };
        let end = (at / 8 * 8 + 8).min(bits.end);
        let mask = (u8::MAX << (at % 8)) & (u8::MAX >> ((8 - end % 8) % 8));
        *byte = if set { *byte | mask } else { *byte & !mask };
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: usize = 8;

    fn ranges_of(bits: &[bool], granularity: u64, disk_size: u64) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (bit, _) in (0..).zip(bits).filter(|(_, set)| **set) {
            let range = bit * granularity..((bit + 1) * granularity).min(disk_size);
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn marks_as_a_list_of_bits(
            sizes in (1..200_000_u64, 1..200_000_u64),
            marks in proptest::collection::vec((0..200_000_u64, 0..60_000_u64), 0..6),
            order in 9..12_u32,
        ) {
            let granularity = 1 << order;
            let mut contents = BitmapContents::new(sizes.0, granularity, PAGE);
            let mut bits = vec![false; in_memory(sizes.0.div_ceil(granularity))];
            for (start, len) in marks {
                contents.mark(start..start + len);
                let end = (start + len).min(sizes.0);
                if start < end {
                    bits[in_memory(start / granularity)..in_memory(end.div_ceil(granularity))].fill(true);
                }
            }
            prop_assert_eq!(contents.ranges().collect::<Vec<_>>(), ranges_of(&bits, granularity, sizes.0));
            contents.resize(sizes.1);
            bits.resize(in_memory(sizes.1.div_ceil(granularity)), false);
            prop_assert_eq!(contents.ranges().collect::<Vec<_>>(), ranges_of(&bits, granularity, sizes.1));
            let mut loaded = BitmapContents::new(sizes.1, granularity, PAGE);
            contents.stored_pages().for_each(|(index, bytes)| loaded.load_page(index, Some(bytes)));
            prop_assert_eq!(loaded.ranges().collect::<Vec<_>>(), contents.ranges().collect::<Vec<_>>());
        }
    }

    #[test]
    fn merges_into_coarser_and_finer_bits() {
        let mut fine = BitmapContents::new(10_000, 512, PAGE);
        fine.mark(1000..1001);
        fine.mark(9999..10_000);
        let mut coarse = BitmapContents::new(10_000, 4096, PAGE);
        coarse.merge(&fine);
        assert_eq!(coarse.ranges().collect::<Vec<_>>(), [0..4096, 8192..10_000]);
        fine.merge(&coarse);
        assert_eq!(fine.ranges().collect::<Vec<_>>(), [0..4096, 8192..10_000]);
        assert_eq!(fine.dirty_bytes(), 4096 + 10_000 - 8192);
    }

    #[test]
    fn a_page_of_ones_ends_with_the_disk() {
        let mut contents = BitmapContents::new(512 * 70, 512, PAGE);
        contents.load_page(0, None);
        contents.load_page(1, None);
        contents.trim();
        assert_eq!(contents.ranges().collect::<Vec<_>>(), std::slice::from_ref(&(0..512 * 70)));
        assert_eq!(contents.stored_pages().last().unwrap().1, [0x3f, 0, 0, 0, 0, 0, 0, 0]);
    }
}
