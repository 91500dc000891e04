use std::collections::BTreeMap;
use std::ops::Range;

/// The guest ranges that a transaction has changed, joined where they touch.
#[derive(Clone, Debug, Default)]
pub(super) struct DirtyRanges(BTreeMap<u64, u64>);

impl DirtyRanges {
    pub(super) fn add(&mut self, range: Range<u64>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        let touching = self.0.range(..=end).rev().take_while(|&(_, &other)| other >= start).map(|(&other, _)| other);
        for other in touching.collect::<Vec<_>>() {
            start = start.min(other);
            end = end.max(self.0.remove(&other).unwrap_or(end));
        }
        self.0.insert(start, end);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().map(|(&start, &end)| start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_what_touches() {
        let mut dirty = DirtyRanges::default();
        for range in [10..20, 30..40, 0..5, 20..25, 24..31, 50..50, 60..61] {
            dirty.add(range);
        }
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [0..5, 10..40, 60..61]);
    }
}
