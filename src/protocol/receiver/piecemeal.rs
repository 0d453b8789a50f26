//! Admission slot by slot: what happens without [`Safeguards::whole_requests`](crate::protocol::Safeguards). Requests
//! hold what they have while they wait for the rest, and can wait for each other.

use std::collections::BTreeSet;
use std::time::Instant;

use super::ReceiverSession;
use super::requests::Stage;
use crate::ids::{GrantId, SlotIndex};

/// What a waiting request holds already.
#[derive(Debug)]
pub(super) struct Held {
    grant: GrantId,
    pub(super) slots: Vec<SlotIndex>,
}

impl<R: Clone + PartialEq> ReceiverSession<R> {
    /// Gives every waiting request one slot at a time.
    pub(super) fn admit_piecemeal(&mut self, now: Instant) {
        let mut progress = true;
        while std::mem::take(&mut progress) {
            for id in self.waiting.clone() {
                let Some(request) = self.requests.get_mut(&id) else { continue };
                let Stage::Waiting { held, .. } = &mut request.stage else { continue };
                let held = held.get_or_insert_with(|| {
                    self.next_grant += 1;
                    Held { grant: GrantId(self.next_grant - 1), slots: Vec::new() }
                });
                let len_bytes = request.sizes[held.slots.len()].len_bytes;
                let Ok(slots) = self.slots.reserve(held.grant, &[len_bytes], &BTreeSet::new(), u64::MAX) else {
                    continue;
                };
                progress = true;
                held.slots.extend(slots);
                if held.slots.len() == request.keys.len() {
                    let (grant, own) = (held.grant, (0u32..).zip(held.slots.iter().copied()).collect());
                    self.waiting.retain(|other| *other != id);
                    self.grant(now, &id, grant, own, Vec::new());
                }
            }
        }
        if !self.waiting.is_empty() {
            self.ask_to_grow();
        }
    }

    /// A request that waits no longer gives back what it held.
    pub(super) fn let_go(&mut self, held: Option<Held>) {
        if let Some(held) = held {
            held.slots.into_iter().for_each(|slot| self.slots.writer_stopped(slot, held.grant));
        }
    }
}
