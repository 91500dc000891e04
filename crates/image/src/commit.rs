use std::num::NonZeroU64;
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread::available_parallelism;

use qtk_block::{Access, BlockRead, BlockWrite, ExtentKind, Progress};
use qtk_qcow2::MappingKind;

use crate::convert::{Sink, Unit};
use crate::pipeline::{Next, ordered};
use crate::status::{Status, Statuses};
use crate::{
    Chain, ChainLayer, Error, Image, NodeSpec, OpenOptions, RateLimit, Run, Runs, Transaction, edit, name, open,
};

/// How an overlay is committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitOptions {
    /// The file of the chain that is to take up what lies above it, by its name; what the overlay lies on if not given.
    /// Where it is named the overlay is kept as it is.
    pub base: Option<String>,
    /// Whether to leave the overlay as it is, instead of emptying it.
    pub keep_overlay: bool,
    /// Whether a base may be written whose format no header names, and which was guessed.
    pub guess_base: bool,
    /// Most bytes to copy in a second.
    pub rate_limit: Option<NonZeroU64>,
}

/// Most bytes that one thread reads at a time.
const STEP: u64 = 1 << 20;
const MIN_GRAIN: u64 = 4 << 10;
const MAX_GRAIN: u64 = 64 << 10;

/// Writes what an image and the layers above its base hold into the base, and empties the image.
///
/// The base changes in one transaction, before the image is emptied: what the image reads as is the same at any moment. A
/// base smaller than the image grows. On a block device the base is written in place. Progress is reported in bytes of the
/// image's disk.
pub fn commit(
    spec: &NodeSpec,
    open: &OpenOptions,
    options: &CommitOptions,
    progress: &dyn Progress,
) -> Result<(), Error> {
    let depth = {
        let image = Image::open_node(spec, &OpenOptions { access: Access::ReadOnly, ..open.clone() })?;
        base_depth(image.chain(), options.base.as_deref())?
    };
    let writable = OpenOptions { access: Access::ReadWrite, ..open.clone() };
    let (chain, _) = open::open_chain(spec.clone(), &writable, Some(depth))?;
    // The chain was not locked in between.
    if base_depth(&chain, options.base.as_deref())? != depth {
        let path = chain.named().map_or_else(Default::default, |layer| layer.path().to_owned());
        return Err(Error::Invalid { path, problem: "its chain changed while it was being opened".to_owned() });
    }
    let image = Image::of_chain(chain, Access::ReadWrite);
    let base = Image::of_chain(image.chain().from(depth), Access::ReadWrite);
    if let Some(layer) = base.chain().named().filter(|layer| layer.format_probed() && !options.guess_base) {
        let (path, format) = (layer.path().to_owned(), layer.format());
        let problem =
            format!("its overlay does not name its format, and {format} is only a guess; rebase the overlay with it");
        return Err(Error::Invalid { path, problem });
    }
    let work = Work { image: &image, above: &image.chain().above(depth), grain: grain(&base), spare: Mutex::default() };
    let (path, device) = (base.path().to_owned(), base.in_place()?);
    let mut sink = match &device {
        Some(device) if device.size() < image.size() => {
            return Err(Error::Invalid { path, problem: "it is a device smaller than the disk".to_owned() });
        }
        Some(device) => Sink::raw(&path, device.clone()),
        None => Sink::existing(&path, begin_grown(base, image.size())?, true),
    };
    work.copy_to(&mut sink, options.rate_limit, progress)?;
    sink.finish()?;
    if let Some(device) = device {
        device.flush().map_err(Error::io(&path, "sync it"))?;
    }
    if options.keep_overlay || options.base.is_some() {
        return Ok(());
    }
    edit::edit_open(&image, |transaction| Ok(transaction.clear()?))
}

/// Where the base lies in the chain.
fn base_depth(chain: &Chain, name: Option<&str>) -> Result<usize, Error> {
    let layers: Vec<&ChainLayer> = chain.layers().iter().filter(|layer| !layer.is_log()).collect();
    let image = || layers.first().map_or_else(Default::default, |layer| layer.path().to_owned());
    match name {
        None if layers.len() > 1 => Ok(1),
        None => Err(Error::NoBacking { image: image() }),
        Some(name) => {
            let found = layers.windows(2).position(|pair| is_named(pair[1], pair[0], name));
            found.map(|index| index + 1).ok_or_else(|| Error::NotInChain { image: image(), wanted: name.to_owned() })
        }
    }
}

/// Whether `name` means `layer`: as the header of the layer `above` names it, or as a file.
fn is_named(layer: &ChainLayer, above: &ChainLayer, name: &str) -> bool {
    let canonical = |path: &Path| path.canonicalize().ok();
    let named = canonical(Path::new(&name::full_backing_name(above.path(), name)));
    above.backing_name() == Some(name)
        || layer.filename() == name
        || (named.is_some() && named == canonical(layer.path()))
}

/// Bytes that are copied together: a cluster of the base, within QEMU's limits.
fn grain(base: &Image) -> u64 {
    let qcow2 = base.chain().named().and_then(ChainLayer::qcow2);
    qcow2.map_or(MAX_GRAIN, |qcow2| qcow2.cluster_size().clamp(MIN_GRAIN, MAX_GRAIN))
}

/// Begins a transaction on a base that has at least `size` bytes afterwards.
fn begin_grown(base: Image, size: u64) -> Result<Transaction, Error> {
    let grows = base.size() < size;
    let transaction = base.begin()?;
    if grows {
        transaction.grow(size)?;
    }
    Ok(transaction)
}

/// The copy of what the layers above the base hold into the base, in whole grains.
struct Work<'a> {
    image: &'a Image,
    /// The layers above the base.
    above: &'a Chain,
    grain: u64,
    /// Units whose buffers can be used again.
    spare: Mutex<Vec<Unit>>,
}

impl Work<'_> {
    /// Reads on all threads, and puts what is read into the sink in the disk's order.
    fn copy_to(&self, sink: &mut Sink, rate_limit: Option<NonZeroU64>, progress: &dyn Progress) -> Result<(), Error> {
        let mut limit = rate_limit.map(RateLimit::new);
        let mut done = 0;
        ordered(
            self.image.path(),
            available_parallelism().map_or(1, usize::from),
            Steps { work: self, runs: self.above.runs(0..self.image.size()), current: None, done: 0 },
            || Ok(()),
            |(), step| self.read(step),
            |unit| {
                if let Some(limit) = &mut limit {
                    limit.pass(unit.bytes_to_write());
                }
                sink.put(&unit)?;
                progress.advance(unit.range.end - done);
                done = unit.range.end;
                self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(unit);
                Ok(Next::Continue)
            },
        )?;
        progress.advance(self.image.size() - done);
        Ok(())
    }

    fn read(&self, step: Step) -> Result<Unit, Error> {
        let mut unit = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        match step {
            Step::Zero(range) => unit.reset_to_zero(range),
            Step::Copy(range) => {
                let offset = range.start;
                unit.reset(range, 1, false);
                let read_error = |source| Error::Read { path: self.image.path().to_owned(), offset, source };
                self.image.read_at(&mut unit.plain, offset).map_err(read_error)?;
                unit.add_plain(0..unit.plain.len(), false);
            }
        }
        Ok(unit)
    }
}

/// What is to be done with a piece of the disk.
enum Step {
    Zero(Range<u64>),
    Copy(Range<u64>),
}

/// All steps of a commit, in order.
struct Steps<'a> {
    work: &'a Work<'a>,
    /// What the layers above the base hold.
    runs: Runs<'a>,
    /// The range that is being cut into steps, and how the whole chain stores it.
    current: Option<(Range<u64>, Statuses<'a>)>,
    /// End of the last range.
    done: u64,
}

impl Steps<'_> {
    /// The next range that the base is to take up.
    fn range(&mut self) -> Option<Result<Range<u64>, Error>> {
        let Work { image, above, grain, .. } = self.work;
        loop {
            let run = match self.runs.next()? {
                Ok(run) => run,
                Err(error) => return Some(Err(error)),
            };
            let through = run.kind == MappingKind::Unallocated && run.depth + 1 == above.layers().len();
            let start = run.range.start / grain * grain;
            let end = run.range.end.next_multiple_of(*grain).min(image.size());
            if !through && end > self.done {
                let range = start.max(self.done)..end;
                self.done = end;
                self.runs.seek(end);
                return Some(Ok(range));
            }
        }
    }

    fn cut(grain: u64, range: &Range<u64>, status: &Status) -> Step {
        let Status { run: Run { range: found, kind, .. }, is_hole, .. } = status;
        let whole = (found.end - range.start) / grain * grain;
        let is_zero = (*is_hole || kind.extent_kind() != ExtentKind::Data) && whole > 0;
        if is_zero {
            Step::Zero(range.start..range.start + whole)
        } else {
            Step::Copy(range.start..range.end.min(range.start + whole.clamp(grain, STEP)))
        }
    }
}

impl Iterator for Steps<'_> {
    type Item = Result<Step, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some((range, statuses)) = &mut self.current else {
                match self.range()? {
                    Ok(range) => {
                        let statuses = Statuses::new(self.work.image.chain(), range.clone());
                        self.current = Some((range, statuses));
                        continue;
                    }
                    Err(error) => return Some(Err(error)),
                }
            };
            match statuses.next() {
                None => self.current = None,
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(status)) => {
                    let step = Self::cut(self.work.grain, range, &status);
                    let (Step::Zero(taken) | Step::Copy(taken)) = &step;
                    range.start = taken.end;
                    statuses.seek(taken.end);
                    return Some(Ok(step));
                }
            }
        }
    }
}
