//! Clusters that no codec shrinks, known by a look at a few of their bytes.

/// Samples are so long. There are at least so many of them, not farther apart than this: a codec could shrink little in between.
const SAMPLE: usize = 64;
const SAMPLES: usize = 64;
const STRIDE: usize = 1024;
/// 64 random bytes have 56.7 different values on average, with a deviation of 2.3; text and code have half as many.
const FEWEST_VALUES: u32 = 44;
/// Random bytes repeat each other in one of 256 pairs. In what Huffman codes could shrink by half a percent, a sixteenth more do.
const SPARE_PAIRS: u64 = 16;
/// Sequences of four bytes that are remembered: about so many of a cluster's.
const MARKS: usize = 256;
/// As many of them come back where about one byte in 85 is a copy.
const REPEATS: u32 = 3;

/// Whether `cluster` is like random bytes: all values are as frequent, everywhere, and nothing comes back.
///
/// Compressed and encrypted data is. Most other clusters are told from it by their first sample.
pub(super) fn is_noise(cluster: &[u8]) -> bool {
    cluster.len() >= SAMPLES * SAMPLE && is_even(cluster) && !repeats(cluster)
}

/// Whether all values are about as frequent as the others.
fn is_even(cluster: &[u8]) -> bool {
    let mut counts = [0_u64; 256];
    let mut total = 0_u64;
    let stride = (cluster.len() / SAMPLES).min(STRIDE);
    for sample in cluster.chunks_exact(stride).map(|stretch| &stretch[..SAMPLE]) {
        let mut seen = [0_u64; 4];
        for &byte in sample {
            seen[usize::from(byte >> 6)] |= 1 << (byte & 63);
            counts[usize::from(byte)] += 1;
        }
        if seen.iter().map(|bits| bits.count_ones()).sum::<u32>() < FEWEST_VALUES {
            return false;
        }
        total += sample.len() as u64;
    }
    let pairs = total * (total - 1) / 256;
    let equal_pairs: u64 = counts.iter().map(|&count| count * count.saturating_sub(1)).sum();
    equal_pairs <= pairs + pairs / SPARE_PAIRS
}

/// Whether sequences come back. Those that are remembered are chosen by their bits, so that a copy shows at any distance.
fn repeats(cluster: &[u8]) -> bool {
    // One of as many sequences as this number counts has all these bits.
    let chosen = u32::try_from(cluster.len() / MARKS).unwrap_or(u32::MAX).next_power_of_two() - 1;
    let mut last = [0; 4 * MARKS];
    let mut found = 0;
    for bytes in cluster.windows(4) {
        let sequence = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        if sequence & chosen == chosen {
            let place = &mut last[(sequence >> 16) as usize % (4 * MARKS)];
            found += u32::from(*place == sequence);
            *place = sequence;
        }
    }
    found >= REPEATS
}

#[cfg(test)]
mod tests {
    use super::super::tests::{noise, text};
    use super::*;

    const LENS: [usize; 4] = [4096, 1 << 16, 1 << 17, 1 << 21];

    #[test]
    fn random_bytes_are_noise() {
        for len in LENS {
            assert!((1..100).all(|seed| is_noise(&noise(seed * 7919, len.min(1 << 17)))), "{len}");
        }
        // Too short to tell.
        assert!(!is_noise(&noise(1, 2048)));
    }

    #[test]
    fn what_shrinks_is_not() {
        for len in LENS {
            let random = noise(3, len);
            // A stretch of text or zeroes anywhere.
            for at in [0, len / 3, len - len.min(1 << 15) / 16] {
                let stretch = (len / 32).max(2 * STRIDE.min(len / SAMPLES)).min(len - at);
                let (mut texts, mut zeroes) = (random.clone(), random.clone());
                texts[at..at + stretch].copy_from_slice(&text(stretch));
                zeroes[at..at + stretch].fill(0);
                assert!(!is_noise(&texts) && !is_noise(&zeroes), "{len}: {stretch} bytes at {at}");
            }
            // The same bytes twice, at any distance.
            let copy = random[..len / 8].to_vec();
            for at in [len / 8 + 1, len / 2 + 3, len - len / 8] {
                let mut twice = random.clone();
                twice[at..at + len / 8].copy_from_slice(&copy);
                assert!(!is_noise(&twice), "{len}: a copy at {at}");
            }
            // Seven bits of eight.
            assert!(!is_noise(&random.iter().map(|byte| byte & 0x7f).collect::<Vec<_>>()), "{len}");
        }
    }
}
