//! Messages to and from msgpack maps whose key `type` names them.
//!
//! Decoding happens in two steps: a walk over the raw bytes that refuses whatever exceeds [`limits`](super::limits)
//! or announces more than is there, and only then the values. Unknown fields are ignored, as LMCache ignores ours.
//! The same encoding serves the connector API.

use serde::Serialize;
use serde::de::value::MapDeserializer;
use serde::de::{self, DeserializeOwned};

use super::decode_error::DecodeError;
use super::limits::{self, MESSAGE_LEN_BYTES_MAX};
use super::scan::{Fields, Head};

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
    let only_type = MapDeserializer::<_, DecodeRefusal>::new(std::iter::once(("type", type_name)));
    !matches!(T::deserialize(only_type), Err(DecodeRefusal::UnknownVariant))
}

/// An error that remembers the one thing [`knows`] asks for.
#[derive(Debug)]
enum DecodeRefusal {
    UnknownVariant,
    Other,
}

impl std::fmt::Display for DecodeRefusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("refused")
    }
}

impl std::error::Error for DecodeRefusal {}

impl de::Error for DecodeRefusal {
    fn custom<T: std::fmt::Display>(_: T) -> Self {
        Self::Other
    }

    fn unknown_variant(_: &str, _: &'static [&'static str]) -> Self {
        Self::UnknownVariant
    }
}
