//! What a node knows of every slot.
//!
//! ```text
//! Free -> Staged -> Free                           outgoing: filled by our own worker, and sent
//!         Staged -> Ready(key) -> Free             parked: filled by our own worker, and kept for a receiver that asks
//! Free -> Reserved(grant) -> Ready(key) -> Free    incoming: granted to a peer, committed by it
//!         Reserved -> Quarantined(grant) -> Free
//! ```
//!
//! A one-sided write cannot be refused, so a slot whose writer may still be writing is quarantined, and freed when that
//! writer is known to have stopped: by its own word, or by its end. A ready chunk is *held* by the requests and leases
//! that need it; one that nobody holds stays for the next request with the same key until its room is needed or the
//! retention time has passed. A chunk that is parked is held as well, and counts as the outgoing half's.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::idle::IdleSlots;
use super::pool::{NoRoom, SlotPool, Taken};
use crate::address::{AddressManager, AddressRange};
use crate::ids::{ChunkKey, GrantId, GroupIndex, SlotIndex};

/// What a slot is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotState {
    /// Nothing; it can be staged or reserved.
    Free,
    /// Our own worker fills it, or it is being sent.
    Staged,
    /// A peer fills it.
    Reserved(GrantId),
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
    Quarantined(GrantId),
}

/// Slots by state, all of one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// Being filled by our own engine, or sent.
    pub staged: u32,
    /// Being written.
    pub reserved: u32,
    /// Committed and held.
    pub ready_pinned: u32,
    /// Committed, held by nobody: freed when room is needed.
    pub ready_idle: u32,
    /// Given up, writer not known to have stopped.
    pub quarantined: u32,
    /// Of `ready_pinned`: parked for whoever registers for them.
    pub parked: u32,
}

/// Where one buffer serves both halves, one part in so many of it is the outgoing half's in any case. What is staged is sent, and
/// freed, whatever else there is. A reservation is freed when its writer has found room to stage, elsewhere: two
/// nodes that send to each other would wait for each other if reservations did not leave that part, and in whole slots.
const SURE_TO_STAGE: u64 = 2;
/// Where chunks are parked as well, one part in so many of that is for them, and no more; the rest can be staged in any case. A
/// parked chunk may wait for room elsewhere, and what is granted here may wait for room to stage elsewhere: if the two shared
/// their part, two nodes could wait for each other.
const SURE_TO_PARK: u64 = 2;
/// And one part in so many can be reserved in any case.
const SURE_TO_RESERVE: u64 = 4;

/// A node's slots.
#[derive(Debug)]
pub struct SlotTable {
    pool: SlotPool,
    /// Whether slots are both staged and reserved, so that neither may take everything.
    is_shared: bool,
    /// Whether slots are parked as well.
    parks: bool,
    /// Staged to be sent.
    staged_bytes: u64,
    /// Of the staged slots: whole ones of the grid, which they are again when they are free.
    staged_whole: usize,
    /// Ready chunks that are parked, and by how many leases each; and slots that are staged to become such, by one.
    parked: BTreeMap<SlotIndex, u32>,
    parked_bytes: u64,
    /// Of the parked slots: as in `staged_whole`.
    parked_whole: usize,
    states: Vec<SlotState>,
    /// Ready chunks that can be found by name. A second copy of a key that is ready already is not in here.
    by_key: BTreeMap<ChunkKey, SlotIndex>,
    idle: IdleSlots,
    counts: SlotCounts,
    version: u64,
}

impl SlotTable {
    /// No slots yet, in the addresses of this manager. With `is_shared`, slots are both staged and reserved; with `parks`, some are
    /// parked.
    pub fn new(addresses: AddressManager, is_shared: bool, parks: bool) -> Self {
        Self {
            pool: SlotPool::new(addresses),
            is_shared,
            parks,
            staged_bytes: 0,
            staged_whole: 0,
            parked: BTreeMap::new(),
            parked_bytes: 0,
            parked_whole: 0,
            states: Vec::new(),
            by_key: BTreeMap::new(),
            idle: IdleSlots::default(),
            counts: SlotCounts::default(),
            version: 0,
        }
    }

    /// Whether slots are both staged and reserved.
    pub const fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Most bytes of a buffer of this length that can be reserved and held.
    pub fn most_reserved_bytes(&self, len_bytes: u64) -> u64 {
        len_bytes - self.sure_slots(len_bytes) * self.addresses().slot_bytes()
    }

    /// Most bytes of a buffer of this length that can be staged at once.
    pub fn most_staged_bytes(&self, len_bytes: u64) -> u64 {
        if self.is_shared { self.sure_to_stage(len_bytes) * self.addresses().slot_bytes() } else { len_bytes }
    }

    /// Most bytes of a buffer of this length that can be parked at once.
    pub fn most_parked_bytes(&self, len_bytes: u64) -> u64 {
        let parked = self.sure_slots(len_bytes) - self.sure_to_stage(len_bytes);
        if self.is_shared { parked * self.addresses().slot_bytes() } else { len_bytes }
    }

    /// How many whole slots can be staged to be sent, whatever is parked and reserved.
    fn sure_to_stage(&self, len_bytes: u64) -> u64 {
        let sure = self.sure_slots(len_bytes);
        if self.parks { sure - sure / SURE_TO_PARK } else { sure }
    }

    /// How many whole slots are left to stage and to park, whatever is reserved.
    fn sure_slots(&self, len_bytes: u64) -> u64 {
        let slots = len_bytes.checked_div(self.addresses().slot_bytes()).unwrap_or(0);
        if self.is_shared { slots / SURE_TO_STAGE } else { 0 }
    }

    /// Stages a slot of each of these lengths, in that order, or none. Idle ready chunks make room as for
    /// [`reserve`](Self::reserve).
    ///
    /// # Errors
    /// As there.
    pub fn stage(&mut self, lens_bytes: &[u64]) -> Result<Vec<SlotIndex>, NoRoom> {
        let len_bytes = self.addresses().len_bytes();
        let most_bytes = if self.is_shared { len_bytes - len_bytes / SURE_TO_RESERVE } else { len_bytes };
        let asked_bytes = self.pool.asked_bytes(lens_bytes);
        let staged_bytes = self.staged_bytes.saturating_add(asked_bytes);
        if asked_bytes > self.available_bytes() || staged_bytes.saturating_add(self.parked_bytes) > most_bytes {
            return Err(self.pool.no_room(lens_bytes));
        }
        let taken = self.pool.take_or_free(lens_bytes, u64::MAX, 0, self.idle.iter())?;
        let slots = self.enter(taken, &SlotState::Staged);
        self.counts.staged += slots.len() as u32;
        self.staged_bytes = staged_bytes;
        self.staged_whole += slots.iter().filter(|slot| self.pool.is_whole(**slot)).count();
        Ok(slots)
    }

    /// As [`stage`](Self::stage), for what will be parked.
    ///
    /// # Errors
    /// As there.
    pub fn stage_to_park(&mut self, lens_bytes: &[u64]) -> Result<Vec<SlotIndex>, NoRoom> {
        let len_bytes = self.addresses().len_bytes();
        let asked_bytes = self.pool.asked_bytes(lens_bytes);
        let parked_bytes = self.parked_bytes.saturating_add(asked_bytes);
        if asked_bytes > self.available_bytes() || parked_bytes > self.most_parked_bytes(len_bytes) {
            return Err(self.pool.no_room(lens_bytes));
        }
        let sure = if self.is_shared { self.sure_to_stage(len_bytes) as usize } else { 0 };
        let slots_left = sure.saturating_sub(self.staged_whole);
        let taken = self.pool.take_or_free(lens_bytes, u64::MAX, slots_left, self.idle.iter())?;
        let slots = self.enter(taken, &SlotState::Staged);
        self.counts.staged += slots.len() as u32;
        slots.iter().for_each(|&slot| self.note_parked(slot));
        Ok(slots)
    }

    /// A staged slot is not needed any more.
    pub fn unstage(&mut self, slot: SlotIndex) {
        if !matches!(self.state(slot), Some(SlotState::Staged)) {
            debug_assert!(false, "slot {slot} is not staged");
            return;
        }
        self.counts.staged -= 1;
        if self.parked.contains_key(&slot) {
            self.note_unparked(slot);
        } else {
            self.staged_bytes -= self.pool.taken_bytes(slot);
            self.staged_whole -= usize::from(self.pool.is_whole(slot));
        }
        self.vacate(slot);
    }

    /// A slot that was staged to be parked now holds a complete chunk, parked once by whoever says so.
    pub fn publish(&mut self, slot: SlotIndex, key: ChunkKey, group: GroupIndex) {
        if !matches!(self.state(slot), Some(SlotState::Staged)) || !self.parked.contains_key(&slot) {
            debug_assert!(false, "slot {slot} is not staged to be parked");
            return;
        }
        self.by_key.entry(key.clone()).or_insert(slot);
        self.states[slot.0 as usize] = SlotState::Ready { key, group, holds: 1 };
        self.counts.staged -= 1;
        self.counts.ready_pinned += 1;
        self.counts.parked += 1;
        self.version += 1;
    }

    /// Parks a ready chunk once more, or for the first time: it is held, and counts as the outgoing half's. False, and nothing has
    /// changed: as much as may be is parked.
    #[must_use = "false means that it is not held"]
    pub fn park(&mut self, slot: SlotIndex) -> bool {
        let most_bytes = self.most_parked_bytes(self.addresses().len_bytes());
        if !self.parked.contains_key(&slot) {
            if self.parked_bytes + self.pool.taken_bytes(slot) > most_bytes {
                return false;
            }
            self.counts.parked += 1;
        }
        self.pin(slot);
        self.note_parked(slot);
        true
    }

    /// One lease on a parked chunk has ended.
    pub fn unpark(&mut self, now: Instant, slot: SlotIndex) {
        if !self.parked.contains_key(&slot) {
            debug_assert!(false, "slot {slot} is not parked");
            return;
        }
        self.note_unparked(slot);
        self.counts.parked -= u32::from(!self.parked.contains_key(&slot));
        // What counts as the incoming half's may be another by now.
        self.version += 1;
        self.unpin(now, slot);
    }

    fn note_parked(&mut self, slot: SlotIndex) {
        let leases = self.parked.entry(slot).or_insert(0);
        *leases += 1;
        if *leases == 1 {
            self.parked_bytes += self.pool.taken_bytes(slot);
            self.parked_whole += usize::from(self.pool.is_whole(slot));
        }
    }

    fn note_unparked(&mut self, slot: SlotIndex) {
        let Some(leases) = self.parked.get_mut(&slot) else { return };
        *leases -= 1;
        if *leases == 0 {
            self.parked.remove(&slot);
            self.parked_bytes -= self.pool.taken_bytes(slot);
            self.parked_whole -= usize::from(self.pool.is_whole(slot));
        }
    }

    /// Reserves a slot of each of these lengths for a grant, in that order, or none, in bytes before `end_bytes`. Idle ready
    /// chunks make room, but for those that `keep` names: as few as will do, the least recently used first, and only those
    /// in whose bytes something is reserved (or without which it finds no place).
    ///
    /// # Errors
    /// [`NoRoom`]: all of them together would not make enough room. Nothing has changed then.
    pub fn reserve(
        &mut self,
        grant: GrantId,
        lens_bytes: &[u64],
        keep: &BTreeSet<SlotIndex>,
        end_bytes: u64,
    ) -> Result<Vec<SlotIndex>, NoRoom> {
        if !self.can_reserve(self.pool.asked_bytes(lens_bytes)) {
            return Err(self.pool.no_room(lens_bytes));
        }
        let spare = || self.idle.iter().filter(|slot| !keep.contains(slot));
        let slots_left = self.slots_left();
        let mut taken = self.pool.take_or_free(lens_bytes, end_bytes, slots_left, spare());
        // Odd lengths may leave no whole slot even if there is nothing else. They are not to wait for ever.
        if taken.is_err() && slots_left > 0 && self.incoming_bytes() + self.staged_bytes + self.parked_bytes == 0 {
            taken = self.pool.take_or_free(lens_bytes, end_bytes, 0, spare());
        }
        let taken = taken?;
        Ok(self.mark_reserved(grant, taken))
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
        keep: &BTreeSet<SlotIndex>,
        end_bytes: u64,
    ) -> Result<Vec<SlotIndex>, NoRoom> {
        if !self.can_reserve(page_bytes.saturating_mul(count as u64)) {
            return Err(self.pool.no_room(&vec![page_bytes; count]));
        }
        let spare = self.idle.iter().filter(|slot| !keep.contains(slot));
        let taken = self.pool.take_pages_or_free(count, page_bytes, end_bytes, self.slots_left(), spare)?;
        Ok(self.mark_reserved(grant, taken))
    }

    /// Says how much of a page that `grant` has reserved is the chunk's.
    pub fn set_chunk_bytes(&mut self, slot: SlotIndex, grant: GrantId, chunk_bytes: u64) {
        if matches!(self.state(slot), Some(SlotState::Reserved(owner)) if *owner == grant) {
            self.pool.set_chunk_bytes(slot, chunk_bytes);
        }
    }

    /// Whether there may be room for so many bytes. What others hold of a peer's chunks counts as taken by peers.
    fn can_reserve(&self, asked_bytes: u64) -> bool {
        let most_bytes = self.most_reserved_bytes(self.addresses().len_bytes());
        asked_bytes <= self.available_bytes() && self.incoming_bytes().saturating_add(asked_bytes) <= most_bytes
    }

    /// What is reserved, quarantined, and held without being parked. The buffer may grow while it is looked at.
    fn incoming_bytes(&self) -> u64 {
        let others = self.available_bytes() + self.staged_bytes + self.parked_bytes;
        self.addresses().len_bytes().saturating_sub(others)
    }

    /// How many whole slots a reservation leaves free, for what can be staged in any case.
    fn slots_left(&self) -> usize {
        let sure = self.sure_slots(self.addresses().len_bytes());
        // What is staged in pieces of a slot, or off the grid, may leave no whole one when it is sent.
        (sure as usize).saturating_sub(self.staged_whole + self.parked_whole)
    }

    fn mark_reserved(&mut self, grant: GrantId, taken: Taken) -> Vec<SlotIndex> {
        let slots = self.enter(taken, &SlotState::Reserved(grant));
        self.counts.reserved += slots.len() as u32;
        slots
    }

    /// Slots that were taken enter this state.
    fn enter(&mut self, taken: Taken, state: &SlotState) -> Vec<SlotIndex> {
        let Taken { slots, freed } = taken;
        // First, because a slot may get the name of one that was freed.
        for slot in freed {
            self.idle.remove(slot);
            self.counts.ready_idle -= 1;
            self.forget(slot);
        }
        for &slot in &slots {
            let at = slot.0 as usize;
            if at >= self.states.len() {
                self.states.resize(at + 1, SlotState::Free);
            }
            self.states[at] = state.clone();
        }
        slots
    }

    /// A reserved slot now holds a complete chunk, held once by whoever commits it.
    ///
    /// Returns false, and changes nothing, unless `grant` has the slot reserved.
    #[must_use = "false means that the commit is about an earlier tenant"]
    pub fn commit(&mut self, slot: SlotIndex, grant: GrantId, key: ChunkKey, group: GroupIndex) -> bool {
        if !matches!(self.state(slot), Some(SlotState::Reserved(owner)) if *owner == grant) {
            return false;
        }
        self.by_key.entry(key.clone()).or_insert(slot);
        self.states[slot.0 as usize] = SlotState::Ready { key, group, holds: 1 };
        self.counts.reserved -= 1;
        self.counts.ready_pinned += 1;
        self.version += 1;
        true
    }

    /// A reserved slot's writer may still be writing, and nobody wants the bytes any more.
    pub fn quarantine(&mut self, slot: SlotIndex, grant: GrantId) {
        if matches!(self.state(slot), Some(SlotState::Reserved(owner)) if *owner == grant) {
            self.states[slot.0 as usize] = SlotState::Quarantined(grant);
            self.counts.reserved -= 1;
            self.counts.quarantined += 1;
        }
    }

    /// Frees a reserved or quarantined slot of this grant: its writer has stopped, or has never begun.
    pub fn free_granted(&mut self, slot: SlotIndex, grant: GrantId) {
        match self.state(slot) {
            Some(SlotState::Reserved(owner)) if *owner == grant => self.counts.reserved -= 1,
            Some(SlotState::Quarantined(owner)) if *owner == grant => self.counts.quarantined -= 1,
            _ => return,
        }
        self.vacate(slot);
    }

    /// The slot of a ready chunk.
    pub fn find(&self, key: &ChunkKey) -> Option<SlotIndex> {
        self.by_key.get(key).copied()
    }

    /// One more request or lease needs this ready chunk.
    pub fn pin(&mut self, slot: SlotIndex) {
        let Some(SlotState::Ready { holds, .. }) = self.states.get_mut(slot.0 as usize) else {
            debug_assert!(false, "slot {slot} is held but not ready");
            return;
        };
        *holds += 1;
        if *holds == 1 {
            self.idle.remove(slot);
            self.counts.ready_idle -= 1;
            self.counts.ready_pinned += 1;
        }
    }

    /// One request or lease less needs it. The last one leaves it idle, or frees it when another slot holds the key.
    pub fn unpin(&mut self, now: Instant, slot: SlotIndex) {
        let Some(SlotState::Ready { key, holds, .. }) = self.states.get_mut(slot.0 as usize) else {
            debug_assert!(false, "slot {slot} is not ready");
            return;
        };
        debug_assert!(*holds > 0, "slot {slot} is held by nobody");
        *holds = holds.saturating_sub(1);
        if *holds > 0 {
            return;
        }
        self.counts.ready_pinned -= 1;
        if self.by_key.get(key) == Some(&slot) {
            self.idle.insert(now, slot, self.pool.taken_bytes(slot));
            self.counts.ready_idle += 1;
            self.version += 1;
        } else {
            self.vacate(slot);
        }
    }

    /// Frees a ready chunk that nobody holds. False: it is none.
    pub fn free_idle(&mut self, slot: SlotIndex) -> bool {
        if !matches!(self.state(slot), Some(SlotState::Ready { holds: 0, .. })) {
            return false;
        }
        self.idle.remove(slot);
        self.counts.ready_idle -= 1;
        self.vacate(slot);
        true
    }

    /// Lets no ready chunk be found any more: those that nobody holds are freed now, the others with their last hold.
    pub fn forget_ready(&mut self) {
        while let Some((slot, _)) = self.idle.first()
            && self.free_idle(slot)
        {}
        self.by_key.clear();
    }

    /// Frees the idle chunks that were last held before `before`. Returns how many.
    pub fn expire_idle(&mut self, before: Instant) -> u32 {
        let mut expired = 0;
        while let Some((slot, _)) = self.idle.first().filter(|(_, since)| *since <= before)
            && self.free_idle(slot)
        {
            expired += 1;
        }
        expired
    }

    /// When the chunk that has been idle longest became idle.
    pub fn oldest_idle(&self) -> Option<Instant> {
        self.idle.first().map(|(_, since)| since)
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
        self.pool.addresses().free_bytes() + self.idle.bytes()
    }

    /// Another number than before whenever slots were freed, or chunks became ready or idle, since: a reservation that was
    /// refused is refused again while this, and the length of the buffer, are the same.
    pub fn version(&self) -> u64 {
        self.version
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
        let is_ready = |slot: &&SlotIndex| matches!(self.state(**slot), Some(SlotState::Ready { .. }));
        let parked = self.parked.keys().filter(is_ready).count() as u32;
        let mut counts = SlotCounts { parked, ..SlotCounts::default() };
        let (mut idle_bytes, mut staged_bytes) = (0, 0);
        for (index, state) in self.states.iter().enumerate() {
            let slot = SlotIndex(index as u32);
            if (*state == SlotState::Free) != self.pool.range(slot).is_none() {
                return Err(format!("slot {slot} is {state:?} and its bytes are {:?}", self.pool.range(slot)));
            }
            match state {
                SlotState::Free => {}
                SlotState::Staged => {
                    counts.staged += 1;
                    let parked = self.parked.contains_key(&slot);
                    staged_bytes += if parked { 0 } else { self.pool.taken_bytes(slot) };
                }
                SlotState::Reserved(_) => counts.reserved += 1,
                SlotState::Quarantined(_) => counts.quarantined += 1,
                SlotState::Ready { holds: 0, key, .. } => {
                    counts.ready_idle += 1;
                    idle_bytes += self.pool.taken_bytes(slot);
                    if !self.idle.contains(slot) {
                        return Err(format!("slot {slot} is idle and not in the order of idle slots"));
                    }
                    if self.by_key.get(key) != Some(&slot) {
                        return Err(format!("slot {slot} is idle and cannot be found as {key}"));
                    }
                }
                SlotState::Ready { .. } => counts.ready_pinned += 1,
            }
        }
        if counts != self.counts || self.idle.len() as u32 != counts.ready_idle {
            return Err(format!("counted {:?}, found {counts:?}", self.counts));
        }
        if (idle_bytes, staged_bytes) != (self.idle.bytes(), self.staged_bytes) {
            let (idle, staged) = (self.idle.bytes(), self.staged_bytes);
            return Err(format!(
                "{idle} idle and {staged} staged bytes counted, {idle_bytes} and {staged_bytes} found"
            ));
        }
        let parked_bytes: u64 = self.parked.keys().map(|slot| self.pool.taken_bytes(*slot)).sum();
        let held_more = |(slot, leases): (&SlotIndex, &u32)| match self.state(*slot) {
            Some(SlotState::Ready { holds, .. }) => holds >= leases,
            Some(SlotState::Staged) => *leases == 1,
            _ => false,
        };
        if parked_bytes != self.parked_bytes || !self.parked.iter().all(held_more) {
            return Err(format!("{} parked bytes counted, {parked_bytes} found: {:?}", self.parked_bytes, self.parked));
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
        self.forget(slot);
        self.pool.give_back(slot);
    }

    /// A slot is out of the counts of its former state: it holds nothing any more.
    fn forget(&mut self, slot: SlotIndex) {
        self.version += 1;
        let state = std::mem::replace(&mut self.states[slot.0 as usize], SlotState::Free);
        if let SlotState::Ready { key, .. } = state
            && self.by_key.get(&key) == Some(&slot)
        {
            self.by_key.remove(&key);
        }
    }
}
