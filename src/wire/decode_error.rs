//! Why a payload is not decoded.

/// A payload that is no message of ours. Nothing has been allocated for it but this error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Longer than any message.
    #[error("message of {len_bytes} bytes; expected at most {len_bytes_max}")]
    TooLong {
        /// Its length.
        len_bytes: usize,
        /// [`MESSAGE_LEN_BYTES_MAX`](super::limits::MESSAGE_LEN_BYTES_MAX).
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
