use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;

use qtk_block::BlockRead;
use qtk_qcow2::Contents;

use crate::layer::SECTOR;
use crate::pipeline::{Next, ordered};
use crate::{Chain, Error, RateLimit};

use super::fill::{Filler, Grain, Packing};
use super::plan::{Plan, REQUEST, Rules, Zeroes};
use super::target::Listener;
use super::{ConvertOptions, ConvertWarning, Detection, Disk, Sink};

/// Bytes of the disk that one thread works on at a time, unless a cluster is larger.
pub(crate) const UNIT: u64 = 1 << 20;
/// The same where the target's layout depends on what is written at once: as much as `qemu-img convert` writes.
pub(crate) const LARGE_UNIT: u64 = REQUEST;

/// What the target wants.
#[derive(Debug)]
pub(crate) struct Shape {
    pub(crate) grain: Grain,
    pub(crate) packing: Option<Packing>,
    pub(crate) zeroes: Zeroes,
    pub(crate) detection: Detection,
    /// What it lies on.
    pub(crate) beneath: Option<Chain>,
    pub(crate) unit: u64,
    /// What the target holds, where clusters that are alike are to be stored once.
    pub(crate) contents: Option<Arc<Contents>>,
}

impl Shape {
    fn rules(&self, salvage: bool) -> Rules {
        let cluster = self.packing.map(|packing| packing.cluster_bits.size());
        let (grain, cuts_anywhere) = match (self.grain, cluster) {
            (_, Some(cluster)) => (cluster, false),
            (Grain::Sectors, None) => (SECTOR, true),
            (Grain::Padded(cluster), None) => (cluster, true),
            (Grain::Whole(grain), None) => (grain, false),
        };
        Rules { grain, cuts_anywhere, unit: self.unit.max(grain), zeroes: self.zeroes, salvage }
    }
}

/// A disk on its way to a target.
#[derive(Debug)]
pub(crate) struct Copy<'a> {
    pub(crate) disk: &'a Disk,
    /// What the target is called.
    pub(crate) path: &'a Path,
    pub(crate) shape: Shape,
    pub(crate) options: &'a ConvertOptions,
}

impl Copy<'_> {
    /// Reads and packs on all threads, and puts the results into the sink in the disk's order.
    pub(crate) fn run(self, sink: &mut Sink, listener: Listener<'_>) -> Result<(), Error> {
        let Listener { warn, progress } = listener;
        let Self { disk, path, shape, options } = self;
        let threads = options.threads.unwrap_or_else(|| available_parallelism().map_or(1, usize::from));
        let rules = shape.rules(options.salvage);
        let filler = Filler { disk, output: path, shape: &shape, salvage: options.salvage, spare: Mutex::default() };
        if options.salvage {
            warn_of_status(disk, warn);
        }
        let mut limit = options.rate_limit.map(RateLimit::new);
        let mut done = 0;
        let mut plan = Plan::new(disk, &options.unused, rules);
        ordered(
            path,
            threads,
            &mut plan,
            || filler.packer(),
            |packer, job| filler.fill(packer.as_mut(), job),
            |mut unit| {
                unit.warnings.drain(..).for_each(&mut *warn);
                if let Some(limit) = &mut limit {
                    limit.pass(unit.bytes_to_write());
                }
                sink.put(&unit)?;
                progress.advance(unit.range.end - done);
                done = unit.range.end;
                filler.spare.lock().unwrap_or_else(PoisonError::into_inner).push(unit);
                Ok(Next::Continue)
            },
        )?;
        progress.advance(disk.size() - done);
        sink.report.left_out = plan.left_out();
        Ok(())
    }
}

/// Says where it cannot be found out how the disk is stored. As in `qemu-img`, that is said again when it is read.
fn warn_of_status(disk: &Disk, warn: &mut dyn FnMut(ConvertWarning)) {
    let mut stretches = disk.stretches();
    while let Some(stretch) = stretches.next() {
        if let Err(error) = stretch
            && let Some(sector) = stretches.pass_over()
        {
            warn(ConvertWarning::NoStatus { offset: sector.range.start, source: error });
        }
    }
}
