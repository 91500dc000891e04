use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use qtk_block::{BlockRead, Durability, HostStorage, OutputFile, Progress, RawFile};
use qtk_qcow2::codec::Compressor;
use qtk_qcow2::{ClusterBits, CompressionType, CreateOptions, ImageWriter};

use crate::convert::{
    Copy, Detection, Disk, Grain, Listener, Packing, Shape, Sink, UNIT, Zeroes, hold_still, refuse_source, refuse_used,
};
use crate::{ConvertOptions, ConvertReport, Error, Format, Image};

/// The smallest hole left in a raw file.
const RAW_HOLE: u64 = 4096;

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
    /// Store clusters that are alike once; see [`ConvertOptions::dedup`].
    pub dedup: bool,
    /// What nobody needs of the disk, such as the free blocks of a file system: byte ranges in order that do not overlap. What
    /// the chain stores there is not read, and zero in the new image.
    pub unused: Vec<Range<u64>>,
    /// Threads that read and compress; as many as there are processors if not given. The result does not depend on it.
    pub threads: Option<usize>,
    /// When the new image counts as written.
    pub durability: Durability,
}

impl Default for FlattenOptions {
    fn default() -> Self {
        Self {
            format: Format::Qcow2,
            compression: None,
            level: None,
            cluster_size: None,
            recompress: false,
            dedup: false,
            unused: Vec::new(),
            threads: None,
            durability: Durability::default(),
        }
    }
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
) -> Result<ConvertReport, Error> {
    let grain = check_options(output, options)?;
    let sources = std::slice::from_ref(image);
    refuse_source(output, sources)?;
    let _lock = refuse_used(output)?;
    let _held = hold_still(sources)?;
    let file = OutputFile::create(output, options.durability).map_err(Error::io(output, "create it"))?;
    let disk = Disk::new(sources, false);
    let (mut sink, shape) = prepare(file.storage().clone(), output, disk.size(), grain, options)?;
    let options =
        ConvertOptions { unused: options.unused.clone(), threads: options.threads, ..ConvertOptions::default() };
    // Nothing warns where nothing is salvaged.
    let listener = Listener { warn: &mut |_| {}, progress };
    Copy { disk: &disk, path: output, shape, options: &options }.run(&mut sink, listener)?;
    let report = ConvertReport { disk_size: disk.size(), ..sink.finish()? };
    file.commit().map_err(Error::io(output, "put it in its place"))?;
    Ok(report)
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
    if options.dedup && options.format == Format::Raw {
        return invalid("raw images cannot share clusters; use qcow2");
    }
    match (options.format, options.cluster_size) {
        (Format::Raw, Some(_)) => invalid("raw images have no clusters"),
        (Format::Raw, None) if options.compression.is_some() => invalid("raw images cannot be compressed; use qcow2"),
        (_, None) => Ok(ClusterBits::default()),
        (Format::Qcow2, Some(size)) => match ClusterBits::from_size(size) {
            Some(bits) => Ok(bits),
            None => invalid("the cluster size must be a power of two from 512 bytes to 2 MiB"),
        },
    }
}

fn prepare(
    storage: Arc<RawFile>,
    output: &Path,
    size: u64,
    cluster_bits: ClusterBits,
    options: &FlattenOptions,
) -> Result<(Sink, Shape), Error> {
    let packing = options.compression.map(|compression| Packing {
        cluster_bits,
        compression,
        level: options.level,
        copies: !options.recompress,
    });
    let shape = |grain, hole| Shape {
        grain,
        packing,
        zeroes: Zeroes::Skip,
        detection: Detection::every(hole),
        beneath: None,
        unit: UNIT,
        contents: None,
    };
    match options.format {
        Format::Raw => {
            storage.set_size(size).map_err(Error::io(output, "set its size"))?;
            Ok((Sink::raw(output, storage), shape(Grain::Sectors, RAW_HOLE)))
        }
        Format::Qcow2 => {
            let compression = options.compression.unwrap_or_default();
            let create = CreateOptions { size, cluster_bits, compression, ..CreateOptions::default() };
            let writer = ImageWriter::new(storage, &output.to_string_lossy(), create)?;
            let grain = cluster_bits.size();
            let contents = options.dedup.then(|| writer.contents());
            let shape = Shape { contents, ..shape(Grain::Whole(grain), grain) };
            Ok((Sink::qcow2(output, writer, true), shape))
        }
    }
}
