//! A request from its grant to its end: commit, cancel, failure, quarantine.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use super::{Note, Port, ReceiverSession, Timer};
use crate::ids::{ChunkKey, Failure, FailureKind, GrantId, RequestId, Seq, SlotIndex};
use crate::wire::Message;
use crate::wire::message::{
    AllocExtension, AllocReplyExtension, AllocResponse, CancelNotif, Commit, CommitAck, Revoke,
};

/// How many ended requests are remembered for readers that ask after them.
const ENDED_MAX: usize = 4096;

/// A request that has not ended.
#[derive(Debug)]
pub(super) struct Request<R> {
    /// Whose.
    pub(super) instance: String,
    /// How its sender is answered.
    pub(super) route: R,
    /// Of its AllocRequest.
    pub(super) seq: Seq,
    pub(super) keys: Vec<ChunkKey>,
    /// Length of the last chunk.
    pub(super) last_len_bytes: u64,
    /// When it entered its stage.
    pub(super) since: Instant,
    /// How many later requests got slots before it.
    pub(super) overtaken: u32,
    pub(super) stage: Stage,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// In the queue for slots.
    Waiting { wait: std::time::Duration },
    /// Its sender writes `own`; `shared` were ready before and are held for it. Positions in `keys` come first.
    Granted { grant: GrantId, own: Vec<(u32, SlotIndex)>, shared: Vec<(u32, SlotIndex)> },
    /// Every chunk is ready and held for it, in the order of `keys`.
    Ready { grant: GrantId, slots: Vec<SlotIndex> },
}

/// A grant that was given up before its writer was known to have stopped.
#[derive(Debug)]
pub(super) struct Closing {
    pub(super) instance: String,
    /// Of its AllocRequest.
    pub(super) seq: Seq,
    pub(super) slots: Vec<SlotIndex>,
}

/// How the latest requests ended.
#[derive(Debug, Default)]
pub(super) struct Ended {
    failures: BTreeMap<RequestId, (Failure, String)>,
    order: VecDeque<RequestId>,
}

impl Ended {
    pub(super) fn find(&self, id: &RequestId) -> Option<&(Failure, String)> {
        self.failures.get(id)
    }

    pub(super) fn forget(&mut self, id: &RequestId) {
        self.failures.remove(id);
    }

    pub(super) fn remember(&mut self, id: RequestId, failure: Failure, instance: String) {
        if self.failures.insert(id.clone(), (failure, instance)).is_none() {
            self.order.push_back(id);
        }
        // The order may still hold names that were forgotten since: they go first.
        while self.order.len() > ENDED_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.failures.remove(&oldest);
            }
        }
    }
}

impl Stage {
    fn grant(&self) -> Option<GrantId> {
        match self {
            Self::Waiting { .. } => None,
            Self::Granted { grant, .. } | Self::Ready { grant, .. } => Some(*grant),
        }
    }
}

impl<R> Request<R> {
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.stage, Stage::Ready { .. })
    }

    /// Slots that its sender may write.
    pub(super) fn written_slots(&self) -> usize {
        match &self.stage {
            Stage::Granted { own, .. } => own.len(),
            _ => 0,
        }
    }
}

impl<R: Clone + PartialEq> ReceiverSession<R> {
    pub(super) fn on_commit(&mut self, now: Instant, from: R, commit: Commit) {
        let known = self.touch_peer(now, &commit.instance);
        let refusal = match self.requests.get(&commit.req_id) {
            Some(request) if known && request.instance == commit.instance => match &request.stage {
                Stage::Granted { grant, .. } if *grant == commit.grant => {
                    self.make_ready(now, &commit.req_id);
                    None
                }
                // Said twice, it is as true as said once.
                Stage::Ready { grant, .. } if *grant == commit.grant => None,
                _ => Some(stale(&commit)),
            },
            _ => Some(stale(&commit)),
        };
        let ack = CommitAck { seq: commit.seq, req_id: commit.req_id, refusal };
        self.send(from, Port::Alloc, Message::PdCommitAck(ack));
        // A request that waits for slots may have been waiting for these very chunks.
        self.admit(now);
    }

    pub(super) fn on_cancel(&mut self, now: Instant, from: R, cancel: CancelNotif) {
        let Some(extension) = cancel.pd else {
            let response = AllocResponse { already_sent_indexes: Vec::new(), remote_indexes: Vec::new(), pd: None };
            return self.send(from, Port::Alloc, Message::AllocResponse(response));
        };
        // A grant names one attempt; so does the number of its allocation, for a sender that never learnt the grant.
        let names = |grant: Option<GrantId>, seq: Seq| match extension.grant {
            Some(named) => grant == Some(named),
            None => extension.alloc_seq == Some(seq),
        };
        let request = self.requests.get(&cancel.req_id);
        let mine = request
            .filter(|request| request.instance == extension.instance && names(request.stage.grant(), request.seq));
        if mine.is_some() {
            let text = format!("sender {} gave it up", extension.instance);
            self.end(now, &cancel.req_id, Failure::new(FailureKind::Cancelled, text), false);
        }
        if extension.writer_stopped {
            let closed = self
                .closing
                .iter()
                .find(|(grant, closing)| closing.instance == extension.instance && names(Some(**grant), closing.seq));
            if let Some(grant) = closed.map(|(&grant, _)| grant) {
                self.free_closing(now, grant);
            }
        }
        let response = AllocResponse {
            already_sent_indexes: Vec::new(),
            remote_indexes: Vec::new(),
            pd: Some(AllocReplyExtension { seq: extension.seq, grant: None, write_within_ms: 0, refusal: None }),
        };
        self.send(from, Port::Alloc, Message::AllocResponse(response));
        self.admit(now);
    }

    /// Ends a request, and tells its sender unless it knows.
    pub(super) fn fail(&mut self, now: Instant, id: &RequestId, failure: Failure) {
        self.end(now, id, failure, true);
    }

    /// A ready request that nobody has fetched: its chunks are free again, but for those that others hold.
    pub(super) fn retention_passed(&mut self, now: Instant, id: &RequestId) {
        let text = format!(
            "nobody fetched it within {} ms of its commit (pd_retention_sec)",
            self.settings.retention.as_millis()
        );
        let expired = self.requests.get(id).map_or(0, |request| request.keys.len());
        self.end(now, id, Failure::new(FailureKind::Expired, text), false);
        self.counts.chunks_expired += expired as u64;
    }

    /// Lets go of a ready request that was sent again, or fetched.
    pub(super) fn drop_ready(&mut self, now: Instant, id: &RequestId) {
        self.timers.cancel(&Timer::Retention(id.clone()));
        if let Some(Request { stage: Stage::Ready { slots, .. }, .. }) = self.requests.remove(id) {
            for slot in slots {
                self.slots.unhold(now, slot);
            }
        }
    }

    /// Frees the slots of a grant whose writer has stopped.
    pub(super) fn free_closing(&mut self, now: Instant, grant: GrantId) {
        let Some(closing) = self.closing.remove(&grant) else { return };
        for &slot in &closing.slots {
            self.slots.writer_stopped(slot, grant);
        }
        self.note(Note::Unquarantined { instance: closing.instance, slots: closing.slots.len() });
        self.admit(now);
    }

    /// Frees everything that this peer may have been writing.
    pub(super) fn free_closing_of(&mut self, now: Instant, instance: &str) {
        let of_peer = self.closing.iter().filter(|(_, closing)| closing.instance == instance);
        let grants: Vec<GrantId> = of_peer.map(|(&grant, _)| grant).collect();
        for grant in grants {
            self.free_closing(now, grant);
        }
    }

    fn make_ready(&mut self, now: Instant, id: &RequestId) {
        let Some(request) = self.requests.get_mut(id) else { return };
        let Stage::Granted { grant, own, shared } = &request.stage else { return };
        let (grant, count) = (*grant, request.keys.len());
        let mut slots = vec![SlotIndex(0); count];
        let mut bytes = 0;
        for &(index, slot) in shared {
            slots[index as usize] = slot;
        }
        for &(index, slot) in own {
            let index = index as usize;
            let len_bytes = if index + 1 == count { request.last_len_bytes } else { self.settings.chunk.chunk_bytes };
            let committed = self.slots.commit(slot, grant, request.keys[index].clone(), len_bytes);
            debug_assert!(committed, "slot {slot} was granted with {grant} and is not reserved");
            slots[index] = slot;
            bytes += len_bytes;
        }
        let took = now.saturating_duration_since(request.since);
        request.since = now;
        request.stage = Stage::Ready { grant, slots };
        let instance = request.instance.clone();
        self.timers.cancel(&Timer::Write(id.clone()));
        self.timers.set(Timer::Retention(id.clone()), now + self.settings.retention);
        self.counts.requests_ready += 1;
        self.counts.bytes += bytes;
        self.note(Note::Committed { request: id.clone(), instance, chunks: count, bytes, took });
        self.serve_waiters(now, id);
    }

    /// The one place where a request ends without having been fetched.
    fn end(&mut self, now: Instant, id: &RequestId, failure: Failure, tell_sender: bool) {
        let Some(request) = self.requests.remove(id) else { return };
        for timer in [Timer::Allocation(id.clone()), Timer::Write(id.clone()), Timer::Retention(id.clone())] {
            self.timers.cancel(&timer);
        }
        let mut quarantined = 0;
        match request.stage {
            Stage::Waiting { .. } => {
                self.waiting.retain(|other| other != id);
                if tell_sender {
                    let instance = request.instance.clone();
                    let extension = AllocExtension { seq: request.seq, instance, wait_ms: 0 };
                    self.refuse_alloc(request.route, &extension, Some(id.clone()), failure.clone());
                }
            }
            Stage::Granted { grant, own, shared } => {
                for (_, slot) in shared {
                    self.slots.unhold(now, slot);
                }
                let slots: Vec<SlotIndex> = own.into_iter().map(|(_, slot)| slot).collect();
                for &slot in &slots {
                    self.slots.quarantine(slot, grant);
                }
                quarantined = slots.len();
                // A request that wrote nothing of its own leaves nothing to wait for.
                if !slots.is_empty() {
                    let closing = Closing { instance: request.instance.clone(), seq: request.seq, slots };
                    self.closing.insert(grant, closing);
                }
                if tell_sender {
                    let revoke = Revoke { req_id: id.clone(), grant, reason: failure.clone() };
                    self.send(request.route, Port::Alloc, Message::PdRevoke(revoke));
                }
            }
            Stage::Ready { slots, .. } => {
                for slot in slots {
                    self.slots.unhold(now, slot);
                }
            }
        }
        self.counts.requests_failed += 1;
        let instance = request.instance;
        self.ended.remember(id.clone(), failure.clone(), instance.clone());
        self.fail_waiters(id, &failure, &instance);
        self.note(Note::Failed { request: id.clone(), instance, failure, quarantined });
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
