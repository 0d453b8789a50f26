//! The address manager: an address space behind one lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::space::Space;
use super::{AddressError, AddressRange, MadeRoom, Usage, UsageSnapshot};

/// A virtual address space behind one lock. Clones are handles of the same space.
///
/// Every call takes the lock once, so what it answers is of one moment, and a batch costs one lock.
#[derive(Debug, Clone)]
pub struct AddressManager {
    shared: Arc<Mutex<SharedSpace>>,
}

#[derive(Debug)]
struct SharedSpace {
    space: Space,
    closed: bool,
}

/// A range that is given back when dropped.
///
/// It keeps the bookkeeping of its space alive, so it may be dropped after the last [`AddressManager`] of it.
#[derive(Debug)]
#[must_use = "the range is free again as soon as this is dropped"]
pub struct OwnedRange {
    /// Of 0 bytes once it is given up.
    range: AddressRange,
    shared: Arc<Mutex<SharedSpace>>,
}

impl AddressManager {
    /// An address space of `len_bytes` (0 is allowed), every range of which starts at a multiple of `alignment` (any
    /// number), without a favoured length.
    ///
    /// # Errors
    /// [`AddressError::ZeroAlignment`].
    pub fn new(len_bytes: u64, alignment: u64) -> Result<Self, AddressError> {
        Ok(Self::of(Space::new(len_bytes, alignment, 0)?))
    }

    /// The same with `slot_bytes`, a multiple of `alignment`, as the length that most ranges have: those are the
    /// fastest, and lie at multiples of `slot_bytes` as long as there are such free. Other lengths cost no more room
    /// than they need. Lengths above `slot_bytes` take time that grows with the number of free stretches: favour the
    /// longest of the lengths that are frequent.
    ///
    /// # Errors
    /// [`AddressError::ZeroAlignment`], [`AddressError::UnalignedSlots`].
    pub fn with_slots(len_bytes: u64, alignment: u64, slot_bytes: u64) -> Result<Self, AddressError> {
        if slot_bytes == 0 && alignment != 0 {
            return Err(AddressError::UnalignedSlots { slot_bytes, alignment });
        }
        Ok(Self::of(Space::new(len_bytes, alignment, slot_bytes)?))
    }

    fn of(space: Space) -> Self {
        Self { shared: Arc::new(Mutex::new(SharedSpace { space, closed: false })) }
    }

    /// Takes a range.
    ///
    /// # Errors
    /// [`AddressError::ZeroSize`], [`AddressError::OutOfMemory`], [`AddressError::Closed`].
    #[inline]
    pub fn allocate(&self, len_bytes: u64) -> Result<AddressRange, AddressError> {
        lock(&self.shared).open()?.allocate(len_bytes)
    }

    /// Gives a range that was handed out back when what this returns is dropped.
    pub fn own(&self, range: AddressRange) -> OwnedRange {
        OwnedRange { range, shared: Arc::clone(&self.shared) }
    }

    /// Takes one range for each length, in that order, or none at all.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn allocate_each(&self, lens_bytes: &[u64]) -> Result<Vec<AddressRange>, AddressError> {
        let mut ranges = Vec::with_capacity(lens_bytes.len());
        lock(&self.shared).open()?.allocate_each(lens_bytes, &mut ranges)?;
        Ok(ranges)
    }

    /// As [`allocate_each`](Self::allocate_each), in bytes before `end_bytes`. Where there is no room, ranges of `spare`,
    /// which are all handed out, are given back: as few as will do, the first before the others, and of those only the ones
    /// whose bytes are taken for this (or all, where the rest finds no place without). There is room where `slots_left` slots
    /// of the grid are free afterwards. When all of them are too few, or what was found ends beyond `end_bytes`, nothing has changed.
    ///
    /// # Errors
    /// As [`allocate_each`](Self::allocate_each).
    ///
    /// # Panics
    /// When a spare range is not one that was handed out.
    pub fn allocate_each_or_free(
        &self,
        lens_bytes: &[u64],
        end_bytes: u64,
        slots_left: usize,
        spare: impl Iterator<Item = AddressRange>,
    ) -> Result<MadeRoom, AddressError> {
        let least_bytes = lens_bytes.iter().fold(0, |sum: u64, len_bytes| sum.saturating_add(*len_bytes));
        let take = |space: &mut Space, out: &mut Vec<AddressRange>| {
            space.allocate_each(lens_bytes, out).and_then(|()| space.leave_slots(slots_left, out))
        };
        lock(&self.shared).open()?.make_room(least_bytes, end_bytes, spare, take)
    }

    /// Takes `count` whole slots, the lowest there are, at multiples of `slot_bytes`, that end at or before `end_bytes`, or
    /// none at all: for peers that address by page index and know the space up to there. Gives ranges of `spare` back as
    /// [`allocate_each_or_free`](Self::allocate_each_or_free) does.
    ///
    /// # Errors
    /// [`AddressError::OutOfMemory`], [`AddressError::Closed`].
    ///
    /// # Panics
    /// As [`allocate_each_or_free`](Self::allocate_each_or_free).
    pub fn allocate_slots_below_or_free(
        &self,
        count: usize,
        end_bytes: u64,
        slots_left: usize,
        spare: impl Iterator<Item = AddressRange>,
    ) -> Result<MadeRoom, AddressError> {
        let take = |space: &mut Space, out: &mut Vec<AddressRange>| {
            space.allocate_slots_below(count, end_bytes, out).and_then(|()| space.leave_slots(slots_left, out))
        };
        let mut shared = lock(&self.shared);
        let space = shared.open()?;
        let least_bytes = space.slots.slot_bytes().saturating_mul(count as u64);
        space.make_room(least_bytes, end_bytes, spare, take)
    }

    /// Gives a range back: exactly one that was handed out. Works after [`close`](Self::close), too.
    ///
    /// # Errors
    /// [`AddressError::NotAllocated`].
    #[inline]
    pub fn free(&self, range: AddressRange) -> Result<(), AddressError> {
        lock(&self.shared).space.free(range)
    }

    /// Gives ranges back, in any order, or none at all.
    ///
    /// # Errors
    /// [`AddressError::NotAllocated`] naming the first range that was not handed out, or that is listed twice.
    pub fn free_batch(&self, ranges: &[AddressRange]) -> Result<(), AddressError> {
        lock(&self.shared).space.free_batch(ranges)
    }

    /// Adds `grow_bytes` at the end; a free tail becomes longer.
    ///
    /// # Errors
    /// [`AddressError::TooLong`], [`AddressError::Closed`].
    pub fn grow(&self, grow_bytes: u64) -> Result<(), AddressError> {
        lock(&self.shared).open()?.grow(grow_bytes)
    }

    /// Hands nothing out any more. What is out can still be given back.
    pub fn close(&self) {
        lock(&self.shared).closed = true;
    }

    /// What every start is a multiple of, in bytes.
    pub fn alignment(&self) -> u64 {
        lock(&self.shared).space.alignment()
    }

    /// Length of a whole slot.
    pub fn slot_bytes(&self) -> u64 {
        lock(&self.shared).space.slots.slot_bytes()
    }

    /// Bytes in the address space.
    pub fn len_bytes(&self) -> u64 {
        lock(&self.shared).space.len_bytes()
    }

    /// Bytes taken, rounding up to the alignment included.
    pub fn used_bytes(&self) -> u64 {
        lock(&self.shared).space.used_bytes()
    }

    /// Bytes free; how they are scattered is in [`usage`](Self::usage), which has to look at every free range.
    pub fn free_bytes(&self) -> u64 {
        lock(&self.shared).space.free_bytes()
    }

    /// The counters, all of one moment. Looks at every free range, under the lock: for status, not for decisions
    /// about each request.
    pub fn usage(&self) -> Usage {
        self.snapshot(&[]).usage
    }

    /// The counters, and how many more ranges of each of these lengths would fit, all of one moment; costs as much as
    /// [`usage`](Self::usage). A length of 0 fits 0 times.
    pub fn snapshot(&self, lens_bytes: &[u64]) -> UsageSnapshot {
        lock(&self.shared).space.snapshot(lens_bytes)
    }

    /// Checks that free and taken ranges tile the space, and that every index into them is right. For tests, and for
    /// an operator who doubts.
    ///
    /// # Errors
    /// What does not agree.
    pub fn check(&self) -> Result<(), String> {
        lock(&self.shared).space.check()
    }
}

impl SharedSpace {
    #[inline]
    fn open(&mut self) -> Result<&mut Space, AddressError> {
        if self.closed { Err(AddressError::Closed) } else { Ok(&mut self.space) }
    }
}

impl OwnedRange {
    /// The range.
    pub fn range(&self) -> AddressRange {
        self.range
    }

    /// Gives it up: whoever has it now gives it back, or has done so.
    pub fn disown(mut self) -> AddressRange {
        std::mem::replace(&mut self.range, AddressRange { start: 0, len_bytes: 0 })
    }
}

impl Drop for OwnedRange {
    fn drop(&mut self) {
        if self.range.len_bytes > 0 {
            // Refused only when somebody freed the range behind its owner's back; then there is nothing left to free.
            let _ = lock(&self.shared).space.free(self.range);
        }
    }
}

/// No call leaves a space half changed, so a panic elsewhere under the lock does not spoil it.
#[inline]
fn lock(shared: &Mutex<SharedSpace>) -> MutexGuard<'_, SharedSpace> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
