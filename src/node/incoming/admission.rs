//! Who gets slots, and when: whole requests, in the order of their arrival, with bounded overtaking.
//!
//! `on_alloc` checks and queues a request; `admit` takes those whose turn it is; `try_grant` asks for all their slots
//! (`dialect::reserve`), and `grant` enters what they got, which `dialect::tell_granted` sends.

use std::collections::BTreeSet;
use std::time::Duration;

use super::origin::Origin;
use super::request::{IncomingRequest, IncomingStage, RoomSeen};
use super::{Incoming, IncomingNote, IncomingTimer, Port};
use crate::ids::{Failure, FailureKind, GrantId, RequestId, Seq, SlotIndex, truncate};
use crate::node::chunks::ChunkSize;
use crate::node::core::Core;
use crate::node::output::To;
#[cfg(feature = "mutants")]
use crate::node::safeguards::Safeguard;
use crate::wire::Message;
use crate::wire::message::{AllocExtension, AllocReplyExtension, AllocRequest, AllocResponse};

/// How often the request at the head of the queue may be overtaken by a smaller one.
const OVERTAKEN_MAX: u32 = 8;
/// How many waiting requests are looked at whenever slots become free.
const LOOKAHEAD_MAX: usize = 8;

impl<R: Clone + PartialEq> Incoming<R> {
    pub(super) fn on_alloc(&mut self, core: &mut Core<R>, from: R, request: AllocRequest) {
        let Some(extension) = request.pd.clone() else { return };
        let known = self.touch_peer(core.now, &extension.instance, extension.seq);
        if let Err(failure) = self.check_addressee(core, &extension.instance, known, &extension.receiver) {
            return self.refuse_alloc(core, from, extension.seq, &extension.instance, request.req_id, failure);
        }
        self.use_peer(core.now, &extension.instance, &from);
        // What the network delivers twice is asked once: its answer is on its way, or was taken back meanwhile.
        let seen = self.senders.get_mut(&extension.instance).is_some_and(|peer| !peer.allocs.insert(extension.seq));
        if seen {
            return core.note(IncomingNote::Unexpected { from, port: Port::Alloc, message: "AllocRequest, twice" });
        }
        let checked = self.check_alloc(core, &request, &extension);
        let checked = checked.and_then(|checked| self.check_share(&extension.instance).map(|()| checked));
        let (id, sizes) = match checked {
            Ok(checked) => checked,
            Err(failure) if extension.ahead => return self.tell_refused(core, from, extension.seq, failure),
            Err(failure) => {
                let id = request.req_id.clone();
                self.refuse_alloc(core, from, extension.seq, &extension.instance, request.req_id, failure.clone());
                // Whoever waits for it at this end need not wait longer.
                if let Some(id) = &id {
                    self.fetch_arrives(core, id);
                }
                if let Some(id) = id.filter(|id| !self.requests.contains_key(id)) {
                    self.tell_end(core, id, failure, truncate(&extension.instance), None);
                }
                return;
            }
        };
        // A name that is ready but not fetched is sent again: the newer request takes its place.
        if self.requests.get(&id).is_some_and(IncomingRequest::is_ready) {
            self.drop_ready(core, &id);
        }
        let text = "its sender is gone, and another has the request now";
        self.replace(core, &id, &Failure::new(FailureKind::PeerLost, text));
        let wait = Duration::from_millis(extension.wait_ms).min(core.settings.allocation_timeout);
        let ahead = extension.ahead;
        let request = IncomingRequest {
            instance: extension.instance,
            route: from,
            seq: extension.seq,
            keys: request.keys,
            sizes,
            known_len_bytes: extension.known_len_bytes,
            since: core.now,
            overtaken: 0,
            refused_in: None,
            verifying: None,
            origin: Origin::Pd,
            ahead,
            stage: IncomingStage::Waiting { wait },
        };
        self.requests.insert(id.clone(), request);
        if ahead {
            return self.admit_ahead(core, &id);
        }
        core.timers.set(IncomingTimer::Allocation(id.clone()), core.now + wait);
        self.fetch_arrives(core, &id);
        self.waiting.push_back(id);
        self.admit(core);
    }

    /// Grants slots to whoever may have them now.
    pub(in crate::node) fn admit(&mut self, core: &mut Core<R>) {
        #[cfg(feature = "mutants")]
        if !core.settings.keeps(Safeguard::WholeRequests) {
            return self.admit_piecemeal(core);
        }
        let mut at = 0;
        // Those that were looked at and could have been granted slots.
        let mut passed: Vec<RequestId> = Vec::new();
        while at < self.waiting.len() && passed.len() < LOOKAHEAD_MAX {
            // Nobody passes a request that has been passed often enough.
            let passed_often =
                |id: &RequestId| self.requests.get(id).is_some_and(|request| request.overtaken >= OVERTAKEN_MAX);
            if passed.iter().any(passed_often) {
                return;
            }
            let id = self.waiting[at].clone();
            // It is not slots that this one waits for.
            if self.waits_for_a_reader(core, &id) {
                at += 1;
                continue;
            }
            // A request that was refused is refused again until there may be more room, or it needs less.
            let room = self.room(core);
            let refused = self.requests.get(&id).is_some_and(|request| request.refused_in == Some(room));
            if refused || !self.try_grant(core, &id) {
                if self.make_room_for_what_was_asked_for(core) {
                    continue;
                }
                if let Some(request) = self.requests.get_mut(&id) {
                    request.refused_in = Some(room);
                }
                if self.requests.get(&id).is_some_and(|request| request.origin.can_use_growth()) {
                    core.ask_to_grow();
                }
                passed.push(id);
                at += 1;
                continue;
            }
            self.waiting.remove(at);
            for earlier in &passed {
                if let Some(request) = self.requests.get_mut(earlier) {
                    request.overtaken += 1;
                }
            }
        }
    }

    pub(super) fn allocation_timed_out(&mut self, core: &mut Core<R>, id: &RequestId) {
        let Some(request) = self.requests.get(id) else { return };
        let IncomingStage::Waiting { wait } = &request.stage else { return };
        if self.waits_for_a_reader(core, id) {
            let text = format!(
                "another request was granted some of its chunks {} ms ago or more, and nobody has fetched them since (pd_allocation_timeout_sec)",
                wait.as_millis()
            );
            return self.fail(core, id, Failure::new(FailureKind::Deadline, text));
        }
        let slot_bytes = core.settings.chunk.slot_bytes;
        let available_bytes = core.slots.available_bytes();
        let text = format!(
            "receiver has {} of {} slots free ({available_bytes} bytes), {id} needs up to {} ({} bytes); waited {} ms (pd_allocation_timeout_sec){}",
            available_bytes / slot_bytes,
            core.slots.addresses().len_bytes() / slot_bytes,
            request.keys.len(),
            core.slots.asked_bytes(&lens_bytes(&request.sizes)),
            wait.as_millis(),
            core.no_room_note(),
        );
        self.fail(core, id, Failure::new(FailureKind::NoSlots, text));
    }

    /// A step of the buffer's growth has failed: requests that are larger than the buffer is now cannot be served.
    pub(super) fn fail_those_that_need_growth(&mut self, core: &mut Core<R>) {
        let (most_bytes, share) =
            (core.slots.most_reserved_bytes(core.slots.addresses().len_bytes()), core.share_note());
        for id in self.waiting.clone() {
            let Some(request) = self.requests.get(&id) else { continue };
            let asked_bytes = core.slots.asked_bytes(&lens_bytes(&request.sizes));
            if asked_bytes > most_bytes {
                let note = core.growth.failure_note();
                let text =
                    format!("{id} needs {asked_bytes} bytes, the receiver's buffer has {most_bytes}{share}{note}");
                self.fail(core, &id, Failure::new(FailureKind::NoSlots, text));
            }
        }
    }

    pub(super) fn refuse_alloc(
        &mut self,
        core: &mut Core<R>,
        to: R,
        seq: Seq,
        instance: &str,
        request: Option<RequestId>,
        failure: Failure,
    ) {
        self.tell_refused(core, to, seq, failure.clone());
        core.note(IncomingNote::Refused { request, instance: truncate(instance), failure });
    }

    pub(super) fn tell_refused(&self, core: &mut Core<R>, to: R, seq: Seq, failure: Failure) {
        let response = AllocResponse {
            already_sent_indexes: Vec::new(),
            remote_indexes: Vec::new(),
            pd: Some(AllocReplyExtension { refusal: Some(failure), ..AllocReplyExtension::empty(seq) }),
        };
        core.send(To::Route(to), Port::Alloc, Message::AllocResponse(response));
    }

    /// Whether a sender may have one more request: none may take all places from the others.
    pub(super) fn check_share(&self, instance: &str) -> Result<(), Failure> {
        let open = |request: &&IncomingRequest<R>| {
            request.instance == instance
                && !request.ahead
                && !request.is_ready()
                && (request.origin.commits() || !request.writes_nothing())
        };
        let open_count = self.requests.values().filter(open).count();
        if open_count < self.settings.peer_requests_max {
            return Ok(());
        }
        let text = format!("{open_count} requests of this sender are open, the limit (pd_max_peer_requests)");
        Err(Failure::new(FailureKind::Limit, text))
    }

    /// Everything about an allocation that can be wrong whoever sent it.
    fn check_alloc(
        &self,
        core: &Core<R>,
        request: &AllocRequest,
        extension: &AllocExtension,
    ) -> Result<(RequestId, Vec<ChunkSize>), Failure> {
        let bad = |text: String| Err(Failure::new(FailureKind::BadRequest, text));
        let chunk = &core.settings.chunk;
        let count = request.keys.len();
        let Some(id) = request.req_id.clone() else {
            return bad("an allocation without req_id; pd-sender names every request".into());
        };
        if core.draining {
            return Err(Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down; use another"));
        }
        if (&request.fmt, &request.shape, &request.dtype) != (&chunk.wire_format, &chunk.wire_shape, &chunk.dtype) {
            let text = format!(
                "{id} has chunks of format {} shape {:?} dtype {}, this receiver's are format {} shape {:?} dtype {}",
                request.fmt, request.shape, request.dtype, chunk.wire_format, chunk.wire_shape, chunk.dtype
            );
            return Err(Failure::new(FailureKind::LayoutMismatch, text));
        }
        let sizes = chunk.sizes(&id, count, &extension.groups, request.last_chunk_toks)?;
        if request.is_last_batch == Some(false) || request.total_chunks.is_some_and(|total| total as usize != count) {
            return bad(format!("{id} comes in several batches; declare all its chunks in one AllocRequest"));
        }
        if request.keys.iter().collect::<BTreeSet<_>>().len() != count {
            return bad(format!("{id} names a chunk twice; keys must be distinct"));
        }
        let asked_bytes = core.slots.asked_bytes(&lens_bytes(&sizes));
        let most_bytes = core.slots.most_reserved_bytes(core.growth.len_max_bytes());
        if asked_bytes > most_bytes {
            let text = format!(
                "{id} has {count} chunks, {asked_bytes} bytes; the receiver's buffer has {} slots, {most_bytes} bytes{}; raise its pd_buffer_size or split the request",
                most_bytes / chunk.slot_bytes,
                core.share_note(),
            );
            return Err(Failure::new(FailureKind::TooLarge, text));
        }
        if count > core.settings.request_chunks_max {
            let text = format!(
                "{id} has {count} chunks, the limit is {} (pd_max_request_chunks)",
                core.settings.request_chunks_max
            );
            return Err(Failure::new(FailureKind::Limit, text));
        }
        match self.requests.get(&id) {
            Some(open) if !open.is_ready() && !self.lmcache_sender_is_gone(open) => {
                bad(format!("{id} is open already, or its last attempt is still ending"))
            }
            _ => {
                let open = self.asked_for();
                if open >= core.settings.requests_max {
                    let text = format!("{open} requests are open, the limit (pd_max_requests)");
                    return Err(Failure::new(FailureKind::Limit, text));
                }
                Ok((id, sizes))
            }
        }
    }

    /// Grants a waiting request all its slots, if there are enough. True: it waits no longer.
    fn try_grant(&mut self, core: &mut Core<R>, id: &RequestId) -> bool {
        let Some(request) = self.requests.get(id) else { return true };
        if !matches!(request.stage, IncomingStage::Waiting { .. }) {
            return true;
        }
        // What is shared stays where it is, perhaps in the middle of the room that the rest needs: then, if the buffer
        // cannot grow around it, it is written again.
        let can_grow = self.room(core).can_grow;
        self.try_reserve(core, id, true) || (!can_grow && self.try_reserve(core, id, false))
    }

    fn room(&self, core: &Core<R>) -> RoomSeen {
        RoomSeen {
            version: core.slots.version(),
            described_len_bytes: core.described_len_bytes,
            can_grow: core.growth.can_grow(core.slots.addresses().len_bytes()),
        }
    }

    /// Grants a waiting request all its slots, sharing ready chunks with others or not.
    pub(super) fn try_reserve(&mut self, core: &mut Core<R>, id: &RequestId, share: bool) -> bool {
        let Some(request) = self.requests.get(id) else { return true };
        let shared = if share { core.ready_of(&request.keys, &request.sizes) } else { Vec::new() };
        let is_shared: BTreeSet<u32> = shared.iter().map(|&(index, _)| index).collect();
        let missing: Vec<u32> = (0..request.keys.len() as u32).filter(|index| !is_shared.contains(index)).collect();
        let grant = GrantId(self.next_grant);
        // The chunks that this request shares do not make room for it.
        let keep: BTreeSet<SlotIndex> = shared.iter().map(|&(_, slot)| slot).collect();
        let Some(reserved) = self.reserve(core, id, grant, &missing, &keep) else { return false };
        for &(_, slot) in &shared {
            core.slots.pin(slot);
        }
        self.next_grant += 1;
        let own: Vec<(u32, SlotIndex)> = missing.into_iter().zip(reserved).collect();
        self.grant(core, id, grant, own, shared);
        true
    }

    /// Enters that a sender may write `own`, and has it told; `shared` is held for it.
    pub(super) fn grant(
        &mut self,
        core: &mut Core<R>,
        id: &RequestId,
        grant: GrantId,
        own: Vec<(u32, SlotIndex)>,
        shared: Vec<(u32, SlotIndex)>,
    ) {
        let Some(request) = self.requests.get(id) else { return };
        let (count, instance) = (request.keys.len(), request.instance.clone());
        let waited = core.now.saturating_duration_since(request.since);
        core.note(IncomingNote::Granted {
            request: id.clone(),
            instance,
            chunks: count,
            already_sent: shared.len(),
            waited,
        });
        if let Some(request) = self.requests.get_mut(id) {
            request.since = core.now;
            request.stage = IncomingStage::Granted { grant, own, shared };
        }
        core.timers.unset(IncomingTimer::Allocation(id.clone()));
        self.tell_granted(core, id);
    }
}

fn lens_bytes(sizes: &[ChunkSize]) -> Vec<u64> {
    sizes.iter().map(|size| size.len_bytes).collect()
}
