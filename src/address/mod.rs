//! The address manager: a virtual address space from 0, with no memory in it.
//!
//! It says which ranges are taken. Where the bytes live, and for how long, is the business of whoever maps addresses
//! to memory.

use std::collections::BTreeMap;

/// A range of the address space, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddressRange {
    /// First byte.
    pub start: u64,
    /// Length, never 0.
    pub len_bytes: u64,
}

impl AddressRange {
    /// First byte after the range.
    pub const fn end(&self) -> u64 {
        self.start + self.len_bytes
    }
}

/// One consistent view of the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in the address space.
    pub len_bytes: u64,
    /// Bytes taken, rounding up to the alignment included.
    pub used_bytes: u64,
    /// Bytes free.
    pub free_bytes: u64,
    /// Longest free range, in bytes.
    pub largest_free_bytes: u64,
    /// Number of free ranges.
    pub free_range_count: usize,
}

/// Why the address manager refused. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// The caller asked for nothing, which is a mistake and not a shortage.
    #[error("an allocation of 0 bytes was asked for; ask for at least 1")]
    ZeroSize,
    /// An alignment of 0.
    #[error("an alignment of 0 bytes was asked for; ask for at least 1")]
    ZeroAlignment,
    /// There is no room for all of it.
    #[error(
        "no room for {count} ranges of {len_bytes} bytes: {free_bytes} bytes are free, the longest free range has {largest_free_bytes}"
    )]
    OutOfMemory {
        /// Ranges asked for.
        count: usize,
        /// Length of each, in bytes.
        len_bytes: u64,
        /// Free bytes.
        free_bytes: u64,
        /// Longest free range, in bytes.
        largest_free_bytes: u64,
    },
    /// The range to free was not handed out, or was freed before, or only overlaps one that was.
    #[error("bytes {start}..{end} are not an allocated range; free exactly what was allocated, once")]
    NotAllocated {
        /// First byte.
        start: u64,
        /// First byte after it.
        end: u64,
    },
    /// The address space would pass 2^64 bytes.
    #[error("growing {len_bytes} bytes by {grow_bytes} passes the end of a 64-bit address space")]
    TooLong {
        /// Bytes now.
        len_bytes: u64,
        /// Bytes asked for.
        grow_bytes: u64,
    },
}

/// Hands out ranges of a virtual address space, first fit, neighbours merged when freed.
#[derive(Debug, Clone)]
pub struct AddressManager {
    alignment: u64,
    len_bytes: u64,
    /// Free ranges by start: start -> length. Never adjacent, never empty, starts aligned.
    free: BTreeMap<u64, u64>,
    /// Ranges handed out: start -> (length taken, length asked for).
    taken: BTreeMap<u64, (u64, u64)>,
    used_bytes: u64,
}

impl AddressManager {
    /// An address space of `len_bytes` (0 is allowed), every range of which starts at a multiple of `alignment`
    /// (any number, not only powers of two).
    ///
    /// # Errors
    /// [`AddressError::ZeroAlignment`].
    pub fn new(len_bytes: u64, alignment: u64) -> Result<Self, AddressError> {
        if alignment == 0 {
            return Err(AddressError::ZeroAlignment);
        }
        let mut manager = Self { alignment, len_bytes, free: BTreeMap::new(), taken: BTreeMap::new(), used_bytes: 0 };
        manager.insert_free(0, len_bytes);
        Ok(manager)
    }

    /// Takes a range of `len_bytes`.
    ///
    /// # Errors
    /// [`AddressError::ZeroSize`], [`AddressError::OutOfMemory`].
    pub fn allocate(&mut self, len_bytes: u64) -> Result<AddressRange, AddressError> {
        let mut one = self.allocate_batch(len_bytes, 1)?;
        Ok(one.pop().expect("a batch of one has one range"))
    }

    /// Takes `count` ranges of `len_bytes` each, or none at all. A count of 0 is an empty answer, also when full.
    ///
    /// # Errors
    /// [`AddressError::ZeroSize`], [`AddressError::OutOfMemory`].
    pub fn allocate_batch(&mut self, len_bytes: u64, count: usize) -> Result<Vec<AddressRange>, AddressError> {
        if len_bytes == 0 {
            return Err(AddressError::ZeroSize);
        }
        let mut ranges = Vec::new();
        if count == 0 {
            return Ok(ranges);
        }
        let Some(taken_bytes) = len_bytes.checked_next_multiple_of(self.alignment) else {
            return Err(self.out_of_memory(count, len_bytes));
        };
        // Plan first, take after: a plan that falls short changes nothing.
        let mut planned: Vec<(u64, u64, u64)> = Vec::new();
        let mut missing = count as u64;
        for (&start, &free_bytes) in &self.free {
            let mut fits = (free_bytes / taken_bytes).min(missing);
            if fits < missing && free_bytes % taken_bytes >= len_bytes {
                // The tail of the space may be no whole multiple of the alignment, and still hold the bytes.
                fits += 1;
            }
            if fits > 0 {
                planned.push((start, fits, free_bytes));
                missing -= fits;
            }
            if missing == 0 {
                break;
            }
        }
        if missing > 0 {
            return Err(self.out_of_memory(count, len_bytes));
        }
        ranges.reserve_exact(count);
        for (start, fits, free_bytes) in planned {
            self.free.remove(&start);
            let mut at = start;
            let end = start + free_bytes;
            for _ in 0..fits {
                let taken = taken_bytes.min(end - at);
                self.taken.insert(at, (taken, len_bytes));
                self.used_bytes += taken;
                ranges.push(AddressRange { start: at, len_bytes });
                at += taken;
            }
            if at < end {
                self.free.insert(at, end - at);
            }
        }
        Ok(ranges)
    }

    /// Gives a range back.
    ///
    /// # Errors
    /// [`AddressError::NotAllocated`].
    pub fn free(&mut self, range: AddressRange) -> Result<(), AddressError> {
        self.free_batch(&[range])
    }

    /// Gives ranges back, in any order, or none at all.
    ///
    /// # Errors
    /// [`AddressError::NotAllocated`] naming the first range that was not handed out, or that is listed twice.
    pub fn free_batch(&mut self, ranges: &[AddressRange]) -> Result<(), AddressError> {
        let mut removed: Vec<(u64, (u64, u64))> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match self.taken.get(&range.start) {
                Some(&(taken, asked)) if asked == range.len_bytes => {
                    self.taken.remove(&range.start);
                    removed.push((range.start, (taken, asked)));
                }
                _ => {
                    self.taken.extend(removed);
                    let end = range.start.saturating_add(range.len_bytes);
                    return Err(AddressError::NotAllocated { start: range.start, end });
                }
            }
        }
        for (start, (taken, _)) in removed {
            self.used_bytes -= taken;
            self.insert_free(start, taken);
        }
        Ok(())
    }

    /// Adds `grow_bytes` at the end; a free tail becomes longer.
    ///
    /// # Errors
    /// [`AddressError::TooLong`].
    pub fn grow(&mut self, grow_bytes: u64) -> Result<(), AddressError> {
        let Some(len_bytes) = self.len_bytes.checked_add(grow_bytes) else {
            return Err(AddressError::TooLong { len_bytes: self.len_bytes, grow_bytes });
        };
        // A last range that was cut short by the end of the space ends where its own bytes do; what the new bytes add
        // behind it begins at the next multiple of the alignment, so that every start stays aligned.
        let old_len_bytes = self.len_bytes;
        self.len_bytes = len_bytes;
        match self.free.last_key_value() {
            Some((&start, &free_bytes)) if start + free_bytes == old_len_bytes => {
                self.free.insert(start, free_bytes + grow_bytes);
            }
            _ => {
                let start = old_len_bytes.next_multiple_of(self.alignment).min(len_bytes);
                if let Some(mut last) = self.taken.last_entry() {
                    let at = *last.key();
                    last.get_mut().0 = start - at;
                    self.used_bytes += start - old_len_bytes;
                }
                self.insert_free(start, len_bytes - start);
            }
        }
        Ok(())
    }

    /// The counters, all of one moment.
    pub fn usage(&self) -> Usage {
        Usage {
            len_bytes: self.len_bytes,
            used_bytes: self.used_bytes,
            free_bytes: self.len_bytes - self.used_bytes,
            largest_free_bytes: self.free.values().copied().max().unwrap_or(0),
            free_range_count: self.free.len(),
        }
    }

    /// Checks that free and taken ranges tile the space without gap, overlap or unmerged neighbours.
    ///
    /// # Errors
    /// What was found, for a log line or a failing test.
    pub fn check(&self) -> Result<(), String> {
        let mut pieces: Vec<(u64, u64, bool)> = self.free.iter().map(|(&start, &len)| (start, len, true)).collect();
        pieces.extend(self.taken.iter().map(|(&start, &(taken, _))| (start, taken, false)));
        pieces.sort_unstable();
        let mut at = 0;
        let mut previous_free = false;
        for (start, len, is_free) in pieces {
            if start != at || len == 0 || start % self.alignment != 0 {
                return Err(format!("a range of {len} bytes at {start}; the one before it ends at {at}"));
            }
            if is_free && previous_free {
                return Err(format!("free ranges meet at {start} and were not merged"));
            }
            previous_free = is_free;
            at += len;
        }
        if at != self.len_bytes {
            return Err(format!("the ranges end at {at} of {} bytes", self.len_bytes));
        }
        let taken: u64 = self.taken.values().map(|&(taken, _)| taken).sum();
        if taken != self.used_bytes {
            return Err(format!("{} bytes counted as used, {taken} are taken", self.used_bytes));
        }
        Ok(())
    }

    fn out_of_memory(&self, count: usize, len_bytes: u64) -> AddressError {
        let usage = self.usage();
        AddressError::OutOfMemory {
            count,
            len_bytes,
            free_bytes: usage.free_bytes,
            largest_free_bytes: usage.largest_free_bytes,
        }
    }

    /// Adds a free range, merged with its neighbours.
    fn insert_free(&mut self, start: u64, len_bytes: u64) {
        if len_bytes == 0 {
            return;
        }
        let mut start = start;
        let mut end = start + len_bytes;
        if let Some((&before, &before_len)) = self.free.range(..start).next_back()
            && before + before_len == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(&after_len) = self.free.get(&end) {
            self.free.remove(&end);
            end += after_len;
        }
        self.free.insert(start, end - start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn zero_bytes_is_a_mistake_and_not_a_shortage() {
        // Broken in production: a caller that asks for nothing evicts or spins as if memory were short.
        let mut full = AddressManager::new(0, 16).unwrap();
        assert_eq!(full.allocate(0), Err(AddressError::ZeroSize));
        assert!(matches!(full.allocate(1), Err(AddressError::OutOfMemory { .. })));
        assert_eq!(full.allocate_batch(16, 0), Ok(vec![]));
    }

    #[test]
    fn a_free_that_is_not_exact_is_refused_and_changes_nothing() {
        // Broken in production: a double free hands one address out twice, and two requests share a slot.
        let mut manager = AddressManager::new(64, 16).unwrap();
        let a = manager.allocate(16).unwrap();
        let b = manager.allocate(16).unwrap();
        let before = manager.usage();
        for bad in [
            AddressRange { start: 32, len_bytes: 16 },
            AddressRange { start: a.start, len_bytes: 32 },
            AddressRange { start: 8, len_bytes: 16 },
            AddressRange { start: u64::MAX, len_bytes: 16 },
        ] {
            assert!(matches!(manager.free(bad), Err(AddressError::NotAllocated { .. })), "{bad:?}");
        }
        assert!(manager.free_batch(&[b, a, b]).is_err());
        assert_eq!(manager.usage(), before);
        manager.free_batch(&[b, a]).unwrap();
        assert!(manager.free(a).is_err());
        assert_eq!(manager.usage().largest_free_bytes, 64);
    }

    #[test]
    fn growing_after_an_unaligned_tail_keeps_starts_aligned() {
        // Broken in production: after growing, chunks start off their alignment and page indexes name other bytes.
        let mut manager = AddressManager::new(40, 16).unwrap();
        let ranges = manager.allocate_batch(8, 3).unwrap();
        assert_eq!(ranges[2], AddressRange { start: 32, len_bytes: 8 });
        manager.grow(24).unwrap();
        manager.check().unwrap();
        assert_eq!(manager.allocate(16).unwrap().start, 48);
    }

    #[derive(Debug, Clone)]
    enum Op {
        Allocate(u64),
        Batch(u64, usize),
        Free(usize),
        Grow(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (1u64..100).prop_map(Op::Allocate),
            2 => (1u64..40, 0usize..8).prop_map(|(len, count)| Op::Batch(len, count)),
            4 => any::<usize>().prop_map(Op::Free),
            1 => (0u64..100).prop_map(Op::Grow),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_map_of_bytes(alignment in 1u64..20, len in 0u64..600, ops in prop::collection::vec(op(), 0..80)) {
            // Broken in production: two chunks share bytes, or freed bytes are lost for good.
            let mut manager = AddressManager::new(len, alignment).unwrap();
            let mut owner: Vec<Option<usize>> = vec![None; len as usize];
            let mut live: Vec<(usize, AddressRange)> = Vec::new();
            let mut next = 0;
            for op in ops {
                let taken = match op {
                    Op::Allocate(len) => manager.allocate(len).map(|range| vec![range]),
                    Op::Batch(len, count) => manager.allocate_batch(len, count),
                    Op::Free(pick) if !live.is_empty() => {
                        let (id, range) = live.swap_remove(pick % live.len());
                        manager.free(range).unwrap();
                        owner.iter_mut().filter(|byte| **byte == Some(id)).for_each(|byte| *byte = None);
                        Ok(vec![])
                    }
                    Op::Free(_) => Ok(vec![]),
                    Op::Grow(bytes) => {
                        manager.grow(bytes).unwrap();
                        owner.resize(owner.len() + bytes as usize, None);
                        Ok(vec![])
                    }
                };
                for range in taken.unwrap_or_default() {
                    prop_assert_eq!(range.start % alignment, 0);
                    for byte in &mut owner[range.start as usize..range.end() as usize] {
                        prop_assert_eq!(*byte, None);
                        *byte = Some(next);
                    }
                    live.push((next, range));
                    next += 1;
                }
                prop_assert_eq!(manager.check(), Ok(()));
            }
            let ranges: Vec<_> = live.iter().map(|(_, range)| *range).collect();
            manager.free_batch(&ranges).unwrap();
            prop_assert_eq!(manager.usage().largest_free_bytes, owner.len() as u64);
        }
    }
}
