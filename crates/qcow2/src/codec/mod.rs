//! Compressed clusters: raw deflate (RFC 1951) and zstd (RFC 8878), one stream or sequence of frames per cluster.
//!
//! The codecs are libdeflate and zstd, or zlib-rs and structured-zstd where the feature `pure-rust` is on. Either set reads what
//! the other writes.

use std::ops::RangeInclusive;

use crate::types::CompressionType;

use frame::Frame;
use inflate::inflate_leading;
use library::Encoder;
use noise::is_noise;

#[cfg(all(feature = "c-codecs", not(feature = "pure-rust")))]
mod c;
mod frame;
mod inflate;
mod noise;
#[cfg(feature = "pure-rust")]
mod pure;

#[cfg(all(feature = "c-codecs", not(feature = "pure-rust")))]
use c as library;
#[cfg(feature = "pure-rust")]
use pure as library;
#[cfg(not(any(feature = "c-codecs", feature = "pure-rust")))]
compile_error!("choose the codecs: the feature `c-codecs` (the default) or `pure-rust`");

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

/// What a codec's library can do.
struct Levels {
    /// The fastest level whose output is no larger than that of QEMU's encoder.
    default: i32,
    /// Each level, in order, with the megabytes of disk that it compresses in a second.
    ///
    /// Measured on one thread of an AMD EPYC (Zen 5), over the clusters of 64 KiB of a Debian guest that are not zero. They are
    /// fixed, so that a level chosen by them does not depend on where and when it is chosen.
    rates: &'static [(i32, u64)],
}

fn library_levels(kind: CompressionType) -> Levels {
    match kind {
        CompressionType::Zlib => library::DEFLATE,
        CompressionType::Zstd => library::ZSTD,
    }
}

/// The levels that a codec has, and the one used where none is asked for.
///
/// Both defaults write no more than QEMU's encoder does, deflate's for a quarter of its work.
#[must_use]
pub fn levels(kind: CompressionType) -> (RangeInclusive<i32>, i32) {
    let Levels { default, rates } = library_levels(kind);
    let levels = || rates.iter().map(|&(level, _)| level);
    (levels().min().unwrap_or(default)..=levels().max().unwrap_or(default), default)
}

/// The strongest level that compresses at least so many bytes of disk per second on each thread, or else the fastest level.
///
/// It goes by a fixed table, measured once on one machine: the answer is the same everywhere.
#[must_use]
pub fn level_for_rate(kind: CompressionType, bytes_per_second_per_thread: u64) -> i32 {
    let Levels { default, rates } = library_levels(kind);
    let reaches = |&&(_, megabytes): &&(i32, u64)| megabytes * 1_000_000 >= bytes_per_second_per_thread;
    let fastest = rates.iter().max_by_key(|&&(_, megabytes)| megabytes);
    rates.iter().rfind(reaches).or(fastest).map_or(default, |&(level, _)| level)
}

/// Fills `output`, one cluster, from its compressed form. What follows the stream in `input` (the rest of the last
/// sector) is ignored.
pub fn decompress(kind: CompressionType, input: &[u8], output: &mut [u8]) -> Result<(), CodecError> {
    match kind {
        CompressionType::Zlib => library::inflate(input, output),
        CompressionType::Zstd => decode_frames(input, output).map(drop),
    }
}

/// Fills `output` from frames, and returns how much of `input` these take.
fn decode_frames(input: &[u8], output: &mut [u8]) -> Result<usize, CodecError> {
    let (mut read, mut written) = (0, 0);
    while written < output.len() {
        let frame = &input[read..][..Frame::first(&input[read..])?.len];
        written += library::decode_frame(frame, &mut output[written..])?;
        read += frame.len();
    }
    Ok(read)
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
            return decode_frames(input, &mut vec![0; cluster_len]);
        };
        len += frame.len;
        decoded = decoded.saturating_add(content);
    }
    if decoded > cluster_len as u64 {
        return Err(CodecError::Damaged("the zstd frame is longer than the cluster"));
    }
    Ok(len)
}

/// Compresses clusters one after the other with one set of tables. The same cluster always gives the same bytes.
pub struct Compressor {
    kind: CompressionType,
    encoder: Encoder,
    /// Whether to look for noise before the encoder does.
    shuns_noise: bool,
}

impl Compressor {
    /// A compressor at `level`, or at the codec's default; see [`levels`].
    pub fn new(kind: CompressionType, level: Option<i32>) -> Result<Self, CodecError> {
        let (levels, default) = levels(kind);
        let level = level.unwrap_or(default);
        if !levels.contains(&level) {
            return Err(CodecError::Level { kind, level, levels });
        }
        Ok(Self { kind, encoder: Encoder::new(kind, level)?, shuns_noise: Encoder::labours_on_noise(kind, level) })
    }

    /// The codec.
    #[must_use]
    pub fn kind(&self) -> CompressionType {
        self.kind
    }

    /// Compresses `cluster` into the front of `output` and returns the length, or `None` where the result is not smaller
    /// than the cluster or does not fit into `output`, or where a look at the cluster says that trying is no use.
    pub fn compress(&mut self, cluster: &[u8], output: &mut [u8]) -> Result<Option<usize>, CodecError> {
        if self.shuns_noise && is_noise(cluster) {
            return Ok(None);
        }
        let room = output.len().min(cluster.len().saturating_sub(1));
        self.encoder.compress(cluster, &mut output[..room])
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").field("kind", &self.kind).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KINDS: [CompressionType; 2] = [CompressionType::Zlib, CompressionType::Zstd];
    const CLUSTER: usize = 1 << 16;

    pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..len).map(|_| next()).collect()
    }

    pub(super) fn text(len: usize) -> Vec<u8> {
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
        // A window of 64 KiB and one block, its last, which repeats a byte.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 0x30, 0x03, 0, 8, b'a'];
        let stored = [&frame[..], &noise(1, 100)].concat();
        assert_eq!(stream_len(CompressionType::Zstd, &stored, CLUSTER), Ok(frame.len()));
        let mut back = vec![0; CLUSTER];
        decompress(CompressionType::Zstd, &stored, &mut back).unwrap();
        assert!(back == [b'a'; CLUSTER]);
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

    #[test]
    fn rates_choose_levels() {
        for kind in KINDS {
            let (levels, _) = levels(kind);
            assert_eq!(level_for_rate(kind, 0), *levels.end());
            let mut before = *levels.end();
            for megabytes in 1..1000 {
                let level = level_for_rate(kind, megabytes * 1_000_000);
                assert!(
                    levels.contains(&level) && level <= before,
                    "{kind:?} {megabytes} MB/s: {level} after {before}"
                );
                before = level;
            }
            // Nothing is so fast: the fastest level.
            assert_eq!(level_for_rate(kind, u64::MAX), before);
            Compressor::new(kind, Some(before)).unwrap();
        }
    }

    #[test]
    fn frames_that_claim_too_much_are_damaged() {
        // A content of 1 TiB; a window of 2 TiB, and one of 128 MiB; each with a last block of 64 KiB.
        let block = [0x03, 0, 8, b'a'];
        let content = [&[0x28, 0xb5, 0x2f, 0xfd, 0xe0, 0, 0, 0, 0, 0, 1, 0, 0][..], &block].concat();
        let window = [&[0x28, 0xb5, 0x2f, 0xfd, 0, 0xf8][..], &block].concat();
        let large = [&[0x28, 0xb5, 0x2f, 0xfd, 0, 0x88][..], &block].concat();
        let mut back = vec![0; CLUSTER];
        for frame in [&content, &window] {
            assert!(matches!(decompress(CompressionType::Zstd, frame, &mut back), Err(CodecError::Damaged(_))));
        }
        decompress(CompressionType::Zstd, &large, &mut back).unwrap();
        assert!(matches!(decompress(CompressionType::Zstd, &large, &mut back[1..]), Err(CodecError::Damaged(_))));
    }

    proptest! {
        #[test]
        fn decoders_survive_damage(seed in any::<u64>(), hits in proptest::collection::vec(any::<(u16, u8)>(), 1..8)) {
            let cluster = [text(5000), noise(seed, 1000), vec![0; 3000], noise(seed ^ 7, 5000), text(4000)].concat();
            for kind in KINDS {
                let mut stored = packed(&mut Compressor::new(kind, None).unwrap(), &cluster).unwrap();
                for &(at, byte) in &hits {
                    // Half of the hits go to the headers.
                    let end = if at & 1 == 0 { stored.len() } else { 64 };
                    stored[usize::from(at >> 1) % end] = byte;
                }
                let mut output = vec![0; cluster.len()];
                let decoded = decompress(kind, &stored, &mut output);
                let len = stream_len(kind, &stored, output.len());
                if decoded.is_ok() {
                    let mut again = vec![0; output.len()];
                    decompress(kind, &stored[..len.unwrap()], &mut again).unwrap();
                    prop_assert!(again == output);
                }
            }
        }

        #[test]
        fn clusters_of_any_mixture_come_back(
            parts in proptest::collection::vec((any::<u8>(), 1..4000_usize, any::<u64>()), 1..40),
            size in 12..17_u32,
        ) {
            let mut cluster = Vec::new();
            for (what, len, seed) in parts {
                match what % 4 {
                    0 => cluster.extend(noise(seed, len)),
                    1 => cluster.extend(text(len)),
                    2 => cluster.extend(std::iter::repeat_n(what, len)),
                    _ => cluster.extend_from_within(cluster.len() / 2..),
                }
            }
            cluster.resize(1 << size, 0);
            for kind in KINDS {
                let Some(stored) = packed(&mut Compressor::new(kind, None).unwrap(), &cluster) else { continue };
                prop_assert_eq!(stream_len(kind, &stored, cluster.len()), Ok(stored.len()));
                let mut back = vec![0; cluster.len()];
                decompress(kind, &stored, &mut back).unwrap();
                prop_assert!(back == cluster);
            }
        }

        #[test]
        fn noise_is_only_what_hardly_shrinks(
            len in 0..2000_usize, at in 0..64_000_usize, copies in 0..6_usize, seed in any::<u64>(),
        ) {
            let mut cluster = noise(seed, CLUSTER);
            cluster[at.min(CLUSTER - len)..][..len].copy_from_slice(&text(len));
            for copy in 0..copies {
                cluster.copy_within(copy * 300..(copy + 1) * 300, CLUSTER / 2 + copy * 5000);
            }
            let mut encoder = Encoder::new(CompressionType::Zlib, levels(CompressionType::Zlib).1).unwrap();
            let shrunk = encoder.compress(&cluster, &mut vec![0; CLUSTER]).unwrap();
            if is_noise(&cluster) {
                prop_assert!(shrunk.is_none_or(|shrunk| shrunk > CLUSTER - CLUSTER / 25), "{:?}", shrunk);
            }
        }

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
