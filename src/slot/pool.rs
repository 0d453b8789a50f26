//! Slots as a pool: all or nothing.

use crate::address::{AddressManager, AddressRange, MadeRoom, OwnedRange};
use crate::ids::SlotIndex;

/// Too little room for a request. Nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{slots} slots of {asked_bytes} bytes together are needed, {free_bytes} of {len_bytes} bytes are free, not all in one piece"
)]
pub struct NoRoom {
    /// Slots asked for.
    pub slots: usize,
    /// Bytes that they need together.
    pub asked_bytes: u64,
    /// Bytes free, in pieces of any length.
    pub free_bytes: u64,
    /// Bytes in the buffer.
    pub len_bytes: u64,
}

/// Slots that were taken, and the slots that were freed for them. A freed slot's name may be a taken slot's name already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// In the order in which they were asked for.
    pub slots: Vec<SlotIndex>,
    /// In the order in which they could be spared.
    pub freed: Vec<SlotIndex>,
}

/// The slots of one pd_buffer: ranges of its addresses, of the lengths that were asked for.
///
/// A slot's index is a name for as long as it is taken. It is reused for other bytes. Dropping
/// the pool gives all of them back.
#[derive(Debug)]
pub struct SlotPool {
    addresses: AddressManager,
    slots: Vec<Slot>,
    /// Indexes that name nothing now.
    vacant: Vec<SlotIndex>,
}

#[derive(Debug)]
struct Slot {
    /// Its bytes while it is taken.
    range: Option<OwnedRange>,
    /// How much of them, from the start, is the chunk's: a page may be longer.
    chunk_bytes: u64,
}

impl SlotPool {
    /// No slots yet, in the addresses of this manager. It may grow meanwhile, and others may take from it.
    pub fn new(addresses: AddressManager) -> Self {
        Self { addresses, slots: Vec::new(), vacant: Vec::new() }
    }

    /// Takes a slot of each of these lengths, in that order, or none, in bytes before `end_bytes`. Where there is no room, gives
    /// slots of `spare` back, which are taken and whose owner can do without them: as few as will do, the first before the
    /// others, and none in vain. There is room where `slots_left` slots of the grid are free afterwards.
    ///
    /// # Errors
    /// [`NoRoom`]: all of them are too few, or what was found ends beyond `end_bytes`. Nothing was given back.
    ///
    /// # Panics
    /// In debug builds, when a length is 0: a chunk has at least one byte.
    pub fn take_or_free(
        &mut self,
        lens_bytes: &[u64],
        end_bytes: u64,
        slots_left: usize,
        spare: impl Iterator<Item = SlotIndex>,
    ) -> Result<Taken, NoRoom> {
        debug_assert!(!lens_bytes.contains(&0), "a slot of 0 bytes");
        let (mut seen, addresses) = (Vec::new(), self.addresses.clone());
        let made = addresses.allocate_each_or_free(lens_bytes, end_bytes, slots_left, self.ranges_of(spare, &mut seen));
        made.map(|made| self.taken(made, &seen)).map_err(|_| self.no_room(lens_bytes))
    }

    /// As [`take_or_free`](Self::take_or_free), `count` whole pages at multiples of their length.
    ///
    /// # Errors
    /// As [`take_or_free`](Self::take_or_free).
    pub fn take_pages_or_free(
        &mut self,
        count: usize,
        page_bytes: u64,
        end_bytes: u64,
        slots_left: usize,
        spare: impl Iterator<Item = SlotIndex>,
    ) -> Result<Taken, NoRoom> {
        let (mut seen, addresses) = (Vec::new(), self.addresses.clone());
        // A slot that begins behind the last page that the peer knows cannot help it.
        let can_help =
            |slot: &SlotIndex| slots_left > 0 || self.range(*slot).is_some_and(|range| range.start < end_bytes);
        let ranges = self.ranges_of(spare.filter(can_help), &mut seen);
        let made = addresses.allocate_slots_below_or_free(count, end_bytes, slots_left, ranges);
        made.map(|made| self.taken(made, &seen)).map_err(|_| self.no_room(&vec![page_bytes; count]))
    }

    /// All bytes of these slots; notes which slots they are of.
    fn ranges_of<'a>(
        &'a self,
        slots: impl Iterator<Item = SlotIndex> + 'a,
        seen: &'a mut Vec<SlotIndex>,
    ) -> impl Iterator<Item = AddressRange> + 'a {
        slots.filter_map(move |slot| {
            let range = self.taken_range(slot)?;
            seen.push(slot);
            Some(range)
        })
    }

    fn taken(&mut self, made: MadeRoom, spare: &[SlotIndex]) -> Taken {
        let freed: Vec<SlotIndex> = made.given_back.into_iter().map(|position| spare[position]).collect();
        for slot in &freed {
            // The addresses have it back already.
            self.slots[slot.0 as usize].range.take().map(OwnedRange::disown);
            self.vacant.push(*slot);
        }
        Taken { slots: made.ranges.into_iter().map(|range| self.name(range)).collect(), freed }
    }

    /// Says how much of a taken page is the chunk's.
    pub fn set_chunk_bytes(&mut self, slot: SlotIndex, chunk_bytes: u64) {
        let Some(Slot { range: Some(range), chunk_bytes: of_chunk, .. }) = self.slots.get_mut(slot.0 as usize) else {
            debug_assert!(false, "slot {slot} is free");
            return;
        };
        let AddressRange { len_bytes, .. } = range.range();
        debug_assert!(chunk_bytes <= len_bytes, "{chunk_bytes} bytes in {range:?}");
        *of_chunk = chunk_bytes.min(len_bytes);
    }

    /// Gives a taken slot back.
    ///
    /// # Panics
    /// In debug builds, when the slot is free already: its owner has lost count.
    pub fn give_back(&mut self, slot: SlotIndex) {
        let range = self.slots.get_mut(slot.0 as usize).and_then(|slot| slot.range.take());
        debug_assert!(range.is_some(), "slot {slot} is free already");
        if range.is_some() {
            self.vacant.push(slot);
        }
    }

    /// The bytes of the chunk in a taken slot.
    pub fn range(&self, slot: SlotIndex) -> Option<AddressRange> {
        let len_bytes = self.slots.get(slot.0 as usize)?.chunk_bytes;
        self.taken_range(slot).map(|range| AddressRange { len_bytes, ..range })
    }

    /// All bytes of a taken slot.
    fn taken_range(&self, slot: SlotIndex) -> Option<AddressRange> {
        self.slots.get(slot.0 as usize)?.range.as_ref().map(OwnedRange::range)
    }

    /// What a taken slot takes, in bytes, rounding up to the alignment included.
    pub fn taken_bytes(&self, slot: SlotIndex) -> u64 {
        self.taken_range(slot).map_or(0, |range| self.asked_bytes(&[range.len_bytes]))
    }

    /// Whether a taken slot is a whole one of the grid.
    pub fn is_whole(&self, slot: SlotIndex) -> bool {
        let slot_bytes = self.addresses.slot_bytes();
        self.taken_range(slot)
            .is_some_and(|range| range.len_bytes == slot_bytes && range.start.is_multiple_of(slot_bytes))
    }

    /// Slots taken.
    pub fn taken_count(&self) -> usize {
        self.slots.len() - self.vacant.len()
    }

    /// The addresses underneath.
    pub fn addresses(&self) -> &AddressManager {
        &self.addresses
    }

    /// What did not fit, and how much is free.
    pub fn no_room(&self, lens_bytes: &[u64]) -> NoRoom {
        NoRoom {
            slots: lens_bytes.len(),
            asked_bytes: self.asked_bytes(lens_bytes),
            free_bytes: self.addresses.free_bytes(),
            len_bytes: self.addresses.len_bytes(),
        }
    }

    /// What slots of these lengths take together, in bytes, rounding up to the alignment included.
    pub fn asked_bytes(&self, lens_bytes: &[u64]) -> u64 {
        let alignment = self.addresses.alignment();
        let taken = |len: &u64| len.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
        lens_bytes.iter().map(taken).fold(0, u64::saturating_add)
    }

    /// Checks the addresses underneath and the names above them.
    ///
    /// # Errors
    /// What does not agree.
    pub fn check(&self) -> Result<(), String> {
        self.addresses.check()?;
        let mut ranges: Vec<AddressRange> =
            self.slots.iter().filter_map(|slot| slot.range.as_ref()).map(OwnedRange::range).collect();
        if ranges.len() != self.taken_count() {
            return Err(format!("{} slots have bytes, {} are counted as taken", ranges.len(), self.taken_count()));
        }
        ranges.sort_unstable();
        if let Some(pair) = ranges.windows(2).find(|pair| pair[0].end() > pair[1].start) {
            return Err(format!("two slots share bytes: {pair:?}"));
        }
        let taken: u64 = ranges.iter().map(|range| range.len_bytes).sum();
        let used = self.addresses.used_bytes();
        if taken > used {
            return Err(format!("slots have {taken} bytes, of which the addresses count {used} as used"));
        }
        Ok(())
    }

    fn name(&mut self, range: AddressRange) -> SlotIndex {
        let slot = self.vacant.pop().unwrap_or_else(|| {
            let index = u32::try_from(self.slots.len()).expect("fewer than 2^32 chunks fit any buffer");
            self.slots.push(Slot { range: None, chunk_bytes: 0 });
            SlotIndex(index)
        });
        self.slots[slot.0 as usize] = Slot { chunk_bytes: range.len_bytes, range: Some(self.addresses.own(range)) };
        slot
    }
}
