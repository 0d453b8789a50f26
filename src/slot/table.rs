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

use super::pool::{NotEnoughSlots, SlotPool};
use crate::ids::{ChunkKey, Generation, GrantId, SlotIndex};

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
        /// Its length in bytes: that of a whole chunk, or of a short last one.
        len_bytes: u64,
        /// Requests and leases that need it.
        holds: u32,
    },
    /// Given up, but its writer may still be writing.
    Quarantined(Tenant),
}

/// Slots by state, all of one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// Nothing in them.
    pub free: u32,
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
    next_order: u64,
    counts: SlotCounts,
}

impl SlotTable {
    /// `slot_count` free slots of `slot_bytes` each.
    pub fn new(slot_count: u32, slot_bytes: u64) -> Self {
        Self {
            pool: SlotPool::new(slot_count, slot_bytes),
            states: vec![SlotState::Free; slot_count as usize],
            by_key: BTreeMap::new(),
            idle: BTreeMap::new(),
            idle_order: vec![0; slot_count as usize],
            next_order: 1,
            counts: SlotCounts { free: slot_count, ..SlotCounts::default() },
        }
    }

    /// Reserves `count` slots for a grant, or none; idle ready chunks make room, the least recently used first.
    ///
    /// # Errors
    /// [`NotEnoughSlots`], counting idle ready chunks as free. Nothing has changed then.
    pub fn reserve(&mut self, grant: GrantId, count: u32) -> Result<Vec<SlotIndex>, NotEnoughSlots> {
        let available = self.available();
        if count > available {
            return Err(NotEnoughSlots { asked: count, free: available, slot_count: self.pool.slot_count() });
        }
        while self.pool.free_count() < count {
            let (_, (slot, _)) = self.idle.pop_first().expect("available slots are free or idle");
            self.idle_order[slot.0 as usize] = 0;
            self.counts.ready_idle -= 1;
            self.vacate(slot);
        }
        let slots = self.pool.take(count)?;
        for &slot in &slots {
            let tenant = Tenant { grant, generation: self.pool.generation(slot) };
            self.states[slot.0 as usize] = SlotState::Reserved(tenant);
        }
        self.counts.free -= count;
        self.counts.reserved += count;
        Ok(slots)
    }

    /// A reserved slot now holds a complete chunk, held once by whoever commits it.
    ///
    /// Returns false, and changes nothing, unless `grant` has the slot reserved.
    #[must_use = "false means that the commit is about an earlier tenant"]
    pub fn commit(&mut self, slot: SlotIndex, grant: GrantId, key: ChunkKey, len_bytes: u64) -> bool {
        if !matches!(self.state(slot), Some(SlotState::Reserved(tenant)) if tenant.grant == grant) {
            return false;
        }
        self.by_key.entry(key.clone()).or_insert(slot);
        self.states[slot.0 as usize] = SlotState::Ready { key, len_bytes, holds: 1 };
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
            self.counts.ready_idle += 1;
        } else {
            self.vacate(slot);
        }
    }

    /// Frees the idle chunks that were last held before `before`. Returns how many.
    pub fn expire_idle(&mut self, before: Instant) -> u32 {
        let mut expired = 0;
        while let Some(entry) = self.idle.first_entry()
            && entry.get().1 <= before
        {
            let (slot, _) = entry.remove();
            self.idle_order[slot.0 as usize] = 0;
            self.counts.ready_idle -= 1;
            self.vacate(slot);
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

    /// Where a slot starts, in bytes from the start of the buffer.
    pub fn offset_bytes(&self, slot: SlotIndex) -> u64 {
        self.pool.offset_bytes(slot)
    }

    /// Slots in the buffer.
    pub fn slot_count(&self) -> u32 {
        self.pool.slot_count()
    }

    /// Slots that can be reserved at once: free, or ready and idle.
    pub fn available(&self) -> u32 {
        self.pool.free_count() + self.counts.ready_idle
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
        for (index, state) in self.states.iter().enumerate() {
            let slot = SlotIndex(index as u32);
            match state {
                SlotState::Free => counts.free += 1,
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
        if counts != self.counts || counts.free != self.pool.free_count() || self.idle.len() as u32 != counts.ready_idle
        {
            return Err(format!("counted {:?}, found {counts:?}", self.counts));
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
        self.counts.free += 1;
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

    #[test]
    fn a_quarantined_slot_is_never_handed_out_until_its_writer_has_stopped() {
        // Broken in production: a paused sender wakes up and overwrites another request's chunk.
        let mut table = SlotTable::new(2, 8);
        let slots = table.reserve(GrantId(1), 2).unwrap();
        table.quarantine(slots[0], GrantId(1));
        table.quarantine(slots[1], GrantId(1));
        assert_eq!(table.reserve(GrantId(2), 1).unwrap_err().free, 0);
        assert!(!table.commit(slots[0], GrantId(1), key(0), 8), "given up means given up");
        table.writer_stopped(slots[0], GrantId(9));
        assert_eq!(table.available(), 0, "another grant has no say");
        table.writer_stopped(slots[0], GrantId(1));
        assert_eq!(table.reserve(GrantId(2), 1).unwrap(), vec![slots[0]]);
        table.writer_stopped(slots[0], GrantId(1));
        assert_eq!(table.counts().reserved, 1, "a late word about the former tenant changes nothing");
    }

    #[test]
    fn idle_chunks_make_room_oldest_first_and_held_ones_never() {
        // Broken in production: a chunk is overwritten while a decode worker copies it.
        let mut table = SlotTable::new(2, 8);
        let now = Instant::now();
        let slots = table.reserve(GrantId(1), 2).unwrap();
        assert!(table.commit(slots[0], GrantId(1), key(0), 8));
        assert!(table.commit(slots[1], GrantId(1), key(1), 8));
        table.unhold(now, slots[1]);
        assert!(table.reserve(GrantId(2), 2).is_err());
        assert_eq!(table.reserve(GrantId(2), 1).unwrap(), vec![slots[1]]);
        assert_eq!((table.find(&key(0)), table.find(&key(1))), (Some(slots[0]), None));
    }

    #[derive(Debug, Clone)]
    enum Op {
        Reserve(u32),
        Commit(usize, u8),
        Quarantine(usize),
        Stopped(usize),
        Hold(u8),
        Unhold(usize),
        Expire(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            3 => (0u32..4).prop_map(Op::Reserve),
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
            let mut table = SlotTable::new(5, 8);
            let mut written: Vec<(SlotIndex, GrantId)> = Vec::new();
            let mut held: Vec<SlotIndex> = Vec::new();
            let mut next_grant = 0;
            for (step, op) in ops.into_iter().enumerate() {
                let now = start + Duration::from_millis(step as u64);
                match op {
                    Op::Reserve(count) => {
                        next_grant += 1;
                        let grant = GrantId(next_grant);
                        if let Ok(slots) = table.reserve(grant, count) {
                            prop_assert_eq!(slots.len() as u32, count);
                            for slot in slots {
                                prop_assert!(!held.contains(&slot), "a held slot was handed out");
                                prop_assert!(!written.iter().any(|(other, _)| *other == slot), "a slot has two writers");
                                written.push((slot, grant));
                            }
                        }
                    }
                    Op::Commit(pick, name) if !written.is_empty() => {
                        let (slot, grant) = written[pick % written.len()];
                        if table.commit(slot, grant, key(name), 8) {
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
            prop_assert_eq!(table.available(), 5);
        }
    }
}
