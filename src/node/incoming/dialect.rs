//! Where a request's way depends on its sender's dialect: reserving, telling the grant, its deadline, refusing. What is said to
//! our own senders is here; what to LMCache's is in [`lmcache`](super::lmcache). A pd-sender commits what it has written and says
//! when it has stopped writing; an LMCache sender does neither, and is granted pages. This file is the boundary.

use std::collections::BTreeSet;

use super::origin::Origin;
use super::request::{IncomingRequest, IncomingStage};
use super::{Incoming, IncomingNote, IncomingTimer, Port};
use crate::ids::{Failure, FailureKind, GrantId, RequestId, SlotIndex};
use crate::node::core::Core;
use crate::node::output::To;
use crate::wire::message::{AllocReplyExtension, AllocResponse, MemoryUpdate};
use crate::wire::{Message, refusal};

impl<R: Clone + PartialEq> Incoming<R> {
    /// Slots for those chunks of a request that are not ready, or none.
    pub(super) fn reserve(
        &mut self,
        core: &mut Core<R>,
        id: &RequestId,
        grant: GrantId,
        missing: &[u32],
        keep: &BTreeSet<SlotIndex>,
    ) -> Option<Vec<SlotIndex>> {
        let request = self.requests.get(id)?;
        if let Origin::Lmcache(_) = request.origin {
            return self.reserve_pages(core, id, grant, missing, keep);
        }
        let lens: Vec<u64> = missing.iter().map(|&index| request.sizes[index as usize].len_bytes).collect();
        // The addresses may be ahead of what the node was told of the buffer. Once it is told, this is tried again.
        core.slots.reserve(grant, &lens, keep, core.described_len_bytes).ok()
    }

    /// Tells a sender where it may write, and sets the deadline of its grant.
    pub(super) fn tell_granted(&mut self, core: &mut Core<R>, id: &RequestId) {
        let Some(request) = self.requests.get(id) else { return };
        let IncomingStage::Granted { grant, own, shared } = &request.stage else { return };
        let already_sent_indexes: Vec<u32> = shared.iter().map(|&(index, _)| index).collect();
        if let Origin::Lmcache(_) = request.origin {
            let own = own.clone();
            core.timers.set(IncomingTimer::Write(id.clone()), core.now + self.settings.retention);
            self.answer_pages(core, id, &own, already_sent_indexes);
            return self.serve_waiters(core, id);
        }
        let response = AllocResponse {
            already_sent_indexes,
            remote_indexes: Vec::new(),
            pd: Some(AllocReplyExtension {
                grant: Some(*grant),
                offsets: own.iter().filter_map(|&(_, slot)| core.slots.range(slot)).map(|range| range.start).collect(),
                write_within_ms: core.settings.write_timeout.as_millis() as u64,
                memory: self.memory_update(core, request.known_len_bytes),
                ..AllocReplyExtension::empty(request.seq)
            }),
        };
        let to = request.route.clone();
        core.timers.set(IncomingTimer::Write(id.clone()), core.now + core.settings.write_timeout);
        core.send(To::Route(to), Port::Alloc, Message::AllocResponse(response));
    }

    /// What a sender must be told that knows only so much of the buffer.
    fn memory_update(&self, core: &Core<R>, known_len_bytes: u64) -> Option<MemoryUpdate> {
        let len_bytes = core.described_len_bytes;
        (known_len_bytes < len_bytes).then(|| MemoryUpdate {
            len_bytes,
            metadata: core.settings.metadata.clone(),
            descriptors: core.settings.descriptors.clone(),
        })
    }

    /// The deadline of a grant has passed.
    pub(super) fn write_timed_out(&mut self, core: &mut Core<R>, id: &RequestId) {
        let Some(request) = self.requests.get(id) else { return };
        if let Origin::Lmcache(_) = request.origin {
            return self.nobody_fetched(core, id);
        }
        let timeout_ms = core.settings.write_timeout.as_millis();
        let text = format!("not committed within {timeout_ms} ms of the grant (pd_write_timeout_sec)");
        self.fail(core, id, Failure::new(FailureKind::Deadline, text));
    }

    /// Refuses a request that waits for slots. `tell_sender` is false when its sender has ended it: only one of LMCache's
    /// waits for an answer even so.
    pub(super) fn refuse_waiting(
        &mut self,
        core: &mut Core<R>,
        id: &RequestId,
        request: &IncomingRequest<R>,
        failure: &Failure,
        tell_sender: bool,
    ) {
        let (to, instance, failure) = (request.route.clone(), request.instance.as_str(), failure.clone());
        match request.origin {
            Origin::Lmcache(_) => self.refuse_pages(core, to, request.keys.len(), instance, Some(id.clone()), failure),
            Origin::Pd if tell_sender => self.refuse_alloc(core, to, request.seq, instance, Some(id.clone()), failure),
            Origin::Pd => {}
        }
    }

    /// A request has ended: what it was granted and never told of is free again.
    pub(super) fn free_spare_slots(&mut self, core: &mut Core<R>, id: &RequestId, request: &IncomingRequest<R>) {
        if let Some(grant) = request.stage.grant() {
            for &slot in request.origin.spare_slots() {
                core.slots.free_granted(slot, grant);
            }
        }
        self.lmcache.forget_granted(&request.keys, id);
    }

    /// A message that its port does not take. An LMCache sender would wait for an answer for ever, and gets a refusal.
    pub(super) fn refuse_misdirected(&self, core: &mut Core<R>, port: Port, from: R, message: &Message) {
        if let Some(refusal) = refusal(message) {
            core.send(To::Route(from.clone()), port, refusal);
        }
        core.note(IncomingNote::Unexpected { from, port, message: message.type_name() });
    }

    /// Whether an LMCache request's sender is gone for good, so that another may ask for what it had. A pd-sender's end is
    /// `process_ended`.
    pub(super) fn lmcache_sender_is_gone(&self, request: &IncomingRequest<R>) -> bool {
        match request.origin {
            Origin::Pd => false,
            Origin::Lmcache(_) => !self.lmcache.is_connected(&request.instance),
        }
    }
}
