//! Bitmaps of blocks and inodes: bit `n` is bit `n % 8` of byte `n / 8`, set where in use.

use std::ops::Range;

const WORD_BITS: u32 = 64;

/// The first bit of `range` that is `value`, or the range's end.
pub(crate) fn find(bytes: &[u8], range: Range<u32>, value: bool) -> u32 {
    let mut at = range.start;
    while at < range.end {
        let word = word(bytes, at / WORD_BITS);
        let wanted = if value { word } else { !word } >> (at % WORD_BITS);
        if wanted != 0 {
            return (at + wanted.trailing_zeros()).min(range.end);
        }
        at = (at / WORD_BITS + 1) * WORD_BITS;
    }
    range.end
}

/// A word of the bitmap; what lies past its end counts as in use.
fn word(bytes: &[u8], index: u32) -> u64 {
    let bytes = bytes.get(index as usize * 8..).unwrap_or_default();
    let mut word = [0xff; 8];
    let len = bytes.len().min(8);
    word[..len].copy_from_slice(&bytes[..len]);
    u64::from_le_bytes(word)
}

/// Sets every bit of `range`, which must lie in the bitmap, to `value`.
pub(crate) fn fill(bytes: &mut [u8], range: Range<u32>, value: bool) {
    let mut at = range.start;
    while at < range.end {
        let Some(byte) = bytes.get_mut(at as usize / 8) else { return };
        if at.is_multiple_of(8) && range.end - at >= 8 {
            *byte = if value { 0xff } else { 0 };
            at += 8;
            continue;
        }
        let bit = 1 << (at % 8);
        *byte = if value { *byte | bit } else { *byte & !bit };
        at += 1;
    }
}

/// How many bits of `range` are clear.
pub(crate) fn count_clear(bytes: &[u8], range: Range<u32>) -> u32 {
    runs(bytes, range).map(|run| run.end - run.start).sum()
}

/// The runs of clear bits in `range`.
pub(crate) fn runs(bytes: &[u8], range: Range<u32>) -> impl Iterator<Item = Range<u32>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = find(bytes, at..range.end, false);
        at = find(bytes, start..range.end, true);
        (start < at).then_some(start..at)
    })
}

/// The first run of at least `want` clear bits in `range`, cut to `want`; or else the longest one.
pub(crate) fn best_run(bytes: &[u8], range: Range<u32>, want: u32) -> Option<Range<u32>> {
    let mut longest: Option<Range<u32>> = None;
    for run in runs(bytes, range) {
        if run.len() >= want as usize {
            return Some(run.start..run.start + want);
        }
        if longest.as_ref().is_none_or(|longest| longest.len() < run.len()) {
            longest = Some(run);
        }
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_and_fills_across_words() {
        let mut bytes = vec![0; 40];
        fill(&mut bytes, 3..130, true);
        fill(&mut bytes, 140..320, true);
        fill(&mut bytes, 200..203, false);
        assert_eq!(runs(&bytes, 0..320).collect::<Vec<_>>(), [0..3, 130..140, 200..203]);
        assert_eq!(runs(&bytes, 1..135).collect::<Vec<_>>(), [1..3, 130..135]);
        assert_eq!(count_clear(&bytes, 0..320), 16);
        assert_eq!(best_run(&bytes, 0..320, 2), Some(0..2));
        assert_eq!(best_run(&bytes, 0..320, 4), Some(130..134));
        assert_eq!(best_run(&bytes, 0..320, 100), Some(130..140));
        assert_eq!(best_run(&bytes, 5..100, 1), None);
        assert_eq!(find(&bytes, 0..1000, false), 0);
        assert_eq!(find(&bytes, 310..1000, false), 1000);
    }
}
