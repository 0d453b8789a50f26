//! A naive model of the address manager, one entry a byte, and operations to play against both. Shared by the property
//! test and the fuzz target, each of which declares `AddressManager` and its friends beside it.

use super::{AddressError, AddressManager, AddressRange};

/// Something to do. Numbers are taken modulo what makes sense.
#[derive(Debug, Clone)]
pub enum Op {
    /// One range.
    Allocate(u64),
    /// One range of a slot's length.
    AllocateSlot,
    /// Ranges of one length.
    Batch(u64, usize),
    /// Ranges of a slot's length.
    BatchSlots(usize),
    /// Whole slots and other lengths in one request: (slots, others).
    Each(usize, Vec<u64>),
    /// Whole slots that end below a byte.
    SlotsBelow(usize, u64),
    /// One live range.
    Free(usize),
    /// Several live ranges, from a pick on, in steps.
    FreeBatch(usize, usize, usize),
    /// Live ranges, and among them one that is none, or one of them twice.
    FreeBad(usize, u64, u64),
    /// More space.
    Grow(u64),
    /// Take as many as are said to fit, see that one more does not, and give all back.
    Fill(u64),
}

/// Whole slots that end below a byte; nothing is given back for them.
pub fn slots_below(manager: &AddressManager, count: usize, end: u64) -> Result<Vec<AddressRange>, AddressError> {
    manager.allocate_slots_below_or_free(count, end, 0, std::iter::empty()).map(|made| made.ranges)
}

/// The manager under test beside the model of it.
pub struct Play {
    manager: AddressManager,
    alignment: u64,
    /// 0: the space has none.
    slot_bytes: u64,
    /// Whether each byte is taken.
    taken: Vec<bool>,
    live: Vec<AddressRange>,
}

impl Play {
    /// Both, empty. `slots_of` alignments make a slot; 0: no slots.
    pub fn new(len_bytes: u64, alignment: u64, slots_of: u64) -> Self {
        let slot_bytes = alignment * slots_of;
        let manager = if slot_bytes == 0 {
            AddressManager::new(len_bytes, alignment)
        } else {
            AddressManager::with_slots(len_bytes, alignment, slot_bytes)
        };
        let manager = manager.expect("a sound space");
        Self { manager, alignment, slot_bytes, taken: vec![false; len_bytes as usize], live: Vec::new() }
    }

    /// Plays one operation and compares everything afterwards.
    pub fn step(&mut self, op: &Op) {
        match *op {
            Op::Allocate(len) => self.allocate(len),
            Op::AllocateSlot => self.allocate(self.slot_bytes),
            Op::Batch(len, count) => self.batch(len, count),
            Op::BatchSlots(count) => self.batch(self.slot_bytes, count),
            Op::Each(slots, ref others) => self.each(slots, others),
            Op::SlotsBelow(count, end) => self.slots_below(count, end),
            Op::Free(pick) => self.free(pick, 1, 1),
            Op::FreeBatch(pick, step, count) => self.free(pick, step, count),
            Op::FreeBad(pick, start, len) => self.free_bad(pick, start, len),
            Op::Grow(bytes) => {
                self.manager.grow(bytes).expect("far from 2^64");
                self.taken.resize(self.taken.len() + bytes as usize, false);
                self.mark_all();
            }
            Op::Fill(len) => self.fill(len),
        }
        self.compare();
    }

    /// Gives everything back: one free range must be left.
    pub fn finish(mut self) {
        self.manager.free_batch(&self.live).expect("all are live");
        self.live.clear();
        self.taken.fill(false);
        self.compare();
    }

    fn allocate(&mut self, len: u64) {
        let lowest_slot = self.free_slots().next();
        match self.manager.allocate(len) {
            Ok(range) => {
                if len == self.slot_bytes
                    && let Some(slot) = lowest_slot
                {
                    assert_eq!(range.start, slot, "the lowest free slot comes first");
                }
                self.take(range, len);
            }
            Err(AddressError::ZeroSize) => assert_eq!(len, 0),
            Err(error) => self.refused(&error, len, 1),
        }
    }

    fn batch(&mut self, len: u64, count: usize) {
        match self.manager.allocate_each(&vec![len; count]) {
            Ok(ranges) => {
                assert_eq!(ranges.len(), count);
                ranges.into_iter().for_each(|range| self.take(range, len));
            }
            Err(AddressError::ZeroSize) => assert_eq!(len, 0),
            Err(error) => self.refused(&error, len, count as u64),
        }
    }

    fn each(&mut self, slots: usize, others: &[u64]) {
        let mut lens = others.to_vec();
        if self.slot_bytes > 0 {
            lens.splice(others.len() / 2..others.len() / 2, std::iter::repeat_n(self.slot_bytes, slots));
        }
        match self.manager.allocate_each(&lens) {
            Ok(ranges) => {
                assert_eq!(ranges.len(), lens.len());
                ranges.into_iter().zip(lens).for_each(|(range, len)| self.take(range, len));
            }
            Err(AddressError::ZeroSize) => assert!(lens.contains(&0)),
            Err(AddressError::OutOfMemory { .. }) => {
                // What all slots lent out or taken leave is hard to say; a single length is not.
                if let [len] = lens[..] {
                    assert!(self.fits(len) == 0, "{len} bytes were refused and fit");
                }
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn slots_below(&mut self, count: usize, end: u64) {
        let slot_bytes = self.slot_bytes;
        let expected: Vec<u64> = self.free_slots().filter(|start| start + slot_bytes <= end).take(count).collect();
        match slots_below(&self.manager, count, end) {
            Ok(ranges) => {
                assert_eq!(ranges.iter().map(|range| range.start).collect::<Vec<_>>(), expected);
                assert_eq!(ranges.len(), count);
                ranges.into_iter().for_each(|range| self.take(range, slot_bytes));
            }
            Err(AddressError::OutOfMemory { .. }) => assert!(expected.len() < count),
            Err(error) => panic!("{error}"),
        }
    }

    fn free(&mut self, pick: usize, step: usize, count: usize) {
        let mut ranges = Vec::new();
        let mut at = pick;
        for _ in 0..count.min(self.live.len()) {
            at %= self.live.len();
            ranges.push(self.live.swap_remove(at));
            at = at.wrapping_add(step);
        }
        match ranges[..] {
            [range] => self.manager.free(range).expect("it is live"),
            _ => self.manager.free_batch(&ranges).expect("all are live"),
        }
        self.mark_all();
    }

    fn free_bad(&mut self, pick: usize, start: u64, len: u64) {
        let start = start % (self.taken.len() as u64 + 2 * self.alignment);
        let bad = match (len % 4, self.live.is_empty()) {
            (0, false) => self.live[pick % self.live.len()],
            (1, false) => {
                let range = self.live[pick % self.live.len()];
                AddressRange { start: range.start, len_bytes: range.len_bytes + 1 }
            }
            (2, false) => {
                let range = self.live[pick % self.live.len()];
                AddressRange { start: range.start + self.alignment, len_bytes: range.len_bytes }
            }
            _ => AddressRange { start, len_bytes: len },
        };
        let mut ranges: Vec<AddressRange> = self.live.iter().copied().skip(pick % 7).take(5).collect();
        if self.live.contains(&bad) {
            // Only a second time is wrong then.
            ranges.push(bad);
            ranges.insert(0, bad);
        } else {
            assert!(matches!(self.manager.free(bad), Err(AddressError::NotAllocated { .. })), "{bad:?}");
            ranges.insert(pick % (ranges.len() + 1), bad);
        }
        assert!(matches!(self.manager.free_batch(&ranges), Err(AddressError::NotAllocated { .. })), "{ranges:?}");
    }

    fn fill(&mut self, len: u64) {
        if len == 0 {
            return;
        }
        let fits = self.manager.snapshot(&[len]).fits[0];
        assert_eq!(fits, self.fits(len), "ranges of {len} bytes that fit");
        assert!(self.manager.allocate_each(&vec![len; fits as usize + 1]).is_err());
        let ranges = self.manager.allocate_each(&vec![len; fits as usize]).expect("so many fit");
        self.manager.check().expect("sound while full");
        self.manager.free_batch(&ranges).expect("just taken");
    }

    fn take(&mut self, range: AddressRange, len: u64) {
        assert_eq!(range.len_bytes, len);
        assert_eq!(range.start % self.alignment, 0, "{range:?}");
        let end = self.taken_end(range);
        for byte in &mut self.taken[range.start as usize..end as usize] {
            assert!(!*byte, "{range:?} was handed out twice");
            *byte = true;
        }
        assert!(range.end() <= end);
        self.live.push(range);
    }

    /// Where a range ends with its rounding, which the end of the space may cut short.
    fn taken_end(&self, range: AddressRange) -> u64 {
        range.end().next_multiple_of(self.alignment).min(self.taken.len() as u64)
    }

    fn mark_all(&mut self) {
        self.taken.fill(false);
        for range in self.live.clone() {
            let end = self.taken_end(range) as usize;
            self.taken[range.start as usize..end].fill(true);
        }
    }

    fn refused(&self, error: &AddressError, len: u64, count: u64) {
        assert!(matches!(error, AddressError::OutOfMemory { .. }), "{error}");
        let fits = self.fits(len);
        assert!(fits < count, "{count} ranges of {len} bytes were refused, {fits} fit");
    }

    /// Free ranges as (start, end), neighbours as one.
    fn free_ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (byte, _) in self.taken.iter().enumerate().filter(|(_, taken)| !**taken) {
            match ranges.last_mut() {
                Some((_, end)) if *end == byte as u64 => *end += 1,
                _ => ranges.push((byte as u64, byte as u64 + 1)),
            }
        }
        ranges
    }

    fn free_slots(&self) -> impl Iterator<Item = u64> {
        let slot_bytes = self.slot_bytes.max(1) as usize;
        let slots = if self.slot_bytes == 0 { 0 } else { self.taken.len() / slot_bytes };
        let starts = (0..slots).map(move |slot| slot * slot_bytes);
        starts.filter(move |&start| !self.taken[start..start + slot_bytes].contains(&true)).map(|start| start as u64)
    }

    /// How many ranges of a length fit: by trying, from the low end of each free range.
    fn fits(&self, len: u64) -> u64 {
        if len == self.slot_bytes && len > 0 {
            // Slots of the grid first, then what is left beside them.
            let mut beside = self.taken.clone();
            let slots: Vec<u64> = self.free_slots().collect();
            slots.iter().for_each(|&start| beside[start as usize..(start + len) as usize].fill(true));
            let rest = Self { manager: self.manager.clone(), taken: beside, live: Vec::new(), ..*self };
            return slots.len() as u64 + rest.free_ranges().iter().map(|(start, end)| (end - start) / len).sum::<u64>();
        }
        let mut count = 0;
        for (start, end) in self.free_ranges() {
            let mut at = start;
            while at + len <= end {
                count += 1;
                at = (at + len).next_multiple_of(self.alignment);
            }
        }
        count
    }

    fn compare(&self) {
        assert_eq!(self.manager.check(), Ok(()));
        let free_ranges = self.free_ranges();
        let usage = self.manager.usage();
        let used = self.taken.iter().filter(|taken| **taken).count() as u64;
        assert_eq!(usage.len_bytes, self.taken.len() as u64);
        assert_eq!(usage.used_bytes, used);
        assert_eq!(usage.free_bytes, usage.len_bytes - used);
        assert_eq!(usage.free_range_count, free_ranges.len());
        assert_eq!(usage.largest_free_bytes, free_ranges.iter().map(|(start, end)| end - start).max().unwrap_or(0));
    }
}
