//! Their requests: grants in pages, in one batch or several; refusals, cancels, and the end of a connection.

use std::collections::BTreeSet;
use std::time::Duration;

use super::super::origin::Origin;
use super::super::request::{IncomingRequest, IncomingStage};
use super::super::{Incoming, IncomingNote, IncomingTimer, Port};
use super::{Batches, NAME_PREFIX};
use crate::ids::{Failure, FailureKind, GrantId, RequestId, Seq, SlotIndex, truncate};
use crate::node::chunks::ChunkSize;
use crate::node::core::Core;
use crate::node::lmcache_terms;
use crate::node::output::To;
use crate::node::safeguards::Safeguard;
use crate::wire::Message;
use crate::wire::message::{AllocRequest, AllocResponse, CancelNotif};

impl<R: Clone + PartialEq> Incoming<R> {
    /// `AllocRequest` without our part.
    pub(super) fn on_lmcache_alloc(&mut self, core: &mut Core<R>, from: R, request: AllocRequest) {
        let known = self.lmcache.route_of(&from).cloned();
        let is_new = known.is_none();
        let instance = known.unwrap_or_else(|| format!("{NAME_PREFIX}{}", self.lmcache.fresh()));
        let count = request.keys.len();
        let id = match request.req_id.clone() {
            Some(id) => id,
            // Its synchronous backend names no requests: readers find the chunks by their keys.
            None => match RequestId::new(format!("{instance}-{}", self.lmcache.fresh())) {
                Ok(id) => id,
                Err(_) => return,
            },
        };
        let mut checked = self.check_lmcache_alloc(core, &instance, &id, &request);
        if is_new && self.lmcache.routes.len() >= core.settings.peers_max {
            let text = "as many senders are connected as may be (pd_max_peers)";
            checked = checked.and_then(|_| Err(Failure::new(FailureKind::Limit, text)));
        }
        // Whoever is refused takes no place.
        if is_new && checked.is_ok() {
            self.lmcache.routes.push((from.clone(), instance.clone()));
        }
        match checked {
            Ok(sizes) if self.is_next_batch(&instance, &id) => self.take_batch(core, from, id, request, sizes),
            Ok(sizes) => {
                // An earlier attempt under this name has been given up by whoever tries again, and may still be written.
                self.replace(core, &id, &Failure::new(FailureKind::Cancelled, "its sender asked for it again"));
                self.begin_lmcache_request(core, from, (id, instance), request, sizes);
            }
            Err(failure) => {
                // Readers do not know a name that a request was given here.
                if !self.requests.contains_key(&id) && request.req_id.is_some() {
                    self.tell_end(core, id.clone(), failure.clone(), instance.clone(), None);
                }
                self.refuse_pages(core, from, count, &instance, Some(id), failure);
            }
        }
    }

    /// Everything that can be wrong about an allocation.
    fn check_lmcache_alloc(
        &self,
        core: &Core<R>,
        instance: &str,
        id: &RequestId,
        request: &AllocRequest,
    ) -> Result<Vec<ChunkSize>, Failure> {
        let refuse = |kind: FailureKind, text: String| Err(Failure::new(kind, text));
        self.check_lmcache_served(core)?;
        let chunk = &core.settings.chunk;
        let count = request.keys.len();
        let Some(known_len_bytes) = self.lmcache.known_len_bytes else {
            return refuse(FailureKind::HandshakeRefused, "no LMCache sender has made its handshake".into());
        };
        // A request of one chunk has that chunk's shape, which may be short.
        let mut shape = request.shape.clone();
        if let Some(tokens) = shape.get_mut(TOKEN_DIMENSION)
            && count == 1
            && *tokens == request.last_chunk_toks
        {
            *tokens = u64::from(chunk.chunk_tokens);
        }
        let dtype = lmcache_terms::dtype(&chunk.dtype)?;
        if (&request.fmt, &shape, &request.dtype) != (&chunk.wire_format, &chunk.wire_shape, &dtype) {
            let text = format!(
                "{id} has chunks of format {} shape {:?} dtype {}, this receiver's are format {} shape {:?} dtype {}",
                request.fmt, request.shape, request.dtype, chunk.wire_format, chunk.wire_shape, dtype
            );
            return refuse(FailureKind::LayoutMismatch, text);
        }
        let sizes = chunk.sizes(id, count, &[], request.last_chunk_toks)?;
        if request.keys.iter().collect::<BTreeSet<_>>().len() != count {
            return refuse(FailureKind::BadRequest, format!("{id} names a chunk twice; keys must be distinct"));
        }
        let total = announced(request);
        let pages = core.slots.most_reserved_bytes(known_len_bytes) / chunk.slot_bytes;
        if total as u64 > pages {
            let text = format!(
                "{id} has {total} chunks; this sender knows {pages} pages of the receiver's buffer{}",
                core.share_note()
            );
            return refuse(FailureKind::TooLarge, text);
        }
        if total > core.settings.request_chunks_max {
            let limit = core.settings.request_chunks_max;
            return refuse(
                FailureKind::Limit,
                format!("{id} has {total} chunks, the limit is {limit} (pd_max_request_chunks)"),
            );
        }
        if self.is_next_batch(instance, id) {
            let open = self.requests.get(id);
            let batches = open.and_then(|open| open.origin.batches());
            let left = open.zip(batches).map_or(0, |(open, batches)| batches.total.saturating_sub(open.keys.len()));
            let earlier: BTreeSet<_> = open.iter().flat_map(|open| &open.keys).collect();
            if request.keys.iter().any(|key| earlier.contains(key)) {
                return refuse(FailureKind::BadRequest, format!("{id} names a chunk of an earlier batch again"));
            }
            if count > left {
                return refuse(
                    FailureKind::BadRequest,
                    format!("{id} has {left} chunks left to come, this batch has {count}"),
                );
            }
            return is_whole(id, request, left).map(|()| sizes);
        }
        is_whole(id, request, total)?;
        match self.requests.get(id) {
            // That sender is gone, and whoever asks has taken its place. A pd-sender's request is not pushed aside.
            Some(open) if self.lmcache_sender_is_gone(open) => Ok(sizes),
            Some(open) if open.instance != instance && (!open.is_ready() || open.origin.commits()) => {
                refuse(FailureKind::BadRequest, format!("{id} is open already, for {}", open.instance))
            }
            Some(_) => Ok(sizes),
            None if self.asked_for() >= core.settings.requests_max => refuse(
                FailureKind::Limit,
                format!("{} requests are open, the limit (pd_max_requests)", self.asked_for()),
            ),
            None => self.check_share(instance).map(|()| sizes),
        }
    }

    /// Whether the sender has batches of this request to announce yet.
    fn is_next_batch(&self, instance: &str, id: &RequestId) -> bool {
        self.requests.get(id).is_some_and(|open| {
            open.instance == instance
                && matches!(open.stage, IncomingStage::Granted { .. })
                && open.origin.batches().is_some_and(|batches| !batches.complete)
        })
    }

    fn begin_lmcache_request(
        &mut self,
        core: &mut Core<R>,
        from: R,
        (id, instance): (RequestId, String),
        request: AllocRequest,
        sizes: Vec<ChunkSize>,
    ) {
        let wait = core.settings.allocation_timeout;
        core.timers.set(IncomingTimer::Allocation(id.clone()), core.now + wait);
        let (complete, total) = (is_last(&request), announced(&request));
        let batches = Batches { total, spare: Vec::new(), complete, unnamed: request.req_id.is_none() };
        let request = IncomingRequest {
            instance,
            route: from,
            seq: Seq(0),
            keys: request.keys,
            sizes,
            known_len_bytes: self.lmcache.known_len_bytes.unwrap_or(0),
            since: core.now,
            overtaken: 0,
            refused_in: None,
            verifying: None,
            origin: Origin::Lmcache(batches),
            ahead: false,
            stage: IncomingStage::Waiting { wait },
        };
        self.requests.insert(id.clone(), request);
        self.waiting.push_back(id);
        self.admit(core);
    }

    /// The pages for a request's first batch and for those to come.
    pub(in crate::node::incoming) fn reserve_pages(
        &mut self,
        core: &mut Core<R>,
        id: &RequestId,
        grant: GrantId,
        missing: &[u32],
        keep: &BTreeSet<SlotIndex>,
    ) -> Option<Vec<SlotIndex>> {
        let request = self.requests.get_mut(id)?;
        let batches = request.origin.batches_mut()?;
        let to_come = batches.total.saturating_sub(request.keys.len());
        let (page_bytes, known) = (core.settings.chunk.slot_bytes, request.known_len_bytes);
        let mut pages = core.slots.reserve_pages(grant, missing.len() + to_come, page_bytes, keep, known).ok()?;
        batches.spare = pages.split_off(missing.len());
        for (&index, &slot) in missing.iter().zip(&pages) {
            core.slots.set_chunk_bytes(slot, grant, request.sizes[index as usize].len_bytes);
        }
        Some(pages)
    }

    /// A further batch of a request: its pages are there.
    fn take_batch(&mut self, core: &mut Core<R>, from: R, id: RequestId, batch: AllocRequest, sizes: Vec<ChunkSize>) {
        let shared = core.ready_of(&batch.keys, &sizes);
        let Some(request) = self.requests.get_mut(&id) else { return };
        let (IncomingStage::Granted { grant, own, shared: held }, Some(batches)) =
            (&mut request.stage, request.origin.batches_mut())
        else {
            return;
        };
        let first = request.keys.len() as u32;
        let mut fresh = Vec::new();
        for (index, size) in (first..).zip(&sizes) {
            if let Some(&(_, slot)) = shared.iter().find(|(at, _)| first + at == index) {
                core.slots.pin(slot);
                held.push((index, slot));
            } else if let Some(slot) = batches.spare.pop() {
                core.slots.set_chunk_bytes(slot, *grant, size.len_bytes);
                own.push((index, slot));
                fresh.push((index, slot));
            }
        }
        batches.complete = is_last(&batch);
        let unneeded = if batches.complete { std::mem::take(&mut batches.spare) } else { Vec::new() };
        let grant = *grant;
        request.keys.extend(batch.keys);
        request.sizes.extend(sizes);
        request.route = from;
        for slot in unneeded {
            core.slots.free_granted(slot, grant);
        }
        let already_sent = shared.iter().map(|&(index, _)| index).collect();
        self.answer_pages(core, &id, &fresh, already_sent);
        self.serve_waiters(core, &id);
        self.admit(core);
    }

    /// Tells an LMCache sender where its chunks go.
    pub(in crate::node::incoming) fn answer_pages(
        &mut self,
        core: &mut Core<R>,
        id: &RequestId,
        own: &[(u32, SlotIndex)],
        already_sent: Vec<u32>,
    ) {
        let Some(request) = self.requests.get(id) else { return };
        let page_bytes = core.settings.chunk.slot_bytes;
        let page = |&(_, slot): &(u32, SlotIndex)| Some((core.slots.range(slot)?.start / page_bytes) as i64);
        let remote_indexes = own.iter().filter_map(page).collect();
        for &(index, _) in own {
            self.lmcache.granted.entry(request.keys[index as usize].clone()).or_default().push(id.clone());
        }
        let response = AllocResponse { already_sent_indexes: already_sent, remote_indexes, pd: None };
        let to = request.route.clone();
        core.send(To::Route(to), Port::Alloc, Message::AllocResponse(response));
    }

    /// LMCache's own way of saying no, which leaves its sender alive.
    pub(in crate::node::incoming) fn refuse_pages(
        &mut self,
        core: &mut Core<R>,
        to: R,
        count: usize,
        instance: &str,
        request: Option<RequestId>,
        failure: Failure,
    ) {
        let response =
            AllocResponse { already_sent_indexes: Vec::new(), remote_indexes: vec![-1; count.max(1)], pd: None };
        core.send(To::Route(to), Port::Alloc, Message::AllocResponse(response));
        core.note(IncomingNote::Refused { request, instance: truncate(instance), failure });
    }

    /// `CancelNotif` without our part. Its writes may go on: nobody waits for them there.
    pub(super) fn on_lmcache_cancel(&mut self, core: &mut Core<R>, from: R, cancel: &CancelNotif) {
        let mine =
            self.requests.get(&cancel.req_id).filter(|open| self.lmcache.route_of(&from) == Some(&open.instance));
        if let Some(instance) = mine.map(|open| open.instance.clone()) {
            let text = format!("sender {instance} cancelled it");
            self.end(core, &cancel.req_id, Failure::new(FailureKind::Cancelled, text), false);
        }
        let response = AllocResponse { already_sent_indexes: Vec::new(), remote_indexes: Vec::new(), pd: None };
        core.send(To::Route(from), Port::Alloc, Message::AllocResponse(response));
        self.admit(core);
    }

    /// A sender's connection is gone: its process has ended, or has closed its backend. What it was granted can still be
    /// vouched for; what it has left is free once nothing of it can be under way. False: it is none of these.
    pub(in crate::node::incoming) fn on_lmcache_route_gone(&mut self, core: &mut Core<R>, route: &R) -> bool {
        let Some(at) = self.lmcache.routes.iter().position(|(known, _)| known == route) else { return false };
        let (_, instance) = self.lmcache.routes.remove(at);
        core.note(IncomingNote::PeerLost { instance: instance.clone(), reason: "closed its connection".into() });
        let waiting =
            self.waiting.iter().filter(|id| self.requests.get(*id).is_some_and(|open| open.instance == instance));
        for id in waiting.cloned().collect::<Vec<_>>() {
            let text = format!("sender {instance} closed its connection before {id} had slots");
            self.end(core, &id, Failure::new(FailureKind::PeerLost, text), false);
        }
        let linger = if core.settings.keeps(Safeguard::Linger) { self.settings.linger } else { Duration::ZERO };
        core.timers.set(IncomingTimer::Linger(instance), core.now + linger);
        self.admit(core);
        true
    }
}

/// Where the tokens are in the shape of KV_2LTD, `[2, layers, tokens, kv_heads * head_size]`.
const TOKEN_DIMENSION: usize = 2;

/// Whether no further batch follows. Its synchronous backend does not say: each is a request of its own.
fn is_last(request: &AllocRequest) -> bool {
    request.is_last_batch.unwrap_or(true)
}

/// Refuses a last batch without those that came before it, `left` chunks of which were to come yet: the request that they
/// were of has ended here, and its sender does not know. A part of a prompt would be taken for the whole.
fn is_whole(id: &RequestId, last: &AllocRequest, left: usize) -> Result<(), Failure> {
    let count = last.keys.len();
    if !is_last(last) || count == left {
        return Ok(());
    }
    let text = format!(
        "{id} ends with a batch of {count} chunks where {left} were to come: it is another request than this receiver knows under the name, or its earlier batches were given up here; send it again as a whole"
    );
    Err(Failure::new(FailureKind::BadRequest, text))
}

/// Chunks that a sender has announced for a request, this batch included. Its synchronous backend announces none.
fn announced(request: &AllocRequest) -> usize {
    let total = request.total_chunks.map_or(0, |total| total as usize);
    total.max(request.keys.len())
}
