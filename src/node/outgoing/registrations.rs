//! Registrations: receivers that ask for parked chunks.
//!
//! What is sent, and what is coming, is found by the chunks' keys; the names of requests only tell what is not wanted any more. So
//! a name that is wrong, missing, used twice or anybody's never brings another request's chunks.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::parking::ParkLease;
use super::registrants::{Asked, Load, Registrant, RegistrantState, RegistrationEnd, keys_len_bytes};
use super::requests::{OutgoingRequest, OutgoingStage, RequestChunks, check_receiver};
use super::transfers::Checked;
use super::uid::{RegistrationId, Uid};
use super::{Outgoing, OutgoingNote, OutgoingTimer, Port};
use crate::ids::{
    ByteCopy, ChunkKey, Failure, FailureKind, GroupIndex, REQUEST_IDS_MAX, ReceiverAddress, Registration, RequestId,
    Seq, SlotIndex, truncate,
};
use crate::node::chunks::ChunkSize;
use crate::node::core::Core;
use crate::node::handshake;
use crate::node::output::To;
use crate::slot::SlotState;
use crate::wire::message::{InitRequest, Register, Registered, ReleaseParked};
use crate::wire::{Message, refusal};

/// Longest that a registration waits for a request that is not known, whatever it says.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Most bytes that the keys take that registrations wait for, together.
const WAITING_LEN_BYTES_MAX: usize = 64 << 20;

/// A chunk that can be sent, or that will be.
#[derive(Debug)]
pub(super) struct Found {
    key: ChunkKey,
    size: ChunkSize,
    /// None: it is being computed.
    slot: Option<SlotIndex>,
}

impl<R: Clone> Outgoing<R> {
    /// A message arrived at the rendezvous port.
    pub(in crate::node) fn handle_rendezvous(&mut self, core: &mut Core<R>, from: R, message: Message) {
        match message {
            Message::PdRegister(register) => self.on_register(core, from, register),
            Message::PdRelease(release) => self.on_release(core, from, release),
            message => self.refuse_misdirected(core, from, message),
        }
    }

    /// Whoever sends anything else here has another port in mind. Who waits for an answer gets one that says so.
    fn refuse_misdirected(&self, core: &mut Core<R>, from: R, message: Message) {
        core.note(OutgoingNote::Misdirected { message: message.type_name() });
        let answer = match message {
            Message::NixlInitRequest(InitRequest { pd: Some(extension), .. }) => {
                Some(handshake::refused(&core.settings.hello, extension.seq, handshake::misdirected(Port::Rendezvous)))
            }
            message => refusal(&message),
        };
        if let Some(answer) = answer {
            core.send(To::Route(from), Port::Rendezvous, answer);
        }
    }

    fn on_register(&mut self, core: &mut Core<R>, from: R, register: Register) {
        let id = (register.hello.instance.clone(), register.req_id.clone());
        let seq = register.seq;
        let named = |receiver: &ReceiverAddress| self.check_is_named(&register.req_id, receiver);
        let checked = Self::check_register(core, &register);
        if let Err(failure) = checked.and_then(|()| register.receiver.as_ref().map_or(Ok(()), named)) {
            return self.answer_registration(core, from, seq, id.1, Registration::Failed, Some(failure));
        }
        if self.registrants.is_late(&id, seq) {
            return;
        }
        if let Some(RegistrationEnd { state, failure, .. }) = self.registrants.end_of(&id, seq) {
            let (state, failure) = (*state, failure.clone());
            return self.answer_registration(core, from, seq, id.1, state, failure);
        }
        // Said again: it lives, and wants to know whether we do. What is held is held for longer.
        if let Some(state) = self.registrants.repeat(&id, seq, from.clone()) {
            let state = match state {
                RegistrantState::Pushing(..) => Registration::Accepted,
                RegistrantState::Waiting(_) => Registration::Pending,
                RegistrantState::Held(lease) => {
                    core.timers.set(OutgoingTimer::Lease(*lease), core.now + self.settings.lease);
                    Registration::Accepted
                }
            };
            return self.answer_registration(core, from, seq, id.1, state, None);
        }
        self.serve_registration(core, id, from, register);
    }

    /// Gives a registration what there is, or lets it wait.
    fn serve_registration(&mut self, core: &mut Core<R>, id: RegistrationId, route: R, register: Register) {
        let found = self.find_parked(core, &register.keys);
        let chunks = found.len();
        let before = self.registrants.remove(&id);
        core.timers.unset(OutgoingTimer::Registration(id.clone()));
        let wait = Duration::from_millis(register.wait_ms).min(WAIT_MAX);
        let (seq, receiver) = (register.seq, register.receiver.clone());
        let asked = Asked { names: register.ids.clone(), last: register.keys.last().cloned() };
        let given_up = if found.is_empty() { self.given_up(core, &asked.names, asked.last.as_ref()) } else { None };
        let refused = given_up.or_else(|| self.check_load(core, &register, &found).err());
        let state = match receiver {
            _ if refused.is_some() => Err((Registration::Failed, refused)),
            _ if found.is_empty() && !wait.is_zero() => {
                core.timers.set(OutgoingTimer::Registration(id.clone()), core.now + wait);
                Ok((Registration::Pending, RegistrantState::Waiting(Box::new(register))))
            }
            _ if found.is_empty() => Err((Registration::Unknown, None)),
            None => {
                let here = found.iter().filter_map(|found| found.slot);
                let slots: Vec<SlotIndex> = here.filter(|&slot| core.slots.park(slot)).collect();
                let lease = core.fresh();
                self.lease(core, lease, ParkLease { ids: asked.names, last: None, slots, unsolicited: false });
                Ok((Registration::Accepted, RegistrantState::Held(lease)))
            }
            Some(address) => {
                self.judge_guess(core, &id, &register.keys, &address);
                match self.push(core, &id, address, found) {
                    Ok(uid) => Ok((Registration::Accepted, RegistrantState::Pushing(uid, asked))),
                    Err(failure) => Err((Registration::Failed, Some(failure))),
                }
            }
        };
        // After what it asks for now is held.
        match before.map(|before| before.state) {
            Some(RegistrantState::Held(lease)) => self.end_park_lease(core, lease, false),
            // It asks for something else under the same name.
            Some(RegistrantState::Pushing(uid, _)) => {
                self.fail(core, uid, Failure::new(FailureKind::Cancelled, "the receiver has registered anew"));
            }
            Some(RegistrantState::Waiting(_)) | None => {}
        }
        let (said, failure) = match state {
            Ok((said, state)) => {
                let pushing = if let RegistrantState::Pushing(uid, _) = state { Some(uid) } else { None };
                self.registrants.insert(id.clone(), Registrant { route: route.clone(), seq, state });
                if let Some(uid) = pushing {
                    self.begin_push(core, uid);
                }
                (said, None)
            }
            Err((said, failure)) => {
                self.registrants.remember(&id, RegistrationEnd { seq, state: said, failure: failure.clone() });
                (said, failure)
            }
        };
        let (instance, request) = id;
        core.note(OutgoingNote::Registered {
            request: request.clone(),
            instance: truncate(&instance),
            state: said,
            chunks,
        });
        self.answer_registration(core, route, seq, request, said, failure);
    }

    /// A request of these chunks has begun to be parked: registrations may have waited for it.
    pub(super) fn serve_registrations(&mut self, core: &mut Core<R>, keys: &[ChunkKey]) {
        for id in self.registrants.waiting_for(keys) {
            let Some(Registrant { route, seq, state: RegistrantState::Waiting(register) }) =
                self.registrants.remove(&id)
            else {
                continue;
            };
            // It has waited, and waits no more.
            let register = Register { seq, wait_ms: 0, ..*register };
            self.serve_registration(core, id, route, register);
        }
    }

    /// A registration has waited long enough for a request that is not known.
    pub(super) fn registration_timed_out(&mut self, core: &mut Core<R>, id: &RegistrationId) {
        // What it waits for stands in prefill's queue.
        if let Some(RegistrantState::Waiting(register)) = self.registrants.state_of(id)
            && self.expected.knows(&register.ids)
        {
            let again = Duration::from_millis(register.wait_ms).min(WAIT_MAX).max(core.settings.heartbeat_interval);
            return core.timers.set(OutgoingTimer::Registration(id.clone()), core.now + again);
        }
        if let Some(Registrant { route, seq, .. }) = self.registrants.end(id, Registration::Unknown, None) {
            self.answer_registration(core, route, seq, id.1.clone(), Registration::Unknown, None);
        }
    }

    fn on_release(&mut self, core: &mut Core<R>, from: R, release: ReleaseParked) {
        let ReleaseParked { seq, instance, req_id, ids, last_key } = release;
        if !handshake::name_fits(&instance) || ids.len() > REQUEST_IDS_MAX {
            let text = format!(
                "the release of {req_id} has {} names, the limit is {REQUEST_IDS_MAX}, or comes from a name of more than {} bytes or \
                 with control characters; no release of ours sends that",
                ids.len(),
                handshake::NAME_LEN_BYTES_MAX
            );
            let failure = Some(Failure::new(FailureKind::Limit, text));
            return self.answer_registration(core, from, seq, req_id, Registration::Failed, failure);
        }
        let id = (instance, req_id);
        // What was said already is not done again: of several that are alike, the next one would be released.
        if !self.registrants.is_late(&id, seq) && self.registrants.end_of(&id, seq).is_none() {
            core.timers.unset(OutgoingTimer::Registration(id.clone()));
            let ended = self.registrants.remove(&id);
            self.registrants.remember(&id, RegistrationEnd { seq, state: Registration::Released, failure: None });
            match ended.map(|registrant| registrant.state) {
                Some(RegistrantState::Held(lease)) => self.end_park_lease(core, lease, true),
                Some(RegistrantState::Pushing(uid, _)) => {
                    self.fail(core, uid, Failure::new(FailureKind::Cancelled, "the receiver gave it up"));
                }
                Some(RegistrantState::Waiting(_)) | None => {}
            }
            self.release(core, &Asked { names: ids, last: last_key });
        }
        self.answer_registration(core, from, seq, id.1, Registration::Released, None);
    }

    /// The lease of a registration that held has ended.
    pub(super) fn park_lease_timed_out(&mut self, core: &mut Core<R>, lease: Uid) {
        if let Some(id) = self.registrants.holding(lease) {
            self.registrants.end(&id, Registration::Unknown, None);
        }
        self.end_park_lease(core, lease, false);
    }

    /// A request that serves a registration has ended badly: whoever waits for it hears of it, whatever it has been told.
    pub(super) fn registration_failed(&mut self, core: &mut Core<R>, uid: Uid, failure: &Failure) {
        let id = self.requests.get(&uid).and_then(|request| request.registration.clone());
        let Some(id) = id else { return };
        // It may have registered anew under the same name.
        if !matches!(self.registrants.state_of(&id), Some(RegistrantState::Pushing(other, _)) if *other == uid) {
            return;
        }
        let (state, failure) = (Registration::Failed, Some(failure.clone()));
        if let Some(Registrant { route, seq, .. }) = self.registrants.end(&id, state, failure.clone()) {
            self.answer_registration(core, route, seq, id.1, state, failure);
        }
    }

    /// A request that serves a registration is sent: what was kept for it makes room, and is found until the room is needed.
    pub(super) fn registration_served(&mut self, core: &mut Core<R>, id: &RegistrationId) {
        let ended = self.registrants.end(id, Registration::Accepted, None);
        if let Some(Registrant { state: RegistrantState::Pushing(_, asked), .. }) = ended {
            self.release(core, &asked);
        }
    }

    pub(super) fn answer_registration(
        &self,
        core: &mut Core<R>,
        to: R,
        seq: Seq,
        req_id: RequestId,
        state: Registration,
        failure: Option<Failure>,
    ) {
        let (instance, lease_ms) = (core.settings.hello.instance.clone(), self.settings.lease.as_millis() as u64);
        let registered = Registered { seq, instance, req_id, state, lease_ms, failure };
        core.send(To::Route(to), Port::Rendezvous, Message::PdRegistered(registered));
    }

    /// Everything about a registration that can be wrong.
    fn check_register(core: &Core<R>, register: &Register) -> Result<(), Failure> {
        handshake::check(&core.settings.hello, &register.hello)?;
        let limit = |text: String| Err(Failure::new(FailureKind::Limit, text));
        let (name, count) = (&register.req_id, register.keys.len());
        if register.ids.len() > REQUEST_IDS_MAX {
            return limit(format!("{name} is known by {} names, the limit is {REQUEST_IDS_MAX}", register.ids.len()));
        }
        if count > core.settings.request_chunks_max {
            let most = core.settings.request_chunks_max;
            return limit(format!("{name} has {count} chunks, the limit is {most} (pd_max_request_chunks)"));
        }
        if let Some(receiver) = &register.receiver {
            check_receiver(name, receiver)?;
        }
        Ok(())
    }

    /// Whether there is a place for a registration that is to hold these chunks, or to wait if there are none. Those who wait, those
    /// who hold and those who are sent something do not take each other's places.
    fn check_load(&self, core: &Core<R>, register: &Register, found: &[Found]) -> Result<(), Failure> {
        let Load { held, waiting, waiting_len_bytes } = self.registrants.load();
        let most = core.settings.requests_max;
        let waits = found.is_empty() && register.wait_ms > 0;
        let text = if waits && waiting >= most {
            format!("{waiting} registrations wait, the limit (pd_max_requests)")
        } else if waits && waiting_len_bytes + keys_len_bytes(&register.keys) > WAITING_LEN_BYTES_MAX {
            format!(
                "the keys that registrations wait for take {waiting_len_bytes} bytes, the limit is {WAITING_LEN_BYTES_MAX}"
            )
        } else if !found.is_empty() && register.receiver.is_none() && held >= most {
            format!("{held} registrations hold chunks, the limit (pd_max_requests)")
        } else {
            return Ok(());
        };
        Err(Failure::new(FailureKind::Busy, text))
    }

    /// Of these chunks those that are here, or that are being computed, in their order and each once.
    pub(super) fn find_parked(&self, core: &Core<R>, keys: &[ChunkKey]) -> Vec<Found> {
        let find = |key: &ChunkKey| {
            if let Some(slot) = core.slots.find(key) {
                let SlotState::Ready { group, .. } = core.slots.state(slot)? else { return None };
                let size = ChunkSize { group: *group, len_bytes: core.slots.range(slot)?.len_bytes };
                return Some(Found { key: key.clone(), size, slot: Some(slot) });
            }
            let request = self.requests.get(self.coming.get(key)?.first()?)?;
            let at = request.keys.iter().position(|other| other == key)?;
            let size = ChunkSize { group: request.group_of(at), len_bytes: request.chunks[at].len_bytes };
            Some(Found { key: key.clone(), size, slot: None })
        };
        let mut seen = BTreeSet::new();
        keys.iter().filter(|key| seen.insert(*key)).filter_map(find).collect()
    }

    /// A request for a registration.
    fn push(
        &mut self,
        core: &mut Core<R>,
        id: &RegistrationId,
        address: ReceiverAddress,
        found: Vec<Found>,
    ) -> Result<Uid, Failure> {
        // As many places as receivers may take are left to this side's own requests.
        let pushing = self.requests.values().filter(|request| request.registration.is_some()).count();
        let most = core.settings.requests_max.div_ceil(2);
        if pushing >= most {
            let text =
                format!("{pushing} registrations are being sent something, the limit is half of pd_max_requests");
            return Err(Failure::new(FailureKind::Busy, text));
        }
        let uid = self.send_found(core, id.1.clone(), address, found, core.settings.allocation_timeout)?;
        if let Some(request) = self.requests.get_mut(&uid) {
            request.registration = Some(id.clone());
        }
        Ok(uid)
    }

    /// A request under this name: these chunks to that receiver.
    pub(super) fn send_found(
        &mut self,
        core: &mut Core<R>,
        name: RequestId,
        address: ReceiverAddress,
        mut found: Vec<Found>,
        wait: Duration,
    ) -> Result<Uid, Failure> {
        // What is here and not parked is not sent if as much as may be is parked.
        found.retain(|found| found.slot.is_none_or(|slot| core.hold_sent(slot)));
        let held: Vec<SlotIndex> = found.iter().filter_map(|found| found.slot).collect();
        let (found, last_chunk_tokens) = expressible(core, found);
        let peer = match found.is_empty() {
            false => self.peer_for(core, &address),
            true => Err(Failure::new(FailureKind::Unknown, "what is here of it cannot be sent together")),
        };
        let sent = if peer.is_ok() { &found[..] } else { &[] };
        let kept: BTreeSet<SlotIndex> = sent.iter().filter_map(|found| found.slot).collect();
        held.into_iter().filter(|slot| !kept.contains(slot)).for_each(|slot| core.let_go_sent(slot));
        let peer = peer?;
        let groups: Vec<GroupIndex> = found.iter().map(|found| found.size.group).collect();
        let groups = if groups.iter().all(|group| *group == GroupIndex(0)) { Vec::new() } else { groups };
        let sizes = found.iter().map(|found| found.size).collect();
        let keys = found.iter().map(|found| found.key.clone()).collect();
        let chunks = RequestChunks { keys, groups, last_chunk_tokens, sizes };
        let stage = OutgoingStage::Connecting { open_id: Seq(0), wait };
        let mut request =
            OutgoingRequest { peer, address: Some(address), ..OutgoingRequest::new(core.now, name, chunks, stage) };
        let uid = core.fresh();
        for (found, chunk) in found.into_iter().zip(&mut request.chunks) {
            chunk.local = found.slot;
            if found.slot.is_none() {
                self.awaiting.entry(found.key).or_default().insert(uid);
            }
        }
        self.requests.insert(uid, request);
        Ok(uid)
    }

    /// Asks the receiver of such a request for room, if it is connected.
    fn begin_push(&mut self, core: &mut Core<R>, uid: Uid) {
        let peer = self.requests.get(&uid).map(|request| request.peer);
        if peer.is_some_and(|peer| self.connection_of(peer).is_some()) {
            self.drop_aheads_without_room(core, uid);
            self.ask_for_room(core, uid);
        }
    }

    /// Sends of such a request what is here, and what its receiver has granted a place.
    pub(super) fn send_parked(&mut self, core: &mut Core<R>, uid: Uid) {
        let Some(request) = self.requests.get_mut(&uid) else { return };
        if !matches!(request.stage, OutgoingStage::Open { last: false, .. }) {
            return;
        }
        let (mut checked, mut needless) = (Vec::new(), Vec::new());
        let mut is_last = true;
        for ((index, key), chunk) in (0u32..).zip(&request.keys).zip(&mut request.chunks) {
            match (chunk.remote, chunk.local) {
                // The receiver has it already.
                (None, Some(slot)) => {
                    core.let_go_sent(slot);
                    chunk.local = None;
                }
                (None, None) => needless.push(key.clone()),
                (Some(remote_offset), Some(slot)) => {
                    let (len_bytes, range) = (chunk.len_bytes, core.slots.range(slot));
                    // False: it was sent before.
                    let (Some(range), true) = (range, chunk.queued.insert(0, len_bytes)) else { continue };
                    let copy = ByteCopy { local_offset: range.start, remote_offset, len_bytes };
                    checked.push(Checked { chunk: index, offset_bytes: 0, copy });
                }
                (Some(_), None) => is_last &= chunk.done_bytes > 0,
            }
        }
        if is_last {
            request.since = core.now;
            if let OutgoingStage::Open { last, .. } = &mut request.stage {
                *last = true;
            }
        }
        for key in needless {
            self.awaits_no_more(&key, uid);
        }
        if !checked.is_empty()
            && let Err(failure) = self.post(core, uid, checked, None)
        {
            return self.fail(core, uid, failure);
        }
        self.commit_if_written(core, uid);
    }
}

/// An allocation says how many tokens the last chunk of every group with short ones has, and that the others are whole: leaves out
/// what that does not describe.
fn expressible<R>(core: &Core<R>, mut found: Vec<Found>) -> (Vec<Found>, u32) {
    let shape = &core.settings.chunk;
    let tokens_of = |size: ChunkSize| {
        let token_bytes = shape.token_bytes.get(usize::from(size.group.0)).copied().unwrap_or(1).max(1);
        (size.len_bytes / token_bytes) as u32
    };
    let mut lasts: BTreeMap<GroupIndex, usize> = BTreeMap::new();
    for (at, found) in found.iter().enumerate().filter(|(_, found)| !shape.is_whole(found.size.group)) {
        lasts.insert(found.size.group, at);
    }
    let mut tokens: Vec<u32> = lasts.values().map(|&at| tokens_of(found[at].size)).collect();
    tokens.dedup();
    let whole = |at: usize| lasts.values().any(|&last| last == at) || tokens_of(found[at].size) == shape.chunk_tokens;
    if tokens.is_empty() {
        return (found, shape.chunk_tokens);
    }
    if let [last_tokens] = tokens[..]
        && (0..found.len()).all(whole)
    {
        return (found, last_tokens);
    }
    found.retain(|found| tokens_of(found.size) == shape.chunk_tokens);
    (found, shape.chunk_tokens)
}
