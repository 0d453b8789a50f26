//! Parked chunks: kept here, under their keys and a lease, until whoever needs them registers for them.
//!
//! A client parks a request as it opens one: it stages, fills and sends. A chunk that is complete stays, ready, and is sent to
//! each receiver that asks for it. The lease begins when the last chunk is complete. When it ends the chunks make room, and are
//! found until the room is needed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::requests::{OutgoingRequest, OutgoingStage, RequestChunks};
use super::uid::Uid;
use super::{Event, Outgoing, OutgoingNote, OutgoingTimer, ParkRequest};
use crate::ids::{ChunkKey, ClientId, Failure, FailureKind, REQUEST_IDS_MAX, RequestId, Seq, SlotIndex, StagedSlot};
use crate::node::Answer;
use crate::node::Output;
use crate::node::chunks::ChunkSize;
use crate::node::core::Core;
use crate::slot::SlotState;

/// A hold on chunks that somebody may ask for.
#[derive(Debug)]
pub(super) struct ParkLease {
    /// What those call the request who will ask.
    pub(super) ids: Vec<RequestId>,
    pub(super) slots: Vec<SlotIndex>,
    /// Nobody is told of it: it ends when it was pushed ahead.
    pub(super) unsolicited: bool,
}

impl<R: Clone> Outgoing<R> {
    /// A client announces a request whose chunks are to be kept for whoever registers for them.
    pub(in crate::node) fn handle_park(&mut self, core: &mut Core<R>, client: ClientId, id: Seq, park: ParkRequest) {
        let sizes = match self.check_park(core, &park) {
            Ok(sizes) => sizes,
            Err(failure) => {
                let mut ids = park.ids;
                ids.truncate(REQUEST_IDS_MAX);
                self.give_up(core, &park.id, ids, &failure);
                return core.refuse(client, id, failure, None);
            }
        };
        let ParkRequest { id: name, ids, keys, groups, last_chunk_tokens, wait, unsolicited, stays } = park;
        self.take_up_names(&ids);
        let parked_keys = keys.clone();
        let here: Vec<(u32, SlotIndex)> =
            core.ready_of(&keys, &sizes).into_iter().filter(|&(_, slot)| core.slots.park(slot)).collect();
        let chunks = RequestChunks { keys, groups, last_chunk_tokens, sizes };
        let parking = OutgoingStage::Parking { ids, open_id: Some(id), last: false, released: false, unsolicited };
        let mut request = OutgoingRequest {
            client: Some(client),
            parked: here.iter().map(|&(_, slot)| slot).collect(),
            ..OutgoingRequest::new(core.now, name.clone(), chunks, parking)
        };
        let is_here: BTreeSet<u32> = here.into_iter().map(|(index, _)| index).collect();
        let (uid, mut missing) = (core.fresh(), Vec::new());
        for ((index, chunk), key) in (0u32..).zip(&mut request.chunks).zip(&request.keys) {
            if !is_here.contains(&index) {
                chunk.remote = Some(0);
                missing.push(index);
                self.coming.entry(key.clone()).or_default().insert(uid);
            }
        }
        self.requests.insert(uid, request);
        self.request_by_name.insert(name.clone(), uid);
        // All slots at once: requests that kept some and waited for the others would wait for each other.
        if missing.is_empty() {
            self.parking_opened(core, uid, Vec::new());
        } else {
            self.queue_for_staging(core, (client, id), uid, missing, wait);
        }
        self.serve_registrations(core, &parked_keys);
        if !stays {
            self.push_ahead(core, uid);
        }
    }

    /// A request that is to be parked has its slots.
    pub(super) fn parking_opened(&mut self, core: &mut Core<R>, uid: Uid, slots: Vec<StagedSlot>) {
        let Some(request) = self.requests.get_mut(&uid) else { return };
        let OutgoingStage::Parking { open_id, .. } = &mut request.stage else { return };
        if let (Some(id), Some(client)) = (open_id.take(), request.client) {
            let here = (0u32..).zip(&request.chunks).filter(|(_, chunk)| chunk.remote.is_none());
            let already_sent = here.map(|(index, _)| index).collect();
            core.answer(client, id, Answer::Opened { request: request.id.clone(), already_sent, slots });
        }
    }

    fn check_park(&self, core: &Core<R>, park: &ParkRequest) -> Result<Vec<ChunkSize>, Failure> {
        if !self.settings.parks {
            let text =
                "nobody could ask this sender for parked chunks: it has no rendezvous port; set pd_rendezvous_port";
            return Err(Failure::new(FailureKind::BadRequest, text));
        }
        let sizes = self.check_chunks(core, &park.id, &park.keys, &park.groups, park.last_chunk_tokens)?;
        if park.ids.len() > REQUEST_IDS_MAX {
            let text =
                format!("{} is to be known by {} names, the limit is {REQUEST_IDS_MAX}", park.id, park.ids.len());
            return Err(Failure::new(FailureKind::Limit, text));
        }
        if park.unsolicited && self.guessed_receiver(core).is_none() {
            let text =
                format!("{} is only to be pushed ahead, and no receiver is connected that could be guessed", park.id);
            return Err(Failure::new(FailureKind::PeerUnreachable, text));
        }
        // All of it is kept at the same time.
        let lens_bytes: Vec<u64> = sizes.iter().map(|size| size.len_bytes).collect();
        let (asked_bytes, most_bytes) =
            (core.slots.asked_bytes(&lens_bytes), core.slots.most_parked_bytes(core.growth.len_max_bytes()));
        if asked_bytes > most_bytes {
            let text = format!(
                "{} is to be parked and has {asked_bytes} bytes; the sender's buffer has {most_bytes}{}; raise pd_buffer_size",
                park.id,
                core.share_note(),
            );
            return Err(Failure::new(FailureKind::TooLarge, text));
        }
        Ok(sizes)
    }

    /// Every chunk of a request is here: its lease begins.
    pub(super) fn finish_parked(&mut self, core: &mut Core<R>, uid: Uid) {
        let Some(request) = self.requests.get_mut(&uid) else { return };
        let OutgoingStage::Parking { ids, released, unsolicited, .. } = &mut request.stage else { return };
        let (ids, released, unsolicited) = (std::mem::take(ids), *released, *unsolicited);
        let slots = std::mem::take(&mut request.parked);
        let Some(request) = self.remove(core, uid) else { return };
        self.counts.requests_parked += 1;
        let chunks = request.chunks.len();
        if released {
            slots.into_iter().for_each(|slot| core.slots.unpark(core.now, slot));
            self.drop_ahead_of(core, uid);
        } else {
            self.lease(core, uid, ids, slots, unsolicited);
        }
        if let Some(client) = request.client {
            let event = Event::Parked { request: request.id.clone(), chunks: chunks as u32 };
            core.outputs.push_back(Output::Event { client, event });
        }
        let lease = if released { Duration::ZERO } else { self.settings.lease };
        core.note(OutgoingNote::Parked { request: request.id, chunks, lease });
        self.serve_staging(core);
    }

    /// Keeps parked chunks for the time of a lease.
    pub(super) fn lease(
        &mut self,
        core: &mut Core<R>,
        lease: Uid,
        ids: Vec<RequestId>,
        slots: Vec<SlotIndex>,
        unsolicited: bool,
    ) {
        core.timers.set(OutgoingTimer::Lease(lease), core.now + self.settings.lease);
        self.park_leases.insert(lease, ParkLease { ids, slots, unsolicited });
    }

    /// What a lease kept makes room from now on.
    pub(super) fn end_park_lease(&mut self, core: &mut Core<R>, lease: Uid, released: bool) {
        let Some(ParkLease { slots, .. }) = self.park_leases.remove(&lease) else { return };
        core.timers.unset(OutgoingTimer::Lease(lease));
        let chunks = slots.len();
        slots.into_iter().for_each(|slot| core.slots.unpark(core.now, slot));
        self.drop_ahead_of(core, lease);
        core.note(OutgoingNote::LeaseEnded { chunks, released });
        self.serve_staging(core);
    }

    /// Where nothing is received, chunks whose lease has ended are found for as long again, and are freed then.
    pub(in crate::node) fn handle_time(&self, core: &mut Core<R>) {
        if let Some(before) = core.now.checked_sub(self.settings.lease) {
            core.slots.expire_idle(before);
        }
    }

    pub(in crate::node) fn idle_until(&self, core: &Core<R>) -> Option<Instant> {
        core.slots.oldest_idle().map(|since| since + self.settings.lease)
    }

    pub(super) fn end_park_leases(&mut self, core: &mut Core<R>) {
        for lease in self.park_leases.keys().copied().collect::<Vec<Uid>>() {
            self.end_park_lease(core, lease, true);
        }
    }

    /// Nobody wants what is known by one of these names. With `sent`, this has been sent to whoever asked: of several requests with
    /// one name, as the prompts of a list have, the others are still to be asked for.
    pub(super) fn release_ids(&mut self, core: &mut Core<R>, ids: &[RequestId], sent: Option<&BTreeSet<ChunkKey>>) {
        let named = |names: &[RequestId]| names.iter().any(|name| ids.contains(name));
        let is_sent = |key: &ChunkKey| sent.is_none_or(|sent| sent.contains(key));
        for request in self.requests.values_mut() {
            if let OutgoingStage::Parking { ids, released, .. } = &mut request.stage
                && named(ids)
                && request.keys.iter().any(is_sent)
            {
                *released = true;
            }
        }
        let holds_sent =
            |slot: &SlotIndex| matches!(core.slots.state(*slot), Some(SlotState::Ready { key, .. }) if is_sent(key));
        let over = |lease: &ParkLease| named(&lease.ids) && (sent.is_none() || lease.slots.iter().any(holds_sent));
        let leases: Vec<Uid> =
            self.park_leases.iter().filter(|(_, lease)| over(lease)).map(|(&lease, _)| lease).collect();
        for lease in leases {
            self.end_park_lease(core, lease, true);
        }
    }

    /// These chunks are complete: whoever waits for them gets them.
    pub(super) fn on_published(&mut self, core: &mut Core<R>, uid: Uid, chunks: &[(ChunkKey, SlotIndex)]) {
        for (key, slot) in chunks {
            self.comes_no_more(key, uid);
            for push in self.awaiting.remove(key).unwrap_or_default() {
                let held = self.give_to_push(core, push, key, *slot);
                debug_assert!(held, "slot {slot} was just parked");
            }
        }
    }

    /// A push gets a chunk that it awaits. False: as much as may be is parked.
    fn give_to_push(&mut self, core: &mut Core<R>, push: Uid, key: &ChunkKey, slot: SlotIndex) -> bool {
        let Some(request) = self.requests.get_mut(&push) else { return true };
        let Some(at) = request.keys.iter().position(|other| other == key) else { return true };
        let held = core.hold_sent(slot);
        if held {
            request.chunks[at].local = Some(slot);
            self.send_parked(core, push);
        }
        held
    }

    /// A request that was being parked, or that sends parked chunks, has ended: nothing is kept for it any more.
    pub(super) fn let_go_of_parked(&mut self, core: &mut Core<R>, uid: Uid, request: &OutgoingRequest) {
        request.parked.iter().for_each(|&slot| core.slots.unpark(core.now, slot));
        if request.sends_parked() {
            for (key, chunk) in request.keys.iter().zip(&request.chunks) {
                match chunk.local {
                    Some(slot) => core.let_go_sent(slot),
                    None => self.awaits_no_more(key, uid),
                }
            }
        }
        if request.address.is_some() {
            return;
        }
        let mut orphans: BTreeSet<Uid> = BTreeSet::new();
        for key in &request.keys {
            if !self.comes_no_more(key, uid) {
                continue;
            }
            for push in self.awaiting.remove(key).unwrap_or_default() {
                // It may have come by another way meanwhile.
                let slot = core.slots.find(key);
                if !slot.is_some_and(|slot| self.give_to_push(core, push, key, slot)) {
                    orphans.insert(push);
                }
            }
        }
        for push in orphans {
            let text = format!("prefill gave {} up before all of it was computed", request.id);
            self.fail(core, push, Failure::new(FailureKind::Cancelled, text));
        }
    }

    /// A request computes this chunk no more. True: it did, and no other does.
    fn comes_no_more(&mut self, key: &ChunkKey, uid: Uid) -> bool {
        let Some(uids) = self.coming.get_mut(key) else { return false };
        let did = uids.remove(&uid);
        if uids.is_empty() {
            self.coming.remove(key);
            return did;
        }
        false
    }

    pub(super) fn awaits_no_more(&mut self, key: &ChunkKey, uid: Uid) {
        if let Some(uids) = self.awaiting.get_mut(key) {
            uids.remove(&uid);
            if uids.is_empty() {
                self.awaiting.remove(key);
            }
        }
    }

    /// Checks that leases, what comes and what is awaited agree with requests.
    pub(super) fn check_parked(&self) -> Result<(), String> {
        let is_here = |uid: &Uid, parking: bool| {
            self.requests.get(uid).is_some_and(|request| match parking {
                true => request.is_parking(),
                false => request.sends_parked(),
            })
        };
        if let Some((key, uids)) = self.coming.iter().find(|(_, uids)| !uids.iter().all(|uid| is_here(uid, true))) {
            return Err(format!("{key} comes from {uids:?}, one of which is not being parked"));
        }
        if let Some((key, uids)) = self.awaiting.iter().find(|(_, uids)| !uids.iter().all(|uid| is_here(uid, false))) {
            return Err(format!("{key} is awaited by {uids:?}, one of which is not there"));
        }
        match self.awaiting.keys().find(|key| !self.coming.contains_key(*key)) {
            Some(key) => Err(format!("{key} is awaited, and nobody computes it")),
            None => Ok(()),
        }
    }
}
