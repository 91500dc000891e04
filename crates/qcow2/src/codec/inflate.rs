//! Deflate streams of which only a cluster is wanted.

use std::cell::RefCell;

use zlib_rs::{Inflate, InflateFlush, Status};

use super::CodecError;

/// RFC 1951's largest window, 32 KiB. QEMU writes streams for a smaller one.
const WINDOW_BITS: u8 = 15;

/// Fills `output` from the front of a stream, which may be longer, and returns how much of `input` that took.
pub(super) fn inflate_leading(input: &[u8], output: &mut [u8]) -> Result<usize, CodecError> {
    thread_local! {
        static DECODER: RefCell<Inflate> = RefCell::new(Inflate::new(false, WINDOW_BITS));
    }
    DECODER.with_borrow_mut(|decoder| {
        decoder.reset(false);
        let status = decoder.decompress(input, output, InflateFlush::Finish);
        let status = status.map_err(|error| CodecError::Damaged(error.as_str()))?;
        match (decoder.total_out() == output.len() as u64, status) {
            (true, _) => Ok(usize::try_from(decoder.total_in()).unwrap_or(input.len()).min(input.len())),
            (false, Status::StreamEnd) => Err(CodecError::Damaged("the deflate stream ends before the cluster does")),
            (false, _) => Err(CodecError::Damaged("the deflate stream is cut short")),
        }
    })
}
