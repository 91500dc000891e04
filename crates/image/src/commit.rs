use std::num::NonZeroU64;
use std::ops::Range;
use std::path::Path;

use qtk_block::{Access, BlockRead, BlockWrite, ExtentKind, Progress};
use qtk_qcow2::MappingKind;

use crate::chain::in_memory;
use crate::status::{Status, Statuses};
use crate::{Chain, ChainLayer, Error, Image, NodeSpec, OpenOptions, RateLimit, Run, Transaction, edit, name, open};

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

/// Most bytes read at a time.
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
    let grain = grain(&base);
    let mut work = Work { image: &image, depth, grain, limit: options.rate_limit.map(RateLimit::new), progress };
    match base.in_place()? {
        Some(device) => {
            if device.size() < image.size() {
                let problem = "it is a device smaller than the disk".to_owned();
                return Err(Error::Invalid { path: base.path().to_owned(), problem });
            }
            work.copy_to(&*device)?;
            device.flush().map_err(Error::io(base.path(), "sync it"))?;
        }
        None => {
            let transaction = begin_grown(base, image.size())?;
            work.copy_to(&transaction)?;
            transaction.commit_settled()?;
        }
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

struct Work<'a> {
    image: &'a Image,
    depth: usize,
    grain: u64,
    limit: Option<RateLimit>,
    progress: &'a dyn Progress,
}

impl Work<'_> {
    /// Copies what the layers above the base hold, in whole grains.
    fn copy_to(&mut self, target: &dyn BlockWrite) -> Result<(), Error> {
        let size = self.image.size();
        let mut done = 0;
        let above = self.image.chain().above(self.depth);
        let mut above = above.runs(0..size);
        while let Some(run) = above.next() {
            let run = run?;
            let through = run.kind == MappingKind::Unallocated && run.depth + 1 == self.depth;
            let start = run.range.start / self.grain * self.grain;
            let end = run.range.end.next_multiple_of(self.grain).min(size);
            if through || end <= done {
                continue;
            }
            let start = start.max(done);
            self.progress.advance(start - done);
            self.copy_range(target, start..end)?;
            done = end;
            above.seek(done);
        }
        self.progress.advance(size - done);
        Ok(())
    }

    fn copy_range(&mut self, target: &dyn BlockWrite, range: Range<u64>) -> Result<(), Error> {
        let mut runs = Statuses::new(self.image.chain(), range.clone());
        let mut buf = Vec::new();
        let mut at = range.start;
        while let Some(status) = runs.next() {
            let Status { run: Run { range: found, kind, .. }, is_hole, .. } = status?;
            let whole = (found.end - at) / self.grain * self.grain;
            let is_zero = (is_hole || kind.extent_kind() != ExtentKind::Data) && whole > 0;
            let len = if is_zero { whole } else { whole.clamp(self.grain, STEP).min(range.end - at) };
            let write_error = |source| Error::Write { path: self.image.path().to_owned(), offset: at, source };
            if is_zero {
                target.zero(at..at + len).map_err(write_error)?;
            } else {
                if let Some(limit) = &mut self.limit {
                    limit.pass(len);
                }
                buf.resize(in_memory(len), 0);
                let read_error = |source| Error::Read { path: self.image.path().to_owned(), offset: at, source };
                self.image.read_at(&mut buf, at).map_err(read_error)?;
                target.write_at(&buf, at).map_err(write_error)?;
            }
            self.progress.advance(len);
            at += len;
            runs.seek(at);
        }
        Ok(())
    }
}
