use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;

use qtk_block::BlockRead;
use qtk_qcow2::Contents;

use crate::chain::in_memory;
use crate::layer::SECTOR;
use crate::pipeline::{BESIDES, Next, ordered};
use crate::{Chain, Error, RateLimit};

use super::fill::{Filler, Grain, Packing};
use super::plan::{Plan, REQUEST, Rules, Zeroes};
use super::target::Listener;
use super::{ConvertOptions, ConvertWarning, Detection, Disk, Sink};

/// Bytes of the disk that one thread works on at a time, unless a cluster is larger.
pub(crate) const UNIT: u64 = 1 << 20;
/// The same where the target's layout depends on what is written at once: as much as `qemu-img convert` writes.
pub(crate) const LARGE_UNIT: u64 = REQUEST;

/// Bytes that the buffers of a copy take together at most.
const MEMORY: u64 = 36 << 20;
/// And where units can be small: codecs take 0.6 to 0.8 MB for each thread as well.
const MEMORY_OF_SMALL: u64 = 12 << 20;
/// Smaller units than this are not worth handing to a thread.
const SMALL_UNIT: u64 = 64 << 10;

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
    /// On how many threads to work, and on units of how many bytes, so that the buffers stay within [`MEMORY`].
    ///
    /// Packed targets take each cluster by itself, so that units may be of any size. The layout of others depends on it.
    fn lanes(&self, threads: usize) -> (usize, u64) {
        let smallest = self.packing.map_or(self.unit, |packing| packing.cluster_bits.size().max(SMALL_UNIT));
        let mut unit = self.unit.max(smallest);
        // Each thread has a unit under way and, where it packs, a buffer that it reads into.
        let per_thread = if self.packing.is_some() { 2 } else { 1 };
        let fitting = |memory: u64, unit: u64| in_memory((memory / unit).saturating_sub(BESIDES) / per_thread);
        while unit > smallest && fitting(MEMORY_OF_SMALL, unit) < threads {
            unit /= 2;
        }
        (threads.min(fitting(MEMORY, unit)).max(1), unit)
    }

    fn rules(&self, unit: u64, salvage: bool, offload: bool) -> Rules {
        let cluster = self.packing.map(|packing| packing.cluster_bits.size());
        let (grain, cuts_anywhere) = match (self.grain, cluster) {
            (_, Some(cluster)) => (cluster, false),
            (Grain::Sectors, None) => (SECTOR, true),
            (Grain::Padded(cluster), None) => (cluster, true),
            (Grain::Whole(grain), None) => (grain, false),
        };
        Rules { grain, cuts_anywhere, unit: unit.max(grain), zeroes: self.zeroes, salvage, offload }
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
        let (threads, unit) = shape.lanes(threads);
        // Who compresses or compares has to look.
        let offload = options.offload && shape.packing.is_none() && !options.dedup && sink.takes_files();
        let rules = shape.rules(unit, options.salvage, offload);
        let (salvage, unused, spare) = (options.salvage, &options.unused, Mutex::default());
        let filler = Filler { disk, output: path, shape: &shape, salvage, unused, spare };
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

#[cfg(test)]
mod tests {
    use super::*;
    use qtk_qcow2::{ClusterBits, CompressionType};

    fn shape(cluster_bits: Option<u32>, unit: u64) -> Shape {
        let packing = cluster_bits.map(|bits| Packing {
            cluster_bits: ClusterBits::new(bits).unwrap(),
            compression: CompressionType::Zlib,
            level: None,
            copies: true,
        });
        let detection = Detection::every(4096);
        Shape { grain: Grain::Sectors, packing, zeroes: Zeroes::Skip, detection, beneath: None, contents: None, unit }
    }

    #[test]
    fn buffers_stay_within_the_memory_on_any_number_of_threads() {
        let targets = [(None, UNIT), (None, LARGE_UNIT), (Some(9), UNIT), (Some(16), UNIT), (Some(21), UNIT)];
        for (bits, unit) in targets {
            for wanted in [0, 1, 2, 8, 64, 1000, usize::MAX] {
                let (threads, unit) = shape(bits, unit).lanes(wanted);
                let buffers = threads as u64 * if bits.is_some() { 2 } else { 1 } + BESIDES;
                assert!(buffers * unit <= MEMORY, "{bits:?}: {threads} of {wanted} threads");
                assert!(threads >= wanted.clamp(1, 6), "{bits:?}: {threads} of {wanted} threads");
            }
        }
        assert_eq!(shape(Some(16), UNIT).lanes(2), (2, UNIT));
        assert_eq!(shape(Some(16), UNIT).lanes(64), (64, 64 << 10));
    }
}
