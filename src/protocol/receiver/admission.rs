//! Who gets slots, and when: whole requests, in the order of their arrival, with bounded overtaking.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::peers::unknown_peer;
use super::requests::{Request, Stage};
use super::{Note, Port, ReceiverSession, Timer};
use crate::ids::{Failure, FailureKind, GrantId, RequestId, SlotIndex, clip};
use crate::wire::Message;
use crate::wire::message::{AllocExtension, AllocReplyExtension, AllocRequest, AllocResponse};

/// How often the request at the head of the queue may be overtaken by a smaller one.
const OVERTAKEN_MAX: u32 = 8;
/// How many waiting requests are looked at whenever slots become free.
const LOOKAHEAD_MAX: usize = 8;

impl<R: Clone + PartialEq> ReceiverSession<R> {
    pub(super) fn on_alloc(&mut self, now: Instant, from: R, request: AllocRequest) {
        let Some(extension) = request.pd.clone() else {
            // LMCache's own way of saying no, so that the sender neither hangs nor writes anywhere.
            let remote_indexes = vec![-1; request.keys.len()];
            let response = AllocResponse { already_sent_indexes: Vec::new(), remote_indexes, pd: None };
            self.send(from, Port::Alloc, Message::AllocResponse(response));
            let failure = Failure::new(
                FailureKind::HandshakeRefused,
                "the allocation carries no `pd` field: this receiver serves pd-sender alone",
            );
            let instance = "a peer of another make".into();
            return self.note(Note::Refused { request: request.req_id, instance, failure });
        };
        if !self.touch_peer(now, &extension.instance) {
            let failure = unknown_peer(&extension.instance);
            return self.refuse_alloc(from, &extension, request.req_id, failure);
        }
        self.set_alloc_route(&extension.instance, &from);
        let id = match self.check_alloc(&request) {
            Ok(id) => id,
            Err(failure) => {
                // Whoever waits for it at this end need not wait longer.
                if let Some(id) = request.req_id.clone().filter(|id| !self.requests.contains_key(id)) {
                    let instance = clip(&extension.instance);
                    self.fail_waiters(&id, &failure, &instance);
                    self.ended.remember(id, failure.clone(), instance);
                }
                return self.refuse_alloc(from, &extension, request.req_id, failure);
            }
        };
        let count = request.keys.len();
        let last_tokens = request.last_chunk_toks as u32;
        let last_len_bytes = self.settings.chunk.len_bytes(count - 1, count, last_tokens);
        // A name that is ready but not fetched is sent again: the newer request takes its place.
        if self.requests.get(&id).is_some_and(Request::is_ready) {
            self.drop_ready(now, &id);
        }
        self.ended.forget(&id);
        let wait = Duration::from_millis(extension.wait_ms).min(self.settings.allocation_timeout);
        self.timers.set(Timer::Allocation(id.clone()), now + wait);
        let request = Request {
            instance: extension.instance,
            route: from,
            seq: extension.seq,
            keys: request.keys,
            last_len_bytes,
            since: now,
            overtaken: 0,
            stage: Stage::Waiting { wait },
        };
        self.requests.insert(id.clone(), request);
        self.waiting.push_back(id);
        self.admit(now);
    }

    /// Grants slots to whoever may have them now.
    pub(super) fn admit(&mut self, now: Instant) {
        let mut at = 0;
        while at < self.waiting.len().min(LOOKAHEAD_MAX) {
            // Nobody passes a request that has been passed often enough.
            let passed_often =
                |id: &RequestId| self.requests.get(id).is_some_and(|request| request.overtaken >= OVERTAKEN_MAX);
            if self.waiting.iter().take(at).any(passed_often) {
                return;
            }
            let id = self.waiting[at].clone();
            if !self.try_grant(now, &id) {
                at += 1;
                continue;
            }
            self.waiting.remove(at);
            for earlier in self.waiting.iter().take(at) {
                if let Some(request) = self.requests.get_mut(earlier) {
                    request.overtaken += 1;
                }
            }
        }
    }

    pub(super) fn allocation_timed_out(&mut self, now: Instant, id: &RequestId) {
        let Some(request) = self.requests.get(id) else { return };
        let Stage::Waiting { wait } = &request.stage else { return };
        let text = format!(
            "receiver has {} of {} slots free, {id} needs up to {}; waited {} ms (pd_allocation_timeout_sec)",
            self.slots.available(),
            self.slots.slot_count(),
            request.keys.len(),
            wait.as_millis()
        );
        self.fail(now, id, Failure::new(FailureKind::NoSlots, text));
    }

    pub(super) fn refuse_alloc(
        &mut self,
        to: R,
        extension: &AllocExtension,
        request: Option<RequestId>,
        failure: Failure,
    ) {
        let response = AllocResponse {
            already_sent_indexes: Vec::new(),
            remote_indexes: Vec::new(),
            pd: Some(AllocReplyExtension {
                seq: extension.seq,
                grant: None,
                write_within_ms: 0,
                refusal: Some(failure.clone()),
            }),
        };
        self.send(to, Port::Alloc, Message::AllocResponse(response));
        self.note(Note::Refused { request, instance: clip(&extension.instance), failure });
    }

    /// Everything about an allocation that can be wrong whoever sent it.
    fn check_alloc(&self, request: &AllocRequest) -> Result<RequestId, Failure> {
        let bad = |text: String| Err(Failure::new(FailureKind::BadRequest, text));
        let chunk = &self.settings.chunk;
        let count = request.keys.len();
        let Some(id) = request.req_id.clone() else {
            return bad("an allocation without req_id; pd-sender names every request".into());
        };
        if self.draining {
            return Err(Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down; use another"));
        }
        if count == 0 {
            return bad(format!("{id} has no chunks; send at least one key"));
        }
        if (&request.fmt, &request.shape, &request.dtype) != (&chunk.wire_format, &chunk.wire_shape, &chunk.dtype) {
            let text = format!(
                "{id} has chunks of format {} shape {:?} dtype {}, this receiver's are format {} shape {:?} dtype {}",
                request.fmt, request.shape, request.dtype, chunk.wire_format, chunk.wire_shape, chunk.dtype
            );
            return Err(Failure::new(FailureKind::LayoutMismatch, text));
        }
        if request.last_chunk_toks == 0 || request.last_chunk_toks > u64::from(chunk.chunk_tokens) {
            return bad(format!(
                "{id} has {} tokens in its last chunk; expected 1 to {}",
                request.last_chunk_toks, chunk.chunk_tokens
            ));
        }
        if request.is_last_batch == Some(false) || request.total_chunks.is_some_and(|total| total as usize != count) {
            return bad(format!("{id} comes in several batches; declare all its chunks in one AllocRequest"));
        }
        if request.keys.iter().collect::<BTreeSet<_>>().len() != count {
            return bad(format!("{id} names a chunk twice; keys must be distinct"));
        }
        if count > self.slots.slot_count() as usize {
            let text = format!(
                "{id} has {count} chunks, the receiver's buffer has {} slots; raise its pd_buffer_size or split the request",
                self.slots.slot_count()
            );
            return Err(Failure::new(FailureKind::TooLarge, text));
        }
        if count > self.settings.request_chunks_max {
            let text = format!(
                "{id} has {count} chunks, the limit is {} (pd_max_request_chunks)",
                self.settings.request_chunks_max
            );
            return Err(Failure::new(FailureKind::Limit, text));
        }
        match self.requests.get(&id) {
            Some(open) if !open.is_ready() => bad(format!("{id} is open already, or its last attempt is still ending")),
            _ if self.requests.len() >= self.settings.requests_max => Err(Failure::new(
                FailureKind::Limit,
                format!("{} requests are open, the limit (pd_max_requests)", self.requests.len()),
            )),
            _ => Ok(id),
        }
    }

    /// Grants a waiting request all its slots, if there are enough. True: it waits no longer.
    fn try_grant(&mut self, now: Instant, id: &RequestId) -> bool {
        let Some(request) = self.requests.get(id) else { return true };
        if !matches!(request.stage, Stage::Waiting { .. }) {
            return true;
        }
        let count = request.keys.len();
        let len_bytes =
            |index: usize| if index + 1 == count { request.last_len_bytes } else { self.settings.chunk.chunk_bytes };
        // A ready chunk of another length under the same key is not this chunk: it is written again.
        let same_len = |slot: &SlotIndex, index: usize| matches!(self.slots.state(*slot), Some(crate::slot::SlotState::Ready { len_bytes: held, .. }) if *held == len_bytes(index));
        let mut shared: Vec<(u32, SlotIndex)> = Vec::new();
        let mut missing: Vec<u32> = Vec::new();
        for (index, key) in request.keys.iter().enumerate() {
            match self.slots.find(key).filter(|slot| same_len(slot, index)) {
                Some(slot) => shared.push((index as u32, slot)),
                None => missing.push(index as u32),
            }
        }
        // Held first, so that making room does not evict what this very request needs.
        for &(_, slot) in &shared {
            self.slots.hold(slot);
        }
        let grant = GrantId(self.next_grant);
        let Ok(reserved) = self.slots.reserve(grant, missing.len() as u32) else {
            for &(_, slot) in &shared {
                self.slots.unhold(now, slot);
            }
            return false;
        };
        self.next_grant += 1;
        let own: Vec<(u32, SlotIndex)> = missing.into_iter().zip(reserved).collect();
        let response = AllocResponse {
            already_sent_indexes: shared.iter().map(|&(index, _)| index).collect(),
            remote_indexes: own.iter().map(|&(_, slot)| i64::from(slot.0)).collect(),
            pd: Some(AllocReplyExtension {
                seq: request.seq,
                grant: Some(grant),
                write_within_ms: self.settings.write_timeout.as_millis() as u64,
                refusal: None,
            }),
        };
        let (to, instance) = (request.route.clone(), request.instance.clone());
        let waited = now.saturating_duration_since(request.since);
        self.note(Note::Granted { request: id.clone(), instance, chunks: count, already_sent: shared.len(), waited });
        if let Some(request) = self.requests.get_mut(id) {
            request.since = now;
            request.stage = Stage::Granted { grant, own, shared };
        }
        self.timers.cancel(&Timer::Allocation(id.clone()));
        self.timers.set(Timer::Write(id.clone()), now + self.settings.write_timeout);
        self.send(to, Port::Alloc, Message::AllocResponse(response));
        true
    }
}
