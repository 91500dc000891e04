//! Sizes as people write them.

/// Parses `4096`, `64K`, `10G`, `1.5T`: binary units, as `qemu-img` reads them.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[number.len()..].to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 1_u64,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        "P" => 1 << 50,
        "E" => 1 << 60,
        _ => return Err(format!("unknown unit in '{text}': use K, M, G, T, P or E")),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let parsed = parse_parts(whole, fraction, unit);
    parsed.ok_or_else(|| format!("'{text}' is not a size below 2^64, such as 512, 64K or 10G"))
}

fn parse_parts(whole: &str, fraction: &str, unit: u64) -> Option<u64> {
    let bytes = whole.parse::<u64>().ok()?.checked_mul(unit)?;
    if fraction.is_empty() {
        return Some(bytes);
    }
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(unit) / scale;
    bytes.checked_add(u64::try_from(part).ok()?)
}

/// `1.5 GiB` for people; bytes below 1 KiB.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let unit = (bytes.ilog2() / 10) as usize;
    let divisor = 1_u64 << (10 * unit);
    let whole = bytes / divisor;
    let digits = if whole >= 100 {
        0
    } else if whole >= 10 {
        1
    } else {
        2
    };
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = bytes as f64 / divisor as f64;
    format!("{value:.digits$} {}", UNITS[unit - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_units_and_fractions() {
        for (text, bytes) in
            [("0", 0), ("512", 512), ("64k", 65536), ("1.5G", 3 << 29), ("10GiB", 10 << 30), ("2MB", 2 << 20)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1.x", "1X", "99999999E", "1..5"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn writes_three_digits() {
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(3 << 29), "1.50 GiB");
        assert_eq!(human(250 << 20), "250 MiB");
    }
}
