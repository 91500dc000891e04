//! Numbers as QEMU reads them.

use std::ops::RangeInclusive;

use super::NAME;
use super::message::Failure;

/// Why a text is no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NumberError {
    /// It is not written as one.
    Malformed,
    /// It is negative, or too large.
    OutOfRange,
}

/// A size in bytes: decimal with an optional fraction and one of the letters b, k, m, g, t, p, e, or hexadecimal with neither.
pub(crate) fn size(text: &str) -> Result<u64, NumberError> {
    use NumberError::{Malformed, OutOfRange};
    let (negative, digits) = sign(text);
    if negative {
        return Err(integer(digits, 10).map_or_else(|error| error, |_| OutOfRange));
    }
    if let Some(digits) = hexadecimal(digits) {
        return integer(digits, 16);
    }
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(end);
    let fraction =
        rest.strip_prefix('.').map(|rest| &rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())]);
    let suffix = &rest[fraction.map_or(0, |fraction| fraction.len() + 1)..];
    if whole.is_empty() && fraction.is_none_or(str::is_empty) {
        return Err(Malformed);
    }
    let unit = unit(suffix).ok_or(Malformed)?;
    let fraction = fraction
        .filter(|fraction| !fraction.is_empty())
        .map_or(Ok(0.0), |fraction| format!("0.{fraction}").parse::<f64>());
    let fraction = fraction.map_err(|_| Malformed)?;
    if unit == 1 && fraction > 0.0 {
        return Err(Malformed);
    }
    let whole = if whole.is_empty() { 0 } else { integer(whole, 10)? };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "rounded to bytes"
    )]
    let part = (fraction * unit as f64).round() as u64;
    whole.checked_mul(unit).and_then(|bytes| bytes.checked_add(part)).ok_or(OutOfRange)
}

/// The size that an argument says, of what errors call `what`.
pub(crate) fn argument(text: &str, what: &str) -> Result<u64, Failure> {
    argument_in(text, what, 0..=i64::MAX.unsigned_abs())
}

/// As [`argument`], within limits.
pub(crate) fn argument_in(text: &str, what: &str, limits: RangeInclusive<u64>) -> Result<u64, Failure> {
    match size(text) {
        Ok(bytes) if limits.contains(&bytes) => Ok(bytes),
        Ok(_) | Err(NumberError::OutOfRange) => {
            let (min, max) = limits.into_inner();
            Err(Failure::new(format!("Invalid {what} specified. Must be between {min} and {max}.")))
        }
        Err(NumberError::Malformed) => Err(Failure::new(format!(
            "Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\n\
             {NAME}: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ))),
    }
}

/// A number without a unit, in base 8, 10 or 16 as in C. A negative one wraps, as it does there.
pub(crate) fn number(text: &str) -> Result<u64, NumberError> {
    let (negative, digits) = sign(text);
    let value = match hexadecimal(digits) {
        Some(digits) => integer(digits, 16)?,
        None if digits.len() > 1 && digits.starts_with('0') => integer(digits, 8)?,
        None => integer(digits, 10)?,
    };
    Ok(if negative { value.wrapping_neg() } else { value })
}

fn sign(text: &str) -> (bool, &str) {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    }
}

fn hexadecimal(digits: &str) -> Option<&str> {
    digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"))
}

fn integer(digits: &str, radix: u32) -> Result<u64, NumberError> {
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(NumberError::Malformed);
    }
    u64::from_str_radix(digits, radix).map_err(|_| NumberError::OutOfRange)
}

fn unit(suffix: &str) -> Option<u64> {
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    Some(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("1", 1),
            ("1k", 1024),
            ("1.5K", 1536),
            (".5k", 512),
            ("1.", 1),
            ("1.k", 1024),
            ("0x10", 16),
            (" 1", 1),
            ("+1", 1),
            ("1b", 1),
            ("0.3k", 307),
            ("0.0005k", 1),
            ("1.999999999999999999k", 2048),
            ("010", 10),
            ("1.00B", 1),
            ("1e", 1 << 60),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "", "k", "1.5", "1.5B", "0x10k", "0x", "1e3", "1 ", "1kk", "inf", "0x1.8", "-x", ".", "-1M", "-0x1", "-1.0",
        ] {
            assert_eq!(size(text), Err(NumberError::Malformed), "{text}");
        }
        for text in ["-1", "-0", "16E", "18446744073709551616"] {
            assert_eq!(size(text), Err(NumberError::OutOfRange), "{text}");
        }
    }

    #[test]
    fn numbers() {
        for (text, value) in [("8", 8), (" 8", 8), ("0x8", 8), ("010", 8), ("0", 0), ("-1", u64::MAX)] {
            assert_eq!(number(text), Ok(value), "{text}");
        }
        for text in ["", "x", "8 ", "8k", "08"] {
            assert_eq!(number(text), Err(NumberError::Malformed), "{text}");
        }
        assert_eq!(number("99999999999999999999"), Err(NumberError::OutOfRange));
    }
}
