use std::ops::Range;

use qtk_block::is_zero;

use crate::layer::SECTOR;

/// When zeroes that are stored count as a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Detection {
    /// Bytes of zeroes that make a hole between data; with 0 there are no holes.
    pub(crate) min: u64,
    /// What holes begin and end at multiples of, a power of two.
    pub(crate) align: u64,
}

impl Detection {
    /// `qemu-img`'s for its option `-S`.
    pub(crate) fn sparse(min: u64) -> Self {
        let align = if min == 0 { SECTOR } else { 1 << min.ilog2() };
        Self { min, align: align.max(SECTOR) }
    }

    /// Every `grain` bytes of zeroes are a hole.
    pub(crate) fn every(grain: u64) -> Self {
        Self { min: grain, align: grain }
    }

    /// Calls `each` with the parts of `bytes`, which begin at `start` on the disk, and whether they are a hole.
    pub(crate) fn split(self, bytes: &[u8], start: u64, mut each: impl FnMut(Range<usize>, bool)) {
        if self.min == 0 {
            return each(0..bytes.len(), false);
        }
        let mut blocks = Blocks { detection: self, bytes, start, at: 0 }.peekable();
        while let Some((mut part, hole)) = blocks.next() {
            if hole {
                while let Some((more, _)) = blocks.next_if(|(_, hole)| *hole) {
                    part.end = more.end;
                }
                each(part, true);
                continue;
            }
            // Holes that are too small belong to the data around them.
            let mut hole_from = part.end;
            while let Some((more, hole)) = blocks.next_if(|(more, hole)| !hole || more.end - hole_from < self.min_len())
            {
                if !hole {
                    hole_from = more.end;
                }
                part.end = more.end;
            }
            each(part.start..hole_from, false);
            if hole_from < part.end {
                part.start = hole_from;
                while let Some((more, _)) = blocks.next_if(|(_, hole)| *hole) {
                    part.end = more.end;
                }
                each(part, true);
            }
        }
    }

    fn min_len(self) -> usize {
        usize::try_from(self.min).unwrap_or(usize::MAX)
    }
}

/// The aligned blocks of a piece of the disk, and whether each is zero.
struct Blocks<'a> {
    detection: Detection,
    bytes: &'a [u8],
    start: u64,
    at: usize,
}

impl Iterator for Blocks<'_> {
    type Item = (Range<usize>, bool);

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.bytes.len() - self.at;
        if rest == 0 {
            return None;
        }
        let align = self.detection.align;
        let to_border = align - ((self.start + self.at as u64) & (align - 1));
        let len = usize::try_from(to_border).unwrap_or(usize::MAX);
        let block = self.at..self.at + len.min(rest);
        self.at = block.end;
        Some((block.clone(), is_zero(&self.bytes[block])))
    }
}
