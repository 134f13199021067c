//! Sizes as people write them.

/// Reads `4GiB`, `512M`, `1.5 g`, `100kB` or plain bytes.
///
/// `K`, `M`, `G`, `T`, alone or with `iB`, are powers of 1024; with `B` alone, of 1000. Case does not matter.
///
/// # Errors
/// A message that says what was expected.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let expected = || format!("{text:?}: expected a size such as 512M, 4GiB or 1.5T");
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(number_end);
    let unit = unit.trim().to_ascii_lowercase();
    let (power, rest) = match unit.chars().next().and_then(|first| "kmgt".find(first)) {
        Some(index) => (index as u32 + 1, &unit[1..]),
        None => (0, unit.as_str()),
    };
    let base: u64 = match (power, rest) {
        (_, "" | "ib") | (0, "b") => 1024,
        (_, "b") => 1000,
        _ => return Err(expected()),
    };
    let factor = base.pow(power);
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(expected);
    }
    let bytes = number.parse::<f64>().map_err(|_| expected())? * factor as f64;
    // Above 2^63 a float no longer tells sizes apart, and nobody has that much.
    if bytes < (1_u64 << 63) as f64 { Ok(bytes as u64) } else { Err(expected()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("123", 123),
            ("64B", 64),
            ("1k", 1024),
            ("4GiB", 4 << 30),
            ("4G", 4 << 30),
            ("1.5 g", 3 << 29),
            ("100kB", 100_000),
            ("2tb", 2_000_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "G", "-1", "1X", "1GG", "1.2.3M", "99999999999T", "9e9", "1 GiBs", "16777216T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
