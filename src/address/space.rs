//! The address space: whole slots from the grid, every other length from ranges, and the lending between the two.
//!
//! What is free belongs to the grid where it is a whole slot, and to the ranges where it is not. So where everything
//! lies follows from what is taken alone, not from how it came about.

use std::ops::Range;

use super::ranges::{Ranges, TakenRange};
use super::slots::Slots;
use super::{AddressError, AddressRange, Usage, UsageSnapshot};

/// Where a range starts that a request has not got yet: no range of at least one byte can.
const NOT_YET: u64 = u64::MAX;

/// Hands out ranges of a virtual address space. Not shared between threads: that is the manager's part.
#[derive(Debug, Clone)]
pub(super) struct Space {
    alignment: u64,
    len_bytes: u64,
    pub(super) used_bytes: u64,
    pub(super) slots: Slots,
    pub(super) ranges: Ranges,
    /// A search for this length, or a longer one, has failed since bytes were last freed or added: callers ask a full
    /// space often.
    pub(super) no_room_from_bytes: u64,
}

impl Space {
    /// A space of `len_bytes` (0 is allowed), every range of which starts at a multiple of `alignment` (any number).
    /// `slot_bytes` is 0 where no length is favoured.
    pub(super) fn new(len_bytes: u64, alignment: u64, slot_bytes: u64) -> Result<Self, AddressError> {
        if alignment == 0 {
            return Err(AddressError::ZeroAlignment);
        }
        if !slot_bytes.is_multiple_of(alignment) {
            return Err(AddressError::UnalignedSlots { slot_bytes, alignment });
        }
        let mut space = Self {
            alignment,
            len_bytes: 0,
            used_bytes: 0,
            slots: Slots::new(slot_bytes),
            ranges: Ranges::default(),
            no_room_from_bytes: u64::MAX,
        };
        space.grow(len_bytes)?;
        Ok(space)
    }

    /// What every start is a multiple of, in bytes.
    pub(super) fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Bytes that are free.
    pub(super) fn free_bytes(&self) -> u64 {
        self.len_bytes - self.used_bytes
    }

    /// Bytes that are taken, rounding included.
    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Bytes in the space.
    pub(super) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Takes one range.
    #[inline]
    pub(super) fn allocate(&mut self, len_bytes: u64) -> Result<AddressRange, AddressError> {
        if len_bytes == 0 {
            return Err(AddressError::ZeroSize);
        }
        self.take(len_bytes).ok_or_else(|| self.out_of_memory(1, len_bytes))
    }

    /// Takes one range for each length, or none; they are appended to `out` in that order.
    pub(super) fn allocate_each(
        &mut self,
        lens_bytes: &[u64],
        out: &mut Vec<AddressRange>,
    ) -> Result<(), AddressError> {
        if lens_bytes.contains(&0) {
            return Err(AddressError::ZeroSize);
        }
        let total_bytes = lens_bytes.iter().fold(0u64, |sum, len_bytes| sum.saturating_add(*len_bytes));
        let whole_slots = lens_bytes.iter().filter(|len_bytes| self.is_slot(**len_bytes)).count();
        if total_bytes > self.free_bytes() || !self.has_room_for_slots(whole_slots) {
            return Err(self.out_of_memory(lens_bytes.len(), total_bytes));
        }
        // Long ranges come first, because slots taken one by one could leave no run of them; then whole slots, from
        // the other end of the space; what is shorter fits in anywhere.
        let (first, known) = (out.len(), self.no_room_from_bytes);
        out.extend(lens_bytes.iter().map(|&len_bytes| AddressRange { start: NOT_YET, len_bytes }));
        let slot_bytes = self.slots.slot_bytes();
        let taken = self.take_where(&mut out[first..], |len_bytes| len_bytes > slot_bytes)
            && self.take_slots(&mut out[first..], whole_slots)
            && self.take_where(&mut out[first..], |len_bytes| len_bytes < slot_bytes);
        if taken {
            return Ok(());
        }
        let mut index = 0;
        out.retain(|range| {
            index += 1;
            index <= first || range.start != NOT_YET
        });
        self.undo(out, first, known);
        Err(self.out_of_memory(lens_bytes.len(), total_bytes))
    }

    /// Takes `count` whole slots that end at or before `end_bytes`, or none; they are appended to `out`.
    pub(super) fn allocate_slots_below(
        &mut self,
        count: usize,
        end_bytes: u64,
        out: &mut Vec<AddressRange>,
    ) -> Result<(), AddressError> {
        let total_bytes = self.slots.slot_bytes().saturating_mul(count as u64);
        if count > self.slots.free_count() || out.try_reserve(count).is_err() {
            return Err(self.out_of_memory(count, total_bytes));
        }
        let (first, known) = (out.len(), self.no_room_from_bytes);
        let taken = self.slots.take_below(end_bytes, count, |slot| out.push(slot));
        self.used_bytes += self.slots.slot_bytes() * taken as u64;
        if taken == count {
            return Ok(());
        }
        self.undo(out, first, known);
        Err(self.out_of_memory(count, total_bytes))
    }

    /// Gives back all that was taken, unless so many slots of the grid are free beside it. Room for a slot off the grid does
    /// not count: once what lies between two such places is free as well, there may be one slot in both.
    pub(super) fn leave_slots(&mut self, slots_left: usize, taken: &mut Vec<AddressRange>) -> Result<(), AddressError> {
        if self.slots.free_count() >= slots_left {
            return Ok(());
        }
        self.free_batch(taken)?;
        taken.clear();
        Err(self.out_of_memory(slots_left, self.slots.slot_bytes().saturating_mul(slots_left as u64)))
    }

    /// Gives one range back.
    #[inline]
    pub(super) fn free(&mut self, range: AddressRange) -> Result<(), AddressError> {
        if self.slots.give_back(range) {
            self.used_bytes -= range.len_bytes;
        } else if let Some(taken) = self.ranges.remove_taken(range.start, range.len_bytes) {
            self.put_back(range.start, taken.end);
        } else {
            return Err(not_allocated(range));
        }
        self.no_room_from_bytes = u64::MAX;
        Ok(())
    }

    /// Gives ranges back, in any order, or none.
    pub(super) fn free_batch(&mut self, ranges: &[AddressRange]) -> Result<(), AddressError> {
        // Each is marked as given back at once, which is how one that is listed twice is noticed; ranges are merged
        // only when all are known to be good, so that marks are all there is to undo.
        let mut odd: Vec<(u64, TakenRange)> = Vec::new();
        for (index, &range) in ranges.iter().enumerate() {
            if self.slots.give_back(range) {
                continue;
            }
            if let Some(taken) = self.ranges.remove_taken(range.start, range.len_bytes) {
                odd.push((range.start, taken));
                continue;
            }
            let mut odd = odd.into_iter().peekable();
            for &good in &ranges[..index] {
                match odd.next_if(|&(start, _)| start == good.start) {
                    Some((start, taken)) => self.ranges.insert_taken(start, taken),
                    None => self.slots.undo_give_back(good),
                }
            }
            return Err(not_allocated(range));
        }
        self.used_bytes -= self.slots.slot_bytes() * (ranges.len() - odd.len()) as u64;
        odd.into_iter().for_each(|(start, taken)| self.put_back(start, taken.end));
        self.no_room_from_bytes = u64::MAX;
        Ok(())
    }

    /// Adds `grow_bytes` at the end; a free tail becomes longer.
    pub(super) fn grow(&mut self, grow_bytes: u64) -> Result<(), AddressError> {
        let old_len_bytes = self.len_bytes;
        let Some(len_bytes) = old_len_bytes.checked_add(grow_bytes) else {
            return Err(AddressError::TooLong { len_bytes: old_len_bytes, grow_bytes });
        };
        let mut start = old_len_bytes;
        if !start.is_multiple_of(self.alignment) && self.ranges.free_until(start).is_none() {
            // The last range was cut short by the end of the space. Now it ends where any other would, so that what
            // comes after it starts aligned.
            start = start.checked_next_multiple_of(self.alignment).unwrap_or(u64::MAX).min(len_bytes);
            let last = self
                .ranges
                .taken_until_mut(old_len_bytes)
                .expect("bytes that are no whole slot are free or taken as a range");
            last.end = start;
            self.used_bytes += start - old_len_bytes;
        }
        self.len_bytes = len_bytes;
        self.slots.extend(len_bytes);
        self.merge_free(start, len_bytes);
        self.no_room_from_bytes = u64::MAX;
        Ok(())
    }

    /// The counters, and how many more ranges of each length would fit. Walks every free range.
    pub(super) fn snapshot(&self, lens_bytes: &[u64]) -> UsageSnapshot {
        let mut usage = Usage {
            len_bytes: self.len_bytes,
            used_bytes: self.used_bytes,
            free_bytes: self.free_bytes(),
            largest_free_bytes: 0,
            free_range_count: 0,
        };
        let mut fits = vec![0; lens_bytes.len()];
        self.for_each_free(|start, end| {
            let free_bytes = end - start;
            usage.largest_free_bytes = usage.largest_free_bytes.max(free_bytes);
            usage.free_range_count += 1;
            for (fits, &len_bytes) in fits.iter_mut().zip(lens_bytes) {
                *fits += self.fits_in(free_bytes, len_bytes);
            }
        });
        for (fits, &len_bytes) in fits.iter_mut().zip(lens_bytes) {
            if self.is_slot(len_bytes) {
                // Slots stay on the grid, whatever is free beside them.
                *fits = self.slots.free_count() as u64 + self.ranges.fits(len_bytes, u64::MAX);
            }
        }
        UsageSnapshot { usage, fits }
    }

    /// Checks everything that must hold between two calls.
    pub(super) fn check(&self) -> Result<(), String> {
        self.slots.check()?;
        self.ranges.check()?;
        // All pieces, in order, must tile the space: (start, end, is free, is a slot of the grid).
        let mut pieces: Vec<(u64, u64, bool, bool)> = Vec::new();
        for slot in (0..self.slots.count()).filter(|&slot| !self.slots.is_lent(slot)) {
            let start = self.slots.start_of(slot);
            pieces.push((start, start + self.slots.slot_bytes(), self.slots.is_free(slot), true));
        }
        pieces.extend(self.ranges.free_descending().into_iter().map(|(start, end)| (start, end, true, false)));
        pieces.extend(self.ranges.taken().map(|(start, taken)| (start, taken.end, false, false)));
        pieces.sort_unstable();
        let (mut at, mut used_bytes, mut after_free_range) = (0, 0, false);
        for (start, end, is_free, is_slot) in pieces {
            if start != at || end <= start || !start.is_multiple_of(self.alignment) {
                return Err(format!("a range {start}..{end}, where the one before it ends at {at}"));
            }
            let is_free_range = is_free && !is_slot;
            if is_free_range && after_free_range {
                return Err(format!("free ranges meet at {start} and were not merged"));
            }
            if is_free_range && !self.slots.within(start, end).is_empty() {
                return Err(format!("the free range {start}..{end} holds a whole slot that was not handed back"));
            }
            if !is_free {
                used_bytes += end - start;
            }
            after_free_range = is_free_range;
            at = end;
        }
        if at != self.len_bytes {
            return Err(format!("the ranges end at {at} of {} bytes", self.len_bytes));
        }
        if used_bytes != self.used_bytes {
            return Err(format!("{} bytes counted as used, {used_bytes} are taken", self.used_bytes));
        }
        match self.ranges.taken().find(|(start, taken)| taken.asked_bytes == 0 || taken.asked_bytes > taken.end - start)
        {
            Some((start, taken)) => Err(format!("{taken:?} at {start} is shorter than what was asked for")),
            None => Ok(()),
        }
    }

    #[inline]
    fn is_slot(&self, len_bytes: u64) -> bool {
        len_bytes == self.slots.slot_bytes()
    }

    /// Whether so many ranges of a slot's length would fit, on the grid or beside it.
    fn has_room_for_slots(&self, count: usize) -> bool {
        let short = count.saturating_sub(self.slots.free_count()) as u64;
        short == 0 || self.ranges.fits(self.slots.slot_bytes(), short) >= short
    }

    /// Takes one range of a length that is not 0.
    #[inline]
    fn take(&mut self, len_bytes: u64) -> Option<AddressRange> {
        if self.is_slot(len_bytes)
            && let Some(range) = self.slots.take()
        {
            self.used_bytes += len_bytes;
            return Some(range);
        }
        self.take_odd(len_bytes)
    }

    /// Fills in the `count` ranges of a slot's length, from the grid as far as it goes, and answers whether there was room.
    fn take_slots(&mut self, ranges: &mut [AddressRange], count: usize) -> bool {
        let slot_bytes = self.slots.slot_bytes();
        let mut wanted = ranges.iter_mut().filter(|range| range.len_bytes == slot_bytes);
        let fill_in = |slot| *wanted.next().expect("no more are taken than are wanted") = slot;
        let taken = self.slots.take_below(self.len_bytes, count, fill_in);
        self.used_bytes += slot_bytes * taken as u64;
        wanted.all(|range| self.take_odd(slot_bytes).map(|taken| *range = taken).is_some())
    }

    /// Fills in the ranges whose length `wanted` picks, and answers whether there was room.
    fn take_where(&mut self, ranges: &mut [AddressRange], wanted: impl Fn(u64) -> bool) -> bool {
        for range in ranges.iter_mut().filter(|range| wanted(range.len_bytes)) {
            match self.take(range.len_bytes) {
                Some(taken) => *range = taken,
                None => return false,
            }
        }
        true
    }

    /// Gives back what a call took that came to nothing. What was `known` before the call to have no room has none
    /// again; what the call learnt it learnt of a space that it had filled up itself.
    fn undo(&mut self, out: &mut Vec<AddressRange>, first: usize, known: u64) {
        self.free_batch(&out[first..]).expect("just taken");
        out.truncate(first);
        self.no_room_from_bytes = known;
    }

    /// Takes a range that is cut out of a free range, or out of slots that are borrowed for it.
    fn take_odd(&mut self, len_bytes: u64) -> Option<AddressRange> {
        if len_bytes >= self.no_room_from_bytes {
            return None;
        }
        if let Some((start, end)) = self.ranges.best_fit(len_bytes) {
            self.ranges.remove_free(start, end);
            return Some(self.cut(start, end, len_bytes));
        }
        let borrowed = if len_bytes <= self.slots.slot_bytes() {
            self.slots.highest_free().map(|slot| slot..slot + 1)
        } else {
            self.run_for(len_bytes)
        };
        let Some(slots) = borrowed else {
            self.no_room_from_bytes = len_bytes;
            return None;
        };
        let (start, end) = (self.slots.start_of(slots.start), self.slots.start_of(slots.end));
        self.slots.lend(slots);
        let (start, end) = self.ranges.absorb_neighbours(start, end);
        Some(self.cut(start, end, len_bytes))
    }

    /// Free slots next to each other that, with what is free right beside them, hold `len_bytes`: of the shortest such
    /// stretch, no more than needed. Looks at every run of free slots; taking the first that will do instead leaves a
    /// space of many lengths a sixth emptier, and is no faster where most of them are too short.
    fn run_for(&self, len_bytes: u64) -> Option<Range<usize>> {
        let slot_bytes = self.slots.slot_bytes();
        let mut best: Option<(u64, Range<usize>, u64)> = None;
        let mut below = self.slots.count();
        while let Some(run) = self.slots.highest_free_run_below(below) {
            below = run.start;
            let (run_start, run_end) = (self.slots.start_of(run.start), self.slots.start_of(run.end));
            // What lies free beside a run is shorter than a slot at either end, or it would be part of the run; only
            // beyond the grid it may be longer.
            let at_end = run.end == self.slots.count();
            if !at_end && (run_end - run_start).saturating_add(slot_bytes.saturating_mul(2)) <= len_bytes {
                continue;
            }
            let start = self.ranges.free_until(run_start).unwrap_or(run_start);
            let end = self.ranges.free_from(run_end).unwrap_or(run_end);
            if end - start >= len_bytes && best.as_ref().is_none_or(|(best_bytes, ..)| end - start < *best_bytes) {
                best = Some((end - start, run, end));
            }
        }
        let (_, run, end) = best?;
        let cut_at = end - len_bytes;
        let first = self.slots.holding(cut_at - cut_at % self.alignment);
        Some(first.map_or(run.start, |slot| slot.max(run.start))..run.end)
    }

    /// Hands out `len_bytes` of `start..end`, which is neither free nor taken while it is being cut. What is left over
    /// stays beside the slots that are still free, where it can become whole again: a range is cut from its low end,
    /// except when a free slot lies below it. So ranges of one length always lie end to end, whatever was freed
    /// between them, and as many fit as the space holds.
    fn cut(&mut self, start: u64, end: u64, len_bytes: u64) -> AddressRange {
        let taken_start = if self.slots.is_free_until(start) {
            let cut_at = end - len_bytes;
            cut_at - cut_at % self.alignment
        } else {
            start
        };
        let rounded_bytes = len_bytes.checked_next_multiple_of(self.alignment).unwrap_or(u64::MAX);
        let taken_end = taken_start.saturating_add(rounded_bytes).min(end);
        self.insert_free(start, taken_start);
        self.insert_free(taken_end, end);
        self.ranges.insert_taken(taken_start, TakenRange { end: taken_end, asked_bytes: len_bytes });
        self.used_bytes += taken_end - taken_start;
        AddressRange { start: taken_start, len_bytes }
    }

    /// Makes a range that was handed out free again.
    fn put_back(&mut self, start: u64, end: u64) {
        self.used_bytes -= end - start;
        self.merge_free(start, end);
    }

    /// Adds free bytes, merged with the free ranges beside them.
    fn merge_free(&mut self, start: u64, end: u64) {
        let (start, end) = self.ranges.absorb_neighbours(start, end);
        self.insert_free(start, end);
    }

    /// Adds free bytes that no free range touches. Slots that are whole go to the grid.
    pub(super) fn insert_free(&mut self, start: u64, end: u64) {
        let whole = self.slots.within(start, end);
        if whole.is_empty() {
            self.ranges.insert_free(start, end);
            return;
        }
        self.ranges.insert_free(start, self.slots.start_of(whole.start));
        self.ranges.insert_free(self.slots.start_of(whole.end), end);
        self.slots.hand_back(whole);
    }

    /// Calls `each` with every free range, highest first, slots and ranges beside each other as one.
    fn for_each_free(&self, mut each: impl FnMut(u64, u64)) {
        let mut ranges = self.ranges.free_descending().into_iter().peekable();
        let mut run = self.slots.highest_free_run_below(self.slots.count());
        let mut open: Option<(u64, u64)> = None;
        loop {
            let slots = run.clone().map(|run| (self.slots.start_of(run.start), self.slots.start_of(run.end)));
            let next = match (ranges.peek().copied(), slots) {
                (Some(range), Some(slots)) if range > slots => ranges.next(),
                (Some(_), None) => ranges.next(),
                (_, Some(slots)) => {
                    run = run.and_then(|run| self.slots.highest_free_run_below(run.start));
                    Some(slots)
                }
                (None, None) => None,
            };
            open = match (open, next) {
                (Some((start, end)), Some((next_start, next_end))) if next_end == start => Some((next_start, end)),
                (open, next) => {
                    if let Some((start, end)) = open {
                        each(start, end);
                    }
                    next
                }
            };
            if open.is_none() {
                return;
            }
        }
    }

    /// How many ranges of `len_bytes` a free range holds, laid end to end.
    fn fits_in(&self, free_bytes: u64, len_bytes: u64) -> u64 {
        if len_bytes == 0 {
            return 0;
        }
        match len_bytes.checked_next_multiple_of(self.alignment) {
            // The end of the space may cut the last one's rounding short.
            Some(rounded_bytes) => free_bytes / rounded_bytes + u64::from(free_bytes % rounded_bytes >= len_bytes),
            None => u64::from(free_bytes >= len_bytes),
        }
    }

    #[cold]
    pub(super) fn out_of_memory(&self, count: usize, len_bytes: u64) -> AddressError {
        AddressError::OutOfMemory { count, len_bytes, free_bytes: self.free_bytes() }
    }
}

#[cold]
fn not_allocated(range: AddressRange) -> AddressError {
    AddressError::NotAllocated { start: range.start, end: range.start.saturating_add(range.len_bytes) }
}
