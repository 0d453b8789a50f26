//! The decode worker's side: waiting for requests, leases on chunks, giving them back.

use std::collections::BTreeSet;
use std::time::Duration;

use super::ended::Audience;
use super::request::{IncomingRequest, IncomingStage};
use super::waiters::Waiter;
use super::{Incoming, IncomingNote, IncomingTimer, Lookup};
use crate::ids::{ChunkKey, ClientId, Failure, FailureKind, GrantId, LeaseId, ReadyChunk, RequestId, Seq, SlotIndex};
use crate::node::Answer;
use crate::node::core::Core;
use crate::node::safeguards::Safeguard;
use crate::slot::SlotState;

/// Most waits that one client may have open.
const WAITS_PER_CLIENT_MAX: usize = 65_536;

impl<R: Clone + PartialEq> Incoming<R> {
    /// A reader wants to know when `request` is ready, which no sender need have announced yet. With `uncommitted` it has
    /// heard from the proxy that the request is written: that makes ready what an LMCache sender was granted.
    pub(in crate::node) fn handle_wait(
        &mut self,
        core: &mut Core<R>,
        client: ClientId,
        id: Seq,
        request: RequestId,
        wait: Option<Duration>,
        uncommitted: bool,
    ) {
        if let Some((failure, instance)) = self.ended.tell(&request, core.now.checked_sub(self.settings.retention)) {
            return core.answer(client, id, Answer::Failed { failure, peer: Some(instance) });
        }
        if core.draining && !self.requests.contains_key(&request) {
            let failure = Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down; use another");
            return core.answer(client, id, Answer::Failed { failure, peer: None });
        }
        if self.waiters.count_of(client) == WAITS_PER_CLIENT_MAX || self.waiters.contains(client, id) {
            let text = format!("id {id} waits already, or {WAITS_PER_CLIENT_MAX} waits are open, the limit");
            let failure = Failure::new(FailureKind::Limit, text);
            return core.answer(client, id, Answer::Failed { failure, peer: None });
        }
        let wait = wait.map_or(self.settings.wait_timeout, |wait| wait.min(self.settings.wait_timeout));
        core.timers.set(IncomingTimer::Wait(client, id), core.now + wait);
        self.waiters.insert(client, id, Waiter { request: request.clone(), wait, uncommitted });
        self.serve_waiters(core, &request);
    }

    /// A reader wants those chunks that are ready.
    pub(in crate::node) fn handle_lookup(&mut self, core: &mut Core<R>, client: ClientId, id: Seq, lookup: &Lookup) {
        let &Lookup { ref keys, uncommitted, fetches } = lookup;
        if let Err(failure) = self.leases.check(client) {
            return core.answer(client, id, Answer::Failed { failure, peer: None });
        }
        if uncommitted {
            self.take_uncommitted(core, keys);
        }
        let granted = self.uncommitted_among(core, keys);
        let slots: Vec<Option<SlotIndex>> = keys.iter().map(|key| core.slots.find(key)).collect();
        let held: Vec<SlotIndex> = slots.iter().copied().flatten().collect();
        for &slot in &held {
            core.slots.pin(slot);
        }
        let chunks = slots.into_iter().map(|slot| slot.and_then(|slot| self.ready_chunk(core, slot))).collect();
        let coming = (0u32..).zip(&chunks).zip(keys);
        let coming = coming.filter(|((_, chunk), key): &((u32, &Option<ReadyChunk>), &ChunkKey)| {
            chunk.is_none() && self.coming.contains(key)
        });
        let coming = coming.map(|((at, _), _)| at).collect();
        let fetched = if fetches { self.ready_among(&held) } else { Vec::new() };
        let lease = (!held.is_empty()).then(|| self.leases.open(client, held));
        core.answer(client, id, Answer::Found { lease, chunks, granted, coming });
        for request in &fetched {
            self.end_fetched(core, request);
        }
        if uncommitted || !fetched.is_empty() {
            // Somebody may have waited for just this.
            self.admit(core);
        }
    }

    /// Ready requests of which every chunk is among these.
    fn ready_among(&self, slots: &[SlotIndex]) -> Vec<RequestId> {
        let found: BTreeSet<SlotIndex> = slots.iter().copied().collect();
        let all_found = |stage: &IncomingStage| matches!(stage, IncomingStage::Ready { slots, .. } if slots.iter().all(|slot| found.contains(slot)));
        self.requests.iter().filter(|(_, request)| all_found(&request.stage)).map(|(id, _)| id.clone()).collect()
    }

    /// A reader has copied what it leased.
    pub(in crate::node) fn handle_release(&mut self, core: &mut Core<R>, client: ClientId, id: Seq, lease: LeaseId) {
        if !self.end_lease(core, client, lease) {
            let text = format!("lease {lease} is not yours, or was released before");
            let failure = Failure::new(FailureKind::Unknown, text);
            return core.answer(client, id, Answer::Failed { failure, peer: None });
        }
        core.answer(client, id, Answer::Released);
        self.admit(core);
    }

    /// A reader gives a request up. Slots that its sender may still write stay quarantined until that has stopped.
    pub(in crate::node) fn handle_cancel(
        &mut self,
        core: &mut Core<R>,
        client: ClientId,
        id: Seq,
        request: &RequestId,
    ) {
        let failure = Failure::new(FailureKind::Cancelled, "the decode worker cancelled it");
        if self.requests.contains_key(request) {
            self.fail(core, request, failure);
        } else {
            // Whoever waits for it has no use for it any more, and a sender that announces it later is served as any.
            self.fail_waiters(core, request, &failure, "");
        }
        self.give_up_fetch(core, request);
        // The reader knows of the end: a wait that comes after this is for the next attempt.
        self.ended.told(request);
        core.answer(client, id, Answer::Cancelled { request: request.clone() });
        self.admit(core);
    }

    /// A client is gone: its leases end, its waits too.
    pub(in crate::node) fn handle_client_gone(&mut self, core: &mut Core<R>, client: ClientId) {
        for lease in self.leases.of_client(client) {
            self.end_lease(core, client, lease);
        }
        for id in self.waiters.of_client(client) {
            if let Some(waiter) = self.end_wait(core, client, id) {
                self.give_up_fetch(core, &waiter.request);
            }
        }
        self.fetches_client_gone(core, client);
        self.admit(core);
    }

    pub(super) fn wait_timed_out(&mut self, core: &mut Core<R>, client: ClientId, id: Seq) {
        let Some(waiter) = self.waiters.remove(client, id) else { return };
        let (state, peer) = match self.requests.get(&waiter.request) {
            None if self.fetches.contains_key(&waiter.request) => ("its sender has not sent it", None),
            None => ("no sender has announced it", None),
            Some(request) => match request.stage {
                IncomingStage::Waiting { .. } => ("it waits for slots", Some(request.instance.clone())),
                _ => ("its sender has not committed it", Some(request.instance.clone())),
            },
        };
        let text = format!("{} is not ready after {} ms: {state}", waiter.request, waiter.wait.as_millis());
        let failure = Failure::new(FailureKind::Deadline, text);
        core.answer(client, id, Answer::Failed { failure, peer });
        self.give_up_fetch(core, &waiter.request);
    }

    /// Gives a ready request to the reader that has waited longest for it; the request has ended then.
    pub(super) fn serve_waiters(&mut self, core: &mut Core<R>, id: &RequestId) {
        if self.waiters.takes_uncommitted(id) && self.can_be_taken_uncommitted(id) {
            // It serves the waiters.
            return self.make_ready(core, id);
        }
        while let Some((client, seq)) = self.waiters.first_for(id) {
            let Some(IncomingRequest { stage: IncomingStage::Ready { slots, .. }, .. }) = self.requests.get(id) else {
                return;
            };
            if let Err(failure) = self.leases.check(client) {
                // It stays ready, for a reader that gives leases back.
                self.end_wait(core, client, seq);
                core.answer(client, seq, Answer::Failed { failure, peer: None });
                continue;
            }
            let slots = slots.clone();
            self.end_wait(core, client, seq);
            for &slot in &slots {
                core.slots.pin(slot);
            }
            let chunks = slots.iter().filter_map(|&slot| self.ready_chunk(core, slot)).collect();
            let lease = self.leases.open(client, slots);
            core.answer(client, seq, Answer::Ready { request: id.clone(), lease, chunks });
            return self.end_fetched(core, id);
        }
    }

    /// A reader has leases on all chunks of a ready request, which has ended with that.
    fn end_fetched(&mut self, core: &mut Core<R>, id: &RequestId) {
        let Some(request) = self.requests.get(id) else { return };
        let after = core.now.saturating_duration_since(request.since);
        let instance = request.instance.clone();
        self.drop_ready(core, id);
        core.note(IncomingNote::Fetched { request: id.clone(), after });
        let failure =
            Failure::new(FailureKind::Unknown, format!("{id} was fetched already; look its chunks up by key"));
        self.fail_waiters(core, id, &failure, &instance);
        // Another sample of the same request may still ask: it finds the chunks by key.
        self.remember_ended(core.now, id.clone(), failure, instance, None, Audience::Everybody);
    }

    /// Tells readers how an attempt has ended: all that wait for it now or, where none waits, the next that asks.
    pub(super) fn tell_end(
        &mut self,
        core: &mut Core<R>,
        id: RequestId,
        failure: Failure,
        instance: String,
        grant: Option<GrantId>,
    ) {
        let told = self.fail_waiters(core, &id, &failure, &instance);
        let once = core.settings.keeps(Safeguard::EndsToldOnce);
        let audience = match (once, told) {
            (false, _) => Audience::Everybody,
            (true, true) => Audience::Nobody,
            (true, false) => Audience::Next,
        };
        self.remember_ended(core.now, id, failure, instance, grant, audience);
    }

    /// Answers every wait for a request with this failure. False: no reader waited.
    pub(super) fn fail_waiters(
        &mut self,
        core: &mut Core<R>,
        id: &RequestId,
        failure: &Failure,
        instance: &str,
    ) -> bool {
        let mut told = false;
        while let Some((client, seq)) = self.waiters.first_for(id) {
            told = true;
            self.end_wait(core, client, seq);
            let peer = (!instance.is_empty()).then(|| instance.to_owned());
            core.answer(client, seq, Answer::Failed { failure: failure.clone(), peer });
        }
        told
    }

    /// Waits that nothing will end: for requests that no sender has announced, when no sender can announce one any more.
    pub(super) fn fail_waiters_for_nothing(&mut self, core: &mut Core<R>, failure: &Failure) {
        let unannounced = self.waiters.requests().filter(|request| !self.requests.contains_key(request));
        for id in unannounced.cloned().collect::<Vec<_>>() {
            self.fail_waiters(core, &id, failure, "");
            self.give_up_fetch(core, &id);
        }
    }

    fn end_wait(&mut self, core: &mut Core<R>, client: ClientId, id: Seq) -> Option<Waiter> {
        core.timers.unset(IncomingTimer::Wait(client, id));
        self.waiters.remove(client, id)
    }

    fn ready_chunk(&self, core: &Core<R>, slot: SlotIndex) -> Option<ReadyChunk> {
        match core.slots.state(slot) {
            Some(SlotState::Ready { key, group, .. }) => {
                let range = core.slots.range(slot)?;
                let (offset_bytes, len_bytes) = (range.start, range.len_bytes);
                Some(ReadyChunk { key: key.clone(), group: *group, slot, offset_bytes, len_bytes })
            }
            _ => None,
        }
    }

    /// False: this client has no such lease.
    pub(super) fn end_lease(&mut self, core: &mut Core<R>, client: ClientId, lease: LeaseId) -> bool {
        let slots = self.leases.end(client, lease);
        for &slot in slots.iter().flatten() {
            core.slots.unpin(core.now, slot);
        }
        slots.is_some()
    }
}
