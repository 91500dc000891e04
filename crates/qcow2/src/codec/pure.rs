//! The codecs of zlib-rs and structured-zstd, for builds without a C compiler.

use std::cell::RefCell;

use structured_zstd::decoding::FrameDecoder;
use structured_zstd::encoding::{CompressionLevel, FrameCompressor};
use zlib_rs::{Deflate, DeflateFlush, Status};

use super::inflate::inflate_leading;
use super::{CodecError, Levels};
use crate::types::CompressionType;

const WINDOW_BITS: u8 = 15;

/// zlib-rs 0.6.8 has a level 1, which damages streams: one that overflows its output spoils the next.
pub(super) const DEFLATE: Levels =
    Levels { default: 3, rates: &[(2, 180), (3, 150), (4, 130), (5, 120), (6, 100), (7, 65), (8, 26), (9, 35)] };

pub(super) const ZSTD: Levels = Levels {
    default: 3,
    rates: &[
        (-7, 820),
        (-6, 850),
        (-5, 830),
        (-4, 780),
        (-3, 750),
        (-2, 700),
        (-1, 680),
        (1, 600),
        (2, 530),
        (3, 330),
        (4, 320),
        (5, 160),
        (6, 120),
        (7, 110),
        (8, 97),
        (9, 82),
        (10, 56),
        (11, 38),
        (12, 31),
        (13, 25),
        (14, 19),
        (15, 17),
        (16, 13),
        (17, 12),
        (18, 12),
        (19, 6),
        (20, 6),
        (21, 6),
        (22, 5),
    ],
};

pub(super) enum Encoder {
    Deflate(i32),
    /// The compressor, and where it leaves its frames.
    Zstd(Box<FrameCompressor>, Vec<u8>),
}

impl Encoder {
    /// For a level that the codec has.
    pub(super) fn new(kind: CompressionType, level: i32) -> Result<Self, CodecError> {
        match kind {
            CompressionType::Zlib => Ok(Self::Deflate(level)),
            CompressionType::Zstd => {
                let mut encoder = FrameCompressor::new(CompressionLevel::from_level(level));
                encoder.set_content_checksum(false);
                Ok(Self::Zstd(Box::new(encoder), Vec::new()))
            }
        }
    }

    /// Whether a look for what cannot be shrunk saves time: structured-zstd passes it over at 3 GB/s and more.
    pub(super) fn labours_on_noise(kind: CompressionType, _level: i32) -> bool {
        kind == CompressionType::Zlib
    }

    /// The length of the compressed cluster, or `None` where `output` is too small.
    pub(super) fn compress(&mut self, cluster: &[u8], output: &mut [u8]) -> Result<Option<usize>, CodecError> {
        match self {
            Self::Deflate(level) => {
                // Nothing is left over from one stream to the next.
                let mut encoder = Deflate::new(*level, false, WINDOW_BITS);
                match encoder.compress(cluster, output, DeflateFlush::Finish) {
                    Ok(Status::StreamEnd) => Ok(usize::try_from(encoder.total_out()).ok()),
                    Ok(Status::Ok | Status::BufError) => Ok(None),
                    Err(error) => Err(CodecError::Encoder(CompressionType::Zlib, error.as_str())),
                }
            }
            Self::Zstd(encoder, frame) => {
                encoder.compress_independent_frame_into(cluster, frame);
                Ok(output.get_mut(..frame.len()).map(|output| {
                    output.copy_from_slice(frame);
                    output.len()
                }))
            }
        }
    }
}

pub(super) fn inflate(input: &[u8], output: &mut [u8]) -> Result<(), CodecError> {
    inflate_leading(input, output).map(drop)
}

/// Decodes one frame into the front of `output`, and returns the length.
pub(super) fn decode_frame(frame: &[u8], output: &mut [u8]) -> Result<usize, CodecError> {
    thread_local! {
        static DECODER: RefCell<FrameDecoder> = RefCell::new(FrameDecoder::new());
    }
    DECODER
        .with_borrow_mut(|decoder| decoder.decode_all(frame, output))
        .map_err(|_| CodecError::Damaged("the zstd frame cannot be decoded, or is longer than the cluster"))
}
