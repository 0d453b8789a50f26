//! Element types of a KV cache: their names and their sizes.

/// `dtype` of a layout whose bytes only the connector can interpret.
pub const OPAQUE_DTYPE: &str = "opaque";

/// Names under which an element type is written, the first one being torch's, and the bytes of one element.
/// The 8-bit floats have the names that vLLM gives in `--kv-cache-dtype` as well.
const DTYPES: &[(&[&str], u32)] = &[
    (&["bfloat16", "bf16"], 2),
    (&["float16", "half", "fp16"], 2),
    (&["float32", "float", "fp32"], 4),
    (&["float8_e4m3fn", "fp8_e4m3", "fp8"], 1),
    (&["float8_e5m2", "fp8_e5m2"], 1),
    (&["uint8"], 1),
    (&["int8"], 1),
];

/// What is accepted, for error texts.
pub const DTYPES_ACCEPTED: &str = "bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8";

/// Torch's name and the bytes of one element; `torch.` in front and the short names of engines are understood.
pub fn parse_dtype(text: &str) -> Option<(&'static str, u32)> {
    let text = text.trim();
    let name = text.strip_prefix("torch.").unwrap_or(text).to_ascii_lowercase();
    DTYPES
        .iter()
        .find(|(names, _)| names.contains(&name.as_str()))
        .and_then(|(names, bytes)| names.first().map(|first| (*first, *bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_dtype_is_one_dtype() {
        // Broken in production: two peers with the same dtype under two spellings refuse each other.
        assert_eq!(parse_dtype("torch.bfloat16"), Some(("bfloat16", 2)));
        assert_eq!(parse_dtype("BF16"), Some(("bfloat16", 2)));
        assert_eq!(parse_dtype("half"), parse_dtype("float16"));
        assert_eq!(parse_dtype("fp8"), Some(("float8_e4m3fn", 1)));
        assert_eq!(parse_dtype("auto"), None);
        assert_eq!(parse_dtype(""), None);
    }
}
