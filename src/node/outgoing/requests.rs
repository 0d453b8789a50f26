//! A request from `open` to its acknowledged commit.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::coverage::Coverage;
use super::uid::{RegistrationId, Uid};
use super::{Event, OpenRequest, Outgoing, OutgoingNote, OutgoingTimer, Phases, Port};
use crate::ids::{
    Checksum, ChunkKey, ClientId, Failure, FailureKind, GrantId, GroupIndex, PeerId, ReceiverAddress, RequestId, Seq,
    SlotIndex, truncate,
};
use crate::node::Answer;
use crate::node::ChunkShape;
use crate::node::Output;
use crate::node::chunks::ChunkSize;
use crate::node::core::Core;
use crate::node::output::To;
use crate::node::safeguards::Safeguard;
use crate::wire::Message;
use crate::wire::message::{AllocExtension, AllocRequest, AllocResponse, Commit, CommitAck, Verifying};

/// What a request is told that was not sent in time.
pub(super) const WRITE_DEADLINE_PASSED: &str =
    "the receiver's grant ended before everything was sent (its pd_write_timeout_sec)";

/// How many allocations are remembered, for answers that come late or twice.
const ASKED_MAX: usize = 4096;

/// Longest that a grant is taken to last, whatever its receiver says.
const WRITE_TIME_MAX: Duration = Duration::from_secs(86_400);

/// A request that has not ended, or whose transfers have not.
#[derive(Debug)]
pub(super) struct OutgoingRequest {
    pub(super) id: RequestId,
    /// Who opened it, as long as somebody cares.
    pub(super) client: Option<ClientId>,
    pub(super) peer: PeerId,
    /// Where it goes; none of one that is being parked.
    pub(super) address: Option<ReceiverAddress>,
    /// Whose registration it serves, with chunks that are parked; none of one whose client stages its chunks.
    pub(super) registration: Option<RegistrationId>,
    /// Of which parked request it pushes the chunks ahead; none of one that somebody asked for.
    pub(super) ahead: Option<Uid>,
    pub(super) keys: Vec<ChunkKey>,
    pub(super) groups: Vec<GroupIndex>,
    pub(super) last_chunk_tokens: u32,
    pub(super) chunks: Vec<Chunk>,
    /// Whether to stage every chunk to send as soon as it is granted.
    pub(super) stage_all: bool,
    /// Local slots by what they hold.
    pub(super) staged: BTreeMap<SlotIndex, u32>,
    /// Of one that is being parked: its chunks that are complete, or were ready before.
    pub(super) parked: Vec<SlotIndex>,
    /// Whether its client learns of its end by an event, at a moment when it may be filling slots.
    pub(super) told_by_event: bool,
    /// Transfers that the engine has not finished.
    pub(super) in_flight: usize,
    pub(super) bytes: u64,
    pub(super) opened_at: Instant,
    /// When the current phase began.
    pub(super) since: Instant,
    pub(super) phases: Phases,
    /// Whether its receiver had forgotten us once, and was connected to again.
    pub(super) reconnected: bool,
    pub(super) stage: OutgoingStage,
}

/// What a request is made of.
#[derive(Debug)]
pub(super) struct RequestChunks {
    pub(super) keys: Vec<ChunkKey>,
    pub(super) groups: Vec<GroupIndex>,
    pub(super) last_chunk_tokens: u32,
    pub(super) sizes: Vec<ChunkSize>,
}

/// One chunk of a request.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) len_bytes: u64,
    /// Where it goes in the receiver's buffer, in bytes from its start, once that is granted, and 0 if it is parked; none when it is there
    /// already.
    pub(super) remote: Option<u64>,
    /// Its local slot, while it is staged, or pinned to be sent.
    pub(super) local: Option<SlotIndex>,
    /// What was given to the engine.
    pub(super) queued: Coverage,
    /// How much of that is written.
    pub(super) done_bytes: u64,
    /// Checksums of its written parts: start -> (length, checksum).
    pub(super) sums: BTreeMap<u64, (u64, Checksum)>,
}

#[derive(Debug)]
pub(super) enum OutgoingStage {
    /// The receiver has not answered the handshake yet.
    Connecting { open_id: Seq, wait: Duration },
    /// The receiver was asked for slots.
    Allocating { open_id: Seq, seq: Seq, wait: Duration },
    /// Chunks can be staged and sent.
    Open { grant: GrantId, write_until: Instant, last: bool },
    /// Everything is written; the receiver was told.
    Committing { grant: GrantId },
    /// Its chunks are kept here, for whoever registers for them.
    Parking { ids: Vec<RequestId>, open_id: Option<Seq>, last: bool, released: bool, unsolicited: bool },
    /// It has ended without having been sent. Once its last transfer has ended too, the receiver is told that nothing writes any more, and
    /// `cancel`, the client that has cancelled it, that it is over.
    Closing { grant: Option<GrantId>, alloc_seq: Option<Seq>, cancel: Option<(ClientId, Seq)> },
}

impl Chunk {
    /// Of all its bytes, if every part of it was summed.
    fn checksum(&self) -> Option<Checksum> {
        let summed: u64 = self.sums.values().map(|(len_bytes, _)| len_bytes).sum();
        let mut parts = self.sums.values();
        let &(_, first) = parts.next()?;
        let whole = parts.fold(first, |sum, &(len_bytes, next)| sum.followed_by(next, len_bytes));
        (summed == self.len_bytes).then_some(whole)
    }

    /// Whether its client may still be filling it, if it is staged.
    pub(super) fn is_filling(&self) -> bool {
        self.queued.len_bytes() < self.len_bytes
    }
}

impl OutgoingRequest {
    /// One that has no chunk anywhere yet, and goes nowhere.
    pub(super) fn new(now: Instant, id: RequestId, chunks: RequestChunks, stage: OutgoingStage) -> Self {
        let RequestChunks { keys, groups, last_chunk_tokens, sizes } = chunks;
        let chunk = |size: ChunkSize| Chunk {
            len_bytes: size.len_bytes,
            remote: None,
            local: None,
            queued: Coverage::default(),
            done_bytes: 0,
            sums: BTreeMap::new(),
        };
        Self {
            id,
            client: None,
            peer: PeerId(0),
            address: None,
            registration: None,
            ahead: None,
            chunks: sizes.into_iter().map(chunk).collect(),
            keys,
            groups,
            last_chunk_tokens,
            stage_all: false,
            staged: BTreeMap::new(),
            parked: Vec::new(),
            told_by_event: false,
            in_flight: 0,
            bytes: 0,
            opened_at: now,
            since: now,
            phases: Phases::default(),
            reconnected: false,
            stage,
        }
    }

    /// Whether its receiver may hold slots for it.
    pub(super) fn may_have_grant(&self) -> bool {
        !matches!(self.stage, OutgoingStage::Connecting { .. } | OutgoingStage::Parking { .. })
    }

    /// Whether its chunks stay here.
    pub(super) const fn is_parking(&self) -> bool {
        matches!(self.stage, OutgoingStage::Parking { .. })
    }

    /// Whether what it sends is parked here.
    pub(super) const fn sends_parked(&self) -> bool {
        self.registration.is_some() || self.ahead.is_some()
    }

    /// Whether it has ended but for its transfers.
    pub(super) const fn is_closing(&self) -> bool {
        matches!(self.stage, OutgoingStage::Closing { .. })
    }

    /// Whether its client may stage and send.
    pub(super) const fn takes_sends(&self) -> bool {
        matches!(
            self.stage,
            OutgoingStage::Open { last: false, .. } | OutgoingStage::Parking { last: false, open_id: None, .. }
        )
    }

    /// Its receiver, for an answer or a log line; empty of one that is parked.
    pub(super) fn receiver(&self) -> String {
        self.address.as_ref().map(ReceiverAddress::to_string).unwrap_or_default()
    }

    pub(super) fn group_of(&self, chunk: usize) -> GroupIndex {
        self.groups.get(chunk).copied().unwrap_or_default()
    }

    /// Whether its client has slots of it that it may not have filled yet.
    pub(super) fn is_filling(&self) -> bool {
        self.staged.values().any(|&chunk| self.chunks[chunk as usize].is_filling())
    }

    pub(super) fn staged_slots(&self) -> usize {
        self.staged.len()
    }

    /// Whether it has no slots at its receiver yet.
    pub(super) const fn waits(&self) -> bool {
        matches!(self.stage, OutgoingStage::Connecting { .. } | OutgoingStage::Allocating { .. })
    }

    /// Makes it wait for a handshake again. What it has waited so far counts.
    pub(super) fn set_aside(&mut self, now: Instant, open_id: Seq, wait: Duration) {
        let wait = wait.saturating_sub(now.saturating_duration_since(self.opened_at));
        self.stage = OutgoingStage::Connecting { open_id, wait };
        // Detach the request from the peer, so that dropping the peer does not fail it.
        self.peer = PeerId(0);
    }

    /// Asks for its slots, as LMCache asks.
    pub(super) fn alloc_message(&self, chunk: &ChunkShape) -> AllocRequest {
        AllocRequest {
            keys: self.keys.clone(),
            fmt: chunk.wire_format,
            shape: chunk.wire_shape.clone(),
            dtype: chunk.dtype.clone(),
            last_chunk_toks: u64::from(self.last_chunk_tokens),
            req_id: Some(self.id.clone()),
            is_last_batch: Some(true),
            total_chunks: Some(self.keys.len() as u32),
            pd: None,
        }
    }
}

impl<R: Clone> Outgoing<R> {
    /// A client announces a request.
    pub(in crate::node) fn handle_open(&mut self, core: &mut Core<R>, client: ClientId, id: Seq, open: OpenRequest) {
        let checked = self.check_open(core, &open).and_then(|sizes| Ok((self.peer_for(core, &open.receiver)?, sizes)));
        let (peer, sizes) = match checked {
            Ok(checked) => checked,
            Err(failure) => return core.refuse(client, id, failure, Some(truncate(&open.receiver.to_string()))),
        };
        let OpenRequest { keys, groups, last_chunk_tokens, .. } = open;
        let chunks = RequestChunks { keys, groups, last_chunk_tokens, sizes };
        let stage = OutgoingStage::Connecting { open_id: id, wait: self.allocation_wait(core, open.wait) };
        let request = OutgoingRequest {
            client: Some(client),
            peer,
            address: Some(open.receiver),
            stage_all: open.stage,
            ..OutgoingRequest::new(core.now, open.id.clone(), chunks, stage)
        };
        let uid = core.fresh();
        self.requests.insert(uid, request);
        self.request_by_name.insert(open.id, uid);
        if self.connection_of(peer).is_some() {
            self.ask_for_room(core, uid);
        }
    }

    /// The request that this client opened under this name, if it has not ended.
    pub(super) fn find_request(&self, client: ClientId, name: &RequestId) -> Result<Uid, Failure> {
        let uid = self.request_by_name.get(name).copied();
        uid.filter(|uid| self.requests.get(uid).is_some_and(|request| request.client == Some(client))).ok_or_else(
            || {
                let text = format!("no request {name} of yours is open: it was never opened here, or it has ended");
                Failure::new(FailureKind::Unknown, text)
            },
        )
    }

    /// Asks a receiver of ours for slots.
    pub(super) fn allocate(&mut self, core: &mut Core<R>, uid: Uid) {
        let seq = Seq(core.fresh());
        let Some(request) = self.requests.get_mut(&uid) else { return };
        let OutgoingStage::Connecting { open_id, wait } = request.stage else { return };
        request.stage = OutgoingStage::Allocating { open_id, seq, wait };
        self.asked.insert(seq, (request.id.clone(), None));
        if self.asked.len() > ASKED_MAX {
            self.asked.pop_first();
        }
        let mut message = request.alloc_message(&core.settings.chunk);
        message.pd = Some(AllocExtension {
            seq,
            instance: core.settings.hello.instance.clone(),
            wait_ms: wait.as_millis() as u64,
            groups: request.groups.clone(),
            known_len_bytes: self.receivers.get(&request.peer).map_or(0, |peer| peer.len_bytes),
            receiver: self.receivers.get(&request.peer).map(|peer| peer.instance.clone()).unwrap_or_default(),
            ahead: request.ahead.is_some(),
        });
        let peer = request.peer;
        self.awaited.insert(seq, uid);
        // The receiver's own answer says more than our clock: give it the time of an acknowledgement beyond the wait.
        core.timers.set(OutgoingTimer::Allocation(uid), core.now + wait + self.settings.commit_timeout);
        core.send(To::Peer(peer), Port::Alloc, Message::AllocRequest(message));
    }

    pub(super) fn allocation_timed_out(&mut self, core: &mut Core<R>, uid: Uid) {
        if let Some(failure) = self.lmcache_allocation_timed_out(core, uid) {
            return self.fail(core, uid, failure);
        }
        let Some(OutgoingRequest { stage: OutgoingStage::Allocating { wait, .. }, .. }) = self.requests.get(&uid)
        else {
            return;
        };
        let text = format!(
            "the receiver did not answer the allocation in time; it was given {} ms to find slots and {} ms to say so",
            wait.as_millis(),
            self.settings.commit_timeout.as_millis()
        );
        self.fail(core, uid, Failure::new(FailureKind::Deadline, text));
    }

    pub(super) fn on_alloc_response(&mut self, core: &mut Core<R>, peer: PeerId, response: AllocResponse) {
        let Some(extension) = response.pd else {
            return self.note_unexpected(core, peer, "AllocResponse without `pd`");
        };
        if self.ack_answered(core, peer, extension.seq) {
            return;
        }
        let Some(&uid) = self.awaited.get(&extension.seq) else {
            return self.on_unawaited_grant(core, peer, extension.seq, extension.grant);
        };
        if let Some(update) = extension.memory {
            self.on_memory_update(core, peer, update);
        }
        let len_bytes = self.receivers.get(&peer).map_or(0, |peer| peer.len_bytes);
        let Some(request) = self.requests.get_mut(&uid).filter(|request| request.peer == peer) else { return };
        let OutgoingStage::Allocating { open_id, seq, .. } = request.stage else { return };
        if seq != extension.seq {
            return;
        }
        self.awaited.remove(&seq);
        core.timers.unset(OutgoingTimer::Allocation(uid));
        let Some(grant) = extension.grant.filter(|_| extension.refusal.is_none()) else {
            let failure = extension.refusal.map(truncated).unwrap_or_else(|| {
                Failure::new(FailureKind::Other, "the receiver granted nothing and did not say why")
            });
            if failure.kind == FailureKind::HandshakeRefused {
                self.awaited.insert(seq, uid);
                return self.reconnect(core, peer, failure);
            }
            return self.fail(core, uid, failure);
        };
        if let Some((_, taken)) = self.asked.get_mut(&seq) {
            *taken = Some(grant);
        }
        // The receiver's word, but not for ever: what it says may be any number.
        let write_until = core.now + Duration::from_millis(extension.write_within_ms).min(WRITE_TIME_MAX);
        let placed = place_chunks(request, &response.already_sent_indexes, &extension.offsets, len_bytes);
        let Some(already_sent) = placed else {
            let text = format!(
                "the receiver answered {} chunks with {} places and {} already sent; expected places that share no byte within {len_bytes}, \
                 one for each chunk that is not already sent",
                request.chunks.len(),
                extension.offsets.len(),
                response.already_sent_indexes.len()
            );
            return self.fail(core, uid, Failure::new(FailureKind::Other, text));
        };
        request.stage = OutgoingStage::Open { grant, write_until, last: false };
        self.opened(core, uid, open_id, write_until, already_sent);
    }

    /// A request has its slots: its client may fill and send.
    pub(super) fn opened(
        &mut self,
        core: &mut Core<R>,
        uid: Uid,
        open_id: Seq,
        write_until: Instant,
        already_sent: Vec<u32>,
    ) {
        core.timers.unset(OutgoingTimer::Allocation(uid));
        let Some(request) = self.requests.get_mut(&uid) else { return };
        request.phases.alloc = core.now.saturating_duration_since(request.opened_at);
        request.since = core.now;
        let sends_parked = request.sends_parked();
        let note = OutgoingNote::Opened {
            request: request.id.clone(),
            receiver: request.receiver(),
            chunks: request.chunks.len(),
            already_sent: already_sent.len(),
            took: request.phases.alloc,
        };
        let (client, name, stage_all) = (request.client, request.id.clone(), request.stage_all);
        core.timers.set(OutgoingTimer::Write(uid), write_until);
        core.note(note);
        if sends_parked {
            self.send_parked(core, uid);
        } else if let Some(client) = client {
            let slots = if stage_all { self.stage_granted(core, uid) } else { Vec::new() };
            core.answer(client, open_id, Answer::Opened { request: name, already_sent, slots });
        }
    }

    /// Everything is written: tells a receiver of ours.
    pub(super) fn commit(&mut self, core: &mut Core<R>, uid: Uid) {
        let seq = Seq(core.fresh());
        let Some(request) = self.requests.get_mut(&uid) else { return };
        let OutgoingStage::Open { grant, last: true, .. } = request.stage else { return };
        let peer = request.peer;
        request.stage = OutgoingStage::Committing { grant };
        let granted = request.chunks.iter().filter(|chunk| chunk.remote.is_some());
        let mut checksums: Vec<Option<Checksum>> = granted.map(Chunk::checksum).collect();
        if checksums.iter().all(Option::is_none) {
            checksums.clear();
        }
        let instance = core.settings.hello.instance.clone();
        let commit = Commit { seq, instance, req_id: request.id.clone(), grant, checksums };
        // Only a mutant of the simulation notifies before the commit is acknowledged.
        if self.settings.notify_proxy && !core.settings.keeps(Safeguard::CommitBeforeNotify) {
            core.outputs.push_back(Output::NotifyProxy { request: commit.req_id.clone() });
        }
        self.awaited.insert(seq, uid);
        self.commits.insert(uid, commit.clone());
        core.timers.unset(OutgoingTimer::Write(uid));
        core.timers.set(OutgoingTimer::Commit(uid), core.now + self.settings.commit_timeout);
        core.timers.set(OutgoingTimer::Recommit(uid), core.now + self.retransmit_after());
        core.send(To::Peer(peer), Port::Alloc, Message::PdCommit(commit));
    }

    /// Sends a commit again that was not answered: it, or its answer, may have been lost.
    pub(super) fn retransmit_commit(&mut self, core: &mut Core<R>, uid: Uid) {
        let Some(commit) = self.commits.get(&uid).cloned() else { return };
        let Some(request) = self.requests.get(&uid) else { return };
        if matches!(request.stage, OutgoingStage::Committing { .. }) {
            core.send(To::Peer(request.peer), Port::Alloc, Message::PdCommit(commit));
            core.timers.set(OutgoingTimer::Recommit(uid), core.now + self.retransmit_after());
        }
    }

    pub(super) fn on_commit_ack(&mut self, core: &mut Core<R>, peer: PeerId, ack: CommitAck) {
        let Some(uid) = self.awaited.remove(&ack.seq) else { return };
        let Some(request) = self.requests.get(&uid).filter(|request| request.peer == peer) else { return };
        if !matches!(request.stage, OutgoingStage::Committing { .. }) {
            return;
        }
        if let Some(refusal) = ack.refusal {
            return self.fail(core, uid, truncated(refusal));
        }
        self.finish_sent(core, uid, core.settings.keeps(Safeguard::CommitBeforeNotify));
    }

    /// The receiver is still checking what was written.
    pub(super) fn on_verifying(&mut self, core: &mut Core<R>, peer: PeerId, verifying: &Verifying) {
        let Some(&uid) = self.awaited.get(&verifying.seq) else { return };
        let committing = |request: &OutgoingRequest| {
            request.peer == peer && matches!(request.stage, OutgoingStage::Committing { .. })
        };
        if self.requests.get(&uid).is_some_and(committing) {
            core.timers.set(OutgoingTimer::Commit(uid), core.now + self.settings.commit_timeout);
        }
    }

    /// Everything of a request is at its receiver, as surely as that receiver lets us know.
    pub(super) fn finish_sent(&mut self, core: &mut Core<R>, uid: Uid, notify: bool) {
        let Some(mut request) = self.remove(core, uid) else { return };
        request.phases.commit = core.now.saturating_duration_since(request.since);
        let chunks = request.chunks.iter().filter(|chunk| chunk.remote.is_some()).count() as u32;
        self.counts.bytes += request.bytes;
        if request.ahead.is_some() {
            return self.pushed_ahead(core, request, chunks);
        }
        self.counts.requests_sent += 1;
        // The proxy is told after the commit is acknowledged, once, and never for a request that failed.
        if self.settings.notify_proxy && notify && request.registration.is_none() {
            core.outputs.push_back(Output::NotifyProxy { request: request.id.clone() });
        }
        if let (Some(registration), Some(address)) = (&request.registration, &request.address) {
            self.guess.was_sent(address);
            self.registration_served(core, registration, request.keys.clone());
        }
        let receiver = request.receiver();
        let (bytes, phases) = (request.bytes, request.phases);
        if let Some(client) = request.client {
            let event = Event::Sent { request: request.id.clone(), chunks, bytes, phases };
            core.outputs.push_back(Output::Event { client, event });
        }
        core.note(OutgoingNote::Sent { request: request.id, receiver, chunks, bytes, phases });
    }

    pub(super) fn forget_deadlines(&mut self, core: &mut Core<R>, uid: Uid) {
        for timer in [
            OutgoingTimer::Allocation(uid),
            OutgoingTimer::Write(uid),
            OutgoingTimer::Commit(uid),
            OutgoingTimer::Recommit(uid),
        ] {
            core.timers.unset(timer);
        }
        self.commits.remove(&uid);
    }

    /// How long to wait for slots that somebody wants to wait for so long.
    pub(super) fn allocation_wait(&self, core: &Core<R>, wanted: Option<Duration>) -> Duration {
        let most = core.settings.allocation_timeout;
        wanted.map_or(most, |wanted| wanted.min(most))
    }

    fn check_open(&self, core: &Core<R>, open: &OpenRequest) -> Result<Vec<ChunkSize>, Failure> {
        let sizes = self.check_chunks(core, &open.id, &open.keys, &open.groups, open.last_chunk_tokens)?;
        check_receiver(&open.id, &open.receiver)?;
        Ok(sizes)
    }

    /// What any request of a client must be, wherever it goes.
    pub(super) fn check_chunks(
        &self,
        core: &Core<R>,
        id: &RequestId,
        keys: &[ChunkKey],
        groups: &[GroupIndex],
        last_chunk_tokens: u32,
    ) -> Result<Vec<ChunkSize>, Failure> {
        let bad = |text: String| Err(Failure::new(FailureKind::BadRequest, text));
        let count = keys.len();
        if core.draining {
            return Err(Failure::new(FailureKind::ShuttingDown, "this sender is shutting down; use another"));
        }
        if self.request_by_name.contains_key(id) {
            return bad(format!("{id} is open already; cancel it first, or wait for its end"));
        }
        let sizes = core.settings.chunk.sizes(id, count, groups, u64::from(last_chunk_tokens))?;
        if keys.iter().collect::<BTreeSet<_>>().len() != count {
            return bad(format!("{id} names a chunk twice; keys must be distinct"));
        }
        if count > core.settings.request_chunks_max {
            let text = format!(
                "{id} has {count} chunks, the limit is {} (pd_max_request_chunks)",
                core.settings.request_chunks_max
            );
            return Err(Failure::new(FailureKind::Limit, text));
        }
        let asked_for = self.requests.len() - self.aheads();
        if asked_for >= core.settings.requests_max {
            let text = format!("{asked_for} requests are open, the limit (pd_max_requests)");
            return Err(Failure::new(FailureKind::Limit, text));
        }
        Ok(sizes)
    }
}

/// Whether that can be connected to.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_receiver(id: &RequestId, receiver: &ReceiverAddress) -> Result<(), Failure> {
    receiver.check().map_err(|text| Failure::new(FailureKind::BadRequest, format!("{id} goes to {text}")))
}

/// A peer's words, made fit for an answer and a log line.
pub(super) fn truncated(failure: Failure) -> Failure {
    Failure::new(failure.kind, truncate(&failure.text))
}

/// Notes where each chunk goes. Returns the positions that need not be sent; none when the answer does not add up.
fn place_chunks(
    request: &mut OutgoingRequest,
    already_sent: &[u32],
    offsets: &[u64],
    len_bytes: u64,
) -> Option<Vec<u32>> {
    let skip: BTreeSet<u32> = already_sent.iter().copied().collect();
    let in_range = skip.last().is_none_or(|&last| (last as usize) < request.chunks.len());
    if !in_range || skip.len() + offsets.len() != request.chunks.len() {
        return None;
    }
    let sent = (0u32..).zip(&mut request.chunks).filter(|(index, _)| !skip.contains(index)).map(|(_, chunk)| chunk);
    let mut places: Vec<(u64, u64)> = Vec::with_capacity(offsets.len());
    for (chunk, &offset) in sent.zip(offsets) {
        places.push((offset, offset.checked_add(chunk.len_bytes).filter(|&end| end <= len_bytes)?));
        chunk.remote = Some(offset);
    }
    places.sort_unstable();
    let apart = places.windows(2).all(|pair| pair[0].1 <= pair[1].0);
    apart.then(|| skip.into_iter().collect())
}
