/// Whether every byte of `bytes` is zero. Compiles to vector code; stops at the first block that is not.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    const LANES: usize = 128;
    let (blocks, tail) = bytes.as_chunks::<LANES>();
    blocks.iter().all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0) && tail.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn finds_a_single_set_bit_anywhere() {
        for len in [0, 1, 127, 128, 129, 4096] {
            let mut bytes = vec![0_u8; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "bit at {at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
