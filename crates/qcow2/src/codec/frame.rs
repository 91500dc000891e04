//! Where zstd frames end, read from their headers (RFC 8878, section 3.1): no block is decoded.

use super::CodecError;

const MAGIC: u32 = 0xfd2f_b528;
/// Skippable frames have sixteen of them, which differ in the last four bits.
const SKIPPABLE_MAGIC: u32 = 0x184d_2a50;
const CHECKSUM_LEN: usize = 4;

/// One frame at the front of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// Its bytes.
    pub(super) len: usize,
    /// The bytes it decodes to, where its header says so.
    pub(super) content: Option<u64>,
}

impl Frame {
    /// The frame at the front of `input`, which holds all of it.
    pub(super) fn first(input: &[u8]) -> Result<Self, CodecError> {
        let mut rest = Bytes(input);
        let magic = rest.number(4)?;
        if magic & !0xf == u64::from(SKIPPABLE_MAGIC) {
            let len = rest.number(4)?;
            rest.skip(len)?;
            return Ok(Self { len: input.len() - rest.0.len(), content: Some(0) });
        }
        if magic != u64::from(MAGIC) {
            return Err(CodecError::Damaged("there is no zstd frame"));
        }
        let descriptor = rest.number(1)?;
        let single_segment = descriptor & 0x20 != 0;
        let dictionary_len = [0, 1, 2, 4][(descriptor & 3) as usize];
        rest.skip(u64::from(!single_segment) + dictionary_len)?;
        let content = match (descriptor >> 6, single_segment) {
            (0, false) => None,
            (0, true) => Some(rest.number(1)?),
            (1, _) => Some(rest.number(2)? + 256),
            (2, _) => Some(rest.number(4)?),
            _ => Some(rest.number(8)?),
        };
        while !rest.skip_block()? {}
        if descriptor & 4 != 0 {
            rest.skip(CHECKSUM_LEN as u64)?;
        }
        Ok(Self { len: input.len() - rest.0.len(), content })
    }
}

/// What is left to read.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    /// A little-endian number of at most eight bytes.
    fn number(&mut self, len: usize) -> Result<u64, CodecError> {
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(CUT)?;
        self.0 = rest;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn skip(&mut self, len: u64) -> Result<(), CodecError> {
        let len = usize::try_from(len).map_err(|_| CUT)?;
        self.0 = self.0.get(len..).ok_or(CUT)?;
        Ok(())
    }

    /// Passes over a block, and says whether it was the frame's last.
    fn skip_block(&mut self) -> Result<bool, CodecError> {
        let header = self.number(3)?;
        let size = header >> 3;
        match header >> 1 & 3 {
            // A byte that is repeated `size` times.
            1 => self.skip(1)?,
            3 => return Err(CodecError::Damaged("a zstd block has a reserved type")),
            _ => self.skip(size)?,
        }
        Ok(header & 1 != 0)
    }
}

const CUT: CodecError = CodecError::Damaged("a zstd frame is cut short");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_give_the_length() {
        // A frame without window, of a raw block of 2 bytes, a last repeated one of 3 and a checksum.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x24, 5, 0x10, 0, 0, b'a', b'b', 0x1b, 0, 0, b'c', 1, 2, 3, 4, 9, 9];
        assert_eq!(Frame::first(&frame).unwrap(), Frame { len: 19, content: Some(5) });
        for len in 0..19 {
            assert!(Frame::first(&frame[..len]).is_err(), "{len}");
        }
        let skippable = [0x53, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 7, 7, 7];
        assert_eq!(Frame::first(&skippable).unwrap(), Frame { len: 10, content: Some(0) });
        let unknown_size = [0x28, 0xb5, 0x2f, 0xfd, 0, 0x58, 1, 0, 0];
        assert_eq!(Frame::first(&unknown_size).unwrap(), Frame { len: 9, content: None });
        let reserved = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 7, 0, 0];
        assert!(Frame::first(&reserved).is_err());
    }
}
