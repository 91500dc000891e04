use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::available_parallelism;

use qtk_block::{
    Access, BlockRead, BlockWrite, HostStorage, ImageLock, LockMode, OutputFile, Progress, RawFile, is_zero,
};
use qtk_qcow2::codec::Compressor;
use qtk_qcow2::{ClusterBits, CompressionType, CreateOptions, GuestCluster, GuestOffset, ImageWriter, MappingKind};

use crate::chain::{Run, Runs, in_memory};
use crate::layer::{acquire, file_id};
use crate::pipeline::{Next, ordered};
use crate::{Chain, ChainLayer, Error, Format, Image, redo};

/// Bytes of the guest's disk that one thread works on at a time, unless a cluster is larger.
const UNIT: u64 = 1 << 20;
/// The smallest hole left in a raw file.
const RAW_BLOCK_BITS: u32 = 12;

/// What a flattened image is to be. The default is plain qcow2.
#[derive(Clone, Debug)]
pub struct FlattenOptions {
    /// Format of the new image.
    pub format: Format,
    /// Codec of its clusters; plain if none. Only qcow2 has compressed clusters.
    pub compression: Option<CompressionType>,
    /// The codec's level; see [`levels`](qtk_qcow2::codec::levels).
    pub level: Option<i32>,
    /// Cluster size of a qcow2 image in bytes; 64 KiB if not given.
    pub cluster_size: Option<u64>,
    /// Whether to compress clusters again that could be copied as they are.
    pub recompress: bool,
    /// Threads that read and compress; as many as there are processors if not given. The result does not depend on it.
    pub threads: Option<usize>,
}

impl Default for FlattenOptions {
    fn default() -> Self {
        Self {
            format: Format::Qcow2,
            compression: None,
            level: None,
            cluster_size: None,
            recompress: false,
            threads: None,
        }
    }
}

/// What [`flatten`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlattenReport {
    /// Size of the guest's disk in bytes.
    pub disk_size: u64,
    /// Size of the new file in bytes.
    pub file_size: u64,
    /// Clusters compressed anew.
    pub compressed: u64,
    /// Compressed clusters copied as they were.
    pub copied: u64,
    /// Bytes stored plain.
    pub plain_bytes: u64,
}

/// Merges `image` and everything it lies on into one new file that stands alone.
///
/// `output` appears when it is complete; what it was before is replaced. Progress is reported in bytes of the guest's disk.
/// Compressed clusters whose codec and size agree with the new image's are copied without a look inside. Meanwhile nobody may
/// write any file of the chain, as with `qemu-img convert`, unless the image was opened to be shared.
pub fn flatten(
    image: &Image,
    output: &Path,
    options: &FlattenOptions,
    progress: &dyn Progress,
) -> Result<FlattenReport, Error> {
    let bits = check_options(output, options)?;
    let _lock = guard_target(image, output)?;
    let _held = image.layers().iter().map(ChainLayer::hold_still).collect::<Result<Vec<_>, _>>()?;
    let file = OutputFile::create(output).map_err(Error::io(output, "create it"))?;
    let clone = file.storage().file().try_clone().and_then(RawFile::from_file);
    let storage = Arc::new(clone.map_err(Error::io(output, "create it"))?);
    let mut sink = Sink::new(storage, output, image.size(), bits, options)?;
    let job = Flattening { chain: image.chain(), output, bits, options, spare: Mutex::default() };
    let report = job.run(&mut sink, progress)?;
    let file_size = sink.finish()?;
    file.commit().map_err(Error::io(output, "put it in its place"))?;
    Ok(FlattenReport { disk_size: image.size(), file_size, ..report })
}

fn check_options(output: &Path, options: &FlattenOptions) -> Result<ClusterBits, Error> {
    let invalid = |problem: &str| Err(Error::Invalid { path: output.to_owned(), problem: problem.to_owned() });
    if options.level.is_some() && options.compression.is_none() {
        return invalid("a level without a codec; name one (-c zlib or -c zstd)");
    }
    if let Some(kind) = options.compression {
        let check = Compressor::new(kind, options.level);
        check.map_err(|source| Error::Codec { path: output.to_owned(), source })?;
    }
    match (options.format, options.cluster_size) {
        (Format::Raw, Some(_)) => invalid("raw images have no clusters"),
        (Format::Raw, None) if options.compression.is_some() => invalid("raw images cannot be compressed; use qcow2"),
        (Format::Raw, None) => Ok(ClusterBits::new(RAW_BLOCK_BITS).unwrap_or_default()),
        (Format::Qcow2, None) => Ok(ClusterBits::default()),
        (Format::Qcow2, Some(size)) => match ClusterBits::from_size(size) {
            Some(bits) => Ok(bits),
            None => invalid("the cluster size must be a power of two from 512 bytes to 2 MiB"),
        },
    }
}

/// Refuses a target that is a part of the chain or that somebody uses.
fn guard_target(image: &Image, output: &Path) -> Result<Option<ImageLock>, Error> {
    let id = file_id(output);
    if let Some(layer) = image.layers().iter().find(|layer| Some(layer.id()) == id) {
        let problem = format!("it belongs to the chain of {}; write to another file", layer.path().display());
        return Err(Error::Invalid { path: output.to_owned(), problem });
    }
    refuse_used(output)
}

/// Refuses a target that somebody uses, or that a log beside it would change. The lock is to be held until the target is
/// replaced.
pub(crate) fn refuse_used(output: &Path) -> Result<Option<ImageLock>, Error> {
    let lock = match RawFile::open(output, Access::ReadOnly) {
        Ok(existing) => match acquire(output, existing.file(), LockMode::Write) {
            // Where there are no locks, nobody holds one.
            Err(Error::Io { .. }) => None,
            result => Some(result?),
        },
        // Whatever is no file is refused where the output is made.
        Err(_) => None,
    };
    redo::clear_place(output)?;
    Ok(lock)
}

/// A stretch of the disk, read and, where asked, compressed.
#[derive(Debug, Default)]
struct Unit {
    range: Range<u64>,
    pieces: Vec<Piece>,
    /// The stretch as the guest sees it, padded to a whole cluster.
    plain: Vec<u8>,
    packed: Vec<u8>,
    packed_len: usize,
}

#[derive(Debug)]
enum Piece {
    Plain { bytes: Range<usize> },
    Compressed { guest: GuestCluster, bytes: Range<usize> },
    Copied { guest: GuestCluster, bytes: Range<usize>, origin: Origin },
}

/// Where copied bytes lie: in which layer, and where in its file.
#[derive(Clone, Debug)]
struct Origin {
    depth: usize,
    range: Range<u64>,
}

impl Origin {
    /// How many of this one's first bytes are the last ones of `before`.
    fn shared(&self, before: &Self) -> u64 {
        let follows = self.depth == before.depth
            && (before.range.start..=before.range.end).contains(&self.range.start)
            && self.range.end >= before.range.end;
        if follows { before.range.end - self.range.start } else { 0 }
    }
}

impl Unit {
    fn reset(&mut self, range: Range<u64>, bits: ClusterBits, packs: bool) {
        let len = in_memory(bits.clusters_for(range.end - range.start) << bits.bits());
        self.plain.resize(len, 0);
        self.packed.resize(if packs { len } else { 0 }, 0);
        self.packed_len = 0;
        self.pieces.clear();
        self.range = range;
    }

    fn add_plain(&mut self, bytes: Range<usize>) {
        match self.pieces.last_mut() {
            Some(Piece::Plain { bytes: last }) if last.end == bytes.start => last.end = bytes.end,
            _ => self.pieces.push(Piece::Plain { bytes }),
        }
    }
}

/// What an output cluster is made from.
#[derive(Clone, Debug)]
enum Source {
    Hole,
    Plain,
    /// A part of [`Unit::packed`].
    Copied(Range<usize>, Origin),
}

struct Flattening<'a> {
    chain: &'a Chain,
    output: &'a Path,
    bits: ClusterBits,
    options: &'a FlattenOptions,
    /// Units whose buffers can be used again.
    spare: Mutex<Vec<Unit>>,
}

impl Flattening<'_> {
    fn run(&self, sink: &mut Sink, progress: &dyn Progress) -> Result<FlattenReport, Error> {
        let threads = self.options.threads.unwrap_or_else(|| available_parallelism().map_or(1, usize::from));
        let mut report = FlattenReport::default();
        let mut done = 0;
        let compressor = || match self.options.compression {
            Some(kind) => {
                Compressor::new(kind, self.options.level).map(Some).map_err(|source| self.codec_error(source))
            }
            None => Ok(None),
        };
        ordered(
            self.output,
            threads,
            self.plan(),
            compressor,
            |compressor, range| self.fill(compressor.as_mut(), range),
            |unit| {
                sink.put(&unit, &mut report).map_err(|error| error.into_error(self.output))?;
                progress.advance(unit.range.end - done);
                done = unit.range.end;
                self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(unit);
                Ok(Next::Continue)
            },
        )?;
        progress.advance(self.chain.size() - done);
        Ok(report)
    }

    fn plan(&self) -> Plan<'_> {
        let size = self.chain.size();
        Plan { runs: self.chain.runs(0..size), size, bits: self.bits, unit: UNIT.max(self.bits.size()) }
    }

    fn codec_error(&self, source: qtk_qcow2::codec::CodecError) -> Error {
        Error::Codec { path: self.output.to_owned(), source }
    }

    fn fill(&self, compressor: Option<&mut Compressor>, range: Range<u64>) -> Result<Unit, Error> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut unit = spare.unwrap_or_default();
        unit.reset(range.clone(), self.bits, compressor.is_some());
        let sources = self.read(&mut unit)?;
        self.pack(&mut unit, &sources, compressor)?;
        Ok(unit)
    }

    /// Reads all runs of the unit and says for each cluster what there is.
    fn read(&self, unit: &mut Unit) -> Result<Vec<Source>, Error> {
        let range = unit.range.clone();
        let len = self.bits.buffer_len();
        let mut sources = vec![Source::Hole; unit.plain.len() / len];
        for run in self.chain.runs(range.clone()) {
            let run = run?;
            let bytes = in_memory(run.range.start - range.start)..in_memory(run.range.end - range.start);
            if let Some((copied, origin)) = self.copy(&run, unit)? {
                sources[bytes.start / len] = Source::Copied(copied, origin);
                continue;
            }
            self.chain.read_run(&mut unit.plain[bytes.clone()], &run)?;
            if matches!(run.kind, MappingKind::Data { .. } | MappingKind::Compressed { .. }) {
                sources[bytes.start / len..bytes.end.div_ceil(len)].fill(Source::Plain);
            }
        }
        unit.plain[in_memory(range.end - range.start)..].fill(0);
        Ok(sources)
    }

    /// Reads the compressed bytes of a whole cluster, if they can stay as they are.
    fn copy(&self, run: &Run, unit: &mut Unit) -> Result<Option<(Range<usize>, Origin)>, Error> {
        let MappingKind::Compressed { host, len } = run.kind else { return Ok(None) };
        let layer = &self.chain.layers()[run.depth];
        let same_codec = layer.qcow2().is_some_and(|layer| {
            Some(layer.compression()) == self.options.compression && layer.cluster_size() == self.bits.size()
        });
        let whole = run.range.end - run.range.start == self.bits.size();
        let range = host.0..host.0 + len;
        // What the file's end may have cut off only decoding can tell.
        let cut = range.end >= layer.file().size();
        // A length may, but need not, be larger than the cluster.
        if self.options.recompress || !same_codec || !whole || cut || len >= self.bits.size() {
            return Ok(None);
        }
        let bytes = unit.packed_len..unit.packed_len + in_memory(len);
        let read = layer.read_host(&mut unit.packed[bytes.clone()], host);
        read.map_err(|source| Error::Read { path: layer.path().to_owned(), offset: run.range.start, source })?;
        unit.packed_len = bytes.end;
        Ok(Some((bytes, Origin { depth: run.depth, range })))
    }

    fn pack(&self, unit: &mut Unit, sources: &[Source], mut compressor: Option<&mut Compressor>) -> Result<(), Error> {
        let len = self.bits.buffer_len();
        let first = unit.range.start >> self.bits.bits();
        for (index, source) in sources.iter().enumerate() {
            let guest = GuestCluster(first + index as u64);
            let bytes = index * len..(index + 1) * len;
            match source {
                Source::Hole => {}
                Source::Copied(bytes, origin) => {
                    unit.pieces.push(Piece::Copied { guest, bytes: bytes.clone(), origin: origin.clone() });
                }
                Source::Plain if is_zero(&unit.plain[bytes.clone()]) => {}
                Source::Plain => {
                    let packed = match &mut compressor {
                        Some(compressor) => compressor
                            .compress(&unit.plain[bytes.clone()], &mut unit.packed[unit.packed_len..])
                            .map_err(|source| self.codec_error(source))?,
                        None => None,
                    };
                    match packed {
                        Some(packed) => {
                            let bytes = unit.packed_len..unit.packed_len + packed;
                            unit.packed_len = bytes.end;
                            unit.pieces.push(Piece::Compressed { guest, bytes });
                        }
                        None => unit.add_plain(bytes),
                    }
                }
            }
        }
        Ok(())
    }
}

/// Cuts what a chain stores into units; what it does not store is left out.
struct Plan<'a> {
    runs: Runs<'a>,
    size: u64,
    bits: ClusterBits,
    unit: u64,
}

impl Iterator for Plan<'_> {
    type Item = Result<Range<u64>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let run = match self.runs.next()? {
                Ok(run) => run,
                Err(error) => return Some(Err(error)),
            };
            if matches!(run.kind, MappingKind::Data { .. } | MappingKind::Compressed { .. }) {
                let start = run.range.start - self.bits.offset_within(run.range.start);
                let end = self.size.min(start + self.unit);
                self.runs.seek(end);
                return Some(Ok(start..end));
            }
        }
    }
}

/// Where the units go.
enum Sink {
    Raw(Arc<RawFile>),
    Qcow2 {
        writer: Box<ImageWriter>,
        /// Where the last compressed stream was copied from, if it was copied.
        origin: Option<Origin>,
    },
}

enum SinkError {
    Io(std::io::Error),
    Qcow2(qtk_qcow2::Error),
}

impl SinkError {
    fn into_error(self, output: &Path) -> Error {
        match self {
            Self::Io(source) => Error::io(output, "write to it")(source),
            Self::Qcow2(error) => error.into(),
        }
    }
}

impl Sink {
    fn new(
        storage: Arc<RawFile>,
        output: &Path,
        size: u64,
        cluster_bits: ClusterBits,
        options: &FlattenOptions,
    ) -> Result<Self, Error> {
        match options.format {
            Format::Raw => {
                storage.set_size(size).map_err(Error::io(output, "set its size"))?;
                Ok(Self::Raw(storage))
            }
            Format::Qcow2 => {
                let compression = options.compression.unwrap_or_default();
                let options = CreateOptions { size, cluster_bits, compression, ..CreateOptions::default() };
                let writer = Box::new(ImageWriter::new(storage, &output.to_string_lossy(), options)?);
                Ok(Self::Qcow2 { writer, origin: None })
            }
        }
    }

    fn put(&mut self, unit: &Unit, report: &mut FlattenReport) -> Result<(), SinkError> {
        for piece in &unit.pieces {
            match (piece, &mut *self) {
                (Piece::Plain { bytes }, sink) => {
                    // The disk may end within the last cluster.
                    let end = bytes.end.min(in_memory(unit.range.end - unit.range.start));
                    report.plain_bytes += (end - bytes.start) as u64;
                    let offset = unit.range.start + bytes.start as u64;
                    let content = &unit.plain[bytes.start..end];
                    match sink {
                        Self::Raw(file) => file.write_at(content, offset).map_err(SinkError::Io)?,
                        Self::Qcow2 { writer, .. } => {
                            writer.write(GuestOffset(offset), content).map_err(SinkError::Qcow2)?
                        }
                    }
                }
                (Piece::Compressed { guest, bytes }, Self::Qcow2 { writer, origin }) => {
                    report.compressed += 1;
                    *origin = None;
                    writer.compressed(*guest, &unit.packed[bytes.clone()]).map_err(SinkError::Qcow2)?;
                }
                (Piece::Copied { guest, bytes, origin: from }, Self::Qcow2 { writer, origin }) => {
                    report.copied += 1;
                    let shared = origin.replace(from.clone()).map_or(0, |before| from.shared(&before));
                    let bytes = &unit.packed[bytes.clone()];
                    writer.compressed_sharing(*guest, bytes, shared).map_err(SinkError::Qcow2)?;
                }
                (Piece::Compressed { .. } | Piece::Copied { .. }, Self::Raw(_)) => {}
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<u64, Error> {
        match self {
            Self::Raw(file) => Ok(file.size()),
            Self::Qcow2 { writer, .. } => Ok(writer.finish()?),
        }
    }
}
