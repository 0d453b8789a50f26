//! A request from its grant to its end: commit, cancel, failure, quarantine.

use std::time::Instant;

use super::ended::{Audience, RequestEnd};
use super::request::{Closing, IncomingRequest, IncomingStage};
use super::{Incoming, IncomingNote, IncomingTimer, Port};
use crate::ids::{Failure, FailureKind, GrantId, RequestId, Seq, SlotIndex};
use crate::node::Output;
use crate::node::chunks::ChunkSize;
use crate::node::core::Core;
use crate::node::output::To;
use crate::node::safeguards::Safeguard;
use crate::wire::Message;
use crate::wire::message::{AllocReplyExtension, AllocResponse, CancelExtension, Commit, CommitAck};

/// How many committed grants are remembered, for commits that are said again.
const COMMITTED_MAX: usize = 4096;

impl<R: Clone + PartialEq> Incoming<R> {
    pub(super) fn on_commit(&mut self, core: &mut Core<R>, from: R, commit: Commit) {
        let known = self.touch_peer(core.now, &commit.instance, commit.seq);
        let any_grant = !core.settings.keeps(Safeguard::GrantCheck);
        let refusal = match self.requests.get(&commit.req_id) {
            Some(request) if known && request.instance == commit.instance => match &request.stage {
                IncomingStage::Granted { grant, .. } if *grant == commit.grant || any_grant => {
                    match self.begin_verification(core, &from, &commit) {
                        Ok(true) => return,
                        Ok(false) => {
                            self.make_ready(core, &commit.req_id);
                            None
                        }
                        Err(failure) => {
                            self.end(core, &commit.req_id, failure.clone(), false);
                            Some(failure)
                        }
                    }
                }
                // Said twice, it is as true as said once.
                IncomingStage::Ready { grant, .. } if *grant == commit.grant => None,
                _ => Some(self.why_not(&commit)),
            },
            _ => Some(self.why_not(&commit)),
        };
        // Its chunks may have been fetched, or its name taken by another request, since it was first said.
        let said_before = self
            .committed
            .get(&commit.grant)
            .is_some_and(|(instance, request)| (instance, request) == (&commit.instance, &commit.req_id));
        let refusal = refusal.filter(|_| !said_before);
        let ack = CommitAck { seq: commit.seq, req_id: commit.req_id, refusal };
        core.send(To::Route(from), Port::Alloc, Message::PdCommitAck(ack));
        // A request that waits for slots may have been waiting for these very chunks.
        self.admit(core);
    }

    /// Why a commit changes nothing: how its request ended, as far as that is remembered.
    fn why_not(&self, commit: &Commit) -> Failure {
        self.ended.of_commit(commit).cloned().unwrap_or_else(|| stale(commit))
    }

    pub(super) fn on_cancel(&mut self, core: &mut Core<R>, from: R, id: &RequestId, extension: CancelExtension) {
        self.touch_peer(core.now, &extension.instance, extension.seq);
        // The allocation that is taken back here may yet arrive.
        if let (Some(seq), Some(peer)) = (extension.alloc_seq, self.senders.get_mut(&extension.instance)) {
            peer.allocs.insert(seq);
        }
        let any_grant = !core.settings.keeps(Safeguard::GrantCheck);
        // A grant names one attempt; so does the number of its allocation, for a sender that never learnt the grant.
        let names = |grant: Option<GrantId>, seq: Seq| match extension.grant {
            _ if any_grant => true,
            Some(named) => grant == Some(named),
            None => extension.alloc_seq == Some(seq),
        };
        let request = self.requests.get(id);
        let mine = request
            .filter(|request| request.instance == extension.instance && names(request.stage.grant(), request.seq));
        if mine.is_some() {
            let text = format!("sender {} gave it up", extension.instance);
            self.end(core, id, Failure::new(FailureKind::Cancelled, text), false);
        }
        if extension.writer_stopped {
            // By instance and not by route: the writer is the process, whichever connection it says so on.
            let closed = self.closing.iter().find(|(grant, closing)| {
                closing.instance == extension.instance && closing.request == *id && names(Some(**grant), closing.seq)
            });
            if let Some(grant) = closed.map(|(&grant, _)| grant) {
                self.free_closing(core, grant);
            }
        }
        let response = AllocResponse {
            already_sent_indexes: Vec::new(),
            remote_indexes: Vec::new(),
            pd: Some(AllocReplyExtension::empty(extension.seq)),
        };
        core.send(To::Route(from), Port::Alloc, Message::AllocResponse(response));
        self.admit(core);
    }

    /// Ends a request, and tells its sender unless it knows.
    pub(super) fn fail(&mut self, core: &mut Core<R>, id: &RequestId, failure: Failure) {
        self.end(core, id, failure, true);
    }

    /// A ready request that nobody has fetched: its chunks make room from now on, but for those that others hold.
    pub(super) fn retention_passed(&mut self, core: &mut Core<R>, id: &RequestId) {
        let text = format!(
            "nobody fetched it within {} ms of its commit (pd_retention_sec)",
            self.settings.retention.as_millis()
        );
        let slots = match self.requests.get(id).map(|request| &request.stage) {
            Some(IncomingStage::Ready { slots, .. }) => slots.clone(),
            _ => Vec::new(),
        };
        self.end(core, id, Failure::new(FailureKind::Expired, text), false);
        let freed = slots.into_iter().filter(|&slot| core.slots.free_idle(slot)).count();
        self.counts.chunks_expired += freed as u64;
    }

    /// Asks a writer whether it has stopped, once in a peer's time-out until it says so. If it gave the request up itself, this is
    /// the first question.
    pub(super) fn revoke_again(&mut self, core: &mut Core<R>, grant: GrantId) {
        let Some(closing) = self.closing.get(&grant) else { return };
        // A writer that is not connected says so with its next handshake.
        let Some(to) = self.senders.get(&closing.instance).and_then(|peer| peer.alloc_route.clone()) else { return };
        let message = closing.revoke(grant);
        core.send(To::Route(to), Port::Alloc, message);
        core.timers.set(IncomingTimer::Revoke(grant), core.now + core.settings.peer_timeout);
    }

    pub(super) fn remember_ended(
        &mut self,
        now: Instant,
        id: RequestId,
        failure: Failure,
        instance: String,
        grant: Option<GrantId>,
        audience: Audience,
    ) {
        let end = RequestEnd { failure, instance, grant, at: now, audience };
        self.ended.remember(now.checked_sub(self.settings.retention), id, end);
    }

    /// Lets go of a ready request that was sent again, or fetched.
    pub(super) fn drop_ready(&mut self, core: &mut Core<R>, id: &RequestId) {
        core.timers.unset(IncomingTimer::Retention(id.clone()));
        if let Some(IncomingRequest { stage: IncomingStage::Ready { slots, .. }, .. }) = self.requests.remove(id) {
            for slot in slots {
                core.slots.unpin(core.now, slot);
            }
        }
    }

    /// Frees the slots of a grant whose writer has stopped.
    pub(super) fn free_closing(&mut self, core: &mut Core<R>, grant: GrantId) {
        let Some(closing) = self.closing.remove(&grant) else { return };
        core.timers.unset(IncomingTimer::Revoke(grant));
        for &slot in &closing.slots {
            core.slots.free_granted(slot, grant);
        }
        self.unwatch_unless_needed(core, &closing.instance);
        core.note(IncomingNote::Unquarantined { instance: closing.instance, slots: closing.slots.len() });
        self.admit(core);
    }

    /// Frees everything that this peer may have been writing, of what it asked for before message `before`.
    pub(super) fn free_closing_of(&mut self, core: &mut Core<R>, instance: &str, before: Seq) {
        let of_peer = self.closing.iter().filter(|(_, closing)| closing.instance == instance && closing.seq < before);
        let grants: Vec<GrantId> = of_peer.map(|(&grant, _)| grant).collect();
        for grant in grants {
            self.free_closing(core, grant);
        }
    }

    pub(super) fn make_ready(&mut self, core: &mut Core<R>, id: &RequestId) {
        self.comes_no_more(id);
        let Some(request) = self.requests.get_mut(id) else { return };
        let IncomingStage::Granted { grant, own, shared } = &request.stage else { return };
        let (grant, count, ahead) = (*grant, request.keys.len(), request.ahead);
        let mut slots = vec![SlotIndex(0); count];
        let mut bytes = 0;
        for &(index, slot) in shared {
            slots[index as usize] = slot;
        }
        for &(index, slot) in own {
            let index = index as usize;
            let ChunkSize { group, len_bytes } = request.sizes[index];
            let committed = core.slots.commit(slot, grant, request.keys[index].clone(), group);
            debug_assert!(committed, "slot {slot} was granted with {grant} and is not reserved");
            slots[index] = slot;
            bytes += len_bytes;
        }
        let took = core.now.saturating_duration_since(request.since);
        request.since = core.now;
        request.stage = IncomingStage::Ready { grant, slots };
        let instance = request.instance.clone();
        self.committed.insert(grant, (instance.clone(), id.clone()));
        if self.committed.len() > COMMITTED_MAX {
            self.committed.pop_first();
        }
        self.lmcache.forget_granted(&request.keys, id);
        core.timers.unset(IncomingTimer::Write(id.clone()));
        self.counts.bytes += bytes;
        if ahead {
            return self.arrived_ahead(core, id, bytes);
        }
        core.timers.set(IncomingTimer::Retention(id.clone()), core.now + self.settings.retention);
        self.counts.requests_ready += 1;
        core.note(IncomingNote::Committed { request: id.clone(), instance, chunks: count, bytes, took });
        self.serve_waiters(core, id);
    }

    /// Ends a request that was not fetched, and tells its readers.
    pub(super) fn end(&mut self, core: &mut Core<R>, id: &RequestId, failure: Failure, tell_sender: bool) {
        if let Some((instance, grant)) = self.retire(core, id, &failure, tell_sender) {
            self.tell_end(core, id.clone(), failure, instance, grant);
        }
    }

    /// Ends an attempt in favour of another under the same name: its readers go on waiting, for the other attempt.
    pub(super) fn replace(&mut self, core: &mut Core<R>, id: &RequestId, failure: &Failure) {
        self.retire(core, id, failure, false);
        self.ended.forget(id);
    }

    /// The one place where an attempt ends that was not fetched. Answers its sender's instance, and its grant, if readers may want to
    /// know.
    fn retire(
        &mut self,
        core: &mut Core<R>,
        id: &RequestId,
        failure: &Failure,
        tell_sender: bool,
    ) -> Option<(String, Option<GrantId>)> {
        self.comes_no_more(id);
        let request = self.requests.remove(id)?;
        for timer in [
            IncomingTimer::Allocation(id.clone()),
            IncomingTimer::Write(id.clone()),
            IncomingTimer::Retention(id.clone()),
        ] {
            core.timers.unset(timer);
        }
        let mut quarantined = 0;
        let grant = request.stage.grant();
        self.free_spare_slots(core, id, &request);
        if let IncomingStage::Waiting { .. } = request.stage {
            self.refuse_waiting(core, id, &request, failure, tell_sender);
        }
        let (commits, abandoned) = (request.origin.commits(), self.lmcache_sender_is_gone(&request));
        match request.stage {
            IncomingStage::Waiting { .. } => {
                #[cfg(feature = "mutants")]
                self.let_go(core, id);
                self.waiting.retain(|other| other != id);
            }
            IncomingStage::Granted { grant, own, shared } => {
                if request.verifying.is_some() {
                    core.outputs.push_back(Output::AbandonVerification(grant));
                }
                for (_, slot) in shared {
                    core.slots.unpin(core.now, slot);
                }
                let slots: Vec<SlotIndex> = own.into_iter().map(|(_, slot)| slot).collect();
                let quarantine = core.settings.keeps(Safeguard::Quarantine);
                for &slot in &slots {
                    if quarantine {
                        core.slots.quarantine(slot, grant);
                    } else {
                        core.slots.free_granted(slot, grant);
                    }
                }
                let (instance, seq) = (request.instance.clone(), request.seq);
                let closing = Closing { instance, seq, slots, request: id.clone(), reason: failure.clone() };
                if tell_sender && commits {
                    let revoke = closing.revoke(grant);
                    core.send(To::Route(request.route), Port::Alloc, revoke);
                }
                // A request that wrote nothing of its own leaves nothing to wait for.
                if !closing.slots.is_empty() && quarantine {
                    quarantined = closing.slots.len();
                    self.closing.insert(grant, closing);
                    core.timers.set(IncomingTimer::Revoke(grant), core.now + core.settings.peer_timeout);
                    if abandoned {
                        core.timers
                            .set(IncomingTimer::Linger(request.instance.clone()), core.now + self.settings.linger);
                    }
                }
            }
            IncomingStage::Ready { slots, .. } => {
                for slot in slots {
                    core.slots.unpin(core.now, slot);
                }
            }
        }
        let (ahead, instance) = (request.ahead, request.instance);
        let (request, failure) = (id.clone(), failure.clone());
        if ahead {
            // Nobody waits for it.
            core.note(IncomingNote::AheadFailed { request, instance, failure, quarantined });
            return None;
        }
        self.counts.requests_failed += 1;
        core.note(IncomingNote::Failed { request, instance: instance.clone(), failure, quarantined });
        Some((instance, grant))
    }
}

fn stale(commit: &Commit) -> Failure {
    Failure::new(
        FailureKind::Unknown,
        format!(
            "grant {} of {} is not open any more: it was cancelled, timed out, or given before a restart; send it again",
            commit.grant, commit.req_id
        ),
    )
}
