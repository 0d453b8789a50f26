//! Random bytes, made once: a chunk's content is a stretch of them, so filling is a memcpy and verifying a memcmp.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Contents start anywhere in this many bytes: more than a processor's caches hold.
const SPAN_BYTES: u64 = 64 * 1024 * 1024;

/// Random bytes that every chunk's content is a stretch of.
#[derive(Debug)]
pub(super) struct Pool {
    bytes: Vec<u8>,
}

/// The first byte that differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Difference {
    /// Counted from the start of the compared bytes.
    pub offset: usize,
    /// What should be there.
    pub expected: u8,
    /// What is there.
    pub seen: u8,
}

impl Pool {
    /// Bytes for contents of at most `content_len_bytes_max`; equal for equal seeds.
    pub(super) fn new(seed: u64, content_len_bytes_max: u64) -> Self {
        let mut bytes = vec![0; (SPAN_BYTES + content_len_bytes_max) as usize];
        StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        Self { bytes }
    }

    /// How many places a content of any length can start at.
    pub(super) const fn span_bytes() -> u64 {
        SPAN_BYTES
    }

    /// The content that starts at `offset`, below [`span_bytes`](Self::span_bytes).
    pub(super) fn content(&self, offset: u64, len_bytes: u64) -> &[u8] {
        &self.bytes[offset as usize..][..len_bytes as usize]
    }
}

/// Where `seen` first is not `expected`, which is as long.
pub(super) fn first_difference(expected: &[u8], seen: &[u8]) -> Option<Difference> {
    if expected == seen {
        return None;
    }
    let offset = expected.iter().zip(seen).position(|(expected, seen)| expected != seen)?;
    Some(Difference { offset, expected: expected[offset], seen: seen[offset] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_changed_byte_is_found_and_equal_bytes_are_not_reported() {
        // Broken in production: the bench says "verified" about bytes that nobody compared.
        let pool = Pool::new(7, 4096);
        let expected = pool.content(12_345, 4096);
        let mut seen = expected.to_vec();
        assert_eq!(first_difference(expected, &seen), None);
        seen[4095] ^= 1;
        let found = Difference { offset: 4095, expected: expected[4095], seen: expected[4095] ^ 1 };
        assert_eq!(first_difference(expected, &seen), Some(found));
        seen[0] ^= 0x80;
        assert_eq!(first_difference(expected, &seen).unwrap().offset, 0);
    }

    #[test]
    fn contents_that_start_apart_differ_and_seeds_differ() {
        // Broken in production: two swapped chunks hold the same bytes, and the swap goes unseen.
        let pool = Pool::new(1, 1024);
        assert_ne!(pool.content(0, 1024), pool.content(1, 1024));
        assert_ne!(pool.content(0, 1024), pool.content(Pool::span_bytes() - 1, 1024));
        assert_eq!(pool.content(5, 64), Pool::new(1, 1024).content(5, 64));
        assert_ne!(pool.content(5, 64), Pool::new(2, 1024).content(5, 64));
    }
}
