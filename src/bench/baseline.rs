//! What the same bytes cost as plain copies: one thread, memory of this process.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::plan::PlannedRequest;

/// Two buffers are made no larger than this; a round with more bytes goes round them again.
const LEN_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// Two private buffers, every page present.
#[derive(Debug)]
pub(super) struct Baseline {
    source: Vec<u8>,
    target: Vec<u8>,
}

impl Baseline {
    /// Buffers for rounds of at most `slots` chunks of `chunk_bytes`.
    pub(super) fn new(slots: u64, chunk_bytes: u64) -> Self {
        let slots = slots.min((LEN_BYTES_MAX / chunk_bytes).max(1));
        let len = (slots * chunk_bytes) as usize;
        // Not zero: zeroed memory would be one shared page until it is written to.
        Self { source: vec![0x5a; len], target: vec![0xa5; len] }
    }

    /// Copies what these requests hold, chunk by chunk, each to its own place, and says how long that took.
    pub(super) fn copy(&mut self, requests: &[PlannedRequest], chunk_bytes: u64) -> Duration {
        let slots = self.source.len() as u64 / chunk_bytes;
        let started = Instant::now();
        for (slot, content) in requests.iter().flat_map(|request| &request.contents).enumerate() {
            let offset = ((slot as u64 % slots) * chunk_bytes) as usize;
            let range = offset..offset + content.len_bytes as usize;
            self.target[range.clone()].copy_from_slice(black_box(&self.source[range]));
        }
        black_box(&mut self.target);
        started.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Shape;
    use super::*;

    #[test]
    fn exactly_the_chunks_are_copied() {
        // Broken in production: the ratio to memcpy compares different amounts of bytes.
        let shape = Shape { seed: 1, chunk_count: 3, chunk_tokens: 16, chunk_bytes: 4096 };
        let requests = [shape.request(0), shape.request(1)];
        let mut baseline = Baseline::new(6, 4096);
        baseline.copy(&requests, 4096);
        let copied = baseline.target.iter().filter(|byte| **byte == 0x5a).count() as u64;
        assert_eq!(copied, requests.iter().map(PlannedRequest::len_bytes).sum::<u64>());
    }
}
