//! Compressed clusters: raw deflate (RFC 1951) and zstd (RFC 8878), one stream or sequence of frames per cluster.

use std::cell::RefCell;
use std::ops::RangeInclusive;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress as inflate_prefix};
use zstd::zstd_safe::{
    CCtx, CParameter, DCtx, ErrorCode, InBuffer, OutBuffer, ResetDirective, get_error_name, zstd_sys::ZSTD_ErrorCode,
};

use crate::types::CompressionType;

use frame::Frame;

mod frame;

/// Why a cluster could not be compressed or decompressed. Names no place: the caller knows the cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The bytes are not what the codec writes, or hold less than one cluster.
    #[error("the compressed data is damaged ({0})")]
    Damaged(&'static str),
    /// The codec has no such level.
    #[error("{} has no level {level}; choose one from {} to {}", kind.name(), levels.start(), levels.end())]
    Level {
        /// The codec.
        kind: CompressionType,
        /// What was asked for.
        level: i32,
        /// What it has.
        levels: RangeInclusive<i32>,
    },
    /// The codec's library failed, as when memory runs out.
    #[error("the {0} encoder failed ({1})")]
    Encoder(CompressionType, &'static str),
}

/// The levels that a codec has, and the one used where none is asked for.
///
/// Deflate levels are libdeflate's; the default writes less than QEMU's encoder for a third of its work.
#[must_use]
pub fn levels(kind: CompressionType) -> (RangeInclusive<i32>, i32) {
    match kind {
        CompressionType::Zlib => (1..=12, 4),
        CompressionType::Zstd => (1..=22, 3),
    }
}

/// Fills `output`, one cluster, from its compressed form. What follows the stream in `input` (the rest of the last
/// sector) is ignored.
pub fn decompress(kind: CompressionType, input: &[u8], output: &mut [u8]) -> Result<(), CodecError> {
    thread_local! {
        static DEFLATE: RefCell<libdeflater::Decompressor> = RefCell::new(libdeflater::Decompressor::new());
        static ZSTD: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
    }
    match kind {
        CompressionType::Zlib => DEFLATE.with_borrow_mut(|decoder| inflate(decoder, input, output)),
        CompressionType::Zstd => ZSTD.with_borrow_mut(|decoder| unpack_frames(decoder, input, output)).map(drop),
    }
}

/// How many bytes of `input` the stream of one cluster of `cluster_len` bytes takes: so many of them decode to what all of
/// them do. An L2 entry knows that only to the end of a sector.
///
/// Deflate streams are decoded for it. Of zstd frames the headers are read, where these tell how much a frame decodes to.
pub fn stream_len(kind: CompressionType, input: &[u8], cluster_len: usize) -> Result<usize, CodecError> {
    match kind {
        CompressionType::Zlib => inflate_leading(input, &mut vec![0; cluster_len]),
        CompressionType::Zstd => frames_len(input, cluster_len),
    }
}

fn frames_len(input: &[u8], cluster_len: usize) -> Result<usize, CodecError> {
    let mut len = 0;
    let mut decoded = 0_u64;
    while decoded < cluster_len as u64 {
        let frame = Frame::first(&input[len..])?;
        let Some(content) = frame.content else {
            return unpack_frames(&mut DCtx::create(), input, &mut vec![0; cluster_len]);
        };
        len += frame.len;
        decoded = decoded.saturating_add(content);
    }
    if decoded > cluster_len as u64 {
        return Err(CodecError::Damaged("the zstd frame is longer than the cluster"));
    }
    Ok(len)
}

fn inflate(decoder: &mut libdeflater::Decompressor, input: &[u8], output: &mut [u8]) -> Result<(), CodecError> {
    match decoder.deflate_decompress(input, output) {
        Ok(len) if len == output.len() => Ok(()),
        Ok(_) => Err(CodecError::Damaged("the deflate stream ends before the cluster does")),
        // libdeflate wants the whole stream; QEMU stops at the end of the cluster, wherever the stream ends.
        Err(_) => inflate_leading(input, output).map(drop),
    }
}

/// Fills `output` from the front of a stream, and returns how much of `input` that took.
fn inflate_leading(input: &[u8], output: &mut [u8]) -> Result<usize, CodecError> {
    let mut decoder = Box::<DecompressorOxide>::default();
    let (status, read, written) =
        inflate_prefix(&mut decoder, input, output, 0, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF);
    let stopped_in_order = matches!(
        status,
        TINFLStatus::Done
            | TINFLStatus::HasMoreOutput
            | TINFLStatus::NeedsMoreInput
            | TINFLStatus::FailedCannotMakeProgress
    );
    if stopped_in_order && written == output.len() {
        return Ok(read);
    }
    Err(CodecError::Damaged("not a deflate stream of one cluster"))
}

/// Fills `output` from frames, and returns how much of `input` these take.
fn unpack_frames(decoder: &mut DCtx<'_>, input: &[u8], output: &mut [u8]) -> Result<usize, CodecError> {
    let damaged = |code: ErrorCode| CodecError::Damaged(get_error_name(code));
    decoder.reset(ResetDirective::SessionOnly).map_err(damaged)?;
    let cluster_len = output.len();
    let mut source = InBuffer::around(input);
    let mut target = OutBuffer::around(output);
    loop {
        let before = (source.pos(), target.pos());
        let frame_rest = decoder.decompress_stream(&mut target, &mut source).map_err(damaged)?;
        match (target.pos() == cluster_len, frame_rest) {
            (true, 0) => return Ok(source.pos()),
            (true, _) => return Err(CodecError::Damaged("the zstd frame is longer than the cluster")),
            (false, _) if (source.pos(), target.pos()) == before => {
                return Err(CodecError::Damaged("the zstd frames end before the cluster does"));
            }
            (false, _) => {}
        }
    }
}

enum Encoder {
    Deflate(libdeflater::Compressor),
    Zstd(CCtx<'static>),
}

/// Compresses clusters one after the other with one set of tables. The same cluster always gives the same bytes.
pub struct Compressor {
    kind: CompressionType,
    encoder: Encoder,
}

impl Compressor {
    /// A compressor at `level`, or at the codec's default; see [`levels`].
    pub fn new(kind: CompressionType, level: Option<i32>) -> Result<Self, CodecError> {
        let (levels, default) = levels(kind);
        let level = level.unwrap_or(default);
        if !levels.contains(&level) {
            return Err(CodecError::Level { kind, level, levels });
        }
        let encoder = match kind {
            CompressionType::Zlib => {
                let level = libdeflater::CompressionLvl::new(level)
                    .map_err(|_| CodecError::Encoder(kind, "libdeflate does not know the level"))?;
                Encoder::Deflate(libdeflater::Compressor::new(level))
            }
            CompressionType::Zstd => {
                let failed = |code| CodecError::Encoder(kind, get_error_name(code));
                let mut context = CCtx::try_create().ok_or(CodecError::Encoder(kind, "out of memory"))?;
                context.set_parameter(CParameter::CompressionLevel(level)).map_err(failed)?;
                context.set_parameter(CParameter::ContentSizeFlag(true)).map_err(failed)?;
                context.set_parameter(CParameter::ChecksumFlag(false)).map_err(failed)?;
                Encoder::Zstd(context)
            }
        };
        Ok(Self { kind, encoder })
    }

    /// The codec.
    #[must_use]
    pub fn kind(&self) -> CompressionType {
        self.kind
    }

    /// Compresses `cluster` into the front of `output` and returns the length, or `None` where the result is not smaller
    /// than the cluster or does not fit into `output`.
    pub fn compress(&mut self, cluster: &[u8], output: &mut [u8]) -> Result<Option<usize>, CodecError> {
        let room = output.len().min(cluster.len().saturating_sub(1));
        let output = &mut output[..room];
        match &mut self.encoder {
            // Its only error is that the output does not fit.
            Encoder::Deflate(encoder) => Ok(encoder.deflate_compress(cluster, output).ok()),
            Encoder::Zstd(context) => match context.compress2(output, cluster) {
                Ok(len) => Ok(Some(len)),
                Err(code) if is_too_small(code) => Ok(None),
                Err(code) => Err(CodecError::Encoder(self.kind, get_error_name(code))),
            },
        }
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// The library returns errors as negated codes.
fn is_too_small(code: ErrorCode) -> bool {
    code.wrapping_neg() == ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KINDS: [CompressionType; 2] = [CompressionType::Zlib, CompressionType::Zstd];
    const CLUSTER: usize = 1 << 16;

    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..len).map(|_| next()).collect()
    }

    fn text(len: usize) -> Vec<u8> {
        b"qcow2 clusters compress one by one. ".iter().copied().cycle().take(len).collect()
    }

    fn packed(compressor: &mut Compressor, cluster: &[u8]) -> Option<Vec<u8>> {
        let mut output = vec![0; cluster.len()];
        let len = compressor.compress(cluster, &mut output).unwrap()?;
        output.truncate(len);
        Some(output)
    }

    #[test]
    fn incompressible_clusters_do_not_spoil_the_next_ones() {
        for kind in KINDS {
            for level in levels(kind).0 {
                let mut compressor = Compressor::new(kind, Some(level)).unwrap();
                let mut half = noise(7, CLUSTER);
                half[..CLUSTER / 2].copy_from_slice(&text(CLUSTER / 2));
                for cluster in [text(CLUSTER), noise(5, CLUSTER), half.clone(), noise(9, CLUSTER), half] {
                    let Some(mut stored) = packed(&mut compressor, &cluster) else {
                        assert!(cluster[..9] != text(9)[..], "{kind:?} {level} did not compress text");
                        continue;
                    };
                    assert_eq!(
                        packed(&mut Compressor::new(kind, Some(level)).unwrap(), &cluster),
                        Some(stored.clone())
                    );
                    let len = stored.len();
                    stored.extend(noise(3, 511));
                    assert_eq!(stream_len(kind, &stored, CLUSTER), Ok(len), "{kind:?} {level}");
                    let mut back = vec![0; CLUSTER];
                    decompress(kind, &stored, &mut back).unwrap();
                    assert!(back == cluster, "{kind:?} {level} changed the cluster");
                }
            }
        }
    }

    #[test]
    fn a_deflate_stream_longer_than_the_cluster_gives_its_first_cluster() {
        let long = [text(CLUSTER), noise(1, CLUSTER / 4)].concat();
        let stored = packed(&mut Compressor::new(CompressionType::Zlib, None).unwrap(), &long).unwrap();
        let len = stream_len(CompressionType::Zlib, &stored, CLUSTER).unwrap();
        assert!(len < stored.len());
        for input in [&stored, &stored[..len]] {
            let mut back = vec![0; CLUSTER];
            decompress(CompressionType::Zlib, input, &mut back).unwrap();
            assert!(back == long[..CLUSTER]);
        }
    }

    #[test]
    fn several_zstd_frames_make_one_cluster() {
        let cluster = text(CLUSTER);
        let mut compressor = Compressor::new(CompressionType::Zstd, None).unwrap();
        let mut stored: Vec<u8> =
            cluster.chunks(10_000).flat_map(|part| packed(&mut compressor, part).unwrap()).collect();
        let len = stored.len();
        stored.extend([0; 100]);
        let mut back = vec![0; CLUSTER];
        decompress(CompressionType::Zstd, &stored, &mut back).unwrap();
        assert!(back == cluster);
        assert_eq!(stream_len(CompressionType::Zstd, &stored, CLUSTER), Ok(len));
    }

    #[test]
    fn a_zstd_frame_that_hides_its_size_has_a_length() {
        let mut context = CCtx::create();
        context.set_parameter(CParameter::ContentSizeFlag(false)).unwrap();
        let mut stored = vec![0; CLUSTER];
        let len = context.compress2(&mut stored[..], &text(CLUSTER)).unwrap();
        assert_eq!(stream_len(CompressionType::Zstd, &stored, CLUSTER), Ok(len));
    }

    #[test]
    fn short_and_broken_streams_are_damaged() {
        for kind in KINDS {
            let stored = packed(&mut Compressor::new(kind, None).unwrap(), &text(CLUSTER - 1)).unwrap();
            let mut back = vec![0; CLUSTER];
            for input in [&stored[..], &stored[..stored.len() / 2], &[], &[0xff; 600]] {
                assert!(matches!(decompress(kind, input, &mut back), Err(CodecError::Damaged(_))), "{kind:?}");
                assert!(matches!(stream_len(kind, input, CLUSTER), Err(CodecError::Damaged(_))), "{kind:?}");
            }
        }
    }

    #[test]
    fn unknown_levels_are_refused() {
        for (kind, level) in [(CompressionType::Zlib, 0), (CompressionType::Zlib, 13), (CompressionType::Zstd, 23)] {
            assert!(matches!(Compressor::new(kind, Some(level)), Err(CodecError::Level { .. })));
        }
    }

    proptest! {
        #[test]
        fn decoders_survive_anything(input in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut output = vec![0; 4096];
            for kind in KINDS {
                let decoded = decompress(kind, &input, &mut output);
                let len = stream_len(kind, &input, output.len());
                if decoded.is_ok() {
                    let mut again = vec![0; output.len()];
                    decompress(kind, &input[..len.unwrap()], &mut again).unwrap();
                    prop_assert_eq!(&again, &output);
                }
            }
        }
    }
}
