//! One header of a tar archive: ustar, pax and GNU (pax of POSIX.1-2001; "Basic Tar Format" in the GNU tar manual).

use std::collections::BTreeMap;

pub(super) const BLOCK: u64 = 512;
pub(super) const BLOCK_LEN: usize = 512;

/// What is wrong with a header.
pub(super) type Damage = &'static str;

pub(super) type Block = [u8; BLOCK_LEN];

/// The fields of a header that matter here.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) permissions: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) kind: u8,
    pub(super) device: (u32, u32),
    /// The size of a file with holes, as GNU keeps it in the old format.
    pub(super) real_size: u64,
}

impl Header {
    /// Reads a header whose checksum must be right.
    pub(super) fn parse(block: &Block) -> Result<Self, Damage> {
        const SUM: std::ops::Range<usize> = 148..156;
        let sum = |byte_value: fn(u8) -> i64| {
            let counted = |(at, &byte): (usize, &u8)| if SUM.contains(&at) { 32 } else { byte_value(byte) };
            block.iter().enumerate().map(counted).sum::<i64>()
        };
        const WRONG: Damage = "the checksum of a header is wrong: this is no tar archive, or it is damaged";
        let stored = number(&block[SUM]).ok_or(WRONG)?;
        // Some old programs added up signed bytes.
        if stored != sum(i64::from) && stored != sum(|byte| byte.cast_signed().into()) {
            return Err(WRONG);
        }
        let field = |range: std::ops::Range<usize>, what| number(&block[range]).ok_or(what);
        let magic = &block[257..263];
        let is_posix = magic == b"ustar\0";
        let name = text(&block[..100]);
        let prefix = if is_posix { text(&block[345..500]) } else { &[] };
        let path = if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() };
        let has_devices = magic.starts_with(b"ustar");
        let device = |range: std::ops::Range<usize>| {
            let value = if has_devices { number(&block[range]) } else { None };
            value.and_then(|value| u32::try_from(value).ok()).unwrap_or(0)
        };
        let id = |range, what| field(range, what).and_then(|value| u32::try_from(value).map_err(|_| what));
        Ok(Self {
            path,
            link: text(&block[157..257]).to_vec(),
            permissions: u16::try_from(field(100..108, "a mode is no number")? & 0o7777).unwrap_or(0),
            uid: id(108..116, "an owner's number is out of range")?,
            gid: id(116..124, "a group's number is out of range")?,
            size: field(124..136, "a size is no number")?.try_into().map_err(|_| "a size is negative")?,
            mtime: field(136..148, "a time is no number")?,
            kind: block[156],
            device: (device(329..337), device(337..345)),
            real_size: if block[156] == b'S' {
                field(483..495, "a size is no number")?.try_into().map_err(|_| "a size is negative")?
            } else {
                0
            },
        })
    }

    /// Bytes in the archive behind the header, padding included. Only files have content, whatever others claim.
    pub(super) fn stored(&self) -> Option<u64> {
        let size = if matches!(self.kind, b'1'..=b'6') { 0 } else { self.size };
        size.checked_next_multiple_of(BLOCK)
    }
}

/// A text up to its first zero byte.
pub(super) fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|&byte| byte == 0).unwrap_or(field.len())]
}

/// A number in octal digits, or in binary where the first bit is set. An empty field is zero.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let start = i64::from(first & 0x3f) - if negative { 0x40 } else { 0 };
        return rest.iter().try_fold(start, |value, &byte| value.checked_mul(256)?.checked_add(byte.into()));
    }
    let digits = text(field).trim_ascii();
    let digit = |value: i64, &byte: &u8| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add((byte - b'0').into()),
        _ => None,
    };
    digits.iter().try_fold(0, digit)
}

/// The records of a pax header, by keyword; of each the last, and in order those that GNU gives several times.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    pub(super) by_key: BTreeMap<Vec<u8>, Vec<u8>>,
    /// `GNU.sparse.offset` and `GNU.sparse.numbytes`, alternating.
    pub(super) sparse: Vec<u64>,
}

impl Records {
    /// Adds the records of one header.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> Result<(), Damage> {
        const DAMAGE: Damage = "a pax header is malformed";
        while !bytes.is_empty() && bytes[0] != 0 {
            let space = bytes.iter().position(|&byte| byte == b' ').ok_or(DAMAGE)?;
            let len = usize::try_from(decimal(&bytes[..space]).ok_or(DAMAGE)?).map_err(|_| DAMAGE)?;
            let record = bytes.get(space + 1..len).ok_or(DAMAGE)?;
            let record = record.strip_suffix(b"\n").ok_or(DAMAGE)?;
            let equals = record.iter().position(|&byte| byte == b'=').ok_or(DAMAGE)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                self.sparse.push(decimal(value).ok_or(DAMAGE)?);
            } else {
                self.by_key.insert(key.to_vec(), value.to_vec());
            }
            bytes = &bytes[len..];
        }
        Ok(())
    }

    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        self.by_key.get(key.as_bytes()).map(Vec::as_slice)
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<u64>, Damage> {
        self.get(key).map(|value| decimal(value).ok_or("a number in a pax header is malformed")).transpose()
    }
}

pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Seconds with a fraction, as seconds rounded down and nanoseconds.
pub(super) fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    if whole.starts_with('-') && nanos > 0 {
        Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos))
    } else {
        Some((seconds, nanos))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_two_forms() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b" 17 \0\0\0\0"), Some(0o17));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\0\0\x01\0\0"), Some(65536));
        assert_eq!(number(b"\xff\xff\xff\xff"), Some(-1));
        assert_eq!(number(b"12x"), None);
        assert_eq!(number(&[0x80, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), None);
    }

    #[test]
    fn times_have_fractions() {
        assert_eq!(time(b"12.5"), Some((12, 500_000_000)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"7"), Some((7, 0)));
        assert_eq!(time(b"1.2345678912"), Some((1, 234_567_891)));
        assert_eq!(time(b"1.x"), None);
    }

    #[test]
    fn records_are_bounded_by_their_header() {
        let mut records = Records::default();
        records.read(b"11 path=ab\n13 x=with \n=\n\0\0").unwrap();
        assert_eq!(records.get("path"), Some(&b"ab"[..]));
        assert_eq!(records.get("x"), Some(&b"with \n="[..]));
        for bad in [&b"99 path=ab\n"[..], b"1 x=y\n", b"0 =\n", b"path\n", b"6 x=ab", b"18446744073709551615 x=y\n"] {
            assert!(Records::default().read(bad).is_err(), "{bad:?}");
        }
    }
}
