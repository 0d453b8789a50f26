//! What LMCache's code can read. A synchronous receiver whose handler fails never answers anybody again, so nothing is sent
//! that it would fail on.

use crate::ids::{ChunkKey, Failure, FailureKind};

/// Element types by LMCache's names, which are the only ones that it knows (observed on LMCache 0.5.6).
const DTYPES: &[&str] = &[
    "half",
    "bfloat16",
    "float",
    "double",
    "int8",
    "uint8",
    "int16",
    "int32",
    "int64",
    "bool",
    "fp8_e4m3fn",
    "fp8_e4m3fnuz",
    "fp8_e5m2",
    "fp8_e5m2fnuz",
];

/// LMCache's name of a type that is given by torch's.
pub(super) fn dtype(torch_name: &str) -> Result<String, Failure> {
    let name = match torch_name {
        "float16" => "half",
        "float32" => "float",
        "float64" => "double",
        other => other,
    };
    if DTYPES.contains(&name) {
        return Ok(name.to_owned());
    }
    let text = format!("LMCache has no element type {torch_name}; start pd-receiver there, or use another dtype");
    Err(Failure::new(FailureKind::LayoutMismatch, text))
}

/// Whether LMCache can read a key, `model@world_size@worker_id@hash@dtype[@tag%value...]`, and would write it the same way.
/// Two texts of one key would be two keys here and one there.
pub(super) fn check_key(key: &ChunkKey) -> Result<(), Failure> {
    let parts: Vec<&str> = key.as_str().split('@').collect();
    let expected = match parts.as_slice() {
        [_, world_size, worker_id, hash, dtype, tags @ ..] => {
            if !is_number(world_size, u8::is_ascii_digit) || !is_number(worker_id, u8::is_ascii_digit) {
                "decimal numbers after the model, without leading zeros"
            } else if !is_number(hash.strip_prefix('-').unwrap_or(hash), is_lower_hex) {
                "a hash of small hexadecimal digits without leading zeros"
            } else if !DTYPES.contains(dtype) {
                "one of LMCache's dtypes"
            } else if tags.iter().any(|tag| !tag.contains('%')) {
                "tags of the form name%value"
            } else {
                return Ok(());
            }
        }
        _ => "five parts at least",
    };
    let text = format!(
        "key {key} is not one that an LMCache receiver can read: expected model@world_size@worker_id@hash@dtype with \
         {expected}"
    );
    Err(Failure::new(FailureKind::BadRequest, text))
}

fn is_number(text: &str, is_digit: impl Fn(&u8) -> bool) -> bool {
    !text.is_empty() && text.bytes().all(|byte| is_digit(&byte)) && (text == "0" || !text.starts_with('0'))
}

fn is_lower_hex(byte: &u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_that_lmcache_reads_and_writes_so_are_sent() {
        // Broken in production: one odd key disables a synchronous receiver for all its senders until it is restarted.
        let check = |text: &str| check_key(&ChunkKey::new(text).unwrap()).map_err(|failure| failure.text);
        for good in [
            "meta-llama/Meta-Llama-3-8B@1@0@1234567890abcdef@bfloat16",
            "m@8@7@-1f@half",
            "m@1@0@0@uint8@lora%x@salt%a%b",
        ] {
            assert_eq!(check(good), Ok(()));
        }
        for (bad, expected) in [
            ("k", "five parts at least"),
            ("m@1@0@12", "five parts at least"),
            ("m@one@0@12@half", "decimal numbers"),
            ("m@1@@12@half", "decimal numbers"),
            ("m@1@00@12@half", "decimal numbers"),
            ("m@1@0@@half", "a hash of small"),
            ("m@1@0@0x12@half", "a hash of small"),
            ("m@1@0@012@half", "a hash of small"),
            ("m@1@0@AB@half", "a hash of small"),
            ("m@1@0@12@float16", "one of LMCache's dtypes"),
            ("m@1@0@12@half@tag", "tags of the form"),
        ] {
            assert!(check(bad).unwrap_err().contains(expected), "{bad}");
        }
    }

    #[test]
    fn element_types_go_by_lmcaches_names() {
        // Broken in production: the first request with float16 disables a synchronous receiver.
        let names = ["bfloat16", "float16", "float32", "uint8", "int8"].map(|name| dtype(name).unwrap());
        assert_eq!(names, ["bfloat16", "half", "float", "uint8", "int8"]);
        assert_eq!(dtype("float4").unwrap_err().kind, FailureKind::LayoutMismatch);
    }
}
