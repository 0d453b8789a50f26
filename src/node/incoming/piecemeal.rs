//! Admission slot by slot: what happens without [`Safeguard::WholeRequests`](crate::node::Safeguard). Requests hold what
//! they have while they wait for the rest, and can wait for each other.

use std::collections::{BTreeMap, BTreeSet};

use super::Incoming;
use crate::ids::{GrantId, RequestId, SlotIndex};
use crate::node::core::Core;

/// What waiting requests have already.
pub(super) type Piecemeal = BTreeMap<RequestId, (GrantId, Vec<SlotIndex>)>;

impl<R: Clone + PartialEq> Incoming<R> {
    /// Gives every waiting request one slot at a time.
    pub(super) fn admit_piecemeal(&mut self, core: &mut Core<R>) {
        let mut progress = true;
        while std::mem::take(&mut progress) {
            for id in self.waiting.clone() {
                let Some(request) = self.requests.get(&id) else { continue };
                let (grant, slots) = self.piecemeal.entry(id.clone()).or_insert_with(|| {
                    self.next_grant += 1;
                    (GrantId(self.next_grant - 1), Vec::new())
                });
                let (grant, len_bytes) = (*grant, request.sizes[slots.len()].len_bytes);
                let Ok(slot) = core.slots.reserve(grant, &[len_bytes], &BTreeSet::new(), u64::MAX) else { continue };
                progress = true;
                slots.extend(slot);
                if slots.len() == request.keys.len() {
                    let own = (0u32..).zip(std::mem::take(slots)).collect();
                    self.piecemeal.remove(&id);
                    self.waiting.retain(|other| *other != id);
                    self.grant(core, &id, grant, own, Vec::new());
                }
            }
        }
        if !self.waiting.is_empty() {
            core.ask_to_grow();
        }
    }

    /// A request that waits no longer gives back what it held.
    pub(super) fn let_go(&mut self, core: &mut Core<R>, id: &RequestId) {
        if let Some((grant, slots)) = self.piecemeal.remove(id) {
            slots.into_iter().for_each(|slot| core.slots.free_granted(slot, grant));
        }
    }
}
