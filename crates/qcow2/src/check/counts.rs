use std::ops::Range;

use crate::refcount::RefcountWidth;
use crate::types::{HostCluster, in_memory};

/// Clusters that a page counts. All pages of the largest file that a check takes are 64 Ki entries of an array.
const PER_PAGE: u64 = 1 << 15;
/// Most clusters are used once or not at all: two bits are enough for them.
const FIRST_ORDER: u8 = 1;
/// What comes next is a byte.
const BYTE_ORDER: u8 = 3;
/// Four clusters of such a page, each used once.
const FOUR_ONES: u8 = 0b0101_0101;

/// References counted so far. A page exists where something was counted and is as wide as its largest count needs, so that
/// memory follows what is in use, and not the width of the image's refcounts.
#[derive(Debug)]
pub(crate) struct Counts {
    pages: Vec<Option<Page>>,
    /// The largest count that the image can store.
    limit: u64,
    /// Clusters of the file, and perhaps one more that reaches past its end.
    clusters: u64,
}

#[derive(Debug)]
struct Page {
    order: u8,
    bytes: Box<[u8]>,
}

impl Page {
    fn new(order: u8) -> Self {
        Self { order, bytes: vec![0; in_memory((PER_PAGE << order) / 8)].into() }
    }

    fn get(&self, index: u64) -> u64 {
        RefcountWidth::new(self.order).get(&self.bytes, index)
    }

    /// Counts one reference more to each of `indices`; those whose count is at its limit go to `full` instead.
    fn add(&mut self, indices: Range<u64>, limit: u64, mut full: impl FnMut(u64)) {
        let mut next = indices.start;
        while next < indices.end {
            // Four at a time: most are counted for the first time, in runs.
            if next.is_multiple_of(4)
                && next + 4 <= indices.end
                && self.order == FIRST_ORDER
                && let Some(byte @ 0) = self.bytes.get_mut(in_memory(next / 4))
            {
                *byte = FOUR_ONES;
                next += 4;
                continue;
            }
            match self.get(next) {
                count if count == limit => full(next),
                count => self.set(next, count + 1),
            }
            next += 1;
        }
    }

    fn set(&mut self, index: u64, count: u64) {
        while count > RefcountWidth::new(self.order).max() {
            // Clusters that hold compressed ones soon have dozens of users.
            let mut wider = Self::new((self.order + 1).max(BYTE_ORDER));
            (0..PER_PAGE).filter(|&index| self.get(index) > 0).for_each(|index| wider.set(index, self.get(index)));
            *self = wider;
        }
        RefcountWidth::new(self.order).set(&mut self.bytes, index, count);
    }
}

impl Counts {
    /// Counts for an image of `clusters` clusters whose refcounts are `width` wide.
    pub(crate) fn new(width: RefcountWidth, clusters: u64) -> Self {
        Self { pages: Vec::new(), limit: width.max(), clusters }
    }

    /// Clusters of the file, and those past its end that something refers to.
    pub(crate) fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Counts one reference more to each of `clusters`; those whose count is at its limit go to `full` instead.
    pub(crate) fn add(&mut self, clusters: Range<u64>, mut full: impl FnMut(HostCluster)) {
        let (mut next, limit) = (clusters.start, self.limit);
        while next < clusters.end {
            let page = next - next % PER_PAGE;
            let end = clusters.end.min(page + PER_PAGE);
            self.page_mut(next).add(next - page..end - page, limit, |index| full(HostCluster(page + index)));
            self.clusters = self.clusters.max(end);
            next = end;
        }
    }

    /// The page of a cluster, which is made where there is none.
    fn page_mut(&mut self, cluster: u64) -> &mut Page {
        let page = in_memory(cluster / PER_PAGE);
        if self.pages.len() <= page {
            self.pages.resize_with(page + 1, || None);
        }
        self.pages[page].get_or_insert_with(|| Page::new(FIRST_ORDER))
    }

    pub(crate) fn set(&mut self, cluster: HostCluster, count: u64) {
        self.clusters = self.clusters.max(cluster.0 + 1);
        self.page_mut(cluster.0).set(cluster.0 % PER_PAGE, count);
    }

    pub(crate) fn get(&self, cluster: HostCluster) -> u64 {
        self.page(cluster.0).map_or(0, |page| page.get(cluster.0 % PER_PAGE))
    }

    fn page(&self, cluster: u64) -> Option<&Page> {
        self.pages.get(in_memory(cluster / PER_PAGE))?.as_ref()
    }

    /// The counts of clusters that lie in one page.
    pub(crate) fn run(&self, clusters: Range<u64>) -> impl Iterator<Item = u64> {
        let page = self.page(clusters.start);
        clusters.map(move |cluster| page.map_or(0, |page| page.get(cluster % PER_PAGE)))
    }

    /// Where the page of a cluster ends.
    pub(crate) fn page_end(cluster: HostCluster) -> HostCluster {
        HostCluster((cluster.0 / PER_PAGE + 1) * PER_PAGE)
    }

    /// The first cluster from `cluster` on that may have references; false leads past the last one.
    pub(crate) fn skip_unused(&self, cluster: HostCluster) -> HostCluster {
        let page = in_memory(cluster.0 / PER_PAGE);
        let rest = self.pages.get(page..).unwrap_or_default();
        match rest.iter().position(Option::is_some) {
            Some(0) => cluster,
            Some(pages) => HostCluster((page + pages) as u64 * PER_PAGE),
            None => HostCluster(u64::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_widen_as_counts_grow() {
        let mut counts = Counts::new(RefcountWidth::new(4), 3);
        let cluster = HostCluster(PER_PAGE * 3 + 5);
        let mut full = Vec::new();
        for _ in 0..=u64::from(u16::MAX) {
            counts.add(cluster.0..cluster.0 + 1, |cluster| full.push(cluster));
        }
        assert_eq!(full, [cluster]);
        counts.add(cluster.0 + 1..cluster.0 + 2, |cluster| full.push(cluster));
        assert_eq!((counts.get(cluster), counts.get(HostCluster(cluster.0 + 1))), (65535, 1));
        assert_eq!(counts.clusters(), cluster.0 + 2);
        assert_eq!(counts.skip_unused(HostCluster(7)), HostCluster(PER_PAGE * 3));
        assert_eq!(counts.get(HostCluster(7)), 0);
    }

    #[test]
    fn runs_count_each_of_their_clusters() {
        let mut counts = Counts::new(RefcountWidth::new(1), 0);
        let runs = [1..2 * PER_PAGE + 3, 3..18, PER_PAGE - 2..PER_PAGE + 9, 16..17, 16..17];
        let mut full = Vec::new();
        for run in runs.clone() {
            counts.add(run, |cluster| full.push(cluster.0));
        }
        for cluster in 0..2 * PER_PAGE + 5 {
            let references = runs.iter().filter(|run| run.contains(&cluster)).count() as u64;
            assert_eq!(counts.get(HostCluster(cluster)), references.min(3), "cluster {cluster}");
        }
        assert_eq!((full, counts.clusters()), (vec![16], 2 * PER_PAGE + 3));
    }
}
