//! Names chosen by engines and routers: bounded text, cheap to copy.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};

use super::printable::is_printable;

/// Longest request id that is accepted, in bytes.
pub const REQUEST_ID_LEN_BYTES_MAX: usize = 256;
/// Longest chunk key that is accepted, in bytes. LMCache's keys are a model's name, a hash and tags.
pub const CHUNK_KEY_LEN_BYTES_MAX: usize = 1024;

/// A name that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Empty, or too long.
    #[error("{what} has {len_bytes} bytes; expected 1 to {len_bytes_max}")]
    Length {
        /// Which kind of name.
        what: &'static str,
        /// Its length.
        len_bytes: usize,
        /// The longest that is accepted.
        len_bytes_max: usize,
    },
    /// With characters that would forge a log line.
    #[error("{what} is {seen:?}; expected text without line breaks and other control characters; leave them out")]
    Unprintable {
        /// Which kind of name.
        what: &'static str,
        /// How it begins.
        seen: String,
    },
}

/// Characters of a refused name that its refusal shows.
const SHOWN_MAX: usize = 80;

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// # Errors
            /// [`NameError`] when `text` is empty, longer than the limit, or not printable.
            pub fn new(text: impl AsRef<str>) -> Result<Self, NameError> {
                let text = text.as_ref();
                if text.is_empty() || text.len() > $max {
                    return Err(NameError::Length { what: $what, len_bytes: text.len(), len_bytes_max: $max });
                }
                if !is_printable(text) {
                    return Err(NameError::Unprintable { what: $what, seen: text.chars().take(SHOWN_MAX).collect() });
                }
                Ok(Self(Arc::from(text)))
            }

            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                Self::new(text).map_err(serde::de::Error::custom)
            }
        }
    };
}

name! {
    /// What a router calls a request; the same on the prefill and the decode side.
    RequestId, "a request id", REQUEST_ID_LEN_BYTES_MAX
}
name! {
    /// What a chunk's content is called: equal keys mean equal bytes.
    ChunkKey, "a chunk key", CHUNK_KEY_LEN_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_too_long_or_empty_is_refused_with_its_length() {
        // Broken in production: an unbounded name from the network is kept in every table and log line.
        assert!(RequestId::new("r").is_ok());
        assert!(RequestId::new("").is_err());
        let error = ChunkKey::new("k".repeat(CHUNK_KEY_LEN_BYTES_MAX + 1)).unwrap_err();
        assert_eq!(error.to_string(), "a chunk key has 1025 bytes; expected 1 to 1024");
    }

    #[test]
    fn a_name_that_forges_a_log_line_is_refused_escaped() {
        // Broken in production: a request id with a line break writes an alarm of its own into the log.
        for name in ["r\n2026-01-01 ERROR forged", "\u{1b}[2Kr", "r\r", "\0", "\u{85}", "\u{2029}", "a\u{202e}b"] {
            let errors = [RequestId::new(name).unwrap_err(), ChunkKey::new(name).unwrap_err()];
            for error in errors.map(|error| error.to_string()) {
                assert!(super::super::is_printable(&error), "{error:?}");
                assert!(
                    error.ends_with("expected text without line breaks and other control characters; leave them out")
                );
            }
        }
        // LMCache's keys, and models named in other scripts.
        for key in ["meta-llama/Meta-Llama-3-8B@1@0@-1f@bfloat16", "a model@8@7@0@half@salt%a%b", "模型@1@0@0@uint8"]
        {
            assert_eq!(ChunkKey::new(key).unwrap().as_str(), key);
        }
    }
}
