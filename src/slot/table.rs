//! What a receiver knows of every slot.
//!
//! ```text
//! Free -> Reserved(tenant) -> Ready(key) -> Free
//!         Reserved -> Quarantined(tenant) -> Free
//! ```
//!
//! A one-sided write cannot be refused, so a slot whose writer may still be writing is quarantined, and freed when that
//! writer is known to have stopped: by its own word, or by its end. A ready chunk is *held* by the requests and leases
//! that need it; one that nobody holds stays for the next request with the same key until its room is needed or the
//! retention time has passed.

use std::collections::BTreeMap;
use std::time::Instant;

use super::pool::{NoRoom, SlotPool};
use crate::address::{AddressManager, AddressRange};
use crate::ids::{ChunkKey, Generation, GrantId, GroupIndex, SlotIndex};

/// Who may write a slot: this grant, in this generation of the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tenant {
    /// What the slot was granted with.
    pub grant: GrantId,
    /// The slot's generation at that time.
    pub generation: Generation,
}

/// What a slot is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotState {
    /// Nothing; it can be reserved.
    Free,
    /// A writer fills it.
    Reserved(Tenant),
    /// A complete chunk, committed by its writer.
    Ready {
        /// Its name.
        key: ChunkKey,
        /// Whose layers it is of.
        group: GroupIndex,
        /// Requests and leases that need it.
        holds: u32,
    },
    /// Given up, but its writer may still be writing.
    Quarantined(Tenant),
}

/// Slots by state, all of one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// Being written.
    pub reserved: u32,
    /// Committed and held.
    pub ready_held: u32,
    /// Committed, held by nobody: freed when room is needed.
    pub ready_idle: u32,
    /// Given up, writer not known to have stopped.
    pub quarantined: u32,
}

/// The receiver's slots.
#[derive(Debug)]
pub struct SlotTable {
    pool: SlotPool,
    states: Vec<SlotState>,
    /// Ready chunks that can be found by name. A second copy of a key that is ready already is not in here.
    by_key: BTreeMap<ChunkKey, SlotIndex>,
    /// Ready chunks that nobody holds, least recently used first.
    idle: BTreeMap<u64, (SlotIndex, Instant)>,
    idle_order: Vec<u64>,
    idle_bytes: u64,
    next_order: u64,
    counts: SlotCounts,
}

impl SlotTable {
    /// No slots yet, in the addresses of this manager.
    pub fn new(addresses: AddressManager) -> Self {
        Self {
            pool: SlotPool::new(addresses),
            states: Vec::new(),
            by_key: BTreeMap::new(),
            idle: BTreeMap::new(),
            idle_order: Vec::new(),
            idle_bytes: 0,
            next_order: 1,
            counts: SlotCounts::default(),
        }
    }

    /// Reserves a slot of each of these lengths for a grant, in that order, or none; idle ready chunks make room, the
    /// least recently used first.
    ///
    /// # Errors
    /// [`NoRoom`]. Idle chunks are let go only when all of them together could make enough room; that may still not be
    /// one piece.
    pub fn reserve(&mut self, grant: GrantId, lens_bytes: &[u64]) -> Result<Vec<SlotIndex>, NoRoom> {
        let asked_bytes = self.pool.asked_bytes(lens_bytes);
        if asked_bytes > self.available_bytes() {
            return Err(self.pool.no_room(lens_bytes));
        }
        while self.pool.addresses().free_bytes() < asked_bytes && self.evict_oldest() {}
        let slots = loop {
            match self.pool.take(lens_bytes) {
                Ok(slots) => break slots,
                // Enough bytes, in pieces that are too short: the next idle chunk may join two of them.
                Err(_) if self.evict_oldest() => {}
                Err(no_room) => return Err(no_room),
            }
        };
        self.mark_reserved(grant, &slots);
        Ok(slots)
    }

    /// Reserves whole pages for a grant, for a peer that knows the buffer as pages up to `end_bytes`, or none.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    pub fn reserve_pages(
        &mut self,
        grant: GrantId,
        count: usize,
        page_bytes: u64,
        end_bytes: u64,
    ) -> Result<Vec<SlotIndex>, NoRoom> {
        if page_bytes.saturating_mul(count as u64) > self.available_bytes() {
            return Err(self.pool.no_room(&vec![page_bytes; count]));
        }
        let slots = loop {
            match self.pool.take_pages(count, page_bytes, end_bytes) {
                Ok(slots) => break slots,
                Err(_) if self.evict_oldest() => {}
                Err(no_room) => return Err(no_room),
            }
        };
        self.mark_reserved(grant, &slots);
        Ok(slots)
    }

    /// Says how much of a page that `grant` has reserved is the chunk's.
    pub fn set_chunk_bytes(&mut self, slot: SlotIndex, grant: GrantId, chunk_bytes: u64) {
        if matches!(self.state(slot), Some(SlotState::Reserved(tenant)) if tenant.grant == grant) {
            self.pool.set_chunk_bytes(slot, chunk_bytes);
        }
    }

    fn mark_reserved(&mut self, grant: GrantId, slots: &[SlotIndex]) {
        for &slot in slots {
            let at = slot.0 as usize;
            if at >= self.states.len() {
                self.states.resize(at + 1, SlotState::Free);
                self.idle_order.resize(at + 1, 0);
            }
            self.states[at] = SlotState::Reserved(Tenant { grant, generation: self.pool.generation(slot) });
        }
        self.counts.reserved += slots.len() as u32;
    }

    /// A reserved slot now holds a complete chunk, held once by whoever commits it.
    ///
    /// Returns false, and changes nothing, unless `grant` has the slot reserved.
    #[must_use = "false means that the commit is about an earlier tenant"]
    pub fn commit(&mut self, slot: SlotIndex, grant: GrantId, key: ChunkKey, group: GroupIndex) -> bool {
        if !matches!(self.state(slot), Some(SlotState::Reserved(tenant)) if tenant.grant == grant) {
            return false;
        }
        self.by_key.entry(key.clone()).or_insert(slot);
        self.states[slot.0 as usize] = SlotState::Ready { key, group, holds: 1 };
        self.counts.reserved -= 1;
        self.counts.ready_held += 1;
        true
    }

    /// A reserved slot's writer may still be writing, and nobody wants the bytes any more.
    pub fn quarantine(&mut self, slot: SlotIndex, grant: GrantId) {
        if let Some(SlotState::Reserved(tenant)) = self.state(slot)
            && tenant.grant == grant
        {
            self.states[slot.0 as usize] = SlotState::Quarantined(*tenant);
            self.counts.reserved -= 1;
            self.counts.quarantined += 1;
        }
    }

    /// The writer of a reserved or quarantined slot has stopped: the slot is free.
    pub fn writer_stopped(&mut self, slot: SlotIndex, grant: GrantId) {
        match self.state(slot) {
            Some(SlotState::Reserved(tenant)) if tenant.grant == grant => self.counts.reserved -= 1,
            Some(SlotState::Quarantined(tenant)) if tenant.grant == grant => self.counts.quarantined -= 1,
            _ => return,
        }
        self.vacate(slot);
    }

    /// The slot of a ready chunk.
    pub fn find(&self, key: &ChunkKey) -> Option<SlotIndex> {
        self.by_key.get(key).copied()
    }

    /// One more request or lease needs this ready chunk.
    pub fn hold(&mut self, slot: SlotIndex) {
        let Some(SlotState::Ready { holds, .. }) = self.states.get_mut(slot.0 as usize) else {
            debug_assert!(false, "slot {slot} is held but not ready");
            return;
        };
        *holds += 1;
        if *holds == 1 {
            let order = std::mem::take(&mut self.idle_order[slot.0 as usize]);
            self.idle.remove(&order);
            self.counts.ready_idle -= 1;
            self.counts.ready_held += 1;
            self.idle_bytes -= self.pool.taken_bytes(slot);
        }
    }

    /// One request or lease less needs it. The last one leaves it idle, or frees it when another slot holds the key.
    pub fn unhold(&mut self, now: Instant, slot: SlotIndex) {
        let Some(SlotState::Ready { key, holds, .. }) = self.states.get_mut(slot.0 as usize) else {
            debug_assert!(false, "slot {slot} is not ready");
            return;
        };
        debug_assert!(*holds > 0, "slot {slot} is held by nobody");
        *holds = holds.saturating_sub(1);
        if *holds > 0 {
            return;
        }
        self.counts.ready_held -= 1;
        if self.by_key.get(key) == Some(&slot) {
            let order = self.next_order;
            self.next_order += 1;
            self.idle.insert(order, (slot, now));
            self.idle_order[slot.0 as usize] = order;
            self.idle_bytes += self.pool.taken_bytes(slot);
            self.counts.ready_idle += 1;
        } else {
            self.vacate(slot);
        }
    }

    /// Frees a ready chunk that nobody holds. False: it is none.
    pub fn free_idle(&mut self, slot: SlotIndex) -> bool {
        if !matches!(self.state(slot), Some(SlotState::Ready { holds: 0, .. })) {
            return false;
        }
        let order = std::mem::take(&mut self.idle_order[slot.0 as usize]);
        self.idle.remove(&order);
        self.counts.ready_idle -= 1;
        self.idle_bytes -= self.pool.taken_bytes(slot);
        self.vacate(slot);
        true
    }

    /// Lets no ready chunk be found any more: those that nobody holds are freed now, the others with their last hold.
    pub fn forget_ready(&mut self) {
        while self.evict_oldest() {}
        self.by_key.clear();
    }

    /// Frees the idle chunks that were last held before `before`. Returns how many.
    pub fn expire_idle(&mut self, before: Instant) -> u32 {
        let mut expired = 0;
        while self.oldest_idle().is_some_and(|since| since <= before) && self.evict_oldest() {
            expired += 1;
        }
        expired
    }

    /// When the chunk that has been idle longest became idle.
    pub fn oldest_idle(&self) -> Option<Instant> {
        self.idle.first_key_value().map(|(_, &(_, since))| since)
    }

    /// The state of a slot; none outside the buffer.
    pub fn state(&self, slot: SlotIndex) -> Option<&SlotState> {
        self.states.get(slot.0 as usize)
    }

    /// The bytes of a slot that is not free.
    pub fn range(&self, slot: SlotIndex) -> Option<AddressRange> {
        self.pool.range(slot)
    }

    /// The addresses underneath.
    pub fn addresses(&self) -> &AddressManager {
        self.pool.addresses()
    }

    /// Bytes that are free, or hold an idle chunk.
    pub fn available_bytes(&self) -> u64 {
        self.pool.addresses().free_bytes() + self.idle_bytes
    }

    /// What slots of these lengths take together, in bytes.
    pub fn asked_bytes(&self, lens_bytes: &[u64]) -> u64 {
        self.pool.asked_bytes(lens_bytes)
    }

    /// Slots by state.
    pub fn counts(&self) -> SlotCounts {
        self.counts
    }

    /// Checks that states, counts, names and the pool agree.
    ///
    /// # Errors
    /// What does not.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.pool.check()?;
        let mut counts = SlotCounts::default();
        let mut idle_bytes = 0;
        for (index, state) in self.states.iter().enumerate() {
            let slot = SlotIndex(index as u32);
            if (*state == SlotState::Free) != self.pool.range(slot).is_none() {
                return Err(format!("slot {slot} is {state:?} and its bytes are {:?}", self.pool.range(slot)));
            }
            match state {
                SlotState::Free => {}
                SlotState::Reserved(tenant) | SlotState::Quarantined(tenant) => {
                    if tenant.generation != self.pool.generation(slot) {
                        return Err(format!("slot {slot} is written by an earlier generation: {tenant:?}"));
                    }
                    match state {
                        SlotState::Reserved(_) => counts.reserved += 1,
                        _ => counts.quarantined += 1,
                    }
                }
                SlotState::Ready { holds: 0, key, .. } => {
                    counts.ready_idle += 1;
                    idle_bytes += self.pool.taken_bytes(slot);
                    let order = self.idle_order[index];
                    if self.idle.get(&order).map(|&(slot, _)| slot) != Some(slot) {
                        return Err(format!("slot {slot} is idle and not in the order of idle slots"));
                    }
                    if self.by_key.get(key) != Some(&slot) {
                        return Err(format!("slot {slot} is idle and cannot be found as {key}"));
                    }
                }
                SlotState::Ready { .. } => counts.ready_held += 1,
            }
        }
        if counts != self.counts || self.idle.len() as u32 != counts.ready_idle {
            return Err(format!("counted {:?}, found {counts:?}", self.counts));
        }
        if idle_bytes != self.idle_bytes {
            return Err(format!("{} idle bytes counted, {idle_bytes} found", self.idle_bytes));
        }
        for (key, slot) in &self.by_key {
            if !matches!(self.state(*slot), Some(SlotState::Ready { key: held, .. }) if held == key) {
                return Err(format!("{key} is said to be in slot {slot}, which does not hold it"));
            }
        }
        Ok(())
    }

    /// Frees a slot that is already out of the counts of its former state.
    fn vacate(&mut self, slot: SlotIndex) {
        let state = std::mem::replace(&mut self.states[slot.0 as usize], SlotState::Free);
        if let SlotState::Ready { key, .. } = state
            && self.by_key.get(&key) == Some(&slot)
        {
            self.by_key.remove(&key);
        }
        self.pool.give_back(slot);
    }

    /// Lets the chunk go that has been idle longest. False: there is none.
    fn evict_oldest(&mut self) -> bool {
        let Some((_, (slot, _))) = self.idle.pop_first() else { return false };
        self.idle_order[slot.0 as usize] = 0;
        self.counts.ready_idle -= 1;
        self.idle_bytes -= self.pool.taken_bytes(slot);
        self.vacate(slot);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn key(n: u8) -> ChunkKey {
        ChunkKey::new(format!("k{n}")).unwrap()
    }

    const GROUP: GroupIndex = GroupIndex(0);

    fn table(len_bytes: u64) -> SlotTable {
        SlotTable::new(AddressManager::with_slots(len_bytes, 1, 8).unwrap())
    }

    #[test]
    fn a_quarantined_slot_is_never_handed_out_until_its_writer_has_stopped() {
        // Broken in production: a paused sender wakes up and overwrites another request's chunk.
        let mut table = table(16);
        let slots = table.reserve(GrantId(1), &[8, 8]).unwrap();
        table.quarantine(slots[0], GrantId(1));
        table.quarantine(slots[1], GrantId(1));
        assert_eq!(table.reserve(GrantId(2), &[8]).unwrap_err().free_bytes, 0);
        assert!(!table.commit(slots[0], GrantId(1), key(0), GROUP), "given up means given up");
        table.writer_stopped(slots[0], GrantId(9));
        assert_eq!(table.available_bytes(), 0, "another grant has no say");
        table.writer_stopped(slots[0], GrantId(1));
        assert_eq!(table.reserve(GrantId(2), &[8]).unwrap(), vec![slots[0]]);
        table.writer_stopped(slots[0], GrantId(1));
        assert_eq!(table.counts().reserved, 1, "a late word about the former tenant changes nothing");
    }

    #[test]
    fn idle_chunks_make_room_oldest_first_and_held_ones_never() {
        // Broken in production: a chunk is overwritten while a decode worker copies it.
        let mut table = table(16);
        let now = Instant::now();
        let slots = table.reserve(GrantId(1), &[8, 8]).unwrap();
        assert!(table.commit(slots[0], GrantId(1), key(0), GROUP));
        assert!(table.commit(slots[1], GrantId(1), key(1), GROUP));
        table.unhold(now, slots[1]);
        assert!(table.reserve(GrantId(2), &[8, 8]).is_err());
        assert_eq!(table.reserve(GrantId(2), &[8]).unwrap(), vec![slots[1]]);
        assert_eq!((table.find(&key(0)), table.find(&key(1))), (Some(slots[0]), None));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Reserve(Vec<u64>),
        Commit(usize, u8),
        Quarantine(usize),
        Stopped(usize),
        Hold(u8),
        Unhold(usize),
        Expire(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => prop::collection::vec(1u64..9, 0..4).prop_map(Op::Reserve),
            3 => (any::<usize>(), 0u8..6).prop_map(|(pick, key)| Op::Commit(pick, key)),
            1 => any::<usize>().prop_map(Op::Quarantine),
            1 => any::<usize>().prop_map(Op::Stopped),
            2 => (0u8..6).prop_map(Op::Hold),
            3 => any::<usize>().prop_map(Op::Unhold),
            1 => (0u64..40).prop_map(Op::Expire),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_a_naive_model(ops in prop::collection::vec(op(), 0..120)) {
            // Broken in production: slots leak, or one slot has two owners.
            let start = Instant::now();
            let mut table = table(40);
            let mut written: Vec<(SlotIndex, GrantId)> = Vec::new();
            let mut held: Vec<SlotIndex> = Vec::new();
            let mut next_grant = 0;
            for (step, op) in ops.into_iter().enumerate() {
                let now = start + Duration::from_millis(step as u64);
                match op {
                    Op::Reserve(lens) => {
                        next_grant += 1;
                        let grant = GrantId(next_grant);
                        if let Ok(slots) = table.reserve(grant, &lens) {
                            prop_assert_eq!(slots.len(), lens.len());
                            for (slot, len_bytes) in slots.into_iter().zip(lens) {
                                prop_assert_eq!(table.range(slot).unwrap().len_bytes, len_bytes);
                                prop_assert!(!held.contains(&slot), "a held slot was handed out");
                                prop_assert!(!written.iter().any(|(other, _)| *other == slot), "a slot has two writers");
                                written.push((slot, grant));
                            }
                        }
                    }
                    Op::Commit(pick, name) if !written.is_empty() => {
                        let (slot, grant) = written[pick % written.len()];
                        if table.commit(slot, grant, key(name), GROUP) {
                            written.retain(|entry| *entry != (slot, grant));
                            held.push(slot);
                        }
                    }
                    Op::Quarantine(pick) if !written.is_empty() => {
                        let (slot, grant) = written[pick % written.len()];
                        table.quarantine(slot, grant);
                    }
                    Op::Stopped(pick) if !written.is_empty() => {
                        let (slot, grant) = written.swap_remove(pick % written.len());
                        table.writer_stopped(slot, grant);
                    }
                    Op::Hold(name) => {
                        if let Some(slot) = table.find(&key(name)) {
                            table.hold(slot);
                            held.push(slot);
                        }
                    }
                    Op::Unhold(pick) if !held.is_empty() => {
                        let slot = held.swap_remove(pick % held.len());
                        table.unhold(now, slot);
                    }
                    Op::Expire(ms) => {
                        table.expire_idle(start + Duration::from_millis(ms));
                    }
                    _ => {}
                }
                prop_assert_eq!(table.check_invariants(), Ok(()));
                let mut distinct = held.clone();
                distinct.sort_unstable();
                distinct.dedup();
                prop_assert_eq!(table.counts().ready_held as usize, distinct.len());
            }
            for (slot, grant) in written {
                table.writer_stopped(slot, grant);
            }
            for slot in held {
                table.unhold(start, slot);
            }
            prop_assert_eq!(table.available_bytes(), 40);
        }
    }
}
