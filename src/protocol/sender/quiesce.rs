//! Quiesce acknowledgements: a sender tells a receiver that it has stopped writing the slots of a grant.
//!
//! A receiver quarantines the slots of a grant that has failed until it has this acknowledgement. So the acknowledgement is
//! retransmitted until the receiver answers it. A handshake says the same of all grants before it; so a receiver that is lost
//! before it has answered is connected to again.

use std::time::{Duration, Instant};

use super::{Port, SenderSession, Timer};
use crate::ids::{Failure, FailureKind, GrantId, PeerAddress, PeerId, RequestId, Seq};
use crate::wire::Message;
use crate::wire::message::{CancelExtension, CancelNotif};

/// How often a commit is sent within its timeout. A quiesce acknowledgement is sent as often in the same time.
const TRANSMISSIONS: u32 = 3;
/// How often a quiesce acknowledgement is sent to a receiver that answers other messages. Then the receiver is taken for
/// lost, and connected to again.
const ACK_TRIES_MAX: u32 = 20;
/// Longest pause between two attempts to connect to a lost receiver.
const SEEK_PAUSE_MAX: Duration = Duration::from_secs(60);
/// How often that is tried: for some hours.
const SEEK_TRIES_MAX: u32 = 240;

/// How many lost receivers are remembered.
const OWED_ACKS_MAX: usize = 4096;

/// A quiesce acknowledgement that was not answered yet.
#[derive(Debug)]
pub(super) struct PendingAck {
    pub(super) peer: PeerId,
    cancel: CancelNotif,
    tries: u32,
}

impl SenderSession {
    /// Gives a grant back. With `writer_stopped`, nothing of it is written now, nor will be.
    pub(super) fn acknowledge_quiesce(
        &mut self,
        peer: PeerId,
        request: RequestId,
        grant: Option<GrantId>,
        alloc_seq: Option<Seq>,
        writer_stopped: bool,
    ) {
        let seq = Seq(self.fresh());
        let instance = self.settings.hello.instance.clone();
        let pd = Some(CancelExtension { seq, instance, grant, alloc_seq, writer_stopped });
        let cancel = CancelNotif { req_id: request, keys: Vec::new(), pd };
        if writer_stopped && self.peers.contains_key(&peer) {
            self.pending_acks.insert(seq, PendingAck { peer, cancel: cancel.clone(), tries: 1 });
            self.timers.set(Timer::Retransmit(seq), self.now + self.retransmit_after());
        }
        self.send(peer, Port::Alloc, Message::CancelNotif(cancel));
    }

    /// How long an answer is waited for before a message is sent again.
    pub(super) fn retransmit_after(&self) -> Duration {
        (self.settings.commit_timeout / TRANSMISSIONS).max(Duration::from_millis(1))
    }

    pub(super) fn retransmit_ack(&mut self, now: Instant, seq: Seq) {
        let Some(ack) = self.pending_acks.get_mut(&seq) else { return };
        ack.tries += 1;
        let (peer, cancel) = (ack.peer, ack.cancel.clone());
        if ack.tries > ACK_TRIES_MAX {
            let text = format!("the receiver did not answer a cancel that was sent {ACK_TRIES_MAX} times");
            return self.peer_failed(peer, Failure::new(FailureKind::PeerLost, text));
        }
        self.timers.set(Timer::Retransmit(seq), now + self.retransmit_after());
        self.send(peer, Port::Alloc, Message::CancelNotif(cancel));
    }

    /// Whether this was the answer to a quiesce acknowledgement.
    pub(super) fn ack_answered(&mut self, peer: PeerId, seq: Seq) -> bool {
        let answered = self.pending_acks.get(&seq).is_some_and(|ack| ack.peer == peer);
        if answered {
            self.pending_acks.remove(&seq);
            self.timers.cancel(&Timer::Retransmit(seq));
        }
        answered
    }

    /// Gives a late grant back, unless it is one that a request has taken.
    pub(super) fn on_unawaited_grant(&mut self, peer: PeerId, seq: Seq, grant: Option<GrantId>) {
        let Some(grant) = grant else { return };
        // If the allocation is no longer remembered, do nothing: the receiver will ask by name.
        if let Some((request, taken)) = self.asked.get(&seq)
            && *taken != Some(grant)
        {
            self.acknowledge_quiesce(peer, request.clone(), Some(grant), None, true);
        }
    }

    /// Remembers that a receiver which is being lost is owed an acknowledgement, if it may hold grants of ours.
    pub(super) fn note_owed_ack(&mut self, peer: PeerId) {
        let Some(record) = self.peers.get(&peer) else { return };
        if !record.link.takes_quiesce_ack() {
            return;
        }
        let address = record.address.clone();
        let owed = self.requests.values().any(|request| request.peer == peer && request.may_have_grant())
            || self.pending_acks.values().any(|ack| ack.peer == peer);
        // Beyond the limit the handshake of the next request to it tells it.
        if owed && !self.owed_acks.contains_key(&address) && self.owed_acks.len() < OWED_ACKS_MAX {
            self.owed_acks.insert(address.clone(), 0);
            self.timers.set(Timer::Seek(address), self.now + self.settings.peer_timeout);
        }
    }

    pub(super) fn forget_owed_ack(&mut self, address: &PeerAddress) {
        self.owed_acks.remove(address);
        self.timers.cancel(&Timer::Seek(address.clone()));
    }

    /// A peer is gone: it learns from the next handshake what these would have told it.
    pub(super) fn forget_pending_acks(&mut self, peer: PeerId) {
        let of_peer: Vec<Seq> =
            self.pending_acks.iter().filter(|(_, ack)| ack.peer == peer).map(|(&seq, _)| seq).collect();
        for seq in of_peer {
            self.pending_acks.remove(&seq);
            self.timers.cancel(&Timer::Retransmit(seq));
        }
    }

    /// Connects to a lost receiver: the handshake tells it that nothing is written any more.
    pub(super) fn seek(&mut self, now: Instant, address: &PeerAddress) {
        let Some(&tries) = self.owed_acks.get(address) else { return };
        if self.draining || tries >= SEEK_TRIES_MAX {
            return self.forget_owed_ack(address);
        }
        // Not counted when a request is connecting to it already, or when the receivers that may be known are all busy.
        let begun = !self.peer_by_address.contains_key(address) && self.peer_for(now, address).is_ok();
        let tries = tries + u32::from(begun);
        let pause = self.settings.peer_timeout.saturating_mul(1 << tries.min(8)).min(SEEK_PAUSE_MAX);
        self.owed_acks.insert(address.clone(), tries);
        self.timers.set(Timer::Seek(address.clone()), now + pause);
    }
}
