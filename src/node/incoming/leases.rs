//! Leases: chunks that a client of the connector API, or an LMCache peer, is reading.

use std::collections::BTreeMap;

use crate::ids::{ClientId, Failure, FailureKind, LeaseId, SlotIndex};

/// Most leases that one client may hold.
const PER_CLIENT_MAX: usize = 65_536;

/// Every lease that was not given back. A slot is pinned once for each lease that names it: by the caller of
/// [`open`](Self::open), and unpinned by the caller of [`end`](Self::end).
#[derive(Debug, Default)]
pub(super) struct Leases {
    slots: BTreeMap<(ClientId, LeaseId), Vec<SlotIndex>>,
    /// How many each client has.
    counts: BTreeMap<ClientId, usize>,
    latest: u64,
}

impl Leases {
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Whether a client may have one more.
    ///
    /// # Errors
    /// When it holds as many as it may.
    pub(super) fn check(&self, client: ClientId) -> Result<(), Failure> {
        if self.counts.get(&client).is_none_or(|&count| count < PER_CLIENT_MAX) {
            return Ok(());
        }
        let text = format!("{PER_CLIENT_MAX} leases are open, the limit; release those whose chunks were copied");
        Err(Failure::new(FailureKind::Limit, text))
    }

    pub(super) fn open(&mut self, client: ClientId, slots: Vec<SlotIndex>) -> LeaseId {
        self.latest += 1;
        let lease = LeaseId(self.latest);
        self.slots.insert((client, lease), slots);
        *self.counts.entry(client).or_default() += 1;
        lease
    }

    /// The slots of a lease that ends; none when this client has no such lease.
    pub(super) fn end(&mut self, client: ClientId, lease: LeaseId) -> Option<Vec<SlotIndex>> {
        let slots = self.slots.remove(&(client, lease))?;
        if let Some(count) = self.counts.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&client);
            }
        }
        Some(slots)
    }

    pub(super) fn of_client(&self, client: ClientId) -> Vec<LeaseId> {
        let of_client = self.slots.range((client, LeaseId(0))..=(client, LeaseId(u64::MAX)));
        of_client.map(|(&(_, lease), _)| lease).collect()
    }

    /// How many slots a client's leases name.
    pub(super) fn slots_of(&self, client: ClientId) -> usize {
        self.slots.range((client, LeaseId(0))..=(client, LeaseId(u64::MAX))).map(|(_, slots)| slots.len()).sum()
    }

    /// # Errors
    /// When counts and leases do not agree.
    pub(super) fn check_invariants(&self) -> Result<(), String> {
        let counted: usize = self.counts.values().sum();
        if counted == self.slots.len() {
            return Ok(());
        }
        Err(format!("{counted} leases are counted, there are {}", self.slots.len()))
    }
}
