//! Which parts of a peer's memory have their pages mapped here.

use std::ops::Range;

/// One bit stands for as much as the system maps in one page fault that only looks (`fault_around_bytes`).
const BLOCK_LEN_BYTES: u64 = 64 * 1024;

/// A bit for each block: whether all its pages are mapped. Mapping them is what the first copy into a block costs.
#[derive(Debug, Default)]
pub(super) struct MappedBlocks {
    words: Vec<u64>,
}

impl MappedBlocks {
    /// The part of `range`, which is not empty, that may have pages to be mapped: whole blocks, cut at `len_bytes`.
    pub(super) fn missing(&self, range: &Range<u64>, len_bytes: u64) -> Option<Range<u64>> {
        let mut blocks = blocks_around(range);
        let first = blocks.clone().find(|&block| !self.contains(block))?;
        let last = blocks.rfind(|&block| !self.contains(block))?;
        Some(first * BLOCK_LEN_BYTES..((last + 1) * BLOCK_LEN_BYTES).min(len_bytes))
    }

    /// All pages of `range`, which [`missing`](Self::missing) said, are mapped. The rest of a block that was cut may get
    /// pages later, so that block is not remembered.
    pub(super) fn insert(&mut self, range: &Range<u64>) {
        for block in range.start / BLOCK_LEN_BYTES..range.end / BLOCK_LEN_BYTES {
            let (word, bit) = place(block);
            if word >= self.words.len() {
                self.words.resize(word + 1, 0);
            }
            self.words[word] |= bit;
        }
    }

    fn contains(&self, block: u64) -> bool {
        let (word, bit) = place(block);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }
}

const fn blocks_around(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_LEN_BYTES..range.end.div_ceil(BLOCK_LEN_BYTES)
}

/// The word that a block's bit is in, and the bit.
const fn place(block: u64) -> (usize, u64) {
    ((block / 64) as usize, 1 << (block % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_is_not_mapped_again_and_nothing_is_left_out() {
        // Broken in production: every copy asks the system to map its pages, or copies take a page fault for each page.
        const BLOCK: u64 = BLOCK_LEN_BYTES;
        let len_bytes = 200 * BLOCK + 100;
        let mut mapped = MappedBlocks::default();
        assert_eq!(mapped.missing(&(BLOCK + 5..BLOCK + 6), len_bytes), Some(BLOCK..2 * BLOCK));
        assert_eq!(mapped.missing(&(3..3 * BLOCK + 1), len_bytes), Some(0..4 * BLOCK));
        mapped.insert(&(BLOCK..2 * BLOCK));
        mapped.insert(&(63 * BLOCK..66 * BLOCK));
        assert_eq!(mapped.missing(&(BLOCK..2 * BLOCK), len_bytes), None);
        assert_eq!(mapped.missing(&(63 * BLOCK + 9..66 * BLOCK - 9), len_bytes), None);
        assert_eq!(mapped.missing(&(BLOCK..3 * BLOCK), len_bytes), Some(2 * BLOCK..3 * BLOCK));
        assert_eq!(mapped.missing(&(62 * BLOCK..66 * BLOCK), len_bytes), Some(62 * BLOCK..63 * BLOCK));
        // The last block of a buffer that may grow yet.
        let tail = mapped.missing(&(200 * BLOCK..len_bytes), len_bytes).unwrap();
        assert_eq!(tail, 200 * BLOCK..len_bytes);
        mapped.insert(&tail);
        assert_eq!(mapped.missing(&(200 * BLOCK..201 * BLOCK), 300 * BLOCK), Some(200 * BLOCK..201 * BLOCK));
        mapped.insert(&(200 * BLOCK..201 * BLOCK));
        assert_eq!(mapped.missing(&(200 * BLOCK..201 * BLOCK), 300 * BLOCK), None);
    }
}
