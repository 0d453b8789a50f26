//! Sizes in bytes as people write them: `4294967296`, `4GiB`, `1.5GiB`, `2GB`.
//!
//! Written here because the crates for it round or saturate silently, or take `4G` for one of the two things that it
//! may mean; a buffer size is a ceiling and must be the number that was meant.

/// What is accepted, for error texts.
pub(super) const SIZE_ACCEPTED: &str =
    "a whole number of bytes, or a number with one of B, KiB, MiB, GiB, TiB (1024) or kB, MB, GB, TB (1000)";

/// Binary units first: they are what sizes are shown in.
const UNITS: &[(&str, u64)] = &[
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

/// Most digits of a number that are read; none that means a size is longer.
const DIGITS_MAX: usize = 20;

/// Bytes, where the text is a size in the form of [`SIZE_ACCEPTED`] and a whole number of bytes below 2^64. Units
/// may be written in any case and after a space.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let number_len = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(number_len);
    let unit = unit.trim_start();
    let factor = match unit {
        "" => 1,
        _ => UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit))?.1,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || whole.len() > DIGITS_MAX || fraction.len() > DIGITS_MAX {
        return None;
    }
    // Exact arithmetic: 0.1GiB is not a whole number of bytes, and is refused instead of rounded.
    let whole_bytes = whole.parse::<u128>().ok()?.checked_mul(factor.into())?;
    let scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let fraction_bytes = fraction.parse::<u128>().ok()?.checked_mul(factor.into())?;
    if !fraction_bytes.is_multiple_of(scale) {
        return None;
    }
    u64::try_from(whole_bytes.checked_add(fraction_bytes / scale)?).ok()
}

/// The shortest text of an exact number of bytes that [`parse_size`] reads back: `32MiB`, `17568KiB`, `1000`.
pub fn exact_size(bytes: u64) -> String {
    UNITS
        .iter()
        .filter(|(name, _)| name.ends_with("iB"))
        .find(|(_, factor)| bytes > 0 && bytes.is_multiple_of(*factor))
        .map_or_else(|| bytes.to_string(), |(name, factor)| format!("{}{name}", bytes / factor))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_what_they_say() {
        // Broken in production: a buffer of another size than the one that was asked for.
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            ("4GiB", 4 << 30),
            (" 512 MiB ", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("2GB", 2_000_000_000),
            ("0.5KiB", 512),
            ("3kb", 3000),
            ("1.25B", 0),
            ("18446744073709551615", u64::MAX),
            ("16TiB", 16 << 40),
        ] {
            let expected = (text != "1.25B").then_some(bytes);
            assert_eq!(parse_size(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_not_an_exact_size_is_refused() {
        // Broken in production: 4G is taken for 4 GB by one and for 4 GiB by another, or a size wraps to a small one.
        for text in [
            "",
            "GiB",
            "4G",
            "4g",
            "-1",
            "+1",
            "1e9",
            "1_000",
            "4 Gi",
            "1..5GiB",
            ".5GiB",
            "1.GiB",
            "0.1GiB",
            "4GiBs",
            "18446744073709551616",
            "16777216TiB",
            "99999999999999999999999GiB",
            "0x10",
            "4,5GiB",
            "١GiB",
            "1.123456789012345678901GiB",
        ] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_shown_size_reads_back(bytes: u64, shift in 0_u32..60) {
            // Broken in production: the size that a refusal tells to write is not the size that works.
            for bytes in [bytes, bytes >> shift << shift, bytes >> shift] {
                prop_assert_eq!(parse_size(&exact_size(bytes)), Some(bytes));
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            // Broken in production: a mistyped size ends the process with a panic.
            let _ = parse_size(&text);
        }
    }
}
