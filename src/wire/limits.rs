//! What one payload may cost, whoever sends it.
//!
//! All of these are checked on the raw bytes, before anything is allocated for what they announce.

use crate::ids::CHUNK_KEY_LEN_BYTES_MAX;

/// Most chunk keys in one message, and most entries in any other array: 4 Mi tokens in chunks of 256.
pub const KEYS_MAX: usize = 16_384;

/// Longest payload that is decoded, in bytes: as many of the longest keys as a message may have, each with the three
/// bytes that announce it, and 4 MiB for the rest. The rest is dominated by engine metadata and descriptor lists;
/// NIXL's list of 16,384 pages takes 24 bytes a page.
pub const MESSAGE_LEN_BYTES_MAX: usize = KEYS_MAX * (CHUNK_KEY_LEN_BYTES_MAX + 3) + 4 * 1024 * 1024;

/// Most values in one payload, counting every array, map, key and leaf. The largest real message is the connector
/// API's `ready`: nine values for each chunk. Decoding buffers each value in some 32 bytes, so this bounds what a
/// payload of one-byte values can make us allocate to 8 MiB.
pub const VALUES_MAX: usize = 16 * KEYS_MAX;

/// Most fields of one map. No message has more than 16; the rest is room for newer peers.
pub const FIELDS_MAX: usize = 64;

/// Deepest nesting of arrays and maps, the message's own map included. Ours reach 5 (`pd.hello.layout[i]`).
pub const DEPTH_MAX: usize = 8;

const _: () = assert!(MESSAGE_LEN_BYTES_MAX < 21 * 1024 * 1024, "a message stays in the range of 20 MiB");
