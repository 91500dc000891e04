use std::ops::Range;
use std::path::Path;

use qtk_block::{Access, BlockRead, BlockWrite, Progress};
use qtk_qcow2::codec::Compressor;
use qtk_qcow2::{Backing, GuestCluster, MappingKind};

use crate::chain::in_memory;
use crate::create::open_base;
use crate::layer::Depth;
use crate::status::Statuses;
use crate::{Chain, ChainLayer, Error, Image, NodeSpec, OpenOptions, edit_alone, edit_open, name, open};

/// What becomes of an image's content when it gets another base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RebaseMode {
    /// It stays the same: the image takes up what the bases differ in.
    #[default]
    Safe,
    /// The header names the other base, and nothing else happens; no base is opened.
    HeaderOnly,
}

/// How an image is rebased.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RebaseOptions {
    /// The new base as the header is to name it, which must come with its format; none if the image is to stand alone.
    pub base: Option<Backing>,
    /// What becomes of the content.
    pub mode: RebaseMode,
    /// Whether what the image takes up is compressed.
    pub compress: bool,
}

/// Bytes of both bases that are compared at a time.
const STEP: u64 = 2 << 20;

/// Lets an image lie on another base, in one transaction. Progress is reported in bytes of the image's disk.
pub fn rebase(
    spec: &NodeSpec,
    open: &OpenOptions,
    options: &RebaseOptions,
    progress: &dyn Progress,
) -> Result<(), Error> {
    let writable = OpenOptions { access: Access::ReadWrite, ..open.clone() };
    if options.mode == RebaseMode::HeaderOnly {
        let layer = open::open_layer(spec.clone(), &writable, Depth::Image)?;
        check_format(layer.path(), options)?;
        return edit_alone(&layer, |transaction| Ok(transaction.set_backing(options.base.clone())?));
    }
    let image = Image::open_node(spec, &writable)?;
    let new = options.base.as_ref().map(|base| NewBase::find(&image, base, open)).transpose()?;
    check_format(image.path(), options)?;
    edit_open(&image, |transaction| {
        Work::new(&image, new.as_ref(), options, transaction)?.run(progress)?;
        Ok(transaction.set_backing(options.base.clone())?)
    })
}

fn check_format(image: &Path, options: &RebaseOptions) -> Result<(), Error> {
    match &options.base {
        Some(Backing { name, format: None }) => {
            Err(Error::BackingFormatMissing { image: image.to_owned(), name: name.clone() })
        }
        _ => Ok(()),
    }
}

/// What an image is to lie on.
enum NewBase {
    /// A file of its chain, at this depth.
    Within(usize, Chain),
    Other(Image),
}

impl NewBase {
    fn find(image: &Image, base: &Backing, open: &OpenOptions) -> Result<Self, Error> {
        let full_name = name::full_backing_name(image.path(), &base.name);
        let same = |layer: &ChainLayer| {
            let canonical = |path: &Path| path.canonicalize().ok();
            layer.filename() == full_name
                || canonical(Path::new(&full_name)).is_some_and(|path| canonical(layer.path()) == Some(path))
        };
        if let Some(depth) = image.layers().iter().skip(1).position(same) {
            return Ok(Self::Within(depth + 1, image.chain().from(depth + 1)));
        }
        let opened = open_base(image.path(), Path::new(&base.name), base.format.as_deref(), open);
        opened.map(Self::Other).map_err(|source| {
            let source = match source {
                Error::Backing { source, .. } => source,
                other => Box::new(other),
            };
            Error::NewBacking { image: image.path().to_owned(), name: base.name.clone(), source }
        })
    }

    fn device(&self) -> &dyn BlockRead {
        match self {
            Self::Within(_, chain) => chain,
            Self::Other(image) => image,
        }
    }
}

struct Work<'a> {
    image: &'a Image,
    /// The image's own layer.
    own: Chain,
    old: Option<Chain>,
    /// The layers between the image and a new base that it lies on already.
    between: Option<Chain>,
    new: Option<&'a dyn BlockRead>,
    /// What is written is as large as this, and lies at a multiple of it.
    grain: u64,
    compressor: Option<Compressor>,
    transaction: &'a qtk_qcow2::Transaction,
}

impl<'a> Work<'a> {
    fn new(
        image: &'a Image,
        new: Option<&'a NewBase>,
        options: &RebaseOptions,
        transaction: &'a qtk_qcow2::Transaction,
    ) -> Result<Self, Error> {
        let not_qcow2 = || Error::NotQcow2 { path: image.path().to_owned() };
        let qcow2 = image.chain().named().and_then(ChainLayer::qcow2).ok_or_else(not_qcow2)?;
        let compressor = match options.compress {
            true => Some(Compressor::new(qcow2.compression(), None)),
            false => None,
        };
        let old = image.chain().beneath();
        let between = match (new, &old) {
            (Some(NewBase::Within(depth, _)), Some(old)) => Some(old.above(depth - 1)),
            _ => None,
        };
        Ok(Self {
            image,
            own: image.chain().above(1),
            old,
            between,
            new: new.map(NewBase::device),
            grain: if options.compress { qcow2.cluster_size() } else { qcow2.header().subcluster_size() },
            compressor: compressor
                .transpose()
                .map_err(|source| Error::Codec { path: image.path().to_owned(), source })?,
            transaction,
        })
    }

    fn run(mut self, progress: &dyn Progress) -> Result<(), Error> {
        let size = self.image.size();
        let mut buffers = Buffers::default();
        let mut at = 0;
        while at < size {
            let end = match self.inherited(at..size.min(at + STEP))? {
                Ok(unchanged) => unchanged,
                Err(range) => {
                    self.take_up(range.clone(), &mut buffers)?;
                    range.end
                }
            };
            progress.advance(end - at);
            at = end;
        }
        Ok(())
    }

    /// The front of `range` that the bases may differ in, in whole grains; or else where what they do not decide ends.
    fn inherited(&self, range: Range<u64>) -> Result<Result<u64, Range<u64>>, Error> {
        let first = |chain: &Chain, range: Range<u64>| {
            let status = Statuses::new(chain, range).next().transpose()?;
            Ok::<_, Error>(status.map(|status| status.run))
        };
        let Some(own) = first(&self.own, range.clone())? else { return Ok(Ok(range.end)) };
        if own.kind != MappingKind::Unallocated {
            return Ok(Ok(own.range.end));
        }
        let mut found = own.range;
        if let Some(between) = &self.between {
            let end = found.end.min(between.size());
            if found.start < end
                && let Some(run) = first(between, found.start..end)?
            {
                let through = run.kind == MappingKind::Unallocated && run.depth + 1 == between.layers().len();
                if through {
                    return Ok(Ok(run.range.end));
                }
                found.end = run.range.end;
            }
        }
        let start = found.start / self.grain * self.grain;
        let end = found.end.next_multiple_of(self.grain).min(self.image.size());
        Ok(Err(start..end))
    }

    /// Writes to the image what the old base has in `range` and the new one has not.
    fn take_up(&mut self, range: Range<u64>, buffers: &mut Buffers) -> Result<(), Error> {
        let len = in_memory(range.end - range.start);
        let old_size = self.old.as_ref().map_or(0, BlockRead::size);
        let old = self.old.as_ref().map(|old| old as &dyn BlockRead);
        fill(&mut buffers.old, len, old, range.start).map_err(|source| self.read_error(range.start, source))?;
        fill(&mut buffers.new, len, self.new, range.start).map_err(|source| self.read_error(range.start, source))?;
        let mut past_old = range.start >= old_size;
        let mut done = 0;
        while done < len {
            let (differ, count) = same_kind(&buffers.old[done..], &buffers.new[done..], in_memory(self.grain));
            let at = range.start + done as u64;
            if differ && past_old {
                let zeroed = self.transaction.zero(at..at + count as u64);
                zeroed.map_err(|source| self.write_error(at, source))?;
            } else if differ {
                self.write(&buffers.old[done..done + count], at)?;
            }
            done += count;
            past_old |= range.start + done as u64 >= old_size;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8], at: u64) -> Result<(), Error> {
        let Some(compressor) = &mut self.compressor else {
            return self.transaction.write_at(bytes, at).map_err(|source| self.write_error(at, source));
        };
        let cluster_len = in_memory(self.grain);
        let (mut cluster, mut packed) = (vec![0; cluster_len], vec![0; cluster_len]);
        for (chunk, offset) in bytes.chunks(cluster_len).zip((at..).step_by(cluster_len)) {
            cluster[..chunk.len()].copy_from_slice(chunk);
            cluster[chunk.len()..].fill(0);
            let codec_error = |source| Error::Codec { path: self.image.path().to_owned(), source };
            match compressor.compress(&cluster, &mut packed).map_err(codec_error)? {
                Some(len) => {
                    self.transaction.write_compressed(GuestCluster(offset / self.grain), &packed[..len])?;
                }
                None => {
                    let write_error = |source| Error::Write { path: self.image.path().to_owned(), offset, source };
                    self.transaction.write_at(chunk, offset).map_err(write_error)?;
                }
            }
        }
        Ok(())
    }

    fn read_error(&self, offset: u64, source: std::io::Error) -> Error {
        Error::Read { path: self.image.path().to_owned(), offset, source }
    }

    fn write_error(&self, offset: u64, source: std::io::Error) -> Error {
        Error::Write { path: self.image.path().to_owned(), offset, source }
    }
}

/// What the old and the new base hold.
#[derive(Debug, Default)]
struct Buffers {
    old: Vec<u8>,
    new: Vec<u8>,
}

/// Fills `buf` with `len` bytes of `device`, and with zeroes where that ends or is not there.
fn fill(buf: &mut Vec<u8>, len: usize, device: Option<&dyn BlockRead>, offset: u64) -> std::io::Result<()> {
    buf.resize(len, 0);
    match device {
        Some(device) => qtk_block::read_padded(device, buf, offset),
        None => {
            buf.fill(0);
            Ok(())
        }
    }
}

/// Whether the first grain of two buffers differs, and how many bytes follow of which each grain is the same in that.
fn same_kind(one: &[u8], other: &[u8], grain: usize) -> (bool, usize) {
    let mut grains = one.chunks(grain).zip(other.chunks(grain)).map(|(one, other)| (one != other, one.len()));
    let Some((differ, len)) = grains.next() else { return (false, one.len().max(1)) };
    (differ, len + grains.take_while(|(next, _)| *next == differ).map(|(_, len)| len).sum::<usize>())
}
