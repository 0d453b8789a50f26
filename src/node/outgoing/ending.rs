//! How a request ends without having been sent: cancelled, revoked, failed; and what its client must still say.

use std::collections::BTreeSet;

use super::requests::{OutgoingRequest, OutgoingStage, truncated};
use super::uid::Uid;
use super::{Event, Outgoing, OutgoingNote, OutgoingTimer};
use crate::ids::{ClientId, Failure, FailureKind, PeerId, RequestId, Seq};
use crate::node::Answer;
use crate::node::Output;
use crate::node::core::Core;
use crate::node::safeguards::Safeguard;
use crate::wire::message::Revoke;

impl<R: Clone> Outgoing<R> {
    /// Whether this client has opened a request of this name, still has slots of one that has failed, or has one that is closing.
    pub(in crate::node) fn knows(&self, client: ClientId, request: &RequestId) -> bool {
        self.find_request(client, request).is_ok()
            || self.expected.contains(client, request)
            || self.unacknowledged.keys().any(|(other, name, _)| *other == client && name == request)
            || self.requests.values().any(|closing| closing.client == Some(client) && closing.id == *request)
    }

    /// A client gives a request up. Answered when nothing of it is written any more.
    pub(in crate::node) fn handle_cancel(
        &mut self,
        core: &mut Core<R>,
        client: ClientId,
        id: Seq,
        request: &RequestId,
    ) {
        if self.expect_no_more(core, client, request) {
            return core.answer(client, id, Answer::Cancelled { request: request.clone() });
        }
        let uid = match self.find_request(client, request) {
            Ok(uid) => uid,
            // A client that does not know the field `acknowledges` acknowledges a failure with a plain cancel.
            Err(_) if self.acknowledge_failure(core, client, request, None) => {
                return core.answer(client, id, Answer::Cancelled { request: request.clone() });
            }
            Err(failure) => return core.refuse(client, id, failure, None),
        };
        let failure = Failure::new(FailureKind::Cancelled, format!("{request} was cancelled by its connector"));
        self.end(core, uid, failure, Some((client, id)));
        if self.requests.contains_key(&uid) {
            core.timers.set(OutgoingTimer::Cancel(uid), core.now + self.settings.commit_timeout);
        }
    }

    /// A client's serving engine has reset its cache: what was computed before, and is not sent, never is.
    pub(in crate::node) fn handle_reset(&mut self, core: &mut Core<R>) {
        let open: Vec<Uid> = self.requests.keys().copied().collect();
        for uid in open {
            self.fail(core, uid, Failure::new(FailureKind::Cancelled, "the prefill server reset its cache"));
        }
        self.end_park_leases(core);
        core.slots.forget_ready();
    }

    /// A receiver takes a grant back: its request fails, and once nothing is written for it the quiesce acknowledgement is sent.
    pub(super) fn on_revoke(&mut self, core: &mut Core<R>, peer: PeerId, revoke: Revoke) {
        let of_grant = |request: &OutgoingRequest| match &request.stage {
            OutgoingStage::Open { grant, .. } | OutgoingStage::Committing { grant } => {
                request.peer == peer && *grant == revoke.grant
            }
            OutgoingStage::Closing { grant, .. } => request.peer == peer && *grant == Some(revoke.grant),
            _ => false,
        };
        match self.requests.iter().find(|(_, request)| of_grant(request)).map(|(&uid, request)| (uid, &request.stage)) {
            // `finish_closing` will send the acknowledgement.
            Some((_, OutgoingStage::Closing { .. })) => {}
            Some((uid, _)) => self.fail(core, uid, truncated(revoke.reason)),
            None => {
                // Nothing is in flight for this grant: no request has it, and those of an earlier connection had ended before this
                // one could begin. The revoke may have overtaken the grant itself, which nobody may take then.
                let asks = |request: &OutgoingRequest| match request.stage {
                    OutgoingStage::Allocating { seq, .. } => {
                        request.peer == peer
                            && revoke.alloc_seq.map_or(request.id == revoke.req_id, |asked| asked == seq)
                    }
                    _ => false,
                };
                if let Some(uid) = self.requests.iter().find(|(_, request)| asks(request)).map(|(&uid, _)| uid) {
                    self.fail(core, uid, truncated(revoke.reason));
                }
                self.acknowledge_quiesce(core, peer, revoke.req_id, Some(revoke.grant), None, true);
            }
        }
    }

    /// Ends a request badly.
    pub(super) fn fail(&mut self, core: &mut Core<R>, uid: Uid, failure: Failure) {
        self.end(core, uid, failure, None);
    }

    /// A transfer of a closing request has ended: the last one lets it go.
    pub(super) fn finish_closing(&mut self, core: &mut Core<R>, uid: Uid) {
        let Some(request) = self.requests.get(&uid) else { return };
        let OutgoingStage::Closing { grant, alloc_seq, cancel } = request.stage else { return };
        if request.in_flight > 0 {
            return;
        }
        let (peer, has_receiver) = (request.peer, request.address.is_some());
        core.timers.unset(OutgoingTimer::Cancel(uid));
        let Some(request) = self.remove(core, uid) else { return };
        if has_receiver {
            self.give_back(core, peer, (request.id.clone(), request.keys), grant, alloc_seq);
        }
        if let Some((client, id)) = cancel {
            core.answer(client, id, Answer::Cancelled { request: request.id });
        }
        self.serve_staging(core);
    }

    /// The engine has not finished a cancelled request's transfers in time: its client is told, its slots stay taken.
    pub(super) fn cancel_timed_out(&mut self, core: &mut Core<R>, uid: Uid) {
        let Some(request) = self.requests.get_mut(&uid) else { return };
        let OutgoingStage::Closing { cancel, .. } = &mut request.stage else { return };
        let Some((client, id)) = cancel.take() else { return };
        let text = format!(
            "{} has ended, but {} transfers of it are still being written; its slots stay taken until they are not",
            request.id, request.in_flight
        );
        let peer = request.receiver();
        core.refuse(client, id, Failure::new(FailureKind::Deadline, text), Some(peer));
    }

    /// The one place where a request begins to end without having been sent. With transfers in flight the receiver is told that it
    /// is (`tell_failed`); once the last of them has ended, `finish_closing` removes the request and gives its grant back.
    pub(super) fn end(&mut self, core: &mut Core<R>, uid: Uid, failure: Failure, cancel: Option<(ClientId, Seq)>) {
        let Some(request) = self.requests.get_mut(&uid) else { return };
        let names = match &mut request.stage {
            OutgoingStage::Parking { ids, .. } => std::mem::take(ids),
            _ => Vec::new(),
        };
        let last = request.keys.last().cloned();
        let mut alloc_seq = None;
        let (open_id, grant, asked) = match request.stage {
            OutgoingStage::Connecting { open_id, .. } => (Some(open_id), None, false),
            OutgoingStage::Allocating { open_id, seq, .. } => {
                alloc_seq = Some(seq);
                (Some(open_id), None, true)
            }
            OutgoingStage::Open { grant, .. } | OutgoingStage::Committing { grant } => (None, Some(grant), true),
            OutgoingStage::Parking { open_id, .. } => (open_id, None, false),
            OutgoingStage::Closing { .. } => return,
        };
        let (is_parking, registered) = (request.is_parking(), request.registration.is_some());
        let ahead = request.ahead;
        request.stage = OutgoingStage::Closing { grant, alloc_seq, cancel };
        let (id, receiver, client, in_flight, request_peer) =
            (request.id.clone(), request.receiver(), request.client, request.in_flight, request.peer);
        self.forget_deadlines(core, uid);
        self.leave_line(uid);
        if self.request_by_name.get(&id) == Some(&uid) {
            self.request_by_name.remove(&id);
        }
        self.awaited.retain(|_, other| *other != uid);
        self.staging_request_ended(core, uid, &failure, is_parking);
        self.counts.requests_failed += u64::from(ahead.is_none());
        let peer = receiver.clone();
        // Decode of LMCache takes any notification for all pages being written.
        if !is_parking && !registered && ahead.is_none() && self.takes_commits(request_peer) {
            self.tell_proxy_of_failure(core, &id, &failure);
        }
        let mut told_by_event = false;
        match (client, open_id) {
            (Some(client), Some(open_id)) => core.refuse(client, open_id, failure.clone(), Some(peer)),
            (Some(client), None) if cancel.is_none() => {
                told_by_event = true;
                let event = Event::Failed { request: id.clone(), attempt: uid, failure: failure.clone(), peer };
                core.outputs.push_back(Output::Event { client, event });
            }
            _ => {}
        }
        if let Some(request) = self.requests.get_mut(&uid) {
            request.told_by_event = told_by_event;
        }
        if in_flight > 0 {
            self.abandon_delayed(core, uid, client.is_none());
        }
        core.note(match ahead {
            None => {
                OutgoingNote::Failed { request: id.clone(), receiver, registered, failure: failure.clone(), in_flight }
            }
            Some(_) => OutgoingNote::AheadDropped { request: id.clone(), receiver, failure: failure.clone() },
        });
        self.registration_failed(core, uid, &failure);
        if asked {
            if in_flight > 0 {
                self.tell_failed(core, request_peer, id.clone(), grant, alloc_seq);
            }
            self.finish_closing(core, uid);
        } else if in_flight == 0 {
            // The receiver has never heard of it, or there is none.
            let request = self.remove(core, uid);
            if let (Some((client, id)), Some(request)) = (cancel, request) {
                core.answer(client, id, Answer::Cancelled { request: request.id });
            }
        }
        if let Some(last) = last.filter(|_| !names.is_empty()) {
            self.give_up(core, &id, &names, &last, &failure);
        }
        if is_parking {
            self.drop_ahead_of(core, uid);
        }
        if let Some(parked) = ahead {
            self.ahead_over(core, parked, request_peer, Some(&failure));
        }
        self.serve_staging(core);
    }

    /// Takes a request out of every table and frees its local slots.
    pub(super) fn remove(&mut self, core: &mut Core<R>, uid: Uid) -> Option<OutgoingRequest> {
        let request = self.requests.remove(&uid)?;
        self.place_is_free(request.peer);
        if self.request_by_name.get(&request.id) == Some(&uid) {
            self.request_by_name.remove(&request.id);
        }
        self.forget_deadlines(core, uid);
        self.let_go_of_parked(core, uid, &request);
        for (&slot, &chunk) in &request.staged {
            let filling = request.told_by_event
                && request.chunks[chunk as usize].is_filling()
                && core.settings.keeps(Safeguard::FailureAcknowledged);
            match request.client {
                Some(client) if filling => {
                    self.unacknowledged.entry((client, request.id.clone(), uid)).or_default().push(slot);
                }
                _ => core.slots.unstage(slot),
            }
        }
        Some(request)
    }

    /// A client knows that its request has failed: what it may have been filling until then can be staged again. `attempt`: which of
    /// those that had the name; none: whoever says so does not tell them apart. Whether there was anything.
    pub(in crate::node) fn acknowledge_failure(
        &mut self,
        core: &mut Core<R>,
        client: ClientId,
        request: &RequestId,
        attempt: Option<Uid>,
    ) -> bool {
        let is_meant = |uid: Uid| attempt.is_none_or(|attempt| attempt == uid);
        let mut was_any = false;
        // If its transfers are under way, its slots are freed with them, and not kept for the client.
        for (_, closing) in self.requests.iter_mut().filter(|(uid, _)| is_meant(**uid)) {
            if closing.client == Some(client) && closing.id == *request && closing.told_by_event && closing.is_filling()
            {
                closing.told_by_event = false;
                was_any = true;
            }
        }
        let of_request = (client, request.clone(), Uid::MIN)..=(client, request.clone(), Uid::MAX);
        let uids: Vec<Uid> = self.unacknowledged.range(of_request).map(|((_, _, uid), _)| *uid).collect();
        for uid in uids.into_iter().filter(|&uid| is_meant(uid)) {
            let slots = self.unacknowledged.remove(&(client, request.clone(), uid)).unwrap_or_default();
            slots.into_iter().for_each(|slot| core.slots.unstage(slot));
            was_any = true;
        }
        if was_any {
            self.serve_staging(core);
        }
        was_any
    }

    /// A client that is gone fills nothing any more.
    pub(super) fn acknowledge_all(&mut self, core: &mut Core<R>, client: ClientId) {
        let of_client = self.unacknowledged.keys().filter(|(other, _, _)| *other == client);
        let requests: BTreeSet<RequestId> = of_client.map(|(_, request, _)| request.clone()).collect();
        for request in requests {
            self.acknowledge_failure(core, client, &request, None);
        }
    }
}
