//! Which blocks of a new file system are taken.

use std::collections::BTreeMap;
use std::ops::Range;

/// Taken blocks as runs that do not touch: far fewer than there are groups, however large the file system.
#[derive(Clone, Debug)]
pub(super) struct Space {
    /// End of each run by its start.
    taken: BTreeMap<u64, u64>,
    first: u64,
    end: u64,
}

impl Space {
    pub(super) fn new(blocks: Range<u64>) -> Self {
        Self { taken: BTreeMap::new(), first: blocks.start, end: blocks.end }
    }

    /// Takes blocks that are free.
    pub(super) fn take(&mut self, blocks: Range<u64>) {
        let (mut start, mut end) = (blocks.start, blocks.end);
        if let Some((&before, &its_end)) = self.taken.range(..=start).next_back()
            && its_end >= start
        {
            start = before;
            end = end.max(its_end);
        }
        while let Some((&after, &its_end)) = self.taken.range(start + 1..=end).next() {
            self.taken.remove(&after);
            end = end.max(its_end);
        }
        self.taken.insert(start, end);
    }

    /// The runs that are taken within a range, cut to it.
    pub(super) fn taken_in(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let before = self.taken.range(..range.start).next_back();
        let runs = before.into_iter().chain(self.taken.range(range.clone()));
        runs.map(move |(&start, &end)| start.max(range.start)..end.min(range.end)).filter(|run| run.start < run.end)
    }

    /// The first free block at or behind `from`, and how many follow it at least, up to `most`.
    fn next_run(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let mut start = from.max(self.first);
        if let Some((_, &end)) = self.taken.range(..=start).next_back() {
            start = start.max(end);
        }
        let limit = self.taken.range(start..).next().map_or(self.end, |(&next, _)| next);
        (start < limit).then(|| start..limit.min(start.saturating_add(most)))
    }

    /// The first place in `starts` where `len` free blocks start; they may end behind it.
    pub(super) fn find(&self, starts: Range<u64>, len: u64) -> Option<u64> {
        let mut at = starts.start;
        while at < starts.end {
            let run = self.next_run(at, len)?;
            if run.end - run.start >= len {
                return Some(run.start).filter(|&start| start < starts.end);
            }
            at = run.end;
        }
        None
    }

    /// The first free run at or behind `goal`, or else from the start, cut to `most` blocks.
    pub(super) fn first_free(&self, goal: u64, most: u64) -> Option<Range<u64>> {
        self.next_run(goal, most).or_else(|| self.next_run(self.first, most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_and_finds() {
        let mut space = Space::new(1..100);
        for run in [10..20, 30..40, 20..25, 25..30, 60..61] {
            space.take(run);
        }
        assert_eq!(space.taken.iter().map(|(&start, &end)| start..end).collect::<Vec<_>>(), [10..40, 60..61]);
        assert_eq!(space.find(0..100, 9), Some(1));
        assert_eq!(space.find(5..100, 9), Some(40));
        assert_eq!(space.find(5..40, 9), None);
        assert_eq!(space.find(0..100, 40), None);
        assert_eq!(space.first_free(35, 50), Some(40..60));
        assert_eq!(space.first_free(99, 50), Some(99..100));
        assert_eq!(space.first_free(100, 5), Some(1..6));
        assert_eq!(space.taken_in(15..61).collect::<Vec<_>>(), [15..40, 60..61]);
    }
}
