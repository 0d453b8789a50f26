//! Senders of another make: LMCache's PD backend, unmodified.
//!
//! What differs from our own. Its allocations carry no name of their sender, so a sender is the connection that they come
//! through. Its grants are whole pages of the buffer as it was at the handshake. It says nothing when it has written, and
//! tells its proxy instead: what it was granted is *granted* here until a reader, which has heard from the proxy, vouches
//! for it. And it never says that it has stopped: what nobody vouches for in time is quarantined until its connection is
//! gone. A refusal is page index -1 for every chunk.

use std::collections::BTreeMap;
use std::time::Instant;

use super::requests::{Request, Stage};
use super::{Note, Output, Port, ReceiverSession, Timer};
use crate::ids::{ChunkKey, ConnectionId, Failure, FailureKind, GrantId, Pages, RequestId, Seq, SlotIndex, clip};
use crate::protocol::chunks::ChunkSize;
use crate::wire::message::{AllocRequest, AllocResponse, CancelNotif, InitResponse, MemRegRequest, MemRegResponse};
use crate::wire::{Message, descriptor_list};

/// What is known of senders of another make.
#[derive(Debug)]
pub(super) struct Stock<R> {
    /// Engines that have shaken hands, by the name that they were given here.
    agents: BTreeMap<String, Agent<R>>,
    /// Connections that allocations come through, and what their senders are called here.
    routes: Vec<(R, String)>,
    /// Chunks that are granted and not vouched for, and for which request.
    granted: BTreeMap<ChunkKey, RequestId>,
    /// How much of the buffer all of them know, in bytes.
    known_len_bytes: Option<u64>,
    names: u64,
}

#[derive(Debug)]
struct Agent<R> {
    /// In the order of their handshakes.
    number: u64,
    state: AgentState<R>,
}

#[derive(Debug)]
enum AgentState<R> {
    /// The engine reads its metadata; then it is answered.
    Loading {
        reply_to: R,
    },
    Met(ConnectionId),
}

/// A request of such a sender, which may come in several batches.
#[derive(Debug)]
pub(super) struct Batches {
    /// Chunks that it has announced in all.
    total: usize,
    /// Pages reserved for batches that are to come. Their sender does not know of them.
    pub(super) spare: Vec<SlotIndex>,
    /// No further batch comes.
    complete: bool,
}

impl<R> Default for Stock<R> {
    fn default() -> Self {
        Self { agents: BTreeMap::new(), routes: Vec::new(), granted: BTreeMap::new(), known_len_bytes: None, names: 0 }
    }
}

impl<R: PartialEq> Stock<R> {
    fn fresh(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    fn route_of(&self, route: &R) -> Option<&String> {
        self.routes.iter().find(|(known, _)| known == route).map(|(_, instance)| instance)
    }

    /// Whether allocations of this sender can still come.
    pub(super) fn is_connected(&self, instance: &str) -> bool {
        self.routes.iter().any(|(_, known)| known == instance)
    }

    /// How many senders are connected or have shaken hands.
    pub(super) fn len(&self) -> usize {
        self.agents.len().max(self.routes.len())
    }

    pub(super) fn forget_granted(&mut self, keys: &[ChunkKey], id: &RequestId) {
        for key in keys {
            if self.granted.get(key) == Some(id) {
                self.granted.remove(key);
            }
        }
    }
}

impl<R: Clone + PartialEq> ReceiverSession<R> {
    /// `NixlInitRequest` without our part.
    pub(super) fn on_stock_init(&mut self, from: R, metadata: Vec<u8>) {
        if let Err(failure) = self.check_stock_served() {
            self.note(Note::PeerRefused { instance: "a sender of another make".into(), failure });
            let refusal = InitResponse { remote_agent_name: Vec::new(), remote_meta_bytes: Vec::new(), pd: None };
            return self.send(from, Port::Init, Message::NixlInitResponse(refusal));
        }
        if self.stock.agents.len() >= self.settings.peers_max {
            self.forget_oldest_agent();
        }
        let number = self.stock.fresh();
        let instance = format!("lmcache-agent-{number}");
        let agent = Agent { number, state: AgentState::Loading { reply_to: from } };
        self.stock.agents.insert(instance.clone(), agent);
        self.outputs.push_back(Output::LoadPeer { instance, agent_name: None, metadata });
    }

    /// Whether senders of another make can be served at all.
    fn check_stock_served(&self) -> Result<(), Failure> {
        let refuse = |text: &str| Err(Failure::new(FailureKind::HandshakeRefused, text));
        if self.settings.pages.is_none() {
            return refuse("LMCache's senders write through NIXL alone; set transfer_channel: nixl");
        }
        if self.settings.chunk.token_bytes.len() > 1 {
            return refuse("the layout has several groups of layers, and LMCache's wire has one; use pd-sender");
        }
        if self.draining {
            return Err(Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down; use another"));
        }
        Ok(())
    }

    fn forget_oldest_agent(&mut self) {
        let met = self.stock.agents.iter().filter(|(_, agent)| matches!(agent.state, AgentState::Met(_)));
        let oldest = met.min_by_key(|(_, agent)| agent.number).map(|(instance, _)| instance.clone());
        if let Some(instance) = oldest
            && let Some(Agent { state: AgentState::Met(connection), .. }) = self.stock.agents.remove(&instance)
        {
            self.outputs.push_back(Output::ForgetPeer(connection));
        }
    }

    /// The engine has met a sender of another make, or could not. False: this is none.
    pub(super) fn on_stock_loaded(&mut self, instance: &str, result: &Result<ConnectionId, String>) -> bool {
        let Some(agent) = self.stock.agents.get_mut(instance) else { return false };
        let AgentState::Loading { reply_to } = &agent.state else { return false };
        let to = reply_to.clone();
        let response = match result {
            Ok(connection) => {
                agent.state = AgentState::Met(*connection);
                self.note(Note::PeerMet { instance: instance.to_owned() });
                // It names itself by this in its next message.
                let remote_agent_name = instance.as_bytes().to_vec();
                InitResponse { remote_agent_name, remote_meta_bytes: self.settings.metadata.clone(), pd: None }
            }
            Err(text) => {
                self.stock.agents.remove(instance);
                let failure = Failure::new(FailureKind::HandshakeRefused, text.as_str());
                self.note(Note::PeerRefused { instance: instance.to_owned(), failure });
                InitResponse { remote_agent_name: Vec::new(), remote_meta_bytes: Vec::new(), pd: None }
            }
        };
        self.send(to, Port::Init, Message::NixlInitResponse(response));
        true
    }

    /// `NixlMemRegRequest` without our part: its pages for ours.
    pub(super) fn on_stock_mem_reg(&mut self, from: R, request: &MemRegRequest) {
        let instance = clip(&String::from_utf8_lossy(&request.remote_agent_name));
        let remote_xfer_dlist_bytes = match self.pages_for(&instance, &request.local_xfer_dlist_bytes) {
            Ok(list) => list,
            Err(failure) => {
                self.note(Note::PeerRefused { instance, failure });
                // Its binding cannot load this, which is an error at its side and nothing else.
                Vec::new()
            }
        };
        let response = MemRegResponse { remote_xfer_dlist_bytes, pd: None };
        self.send(from, Port::Init, Message::NixlMemRegResponse(response));
    }

    fn pages_for(&mut self, instance: &str, list: &[u8]) -> Result<Vec<u8>, Failure> {
        let refuse = |kind: FailureKind, text: String| Err(Failure::new(kind, text));
        self.check_stock_served()?;
        let met = self.stock.agents.get(instance).is_some_and(|agent| matches!(agent.state, AgentState::Met(_)));
        let Some(pages) = self.settings.pages.filter(|_| met) else {
            return refuse(FailureKind::HandshakeRefused, "it has not shaken hands; restart that sender".into());
        };
        let (module, theirs) = match descriptor_list::decode(list) {
            Ok(decoded) => decoded,
            Err(error) => return refuse(FailureKind::BadRequest, error.to_string()),
        };
        if theirs.page_bytes != pages.page_bytes {
            let text = format!(
                "its chunks have {} bytes and this receiver's {}; start both sides for the same model, dtype, chunk_size \
                 and tensor-parallel size",
                theirs.page_bytes, pages.page_bytes
            );
            return refuse(FailureKind::LayoutMismatch, text);
        }
        let count = self.described_len_bytes / pages.page_bytes;
        let known_len_bytes = count * pages.page_bytes;
        self.stock.known_len_bytes =
            Some(self.stock.known_len_bytes.map_or(known_len_bytes, |known| known.min(known_len_bytes)));
        Ok(descriptor_list::encode(&module, &Pages { count, ..pages }))
    }

    /// `AllocRequest` without our part.
    pub(super) fn on_stock_alloc(&mut self, now: Instant, from: R, request: AllocRequest) {
        let instance = match self.stock.route_of(&from) {
            Some(instance) => instance.clone(),
            None => {
                if self.stock.routes.len() >= self.settings.peers_max {
                    let text = "as many senders are connected as may be (pd_max_peers)";
                    let failure = Failure::new(FailureKind::Limit, text);
                    return self.refuse_stock(from, request.keys.len(), "a sender of another make", None, failure);
                }
                let instance = format!("lmcache-{}", self.stock.fresh());
                self.stock.routes.push((from.clone(), instance.clone()));
                instance
            }
        };
        let count = request.keys.len();
        let id = match request.req_id.clone() {
            Some(id) => id,
            // Its synchronous backend names no requests: readers find the chunks by their keys.
            None => match RequestId::new(format!("{instance}-{}", self.stock.fresh())) {
                Ok(id) => id,
                Err(_) => return,
            },
        };
        match self.check_stock_alloc(&instance, &id, &request) {
            Ok(sizes) if self.is_next_batch(&instance, &id) => self.take_batch(now, from, id, request, sizes),
            Ok(sizes) => {
                // An earlier attempt under this name has been given up by whoever tries again, and may still be written.
                self.end(now, &id, Failure::new(FailureKind::Cancelled, "its sender asked for it again"), false);
                self.begin_stock_request(now, from, id, instance, request, sizes);
            }
            Err(failure) => {
                if !self.requests.contains_key(&id) {
                    self.fail_waiters(&id, &failure, &instance);
                }
                self.refuse_stock(from, count, &instance, Some(id), failure);
            }
        }
    }

    /// Everything that can be wrong about an allocation.
    fn check_stock_alloc(
        &self,
        instance: &str,
        id: &RequestId,
        request: &AllocRequest,
    ) -> Result<Vec<ChunkSize>, Failure> {
        let refuse = |kind: FailureKind, text: String| Err(Failure::new(kind, text));
        self.check_stock_served()?;
        let chunk = &self.settings.chunk;
        let count = request.keys.len();
        let Some(known_len_bytes) = self.stock.known_len_bytes else {
            return refuse(FailureKind::HandshakeRefused, "no sender of another make has shaken hands".into());
        };
        // A request of one chunk has that chunk's shape, which may be short.
        let mut shape = request.shape.clone();
        if let Some(tokens) = shape.get_mut(TOKEN_DIMENSION)
            && count == 1
            && *tokens == request.last_chunk_toks
        {
            *tokens = u64::from(chunk.chunk_tokens);
        }
        if (&request.fmt, &shape, &request.dtype) != (&chunk.wire_format, &chunk.wire_shape, &chunk.dtype) {
            let text = format!(
                "{id} has chunks of format {} shape {:?} dtype {}, this receiver's are format {} shape {:?} dtype {}",
                request.fmt, request.shape, request.dtype, chunk.wire_format, chunk.wire_shape, chunk.dtype
            );
            return refuse(FailureKind::LayoutMismatch, text);
        }
        let sizes = chunk.sizes(id, count, &[], request.last_chunk_toks)?;
        let total = announced(request);
        let pages = known_len_bytes / chunk.slot_bytes;
        if total as u64 > pages {
            let text = format!("{id} has {total} chunks; this sender knows {pages} pages of the receiver's buffer");
            return refuse(FailureKind::TooLarge, text);
        }
        if total > self.settings.request_chunks_max {
            let limit = self.settings.request_chunks_max;
            return refuse(
                FailureKind::Limit,
                format!("{id} has {total} chunks, the limit is {limit} (pd_max_request_chunks)"),
            );
        }
        if self.is_next_batch(instance, id) {
            let open = self.requests.get(id);
            let batches = open.and_then(|open| open.batches.as_ref());
            let left = open.zip(batches).map_or(0, |(open, batches)| batches.total.saturating_sub(open.keys.len()));
            if count > left {
                return refuse(
                    FailureKind::BadRequest,
                    format!("{id} has {left} chunks left to come, this batch has {count}"),
                );
            }
            return Ok(sizes);
        }
        match self.requests.get(id) {
            Some(open) if open.instance != instance && !open.is_ready() => {
                refuse(FailureKind::BadRequest, format!("{id} is open already, for {}", open.instance))
            }
            Some(_) => Ok(sizes),
            None if self.requests.len() >= self.settings.requests_max => refuse(
                FailureKind::Limit,
                format!("{} requests are open, the limit (pd_max_requests)", self.requests.len()),
            ),
            None => self.check_share(instance).map(|()| sizes),
        }
    }

    /// Whether the sender has batches of this request to announce yet.
    fn is_next_batch(&self, instance: &str, id: &RequestId) -> bool {
        self.requests.get(id).is_some_and(|open| {
            open.instance == instance
                && matches!(open.stage, Stage::Granted { .. })
                && open.batches.as_ref().is_some_and(|batches| !batches.complete)
        })
    }

    fn begin_stock_request(
        &mut self,
        now: Instant,
        from: R,
        id: RequestId,
        instance: String,
        request: AllocRequest,
        sizes: Vec<ChunkSize>,
    ) {
        self.drop_ready(now, &id);
        self.ended.forget(&id);
        let wait = self.settings.allocation_timeout;
        self.timers.set(Timer::Allocation(id.clone()), now + wait);
        let batches =
            Batches { total: announced(&request), spare: Vec::new(), complete: request.is_last_batch.unwrap_or(true) };
        let request = Request {
            instance,
            route: from,
            seq: Seq(0),
            keys: request.keys,
            sizes,
            known_len_bytes: self.stock.known_len_bytes.unwrap_or(0),
            since: now,
            overtaken: 0,
            verifying: None,
            batches: Some(batches),
            stage: Stage::Waiting { wait, held: None },
        };
        self.requests.insert(id.clone(), request);
        self.waiting.push_back(id);
        self.admit(now);
    }

    /// The pages for a request's first batch and for those to come.
    pub(super) fn reserve_pages(&mut self, id: &RequestId, grant: GrantId, missing: &[u32]) -> Option<Vec<SlotIndex>> {
        let request = self.requests.get_mut(id)?;
        let batches = request.batches.as_mut()?;
        let to_come = batches.total.saturating_sub(request.keys.len());
        let (page_bytes, known) = (self.settings.chunk.slot_bytes, request.known_len_bytes);
        let mut pages = self.slots.reserve_pages(grant, missing.len() + to_come, page_bytes, known).ok()?;
        batches.spare = pages.split_off(missing.len());
        for (&index, &slot) in missing.iter().zip(&pages) {
            self.slots.set_chunk_bytes(slot, grant, request.sizes[index as usize].len_bytes);
        }
        Some(pages)
    }

    /// A further batch of a request: its pages are there.
    fn take_batch(&mut self, now: Instant, from: R, id: RequestId, batch: AllocRequest, sizes: Vec<ChunkSize>) {
        let shared = self.ready_of(&batch.keys, &sizes);
        let Some(request) = self.requests.get_mut(&id) else { return };
        let (Stage::Granted { grant, own, shared: held }, Some(batches)) = (&mut request.stage, &mut request.batches)
        else {
            return;
        };
        let first = request.keys.len() as u32;
        let mut fresh = Vec::new();
        for (index, size) in (first..).zip(&sizes) {
            if let Some(&(_, slot)) = shared.iter().find(|(at, _)| first + at == index) {
                self.slots.hold(slot);
                held.push((index, slot));
            } else if let Some(slot) = batches.spare.pop() {
                self.slots.set_chunk_bytes(slot, *grant, size.len_bytes);
                own.push((index, slot));
                fresh.push((index, slot));
            }
        }
        batches.complete = batch.is_last_batch.unwrap_or(true);
        let unneeded = if batches.complete { std::mem::take(&mut batches.spare) } else { Vec::new() };
        let grant = *grant;
        request.keys.extend(batch.keys);
        request.sizes.extend(sizes);
        request.route = from;
        for slot in unneeded {
            self.slots.writer_stopped(slot, grant);
        }
        let already_sent = shared.iter().map(|&(index, _)| index).collect();
        self.answer_stock(&id, &fresh, already_sent);
        self.serve_waiters(now, &id);
        self.admit(now);
    }

    /// Tells a sender of another make where its chunks go.
    pub(super) fn answer_stock(&mut self, id: &RequestId, own: &[(u32, SlotIndex)], already_sent: Vec<u32>) {
        let Some(request) = self.requests.get(id) else { return };
        let page_bytes = self.settings.chunk.slot_bytes;
        let page = |&(_, slot): &(u32, SlotIndex)| Some((self.slots.range(slot)?.start / page_bytes) as i64);
        let remote_indexes = own.iter().filter_map(page).collect();
        for &(index, _) in own {
            self.stock.granted.insert(request.keys[index as usize].clone(), id.clone());
        }
        let response = AllocResponse { already_sent_indexes: already_sent, remote_indexes, pd: None };
        let to = request.route.clone();
        self.send(to, Port::Alloc, Message::AllocResponse(response));
    }

    /// LMCache's own way of saying no, which leaves its sender alive.
    pub(super) fn refuse_stock(
        &mut self,
        to: R,
        count: usize,
        instance: &str,
        request: Option<RequestId>,
        failure: Failure,
    ) {
        let response =
            AllocResponse { already_sent_indexes: Vec::new(), remote_indexes: vec![-1; count.max(1)], pd: None };
        self.send(to, Port::Alloc, Message::AllocResponse(response));
        self.note(Note::Refused { request, instance: clip(instance), failure });
    }

    /// `CancelNotif` without our part. Its writes may go on: nobody waits for them there.
    pub(super) fn on_stock_cancel(&mut self, now: Instant, from: R, cancel: &CancelNotif) {
        let mine = self.requests.get(&cancel.req_id).filter(|open| self.stock.route_of(&from) == Some(&open.instance));
        if let Some(instance) = mine.map(|open| open.instance.clone()) {
            let text = format!("sender {instance} cancelled it");
            self.end(now, &cancel.req_id, Failure::new(FailureKind::Cancelled, text), false);
        }
        let response = AllocResponse { already_sent_indexes: Vec::new(), remote_indexes: Vec::new(), pd: None };
        self.send(from, Port::Alloc, Message::AllocResponse(response));
        self.admit(now);
    }

    /// A sender's connection is gone: its process has ended, or has closed its backend. What it was granted can still be
    /// vouched for; what it has left is free once nothing of it can be under way. False: it is none of these.
    pub(super) fn on_stock_route_gone(&mut self, now: Instant, route: &R) -> bool {
        let Some(at) = self.stock.routes.iter().position(|(known, _)| known == route) else { return false };
        let (_, instance) = self.stock.routes.remove(at);
        self.note(Note::PeerLost { instance: instance.clone(), reason: "closed its connection".into() });
        let waiting =
            self.waiting.iter().filter(|id| self.requests.get(*id).is_some_and(|open| open.instance == instance));
        for id in waiting.cloned().collect::<Vec<_>>() {
            let text = format!("sender {instance} closed its connection before {id} had slots");
            self.end(now, &id, Failure::new(FailureKind::PeerLost, text), false);
        }
        self.timers.set(Timer::Linger(instance), now + self.settings.linger);
        self.admit(now);
        true
    }

    /// Makes chunks ready that a sender of another make was granted: a reader knows from the proxy that they are written.
    pub(super) fn vouch_for(&mut self, now: Instant, keys: &[ChunkKey]) {
        for key in keys {
            if self.slots.find(key).is_some() {
                continue;
            }
            let Some(id) = self.stock.granted.remove(key) else { continue };
            self.vouch_for_one(now, &id, key);
        }
    }

    fn vouch_for_one(&mut self, now: Instant, id: &RequestId, key: &ChunkKey) {
        let Some(request) = self.requests.get_mut(id) else { return };
        let Stage::Granted { grant, own, shared } = &mut request.stage else { return };
        let Some(at) = own.iter().position(|&(index, _)| request.keys[index as usize] == *key) else { return };
        let (index, slot) = own.remove(at);
        let committed = self.slots.commit(slot, *grant, key.clone(), request.sizes[index as usize].group);
        debug_assert!(committed, "slot {slot} was granted with {grant} and is not reserved");
        shared.push((index, slot));
        let all = own.is_empty() && request.batches.as_ref().is_some_and(|batches| batches.complete);
        if all {
            // Whoever vouches takes the chunks by their keys, so the request has served its purpose.
            self.make_ready(now, id);
            self.drop_ready(now, id);
        }
    }

    pub(super) fn is_of_stock(&self, id: &RequestId) -> bool {
        self.requests.get(id).is_some_and(|request| request.batches.is_some())
    }

    /// The time is up in which somebody could have fetched what was granted.
    pub(super) fn nobody_vouched(&mut self, now: Instant, id: &RequestId) {
        let text = format!(
            "nobody fetched it within {} ms of its grant (pd_retention_sec), and its sender does not say when it is written",
            self.settings.retention.as_millis()
        );
        self.end(now, id, Failure::new(FailureKind::Expired, text), false);
    }

    /// Whether a request is granted as a whole, so that whoever knows it to be written can have it.
    pub(super) fn can_be_vouched_for(&self, id: &RequestId) -> bool {
        self.requests.get(id).is_some_and(|request| {
            matches!(request.stage, Stage::Granted { .. })
                && request.batches.as_ref().is_some_and(|batches| batches.complete)
        })
    }

    /// Positions of the chunks that are granted and that nobody has vouched for.
    pub(super) fn granted_among(&self, keys: &[ChunkKey]) -> Vec<u32> {
        let granted =
            |(_, key): &(u32, &ChunkKey)| self.stock.granted.contains_key(key) && self.slots.find(key).is_none();
        (0..).zip(keys).filter(granted).map(|(index, _)| index).collect()
    }
}

/// Where the tokens are in the shape of KV_2LTD, `[2, layers, tokens, kv_heads * head_size]`.
const TOKEN_DIMENSION: usize = 2;

/// Chunks that a sender has announced for a request, this batch included. Its synchronous backend announces none.
fn announced(request: &AllocRequest) -> usize {
    let total = request.total_chunks.map_or(0, |total| total as usize);
    total.max(request.keys.len())
}
