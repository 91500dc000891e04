use crate::refcount::RefcountWidth;
use crate::types::{HostCluster, in_memory};

/// Clusters that a page counts. All pages of the largest file that a check takes are 64 Ki entries of an array.
const PER_PAGE: u64 = 1 << 15;
/// Most clusters are used once or not at all: two bits are enough for them.
const FIRST_ORDER: u8 = 1;

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

    fn set(&mut self, index: u64, count: u64) {
        while count > RefcountWidth::new(self.order).max() {
            let mut wider = Self::new(self.order + 1);
            (0..PER_PAGE).for_each(|index| wider.set(index, self.get(index)));
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

    /// Counts one reference more; false if the count is at its limit.
    pub(crate) fn add(&mut self, cluster: HostCluster) -> bool {
        let count = self.get(cluster);
        if count == self.limit {
            self.clusters = self.clusters.max(cluster.0 + 1);
            return false;
        }
        self.set(cluster, count + 1);
        true
    }

    pub(crate) fn set(&mut self, cluster: HostCluster, count: u64) {
        self.clusters = self.clusters.max(cluster.0 + 1);
        let page = in_memory(cluster.0 / PER_PAGE);
        if self.pages.len() <= page {
            self.pages.resize_with(page + 1, || None);
        }
        self.pages[page].get_or_insert_with(|| Page::new(FIRST_ORDER)).set(cluster.0 % PER_PAGE, count);
    }

    pub(crate) fn get(&self, cluster: HostCluster) -> u64 {
        match self.pages.get(in_memory(cluster.0 / PER_PAGE)) {
            Some(Some(page)) => page.get(cluster.0 % PER_PAGE),
            _ => 0,
        }
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
        for _ in 0..u64::from(u16::MAX) {
            assert!(counts.add(cluster));
        }
        assert!(!counts.add(cluster));
        assert!(counts.add(HostCluster(cluster.0 + 1)));
        assert_eq!((counts.get(cluster), counts.get(HostCluster(cluster.0 + 1))), (65535, 1));
        assert_eq!(counts.clusters(), cluster.0 + 2);
        assert_eq!(counts.skip_unused(HostCluster(7)), HostCluster(PER_PAGE * 3));
        assert_eq!(counts.get(HostCluster(7)), 0);
    }
}
