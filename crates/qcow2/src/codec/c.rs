//! The codecs of libdeflate and zstd, which are C.

use std::cell::RefCell;

use zstd::zstd_safe::{CCtx, CParameter, DCtx, ErrorCode, get_error_name, zstd_sys::ZSTD_ErrorCode};

use super::inflate::inflate_leading;
use super::{CodecError, Levels};
use crate::types::CompressionType;

pub(super) const DEFLATE: Levels = Levels {
    default: 2,
    rates: &[
        (1, 270),
        (2, 220),
        (3, 200),
        (4, 190),
        (5, 160),
        (6, 140),
        (7, 110),
        (8, 62),
        (9, 44),
        (10, 18),
        (11, 12),
        (12, 9),
    ],
};

pub(super) const ZSTD: Levels = Levels {
    default: 3,
    rates: &[
        (-7, 940),
        (-6, 930),
        (-5, 890),
        (-4, 840),
        (-3, 820),
        (-2, 760),
        (-1, 730),
        (1, 650),
        (2, 590),
        (3, 490),
        (4, 360),
        (5, 200),
        (6, 140),
        (7, 120),
        (8, 97),
        (9, 98),
        (10, 79),
        (11, 41),
        (12, 33),
        (13, 29),
        (14, 19),
        (15, 16),
        (16, 12),
        (17, 10),
        (18, 9),
        (19, 6),
        (20, 5),
        (21, 5),
        (22, 4),
    ],
};

pub(super) enum Encoder {
    Deflate(libdeflater::Compressor),
    Zstd(CCtx<'static>),
}

impl Encoder {
    /// For a level that the codec has.
    pub(super) fn new(kind: CompressionType, level: i32) -> Result<Self, CodecError> {
        match kind {
            CompressionType::Zlib => {
                let level = libdeflater::CompressionLvl::new(level)
                    .map_err(|_| CodecError::Encoder(kind, "libdeflate does not know the level"))?;
                Ok(Self::Deflate(libdeflater::Compressor::new(level)))
            }
            CompressionType::Zstd => {
                let failed = |code| CodecError::Encoder(kind, get_error_name(code));
                let mut context = CCtx::try_create().ok_or(CodecError::Encoder(kind, "out of memory"))?;
                context.set_parameter(CParameter::CompressionLevel(level)).map_err(failed)?;
                context.set_parameter(CParameter::ContentSizeFlag(true)).map_err(failed)?;
                context.set_parameter(CParameter::ChecksumFlag(false)).map_err(failed)?;
                Ok(Self::Zstd(context))
            }
        }
    }

    /// Whether a look for what cannot be shrunk saves time: libdeflate searches it as it does everything, and so do zstd's
    /// binary trees, from level 13 on. Its other levels soon pass it over, at 0.8 to 13 GB/s.
    pub(super) fn labours_on_noise(kind: CompressionType, level: i32) -> bool {
        kind == CompressionType::Zlib || level >= 13
    }

    /// The length of the compressed cluster, or `None` where `output` is too small.
    pub(super) fn compress(&mut self, cluster: &[u8], output: &mut [u8]) -> Result<Option<usize>, CodecError> {
        match self {
            // Its only error is that the output does not fit.
            Self::Deflate(encoder) => Ok(encoder.deflate_compress(cluster, output).ok()),
            Self::Zstd(context) => match context.compress2(output, cluster) {
                Ok(len) => Ok(Some(len)),
                Err(code) if is_too_small(code) => Ok(None),
                Err(code) => Err(CodecError::Encoder(CompressionType::Zstd, get_error_name(code))),
            },
        }
    }
}

/// The library returns errors as negated codes.
fn is_too_small(code: ErrorCode) -> bool {
    code.wrapping_neg() == ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall as usize
}

pub(super) fn inflate(input: &[u8], output: &mut [u8]) -> Result<(), CodecError> {
    thread_local! {
        static DECODER: RefCell<libdeflater::Decompressor> = RefCell::new(libdeflater::Decompressor::new());
    }
    match DECODER.with_borrow_mut(|decoder| decoder.deflate_decompress(input, output)) {
        Ok(len) if len == output.len() => Ok(()),
        Ok(_) => Err(CodecError::Damaged("the deflate stream ends before the cluster does")),
        // libdeflate wants the whole stream; QEMU stops at the end of the cluster, wherever the stream ends.
        Err(_) => inflate_leading(input, output).map(drop),
    }
}

/// Decodes one frame into the front of `output`, and returns the length.
pub(super) fn decode_frame(frame: &[u8], output: &mut [u8]) -> Result<usize, CodecError> {
    thread_local! {
        static DECODER: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
    }
    DECODER
        .with_borrow_mut(|decoder| decoder.decompress(output, frame))
        .map_err(|code| CodecError::Damaged(get_error_name(code)))
}
