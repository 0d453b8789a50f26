//! Ranges of any length: free ones, merged and found by length, and the ones handed out.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

/// A range that was handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TakenRange {
    /// First byte after it, rounding included.
    pub(super) end: u64,
    /// The length that was asked for.
    pub(super) asked_bytes: u64,
}

/// Keys are addresses that this module chose itself, so one multiplication mixes them well enough. The order of these
/// maps is never seen.
type ByAddress<T> = HashMap<u64, T, BuildHasherDefault<AddressHasher>>;

/// Free and taken ranges of the bytes that no slot of the grid has.
#[derive(Debug, Clone, Default)]
pub(super) struct Ranges {
    /// Free ranges by length: (length, start). Never adjacent, never empty.
    by_len: BTreeSet<(u64, u64)>,
    /// The same, start -> end: what is freed below one finds it here,
    free_from: ByAddress<u64>,
    /// and end -> start: what is freed above it finds it here.
    free_until: ByAddress<u64>,
    taken: ByAddress<TakenRange>,
}

impl Ranges {
    /// The shortest free range of at least `len_bytes`, the lowest of these: (start, end).
    pub(super) fn best_fit(&self, len_bytes: u64) -> Option<(u64, u64)> {
        self.by_len.range((len_bytes, 0)..).next().map(|&(len_bytes, start)| (start, start + len_bytes))
    }

    /// How many ranges of `len_bytes` the free ranges hold, counted no further than `count_max`.
    pub(super) fn fits(&self, len_bytes: u64, count_max: u64) -> u64 {
        let mut count = 0;
        for (free_bytes, _) in self.by_len.range((len_bytes, 0)..) {
            count += free_bytes / len_bytes;
            if count >= count_max {
                break;
            }
        }
        count
    }

    /// Adds a free range that no free range touches; an empty one is nothing.
    pub(super) fn insert_free(&mut self, start: u64, end: u64) {
        if start < end {
            self.by_len.insert((end - start, start));
            self.free_from.insert(start, end);
            self.free_until.insert(end, start);
        }
    }

    /// Removes a free range.
    pub(super) fn remove_free(&mut self, start: u64, end: u64) {
        self.by_len.remove(&(end - start, start));
        self.free_from.remove(&start);
        self.free_until.remove(&end);
    }

    /// Removes the free ranges that touch `start..end`, and answers where the union of all three starts and ends.
    pub(super) fn absorb_neighbours(&mut self, start: u64, end: u64) -> (u64, u64) {
        let merged_start = self.free_until(start).unwrap_or(start);
        if merged_start < start {
            self.remove_free(merged_start, start);
        }
        let merged_end = self.free_from(end).unwrap_or(end);
        if merged_end > end {
            self.remove_free(end, merged_end);
        }
        (merged_start, merged_end)
    }

    /// Where the free range that starts here ends.
    pub(super) fn free_from(&self, start: u64) -> Option<u64> {
        self.free_from.get(&start).copied()
    }

    /// Where the free range that ends here starts.
    pub(super) fn free_until(&self, end: u64) -> Option<u64> {
        self.free_until.get(&end).copied()
    }

    /// Notes a range as handed out.
    pub(super) fn insert_taken(&mut self, start: u64, taken: TakenRange) {
        self.taken.insert(start, taken);
    }

    /// Forgets a range that was handed out with exactly this length.
    pub(super) fn remove_taken(&mut self, start: u64, asked_bytes: u64) -> Option<TakenRange> {
        let taken = *self.taken.get(&start)?;
        if taken.asked_bytes != asked_bytes {
            return None;
        }
        self.taken.remove(&start)
    }

    /// The range handed out that ends here. Looks at all of them.
    pub(super) fn taken_until_mut(&mut self, end: u64) -> Option<&mut TakenRange> {
        self.taken.values_mut().find(|taken| taken.end == end)
    }

    /// The free ranges, highest first: (start, end).
    pub(super) fn free_descending(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = self.free_from.iter().map(|(&start, &end)| (start, end)).collect();
        ranges.sort_unstable_by(|a, b| b.cmp(a));
        ranges
    }

    /// The ranges handed out, in no order.
    pub(super) fn taken(&self) -> impl Iterator<Item = (u64, TakenRange)> {
        self.taken.iter().map(|(&start, &taken)| (start, taken))
    }

    /// Checks that the views of the free ranges are the same.
    pub(super) fn check(&self) -> Result<(), String> {
        let counts = (self.by_len.len(), self.free_from.len(), self.free_until.len());
        if counts.0 != counts.1 || counts.0 != counts.2 {
            return Err(format!("free ranges counted by length, start and end: {counts:?}"));
        }
        let lost = self.free_from.iter().find(|&(&start, &end)| {
            !self.by_len.contains(&(end - start, start)) || self.free_until.get(&end) != Some(&start)
        });
        match lost {
            Some((start, end)) => Err(format!("the free range {start}..{end} is not found by its length or its end")),
            None => Ok(()),
        }
    }
}

/// One multiplication, and its high bits, which are the good ones, folded over the low ones.
#[derive(Debug, Clone, Copy, Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn write_u64(&mut self, address: u64) {
        let product = u128::from(address ^ self.0) * 0x9E37_79B9_7F4A_7C15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
