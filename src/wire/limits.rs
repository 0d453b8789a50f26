//! What one payload may cost, whoever sends it.
//!
//! All of these are checked on the raw bytes, before anything is allocated for what they announce.

use crate::ids::{CHUNK_KEY_LEN_BYTES_MAX, METADATA_LEN_BYTES_MAX, PEERS_MAX, REQUEST_CHUNKS_MAX};

/// Most chunk keys in one message, and most entries in any other array: 4 Mi tokens in chunks of 256.
pub const KEYS_MAX: usize = REQUEST_CHUNKS_MAX as usize;

/// Longest payload that is decoded, in bytes: as many of the longest keys as a message may have, each with the three
/// bytes that announce it, and 4 MiB for the rest. The rest is dominated by engine metadata and descriptor lists;
/// NIXL's list of 16,384 pages takes 24 bytes a page.
pub const MESSAGE_LEN_BYTES_MAX: usize = KEYS_MAX * (CHUNK_KEY_LEN_BYTES_MAX + 3) + 4 * 1024 * 1024;

/// Longest payload at a port for handshakes: an engine's metadata, or a list of 174,000 pages from LMCache's senders.
pub const INIT_MESSAGE_LEN_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Most values in one payload, counting every array, map, key and leaf. The largest real message is the connector
/// API's `ready`: eleven values for each chunk. Decoding buffers each value in some 32 bytes, so this bounds what a
/// payload of one-byte values can make us allocate to 8 MiB.
pub const VALUES_MAX: usize = 16 * KEYS_MAX;

/// Most fields of one map. No message has more than 16; the rest is room for newer peers.
pub const FIELDS_MAX: usize = 64;

/// Deepest nesting of arrays and maps, the message's own map included. Ours reach 5 (`pd.hello.layout[i]`).
pub const DEPTH_MAX: usize = 8;

/// What one value costs at most once it is decoded, beyond its bytes: a key's place in its list and its allocation.
const VALUE_LEN_BYTES_MAX: usize = 64;

/// What a payload costs at most once it is decoded, in bytes.
pub(super) const fn decoded_len_bytes(len_bytes: usize, value_count: usize) -> usize {
    len_bytes + VALUE_LEN_BYTES_MAX * value_count
}

// What a handshake carries at most: metadata, twice as many names of 256 bytes as there may be peers, and who asks.
const _: () = assert!(INIT_MESSAGE_LEN_BYTES_MAX > METADATA_LEN_BYTES_MAX + 2 * 259 * PEERS_MAX as usize + 512 * 1024);
const _: () = assert!(2 * PEERS_MAX <= REQUEST_CHUNKS_MAX, "each name has an entry in a list");
const _: () = assert!(MESSAGE_LEN_BYTES_MAX < 21 * 1024 * 1024, "a message stays in the range of 20 MiB");
