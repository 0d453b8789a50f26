//! The receiver's slots against a naive model.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use pd_backend::address::{AddressManager, AddressRange};
use pd_backend::ids::{ChunkKey, GrantId, GroupIndex, SlotIndex};
use pd_backend::slot::{NoRoom, SlotState, SlotTable};
use proptest::prelude::*;

const GROUP: GroupIndex = GroupIndex(0);
const SLOT_BYTES: u64 = 8;
const TABLE_BYTES: u64 = 40;

fn key(n: u8) -> ChunkKey {
    ChunkKey::new(format!("k{n}")).unwrap()
}

fn table(len_bytes: u64) -> SlotTable {
    SlotTable::new(AddressManager::with_slots(len_bytes, 1, SLOT_BYTES).unwrap(), false, false)
}

fn reserve(table: &mut SlotTable, grant: u64, lens_bytes: &[u64]) -> Result<Vec<SlotIndex>, NoRoom> {
    table.reserve(GrantId(grant), lens_bytes, &BTreeSet::new(), u64::MAX)
}

/// Fills slots of these lengths with idle chunks, used in this order.
fn idle(table: &mut SlotTable, lens_bytes: &[u64]) -> Vec<SlotIndex> {
    let slots = reserve(table, 100, lens_bytes).unwrap();
    for (name, &slot) in (0..).zip(&slots) {
        assert!(table.commit(slot, GrantId(100), key(name), GROUP));
        table.unpin(Instant::now(), slot);
    }
    slots
}

#[test]
fn a_quarantined_slot_is_never_handed_out_until_its_writer_has_stopped() {
    // Broken in production: a paused sender wakes up and overwrites another request's chunk.
    let mut table = table(16);
    let slots = reserve(&mut table, 1, &[8, 8]).unwrap();
    table.quarantine(slots[0], GrantId(1));
    table.quarantine(slots[1], GrantId(1));
    assert_eq!(reserve(&mut table, 2, &[8]).unwrap_err().free_bytes, 0);
    assert!(!table.commit(slots[0], GrantId(1), key(0), GROUP), "given up means given up");
    table.free_granted(slots[0], GrantId(9));
    assert_eq!(table.available_bytes(), 0, "another grant has no say");
    table.free_granted(slots[0], GrantId(1));
    assert_eq!(reserve(&mut table, 2, &[8]).unwrap(), vec![slots[0]]);
    table.free_granted(slots[0], GrantId(1));
    assert_eq!(table.counts().reserved, 1, "a late word about the former tenant changes nothing");
}

#[test]
fn idle_chunks_make_room_oldest_first_and_held_ones_never() {
    // Broken in production: a chunk is overwritten while a decode worker copies it.
    let mut table = table(16);
    let now = Instant::now();
    let slots = reserve(&mut table, 1, &[8, 8]).unwrap();
    assert!(table.commit(slots[0], GrantId(1), key(0), GROUP));
    assert!(table.commit(slots[1], GrantId(1), key(1), GROUP));
    table.unpin(now, slots[1]);
    assert!(reserve(&mut table, 2, &[8, 8]).is_err());
    assert_eq!(reserve(&mut table, 2, &[8]).unwrap(), vec![slots[1]]);
    assert_eq!((table.find(&key(0)), table.find(&key(1))), (Some(slots[0]), None));
}

#[test]
fn a_reservation_that_cannot_fit_evicts_nothing() {
    // Broken in production: one long prompt that has to wait empties the prefix cache, and gets no room by it.
    let mut table = table(16);
    let slots = idle(&mut table, &[5, 3, 5, 3]);
    let starts: Vec<u64> = slots.iter().map(|&slot| table.range(slot).unwrap().start).collect();
    assert_eq!(starts, [11, 8, 0, 5], "one short and one long chunk in each slot");
    table.pin(slots[1]);
    table.pin(slots[3]);
    // Ten bytes could be free, and no eight of them in one piece.
    assert!(reserve(&mut table, 1, &[8]).is_err());
    assert_eq!(table.counts().ready_idle, 2);
    assert_eq!(reserve(&mut table, 1, &[5]).map(|slots| slots.len()), Ok(1));
    assert_eq!((table.find(&key(0)), table.find(&key(2))), (None, Some(slots[2])), "the older one");
}

#[test]
fn chunks_that_lie_off_the_pages_of_a_peer_are_not_evicted_for_it() {
    // Broken in production: a sender that knows the first pages of a buffer empties all of it, and waits all the same.
    let mut table = table(32);
    let slots = idle(&mut table, &[8, 8, 8, 3, 5]);
    let none = BTreeSet::new();
    // The chunks behind the second page were used least recently.
    for &slot in &slots[..2] {
        table.pin(slot);
        table.unpin(Instant::now(), slot);
    }
    table.pin(slots[0]);
    assert!(table.reserve_pages(GrantId(1), 2, 8, &none, 16).is_err());
    assert_eq!(table.counts().ready_idle, 4);
    assert_eq!(table.reserve_pages(GrantId(1), 1, 8, &none, 16).map(|slots| slots.len()), Ok(1));
    assert_eq!((table.counts().ready_idle, table.find(&key(1))), (3, None), "the one in the second page");
}

proptest! {
    #[test]
    fn half_of_a_shared_buffer_can_always_be_staged(
        ops in prop::collection::vec((prop::collection::vec(1..=SLOT_BYTES, 1..4), any::<bool>(), any::<bool>(), 0..8usize), 1..60),
    ) {
        // Broken in production: two nodes that send to each other wait for room to stage until their requests' deadlines,
        // each with its buffer full, or in pieces, of what the other has been granted and cannot send.
        let addresses = AddressManager::with_slots(8 * SLOT_BYTES, 1, SLOT_BYTES).unwrap();
        let mut table = SlotTable::new(addresses, true, false);
        let mut reserved: Vec<(u64, SlotIndex)> = Vec::new();
        // Staged while something is reserved, and gone before the next look.
        let mut odd: Option<SlotIndex> = None;
        for (grant, (lens_bytes, keeps, stages, free)) in (1..).zip(ops) {
            if let Ok(slots) = reserve(&mut table, grant, &lens_bytes) {
                reserved.extend(slots.into_iter().map(|slot| (grant, slot)));
            }
            if !keeps && !reserved.is_empty() {
                let (grant, slot) = reserved.swap_remove(free % reserved.len());
                table.free_granted(slot, GrantId(grant));
            }
            if let Some(slot) = odd.take() {
                table.unstage(slot);
            }
            let one = table.stage(&[SLOT_BYTES]).unwrap();
            let others = table.stage(&[SLOT_BYTES; 3]).unwrap();
            one.into_iter().chain(others).for_each(|slot| table.unstage(slot));
            odd = stages.then(|| table.stage(&[1 + free as u64 % SLOT_BYTES]).unwrap()[0]);
            table.check_invariants().unwrap();
        }
    }
}

#[test]
fn what_a_request_shares_and_what_no_sender_knows_of_is_left_alone() {
    // Broken in production: a request evicts the prefix that it was to share, or idle chunks for room that it may not use yet.
    let mut table = table(16);
    let slots = idle(&mut table, &[8, 8]);
    let keep = BTreeSet::from([slots[0]]);
    assert!(table.reserve(GrantId(1), &[8, 8], &keep, u64::MAX).is_err());
    table.addresses().grow(8).unwrap();
    assert!(table.reserve(GrantId(1), &[8, 8], &keep, 16).is_err(), "one of them lies beyond");
    assert_eq!(table.counts().ready_idle, 2);
    assert!(table.reserve(GrantId(1), &[8, 8], &keep, 24).is_ok());
    assert_eq!((table.find(&key(0)), table.find(&key(1))), (Some(slots[0]), None));
}

#[derive(Debug, Clone)]
enum Op {
    Reserve(Vec<u64>),
    ReservePages(usize, u64),
    Commit(usize, u8),
    Quarantine(usize),
    Stopped(usize),
    Hold(u8),
    Unhold(usize),
    Expire(u64),
    Grow(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => prop::collection::vec(1u64..9, 0..4).prop_map(Op::Reserve),
        2 => (1usize..3, 0u64..50).prop_map(|(count, end)| Op::ReservePages(count, end)),
        4 => (any::<usize>(), 0u8..9).prop_map(|(pick, key)| Op::Commit(pick, key)),
        1 => any::<usize>().prop_map(Op::Quarantine),
        1 => any::<usize>().prop_map(Op::Stopped),
        2 => (0u8..9).prop_map(Op::Hold),
        4 => any::<usize>().prop_map(Op::Unhold),
        1 => (0u64..40).prop_map(Op::Expire),
        1 => (1u64..9).prop_map(Op::Grow),
    ]
}

/// A table, and who has what of it.
struct Play {
    start: Instant,
    table: SlotTable,
    written: Vec<(SlotIndex, GrantId)>,
    held: Vec<SlotIndex>,
    /// Slots in the order in which they were let go last; some are not idle any more.
    let_go: Vec<SlotIndex>,
}

impl Play {
    /// The same operations are the same table.
    fn of(start: Instant, ops: &[Op]) -> Self {
        let table = table(TABLE_BYTES);
        let mut play = Self { start, table, written: Vec::new(), held: Vec::new(), let_go: Vec::new() };
        for (step, op) in ops.iter().enumerate() {
            play.step(step, op);
        }
        play
    }

    /// Answers whether a reservation was refused.
    fn step(&mut self, step: usize, op: &Op) -> bool {
        let Self { start, table, written, held, let_go } = self;
        let now = *start + Duration::from_millis(step as u64);
        let grant = GrantId(step as u64);
        let reserved = match *op {
            Op::Reserve(ref lens_bytes) => reserve(table, grant.0, lens_bytes),
            Op::ReservePages(count, end) => table.reserve_pages(grant, count, SLOT_BYTES, &BTreeSet::new(), end),
            Op::Commit(pick, name) if !written.is_empty() => {
                let (slot, grant) = written[pick % written.len()];
                if table.commit(slot, grant, key(name), GROUP) {
                    written.retain(|entry| *entry != (slot, grant));
                    held.push(slot);
                }
                return false;
            }
            Op::Quarantine(pick) if !written.is_empty() => {
                let (slot, grant) = written[pick % written.len()];
                table.quarantine(slot, grant);
                return false;
            }
            Op::Stopped(pick) if !written.is_empty() => {
                let (slot, grant) = written.swap_remove(pick % written.len());
                table.free_granted(slot, grant);
                return false;
            }
            Op::Hold(name) => {
                if let Some(slot) = table.find(&key(name)) {
                    table.pin(slot);
                    held.push(slot);
                }
                return false;
            }
            Op::Unhold(pick) if !held.is_empty() => {
                let slot = held.swap_remove(pick % held.len());
                table.unpin(now, slot);
                let_go.retain(|other| *other != slot);
                let_go.push(slot);
                return false;
            }
            Op::Expire(ms) => {
                table.expire_idle(*start + Duration::from_millis(ms));
                return false;
            }
            Op::Grow(bytes) => {
                table.addresses().grow(bytes).unwrap();
                return false;
            }
            _ => return false,
        };
        let Ok(slots) = reserved else { return true };
        match op {
            Op::Reserve(lens_bytes) => {
                let lens: Vec<u64> = slots.iter().map(|&slot| table.range(slot).unwrap().len_bytes).collect();
                assert_eq!(&lens, lens_bytes);
            }
            Op::ReservePages(_, end) => {
                let is_page = |range: AddressRange| range.start.is_multiple_of(SLOT_BYTES) && range.end() <= *end;
                assert!(slots.iter().all(|&slot| table.range(slot).is_some_and(is_page)));
            }
            _ => {}
        }
        for slot in slots {
            assert!(!held.contains(&slot), "a held slot was handed out");
            assert!(!written.iter().any(|(other, _)| *other == slot), "a slot has two writers");
            written.push((slot, grant));
        }
        false
    }

    /// The idle chunks, least recently used first.
    fn idle(&self) -> Vec<(SlotIndex, ChunkKey)> {
        let idle = |&slot: &SlotIndex| match self.table.state(slot) {
            Some(SlotState::Ready { key, holds: 0, .. }) => Some((slot, key.clone())),
            _ => None,
        };
        self.let_go.iter().filter_map(idle).collect()
    }

    /// Whether a reservation finds room once these idle chunks are gone, and no other may go.
    fn fits_without(mut self, gone: &[SlotIndex], op: &Op) -> bool {
        for &slot in gone {
            assert!(self.table.free_idle(slot));
        }
        match op {
            Op::Reserve(lens_bytes) => self.table.addresses().allocate_each(lens_bytes).is_ok(),
            Op::ReservePages(count, end) => {
                self.table.addresses().allocate_slots_below_or_free(*count, *end, 0, std::iter::empty()).is_ok()
            }
            _ => panic!("{op:?}"),
        }
    }
}

proptest! {
    #[test]
    fn agrees_with_a_naive_model(ops in prop::collection::vec(op(), 0..120)) {
        // Broken in production: slots leak, or one slot has two owners.
        let start = Instant::now();
        let mut play = Play::of(start, &[]);
        for (step, op) in ops.iter().enumerate() {
            play.step(step, op);
            prop_assert_eq!(play.table.check_invariants(), Ok(()));
            let mut distinct = play.held.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(play.table.counts().ready_pinned as usize, distinct.len());
        }
        for (slot, grant) in play.written {
            play.table.free_granted(slot, grant);
        }
        for slot in play.held {
            play.table.unpin(start, slot);
        }
        prop_assert_eq!(play.table.available_bytes(), play.table.addresses().len_bytes());
    }

    #[test]
    fn evicts_the_oldest_that_will_do_and_nothing_in_vain(ops in prop::collection::vec(op(), 1..60)) {
        // Broken in production: a reservation that fails takes the cache with it, or one that succeeds takes more of it, and
        // what was used later, than it needs.
        let start = Instant::now();
        let mut play = Play::of(start, &[]);
        for (step, op) in ops.iter().enumerate() {
            if !matches!(op, Op::Reserve(_) | Op::ReservePages(..)) {
                play.step(step, op);
                continue;
            }
            let before = play.idle();
            let slots: Vec<SlotIndex> = before.iter().map(|(slot, _)| *slot).collect();
            let ranges: Vec<AddressRange> = slots.iter().map(|&slot| play.table.range(slot).unwrap()).collect();
            let fits = |gone: &[SlotIndex]| Play::of(start, &ops[..step]).fits_without(gone, op);
            let refused = play.step(step, op);
            let after = play.idle();
            if refused {
                prop_assert_eq!(&after, &before, "nothing is evicted for nothing");
                prop_assert!(!fits(&slots), "there was room");
                continue;
            }
            let evicted: Vec<usize> = (0..before.len()).filter(|&at| !after.contains(&before[at])).collect();
            prop_assert_eq!(after.len() + evicted.len(), before.len());
            // As few as will do. Where lengths are mixed, more room can mean less: then one fewer would not.
            let will_do = |count: usize| fits(&slots[..count]) && (count == 0 || !fits(&slots[..count - 1]));
            let last = evicted.last().map_or(0, |at| at + 1);
            prop_assert!((last..=slots.len()).any(will_do), "{evicted:?} of {ranges:?}");
            let grant = GrantId(step as u64);
            let of_grant = |&(slot, other): &(SlotIndex, GrantId)| (other == grant).then_some(slot);
            let reserved: Vec<AddressRange> =
                play.written.iter().filter_map(of_grant).map(|slot| play.table.range(slot).unwrap()).collect();
            let is_used = |at: &usize| {
                reserved.iter().any(|range| range.start < ranges[*at].end() && ranges[*at].start < range.end())
            };
            let used: Vec<SlotIndex> = evicted.iter().filter(|at| is_used(at)).map(|&at| slots[at]).collect();
            prop_assert!(used.len() == evicted.len() || !fits(&used), "{evicted:?} for {reserved:?}");
        }
    }
}
