//! Slots as a pool: all or nothing, each with a generation.

use crate::address::{AddressManager, AddressRange};
use crate::ids::{Generation, SlotIndex};

/// Too few free slots for a request. Nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{asked} slots are needed, {free} of {slot_count} are free")]
pub struct NotEnoughSlots {
    /// Slots asked for.
    pub asked: u32,
    /// Slots free.
    pub free: u32,
    /// Slots in the buffer.
    pub slot_count: u32,
}

/// The slots of one pd_buffer. Slot `i` is the addresses `i * slot_bytes .. (i + 1) * slot_bytes`.
#[derive(Debug)]
pub struct SlotPool {
    addresses: AddressManager,
    slot_bytes: u64,
    generations: Vec<Generation>,
    free: u32,
}

impl SlotPool {
    /// `slot_count` free slots of `slot_bytes` each.
    ///
    /// # Panics
    /// When `slot_bytes` is 0 or the buffer passes 2^64 bytes; a checked configuration holds neither.
    pub fn new(slot_count: u32, slot_bytes: u64) -> Self {
        let len_bytes = slot_bytes.checked_mul(u64::from(slot_count)).expect("a checked configuration fits in 64 bits");
        let addresses =
            AddressManager::new(len_bytes, slot_bytes).expect("a checked configuration has chunks of at least 1 byte");
        Self { addresses, slot_bytes, generations: vec![Generation(0); slot_count as usize], free: slot_count }
    }

    /// Takes `count` slots, or none. Each gets a new generation.
    ///
    /// # Errors
    /// [`NotEnoughSlots`].
    pub fn take(&mut self, count: u32) -> Result<Vec<SlotIndex>, NotEnoughSlots> {
        let short = NotEnoughSlots { asked: count, free: self.free, slot_count: self.slot_count() };
        let ranges = self.addresses.allocate_batch(self.slot_bytes, count as usize).map_err(|_| short)?;
        self.free -= count;
        Ok(ranges
            .into_iter()
            .map(|range| {
                let slot = SlotIndex((range.start / self.slot_bytes) as u32);
                self.generations[slot.0 as usize].0 += 1;
                slot
            })
            .collect())
    }

    /// Gives a taken slot back.
    ///
    /// # Panics
    /// In debug builds, when the slot is free already: its owner has lost count.
    pub fn give_back(&mut self, slot: SlotIndex) {
        let range = AddressRange { start: self.offset_bytes(slot), len_bytes: self.slot_bytes };
        match self.addresses.free(range) {
            Ok(()) => self.free += 1,
            Err(error) => debug_assert!(false, "slot {slot}: {error}"),
        }
    }

    /// Where a slot starts, in bytes from the start of the buffer.
    pub fn offset_bytes(&self, slot: SlotIndex) -> u64 {
        u64::from(slot.0) * self.slot_bytes
    }

    /// How often this slot has been taken.
    pub fn generation(&self, slot: SlotIndex) -> Generation {
        self.generations[slot.0 as usize]
    }

    /// Bytes from one slot to the next.
    pub fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Slots in the buffer.
    pub fn slot_count(&self) -> u32 {
        self.generations.len() as u32
    }

    /// Slots that can be taken.
    pub fn free_count(&self) -> u32 {
        self.free
    }

    /// Checks the addresses underneath and the count above them.
    ///
    /// # Errors
    /// What does not agree.
    pub fn check(&self) -> Result<(), String> {
        self.addresses.check()?;
        let free = self.addresses.usage().free_bytes / self.slot_bytes;
        if free != u64::from(self.free) {
            return Err(format!("{} slots counted as free, {free} are", self.free));
        }
        Ok(())
    }
}
