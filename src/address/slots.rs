//! The grid: slots of one length, each free, taken whole, or lent out to be cut up.

use std::ops::Range;

use super::AddressRange;
use super::bitmap::{Bitmap, words_of};

/// Most slots that a grid has; each costs two bits. What lies beyond is served like the end of a space that is no
/// whole slot.
const SLOTS_MAX: u64 = 1 << 28;

/// Slot `i` is the bytes `i * slot_bytes .. (i + 1) * slot_bytes`.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    /// Length of a slot. 0: there are none.
    slot_bytes: u64,
    /// 2^64 / `slot_bytes`, rounded up: multiplying is faster than dividing.
    inverse: u128,
    free: Bitmap,
    /// Lent out to be cut up, one bit each. A slot that is neither free nor lent is taken whole.
    lent: Vec<u64>,
}

impl Slots {
    /// A grid without slots yet.
    pub(super) fn new(slot_bytes: u64) -> Self {
        let inverse = if slot_bytes == 0 { 0 } else { (1u128 << 64).div_ceil(u128::from(slot_bytes)) };
        Self { slot_bytes, inverse, free: Bitmap::new(), lent: vec![0] }
    }

    /// Adds the slots that a space of `len_bytes` has room for, as if lent.
    pub(super) fn extend(&mut self, len_bytes: u64) {
        let before = self.free.bound();
        let bound = len_bytes.checked_div(self.slot_bytes).unwrap_or(0).min(SLOTS_MAX) as usize;
        self.free.extend(bound);
        self.lent.resize(bound.div_ceil(64).max(1), 0);
        words_of(before..bound).for_each(|(word, bits)| self.lent[word] |= bits);
    }

    pub(super) fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Slots there are.
    pub(super) fn count(&self) -> usize {
        self.free.bound()
    }

    /// Slots that are free.
    pub(super) fn free_count(&self) -> usize {
        self.free.count()
    }

    /// First byte of a slot.
    #[inline]
    pub(super) fn start_of(&self, slot: usize) -> u64 {
        slot as u64 * self.slot_bytes
    }

    /// The slots that lie whole in a range of bytes; empty where there is none.
    pub(super) fn within(&self, start: u64, end: u64) -> Range<usize> {
        if self.slot_bytes == 0 {
            return 0..0;
        }
        let first = start.div_ceil(self.slot_bytes);
        let last = (end / self.slot_bytes).min(self.count() as u64);
        if first < last { first as usize..last as usize } else { 0..0 }
    }

    /// The slot that holds a byte, if any does.
    pub(super) fn holding(&self, byte: u64) -> Option<usize> {
        let slot = byte.checked_div(self.slot_bytes)?;
        (slot < self.count() as u64).then_some(slot as usize)
    }

    /// The slot that starts at a byte, if one does.
    #[inline]
    fn starting_at(&self, start: u64) -> Option<usize> {
        // For a multiple of `slot_bytes` the product is off by less than one; for any other byte it does not matter
        // what comes out, since it is multiplied back.
        let slot = (u128::from(start) * self.inverse) >> 64;
        (slot < self.count() as u128 && self.start_of(slot as usize) == start).then_some(slot as usize)
    }

    /// Whether a free slot starts at this byte.
    pub(super) fn is_free_from(&self, start: u64) -> bool {
        self.starting_at(start).is_some_and(|slot| self.free.contains(slot))
    }

    /// Whether a free slot ends at this byte.
    pub(super) fn is_free_until(&self, end: u64) -> bool {
        end.checked_sub(self.slot_bytes).is_some_and(|start| self.is_free_from(start))
    }

    /// Takes the lowest free slot whole.
    #[inline]
    pub(super) fn take(&mut self) -> Option<AddressRange> {
        let slot = self.free.take_lowest()?;
        Some(AddressRange { start: self.start_of(slot), len_bytes: self.slot_bytes })
    }

    /// Takes the `count_max` lowest free slots that end at or before `end_bytes`. Answers how many there were.
    #[inline]
    pub(super) fn take_below(&mut self, end_bytes: u64, count_max: usize, mut each: impl FnMut(AddressRange)) -> usize {
        let slot_bytes = self.slot_bytes;
        let end = end_bytes.checked_div(slot_bytes).unwrap_or(0).min(self.count() as u64) as usize;
        self.free.take_lowest_below(end, count_max, |slot| {
            each(AddressRange { start: slot as u64 * slot_bytes, len_bytes: slot_bytes });
        })
    }

    /// Gives back a slot that was taken whole. Answers false, and does nothing, when the range is no such slot.
    #[inline]
    pub(super) fn give_back(&mut self, range: AddressRange) -> bool {
        if range.len_bytes != self.slot_bytes {
            return false;
        }
        self.starting_at(range.start).is_some_and(|slot| !self.is_lent(slot) && self.free.insert(slot))
    }

    /// Takes back what [`give_back`](Self::give_back) just freed.
    pub(super) fn undo_give_back(&mut self, range: AddressRange) {
        if let Some(slot) = self.starting_at(range.start) {
            self.free.remove(slot);
        }
    }

    /// The highest run of free slots below a slot.
    pub(super) fn highest_free_run_below(&self, end: usize) -> Option<Range<usize>> {
        self.free.highest_run_below(end)
    }

    /// The highest free slot.
    pub(super) fn highest_free(&self) -> Option<usize> {
        self.free.highest_below(self.count())
    }

    /// Lends free slots out.
    pub(super) fn lend(&mut self, slots: Range<usize>) {
        self.free.remove_range(slots.clone());
        words_of(slots).for_each(|(word, bits)| self.lent[word] |= bits);
    }

    /// Makes lent slots free again.
    pub(super) fn hand_back(&mut self, slots: Range<usize>) {
        self.free.insert_range(slots.clone());
        words_of(slots).for_each(|(word, bits)| self.lent[word] &= !bits);
    }

    #[inline]
    pub(super) fn is_lent(&self, slot: usize) -> bool {
        self.lent[slot / 64] >> (slot % 64) & 1 == 1
    }

    pub(super) fn is_free(&self, slot: usize) -> bool {
        self.free.contains(slot)
    }

    /// Checks the bitmap, and that no slot is both free and lent.
    pub(super) fn check(&self) -> Result<(), String> {
        self.free.check()?;
        match (0..self.count()).find(|&slot| self.is_free(slot) && self.is_lent(slot)) {
            Some(slot) => Err(format!("slot {slot} is free and lent at once")),
            None => Ok(()),
        }
    }
}
