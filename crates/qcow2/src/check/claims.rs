use std::collections::BTreeMap;
use std::ops::Range;

/// Runs that are kept apart at most.
const MAX_RUNS: usize = 1 << 16;

/// Clusters beyond the end of the file that something refers to all the same. Nothing new may be put there, or it would be
/// taken for what was lost.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claims {
    /// Ends of runs by their starts; runs do not touch.
    runs: BTreeMap<u64, u64>,
}

impl Claims {
    pub(crate) fn add(&mut self, clusters: Range<u64>) {
        let Range { mut start, mut end } = clusters;
        while let Some((&other_start, &other_end)) =
            self.runs.range(..=end).next_back().filter(|(_, other)| **other >= start)
        {
            start = start.min(other_start);
            end = end.max(other_end);
            self.runs.remove(&other_start);
        }
        self.runs.insert(start, end);
        if self.runs.len() > MAX_RUNS {
            self.join_nearest();
        }
    }

    /// Closes the smaller half of the gaps between runs, which claims a little more.
    fn join_nearest(&mut self) {
        let mut gaps: Vec<u64> = self.gaps().map(|(_, gap)| gap).collect();
        gaps.sort_unstable();
        let Some(&median) = gaps.get(gaps.len() / 2) else { return };
        let joined: Vec<u64> = self.gaps().filter(|&(_, gap)| gap <= median).map(|(start, _)| start).collect();
        for start in joined.into_iter().rev() {
            if let Some(end) = self.runs.remove(&start)
                && let Some((_, previous)) = self.runs.range_mut(..start).next_back()
            {
                *previous = end;
            }
        }
    }

    /// Starts of runs but the first, and how far each is from the one before.
    fn gaps(&self) -> impl Iterator<Item = (u64, u64)> {
        self.runs.iter().zip(self.runs.iter().skip(1)).map(|((_, end), (&start, _))| (start, start - end))
    }

    /// The first of `count` clusters in a row from `from` on that nothing refers to.
    pub(crate) fn skip(&self, from: u64, count: u64) -> u64 {
        let mut start = from;
        let reaching = self.runs.range(..=from).next_back();
        for (&run, &end) in reaching.into_iter().chain(self.runs.range(from.saturating_add(1)..)) {
            if run >= start.saturating_add(count) {
                break;
            }
            start = start.max(end);
        }
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_and_are_skipped() {
        let mut claims = Claims::default();
        [10..12, 20..21, 12..14, 5..6, 19..23].into_iter().for_each(|run| claims.add(run));
        assert_eq!(claims.runs, BTreeMap::from([(5, 6), (10, 14), (19, 23)]));
        assert_eq!((claims.skip(0, 5), claims.skip(0, 6), claims.skip(11, 5), claims.skip(11, 6)), (0, 23, 14, 23));
        assert_eq!(claims.skip(23, 100), 23);
    }

    #[test]
    fn many_runs_are_joined_where_they_are_near() {
        let mut claims = Claims::default();
        (2..MAX_RUNS as u64 + 4).for_each(|n| claims.add(n * n..n * n + 1));
        assert!(claims.runs.len() < MAX_RUNS);
        assert!((2..MAX_RUNS as u64 + 4).all(|n| claims.skip(n * n, 1) > n * n));
    }
}
