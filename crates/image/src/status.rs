use std::ops::Range;

use qtk_qcow2::MappingKind;

use crate::chain::{Run, Runs};
use crate::{Chain, ChainLayer, Error};

/// Bytes of an L2 table that QEMU looks at in one step.
const L2_SLICE: u64 = 64 << 10;

/// A run of a chain, as QEMU finds it.
#[derive(Clone, Debug)]
pub(crate) struct Status {
    pub(crate) run: Run,
    /// Whether its data is a hole of the file, and reads as zeroes.
    pub(crate) is_hole: bool,
    /// Whether it has a place in the file, though nothing is stored there.
    pub(crate) is_reserved: bool,
}

/// How a chain stores its disk, in the steps in which QEMU finds out.
///
/// They show in what `qemu-img` does: where it looks for zeroes, and in what `compare -s` calls different.
#[derive(Debug)]
pub(crate) struct Statuses<'a> {
    chain: &'a Chain,
    runs: Runs<'a>,
    /// What is left of the last run.
    rest: Option<Run>,
}

impl<'a> Statuses<'a> {
    pub(crate) fn new(chain: &'a Chain, range: Range<u64>) -> Self {
        Self { chain, runs: chain.runs(range), rest: None }
    }

    /// Goes on at `offset`, which lies past what was returned so far: where that failed, and the caller wants to know what
    /// follows.
    pub(crate) fn seek(&mut self, offset: u64) {
        self.rest = None;
        self.runs.seek(offset);
    }

    /// Where the first step of a run ends.
    fn step_end(&self, run: &Run) -> u64 {
        let Range { start, end } = run.range;
        let layers = self.chain.layers().iter().take(run.depth + 1);
        let steps = layers.filter_map(step_of).map(|step| (start - start % step).saturating_add(step));
        steps.min().map_or(end, |stop| stop.min(end))
    }

    fn first_of(&mut self, run: Run) -> Result<Status, Error> {
        let end = self.step_end(&run);
        let front = Run { range: run.range.start..end, ..run };
        let mut status = Status { run: front, is_hole: false, is_reserved: false };
        let layer = &self.chain.layers()[run.depth];
        if let MappingKind::Data { host } = run.kind
            && layer.tells_holes()?
        {
            let (host_end, is_hole) = layer.hole(host.0..host.0.saturating_add(end - run.range.start))?;
            status.run.range.end = run.range.start + (host_end - host.0);
            status.is_hole = is_hole;
        }
        if run.kind == MappingKind::Unallocated {
            let (front, host) = layer.reserved(status.run.range.clone())?;
            (status.run.range, status.is_reserved) = (front, host.is_some());
        }
        let stop = status.run.range.end;
        self.rest = (stop < run.range.end).then(|| Run {
            range: stop..run.range.end,
            depth: run.depth,
            kind: run.kind.skip(stop - run.range.start),
        });
        Ok(status)
    }
}

impl Iterator for Statuses<'_> {
    type Item = Result<Status, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let run = match self.rest.take() {
            Some(run) => run,
            None => match self.runs.next()? {
                Ok(run) => run,
                Err(error) => return Some(Err(error)),
            },
        };
        Some(self.first_of(run))
    }
}

/// Bytes of the disk that QEMU looks up in one step in a layer, if it has tables.
fn step_of(layer: &ChainLayer) -> Option<u64> {
    let header = layer.qcow2()?.header();
    let cluster = header.cluster_bits.size();
    let entry = if header.extended_l2() { 16 } else { 8 };
    Some(cluster.min(L2_SLICE) / entry * cluster)
}

/// What QEMU says of a run besides where it lies. Equal for runs that `compare -s` takes to be stored alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StatusFlags {
    allocated: bool,
    zero: bool,
    has_offset: bool,
    compressed: bool,
    /// Whether the disk ends here.
    last: bool,
}

impl StatusFlags {
    pub(crate) fn new(chain: &Chain, status: &Status, disk_size: u64) -> Self {
        let run = &status.run;
        let (allocated, zero, has_offset) = match run.kind {
            // A layer that is too short hides nothing, but says so.
            MappingKind::Unallocated => (chain.layers().len() > run.depth + 1, true, status.is_reserved),
            MappingKind::Zero { host } => (true, true, host.is_some()),
            MappingKind::Data { .. } => (true, status.is_hole, true),
            MappingKind::Compressed { .. } => (true, false, false),
        };
        let compressed = matches!(run.kind, MappingKind::Compressed { .. });
        let last = run.range.end >= disk_size;
        Self { allocated, zero, has_offset, compressed, last }
    }
}
