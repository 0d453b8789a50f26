//! Ready chunks that nobody holds, in the order of their last use.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::ids::SlotIndex;

/// Slots whose chunks make room when it is needed, the least recently used first.
#[derive(Debug, Default)]
pub(super) struct IdleSlots {
    by_order: BTreeMap<u64, Idle>,
    /// Of each slot that is in here.
    orders: BTreeMap<SlotIndex, u64>,
    bytes: u64,
    next_order: u64,
}

#[derive(Debug)]
struct Idle {
    slot: SlotIndex,
    since: Instant,
    bytes: u64,
}

impl IdleSlots {
    pub(super) fn len(&self) -> usize {
        self.by_order.len()
    }

    /// What they take, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn contains(&self, slot: SlotIndex) -> bool {
        self.orders.contains_key(&slot)
    }

    /// A chunk of so many bytes was used last now.
    pub(super) fn insert(&mut self, now: Instant, slot: SlotIndex, bytes: u64) {
        self.by_order.insert(self.next_order, Idle { slot, since: now, bytes });
        self.orders.insert(slot, self.next_order);
        self.next_order += 1;
        self.bytes += bytes;
    }

    pub(super) fn remove(&mut self, slot: SlotIndex) {
        if let Some(idle) = self.orders.remove(&slot).and_then(|order| self.by_order.remove(&order)) {
            self.bytes -= idle.bytes;
        }
    }

    /// The chunk that was used least recently, and when.
    pub(super) fn first(&self) -> Option<(SlotIndex, Instant)> {
        self.by_order.first_key_value().map(|(_, idle)| (idle.slot, idle.since))
    }

    /// The least recently used first.
    pub(super) fn iter(&self) -> impl Iterator<Item = SlotIndex> {
        self.by_order.values().map(|idle| idle.slot)
    }
}
