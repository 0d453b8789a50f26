//! Admission slot by slot: what happens without [`Safeguards::whole_requests`](crate::node::Safeguards). Requests
//! hold what they have while they wait for the rest, and can wait for each other.

use std::collections::BTreeSet;

use super::Incoming;
use super::request::{PartialGrant, Stage};
use crate::ids::GrantId;
use crate::node::core::Core;

impl<R: Clone + PartialEq> Incoming<R> {
    /// Gives every waiting request one slot at a time.
    pub(super) fn admit_piecemeal(&mut self, core: &mut Core<R>) {
        let mut progress = true;
        while std::mem::take(&mut progress) {
            for id in self.waiting.clone() {
                let Some(request) = self.requests.get_mut(&id) else { continue };
                let Stage::Waiting { partial, .. } = &mut request.stage else { continue };
                let partial = partial.get_or_insert_with(|| {
                    self.next_grant += 1;
                    PartialGrant { grant: GrantId(self.next_grant - 1), slots: Vec::new() }
                });
                let len_bytes = request.sizes[partial.slots.len()].len_bytes;
                let Ok(slots) = core.slots.reserve(partial.grant, &[len_bytes], &BTreeSet::new(), u64::MAX) else {
                    continue;
                };
                progress = true;
                partial.slots.extend(slots);
                if partial.slots.len() == request.keys.len() {
                    let (grant, own) = (partial.grant, (0u32..).zip(partial.slots.iter().copied()).collect());
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
    pub(super) fn let_go(&mut self, core: &mut Core<R>, partial: Option<PartialGrant>) {
        if let Some(partial) = partial {
            partial.slots.into_iter().for_each(|slot| core.slots.writer_stopped(slot, partial.grant));
        }
    }
}
