//! The name hashes that order an indexed directory (kernel documentation, "Hash Tree Directories").

use crate::superblock::HashParameters;

/// A hash function, as the index root or the superblock numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HashFunction {
    Legacy,
    HalfMd4,
    Tea,
}

impl HashFunction {
    /// The function with this number on disk, if it is one of the three.
    pub(crate) fn from_disk(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Legacy),
            1 => Some(Self::HalfMd4),
            2 => Some(Self::Tea),
            _ => None,
        }
    }

    pub(crate) fn to_disk(self) -> u8 {
        match self {
            Self::Legacy => 0,
            Self::HalfMd4 => 1,
            Self::Tea => 2,
        }
    }
}

/// The hash that marks the end of an index; a name's hash is never it.
const END_OF_INDEX: u32 = 0xffff_fffe;

impl HashParameters {
    /// The function for new indexes; half MD4 where the superblock names none that is known.
    pub(crate) fn for_new_index(&self) -> HashFunction {
        HashFunction::from_disk(self.version).unwrap_or(HashFunction::HalfMd4)
    }

    /// The hash of a name: even, since the lowest bit marks a continued run of equal hashes in the index.
    pub(crate) fn hash(&self, function: HashFunction, name: &[u8]) -> u32 {
        let hash = match function {
            HashFunction::Legacy => self.legacy(name),
            HashFunction::HalfMd4 => self.fold(name, half_md4)[1],
            HashFunction::Tea => self.fold(name, tea)[0],
        } & !1;
        if hash == END_OF_INDEX { END_OF_INDEX - 2 } else { hash }
    }

    fn widen(&self, byte: u8) -> u32 {
        if self.unsigned { u32::from(byte) } else { i32::from(byte.cast_signed()).cast_unsigned() }
    }

    fn legacy(&self, name: &[u8]) -> u32 {
        let (mut last, mut before) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
        for &byte in name {
            let mut hash = before.wrapping_add(last ^ self.widen(byte).wrapping_mul(7_152_373));
            if hash & 0x8000_0000 != 0 {
                hash = hash.wrapping_sub(0x7fff_ffff);
            }
            (before, last) = (last, hash);
        }
        last << 1
    }

    /// Feeds the name to `transform` in pieces of `N` words.
    fn fold<const N: usize>(&self, name: &[u8], transform: fn(&mut [u32; 4], &[u32; N])) -> [u32; 4] {
        let mut state = match self.seed {
            [0, 0, 0, 0] => [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476],
            seed => seed,
        };
        let mut rest = name;
        while !rest.is_empty() {
            transform(&mut state, &self.words(rest));
            rest = rest.get(4 * N..).unwrap_or_default();
        }
        state
    }

    /// The next `N` words of the name, padded with its remaining length.
    fn words<const N: usize>(&self, rest: &[u8]) -> [u32; N] {
        #[expect(clippy::cast_possible_truncation, reason = "only the lowest byte of the length pads")]
        let pad = u32::from_le_bytes([rest.len() as u8; 4]);
        let mut words = [pad; N];
        for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
            *word = bytes.iter().fold(pad, |word, &byte| (word << 8).wrapping_add(self.widen(byte)));
        }
        words
    }
}

/// Three rounds of eight steps, the compression function of MD4 cut in half.
fn half_md4(state: &mut [u32; 4], input: &[u32; 8]) {
    type Round = (fn(u32, u32, u32) -> u32, u32, [usize; 8], [u32; 4]);
    const ROUNDS: [Round; 3] = [
        (|x, y, z| z ^ (x & (y ^ z)), 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (|x, y, z| (x & y).wrapping_add((x ^ y) & z), 0x5a82_7999, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]),
        (|x, y, z| x ^ y ^ z, 0x6ed9_eba1, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, shifts) in ROUNDS {
        for (word, shift) in order.into_iter().zip(shifts.into_iter().cycle()) {
            let sum = a.wrapping_add(mix(b, c, d)).wrapping_add(input[word]).wrapping_add(constant);
            (a, b, c, d) = (d, sum.rotate_left(shift), b, c);
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}

/// The Tiny Encryption Algorithm, with the name as its key.
fn tea(state: &mut [u32; 4], key: &[u32; 4]) {
    let [mut left, mut right, ..] = *state;
    let half = |value: u32, sum: u32, k0: u32, k1: u32| {
        (value << 4).wrapping_add(k0) ^ value.wrapping_add(sum) ^ (value >> 5).wrapping_add(k1)
    };
    let mut sum = 0_u32;
    for _ in 0..16 {
        sum = sum.wrapping_add(0x9e37_79b9);
        left = left.wrapping_add(half(right, sum, key[0], key[1]));
        right = right.wrapping_add(half(left, sum, key[2], key[3]));
    }
    state[0] = state[0].wrapping_add(left);
    state[1] = state[1].wrapping_add(right);
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASCII: &str = "a-rather-long-name-that-needs-more-than-thirty-two-bytes.tar.gz";
    const LATIN: &str = "naïve-café-ÿÿÿ-quite-long-name-of-more-than-32-bytes";

    /// Answers of `debugfs -R 'dx_hash -h FUNCTION NAME'`; 3 to 5 are the unsigned variants there.
    #[test]
    fn agrees_with_debugfs() {
        let table: [(u8, bool, &str, u32); 21] = [
            (0, false, "a", 0xe74b_53e2),
            (0, false, "hello.txt", 0x65a0_5776),
            (0, false, ASCII, 0x8967_6ba4),
            (0, false, "é", 0x1108_3c86),
            (0, false, LATIN, 0xabf4_c5a4),
            (0, true, "é", 0x878c_a486),
            (0, true, LATIN, 0x0c50_24c2),
            (1, false, "a", 0xd5fa_7d7a),
            (1, false, "hello.txt", 0xa26e_1d86),
            (1, false, ASCII, 0x65c6_b020),
            (1, false, "é", 0x89d4_704e),
            (1, false, LATIN, 0x534c_7dec),
            (1, true, "é", 0xfda9_f3f8),
            (1, true, LATIN, 0x23fd_152a),
            (2, false, "a", 0x6d0e_a4c0),
            (2, false, "hello.txt", 0x5107_c3f2),
            (2, false, ASCII, 0x005b_204e),
            (2, false, "é", 0x591e_9bd6),
            (2, false, LATIN, 0x5878_e1bc),
            (2, true, "é", 0x6daf_7c00),
            (2, true, LATIN, 0xe340_3176),
        ];
        for (number, unsigned, name, expected) in table {
            let function = HashFunction::from_disk(number).unwrap();
            let hash = HashParameters { seed: [0; 4], version: 0, unsigned }.hash(function, name.as_bytes());
            assert_eq!(hash, expected, "{function:?} of {name}: {hash:#x}");
        }
    }

    /// `debugfs -R 'dx_hash -s 11111111-2222-3333-4444-555555555555 …'`
    #[test]
    fn a_seed_replaces_the_constants() {
        let seed = [0x1111_1111, 0x3333_2222, 0x5555_4444, 0x5555_5555];
        let seeded = HashParameters { seed, version: 0, unsigned: false };
        assert_eq!(seeded.hash(HashFunction::HalfMd4, b"hello.txt"), 0x8d4f_0414);
        assert_eq!(seeded.hash(HashFunction::Tea, b"hello.txt"), 0xf97f_49a0);
        assert_eq!(seeded.hash(HashFunction::Legacy, b"hello.txt"), 0x65a0_5776);
    }
}
