//! Sizes in bytes, as people write them: `512MiB`, `8GiB`, `1000000`.

/// The units, by their factor.
const UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// Reads a size of at least one byte.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = (text[..split].parse::<u64>(), text[split..].trim());
    let factor = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, factor)| *factor);
    let bytes = number.ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor));
    bytes.filter(|bytes| *bytes > 0).ok_or_else(|| format!("{text:?} is no size; write for example 512MiB or 8GiB"))
}

/// A size as people read it.
pub(crate) fn show(bytes: u64) -> String {
    let unit = UNITS[2..6].iter().rev().find(|(_, factor)| bytes >= *factor);
    unit.map_or_else(|| format!("{bytes} B"), |(name, factor)| format!("{:.1} {name}", bytes as f64 / *factor as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        assert_eq!(parse("8GiB"), Ok(8 << 30));
        assert_eq!(parse("10 mb"), Ok(10_000_000));
        assert_eq!(parse("7"), Ok(7));
        for bad in ["", "0", "GiB", "-1", "1.5GiB", "99999999999TiB", "8 parsecs"] {
            assert!(parse(bad).unwrap_err().contains("512MiB"), "{bad}");
        }
        assert_eq!((show(5), show(3 << 19), show(8 << 30)), ("5 B".into(), "1.5 MiB".into(), "8.0 GiB".into()));
    }
}
