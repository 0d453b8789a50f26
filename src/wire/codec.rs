//! Messages to and from msgpack maps whose key `type` names them.
//!
//! Decoding happens in two steps: a walk over the raw bytes that refuses whatever exceeds [`limits`](super::limits)
//! or announces more than is there, and only then the values. Unknown fields are ignored, as LMCache ignores ours.
//! The same encoding serves the connector API.

use serde::Serialize;
use serde::de::value::MapDeserializer;
use serde::de::{self, DeserializeOwned};

use super::limits::{self, MESSAGE_LEN_BYTES_MAX};
use super::scan::{Fields, Head};

/// A payload that is no message of ours. Nothing has been allocated for it but this error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Longer than any message.
    #[error("message of {len_bytes} bytes; expected at most {len_bytes_max}")]
    TooLong {
        /// Its length.
        len_bytes: usize,
        /// [`MESSAGE_LEN_BYTES_MAX`].
        len_bytes_max: usize,
    },
    /// More of something than any message has.
    #[error("message with {count} {what}; expected at most {count_max}")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// How much was announced.
        count: usize,
        /// How much is accepted.
        count_max: usize,
    },
    /// Something announces more bytes than are left.
    #[error("message is cut off: at byte {offset_bytes} {wanted_bytes} bytes are announced, {left_bytes} are left")]
    Truncated {
        /// Where.
        offset_bytes: usize,
        /// How many bytes have to follow.
        wanted_bytes: usize,
        /// How many do.
        left_bytes: usize,
    },
    /// A byte that starts no value, or an extension type, which no message has.
    #[error("message has byte {marker:#04x} at {offset_bytes}, where a msgpack value starts")]
    Malformed {
        /// Where.
        offset_bytes: usize,
        /// The byte.
        marker: u8,
    },
    /// Bytes after the end.
    #[error("message ends {trailing_bytes} bytes before its frame does")]
    Trailing {
        /// How many.
        trailing_bytes: usize,
    },
    /// Msgpack, but not a map.
    #[error("message starts with byte {first_byte:#04x}; expected a msgpack map")]
    NotAMap {
        /// How it starts.
        first_byte: u8,
    },
    /// A map without a text under `type`.
    #[error("message without a `type`")]
    NoType,
    /// A `type` that this build does not know: a newer peer, or the wrong port.
    #[error("message of unknown type {type_name:?}")]
    UnknownType {
        /// The name, cut to 64 characters.
        type_name: String,
    },
    /// A known type whose fields are not as they should be.
    #[error("{type_name}: {reason}")]
    Invalid {
        /// The name.
        type_name: String,
        /// Which field, what was seen and what was expected.
        reason: String,
    },
}

/// The message as a msgpack map, `type` first, fields named.
pub fn encode<T: Serialize + ?Sized>(message: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(message)
        .expect("messages are structs of numbers, text, bytes and sequences of known length")
}

/// The message in this payload.
///
/// # Errors
/// [`DecodeError`] says what was seen; nothing larger than a small multiple of `payload` has been allocated then.
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, DecodeError> {
    let (type_name, _) = check(payload)?;
    rmp_serde::from_slice(payload).map_err(|error| {
        if knows::<T>(type_name) {
            DecodeError::Invalid { type_name: type_name.to_owned(), reason: error.to_string() }
        } else {
            DecodeError::UnknownType { type_name: type_name.chars().take(64).collect() }
        }
    })
}

/// The `type` of a payload, even of one that [`decode`] refuses for its fields.
pub fn type_name(payload: &[u8]) -> Option<&str> {
    check(payload).ok().map(|(type_name, _)| type_name)
}

/// What the message in this payload takes at most once it is decoded, in bytes.
///
/// # Errors
/// Those of [`decode`] that hold before anything is decoded.
pub fn decoded_len_bytes(payload: &[u8]) -> Result<usize, DecodeError> {
    check(payload).map(|(_, value_count)| limits::decoded_len_bytes(payload.len(), value_count))
}

/// A field of the message's own map that holds a number which is not negative: what an answer to a refused message
/// needs to say which message it answers.
pub fn unsigned_field(payload: &[u8], name: &str) -> Option<u64> {
    // Not held against the limits: a message that exceeds them is just what has to be answered. Fields are passed over
    // one by one, and nothing is kept.
    if payload.len() > MESSAGE_LEN_BYTES_MAX {
        return None;
    }
    let mut fields = Fields::new(payload).ok()?;
    while let Some((field, head)) = fields.next().ok()? {
        if field == name.as_bytes() {
            return match head {
                Head::Unsigned(number) => Some(number),
                _ => None,
            };
        }
    }
    None
}

/// Holds the whole payload against the limits; returns its `type`, and how many values it has.
fn check(payload: &[u8]) -> Result<(&str, usize), DecodeError> {
    if payload.len() > MESSAGE_LEN_BYTES_MAX {
        return Err(DecodeError::TooLong { len_bytes: payload.len(), len_bytes_max: MESSAGE_LEN_BYTES_MAX });
    }
    let mut type_name = None;
    let mut fields = Fields::new(payload)?;
    while let Some((field, head)) = fields.next()? {
        if let (b"type", Head::Text(text)) = (field, head) {
            type_name = std::str::from_utf8(text).ok();
        }
    }
    match fields.rest_len_bytes() {
        0 => type_name.map(|name| (name, fields.value_count())).ok_or(DecodeError::NoType),
        trailing_bytes => Err(DecodeError::Trailing { trailing_bytes }),
    }
}

/// Whether `T` has a variant of this name, asked of its own deserializer.
fn knows<T: DeserializeOwned>(type_name: &str) -> bool {
    let only_type = MapDeserializer::<_, Refusal>::new(std::iter::once(("type", type_name)));
    !matches!(T::deserialize(only_type), Err(Refusal::UnknownVariant))
}

/// An error that remembers the one thing [`knows`] asks for.
#[derive(Debug)]
enum Refusal {
    UnknownVariant,
    Other,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("refused")
    }
}

impl std::error::Error for Refusal {}

impl de::Error for Refusal {
    fn custom<T: std::fmt::Display>(_: T) -> Self {
        Self::Other
    }

    fn unknown_variant(_: &str, _: &'static [&'static str]) -> Self {
        Self::UnknownVariant
    }
}
