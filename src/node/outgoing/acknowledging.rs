//! Telling receivers that nothing writes any more: see [`quiesce`](super::quiesce).

use std::time::Duration;

use super::quiesce::{ACK_TRIES_MAX, TRANSMISSIONS, Unanswered};
use super::{Outgoing, OutgoingTimer, Port};
use crate::ids::{Failure, FailureKind, GrantId, PeerId, ReceiverAddress, RequestId, Seq};
use crate::node::core::Core;
use crate::node::output::To;
use crate::wire::Message;
use crate::wire::message::{CancelExtension, CancelNotif};

impl<R: Clone> Outgoing<R> {
    /// Gives a grant back. With `writer_stopped`, nothing of it is written now, nor will be.
    pub(super) fn acknowledge_quiesce(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        request: RequestId,
        grant: Option<GrantId>,
        alloc_seq: Option<Seq>,
        writer_stopped: bool,
    ) {
        let seq = Seq(core.fresh());
        let instance = core.settings.hello.instance.clone();
        let pd = Some(CancelExtension { seq, instance, grant, alloc_seq, writer_stopped });
        let cancel = CancelNotif { req_id: request, keys: Vec::new(), pd };
        if writer_stopped && self.receivers.contains_key(&peer) {
            self.quiesce.sent(seq, peer, cancel.clone());
            core.timers.set(OutgoingTimer::Retransmit(seq), core.now + self.retransmit_after());
        }
        core.send(To::Peer(peer), Port::Alloc, Message::CancelNotif(cancel));
    }

    /// How long an answer is waited for before a message is sent again.
    pub(super) fn retransmit_after(&self) -> Duration {
        (self.settings.commit_timeout / TRANSMISSIONS).max(Duration::from_millis(1))
    }

    /// An acknowledgement was not answered in time.
    pub(super) fn retransmit_ack(&mut self, core: &mut Core<R>, seq: Seq) {
        match self.quiesce.unanswered(seq) {
            None => {}
            Some(Unanswered::Retransmit(peer, cancel)) => {
                core.timers.set(OutgoingTimer::Retransmit(seq), core.now + self.retransmit_after());
                core.send(To::Peer(peer), Port::Alloc, Message::CancelNotif(cancel));
            }
            Some(Unanswered::GiveUp(peer)) => {
                let text = format!("the receiver did not answer a cancel that was sent {ACK_TRIES_MAX} times");
                self.peer_failed(core, peer, Failure::new(FailureKind::PeerLost, text));
            }
        }
    }

    /// Whether this was the answer to an acknowledgement.
    pub(super) fn ack_answered(&mut self, core: &mut Core<R>, peer: PeerId, seq: Seq) -> bool {
        let answered = self.quiesce.answered(peer, seq);
        if answered {
            core.timers.unset(OutgoingTimer::Retransmit(seq));
        }
        answered
    }

    /// Gives a late grant back, unless it is one that a request has taken.
    pub(super) fn on_unawaited_grant(&mut self, core: &mut Core<R>, peer: PeerId, seq: Seq, grant: Option<GrantId>) {
        let Some(grant) = grant else { return };
        // If the allocation is no longer remembered, do nothing: the receiver revokes the grant at its deadline, and that is answered.
        if let Some((request, taken)) = self.asked.get(&seq)
            && *taken != Some(grant)
        {
            self.acknowledge_quiesce(core, peer, request.clone(), Some(grant), None, true);
        }
    }

    /// Remembers that a receiver which is being lost is owed an acknowledgement, if it may hold grants of ours.
    pub(super) fn note_owed_ack(&mut self, core: &mut Core<R>, peer: PeerId) {
        let Some(record) = self.receivers.get(&peer).filter(|record| record.link.takes_quiesce_ack()) else { return };
        let address = record.address.clone();
        let has_grant = self.requests.values().any(|request| request.peer == peer && request.may_have_grant());
        if (has_grant || self.quiesce.is_pending(peer)) && self.quiesce.owe(&address) {
            core.timers.set(OutgoingTimer::Seek(address), core.now + core.settings.peer_timeout);
        }
    }

    pub(super) fn forget_owed_ack(&mut self, core: &mut Core<R>, address: &ReceiverAddress) {
        self.quiesce.paid(address);
        core.timers.unset(OutgoingTimer::Seek(address.clone()));
    }

    /// A receiver is gone.
    pub(super) fn forget_pending_acks(&mut self, core: &mut Core<R>, peer: PeerId) {
        for seq in self.quiesce.forget_pending(peer) {
            core.timers.unset(OutgoingTimer::Retransmit(seq));
        }
    }

    /// Connects to a lost receiver: the handshake tells it that nothing is written any more.
    pub(super) fn seek(&mut self, core: &mut Core<R>, address: &ReceiverAddress) {
        if core.draining || !self.quiesce.wants_try(address) {
            return self.forget_owed_ack(core, address);
        }
        // Not counted when a request is connecting to it already, or when the receivers that may be known are all busy.
        let tried = !self.receiver_by_address.contains_key(address) && self.peer_for(core, address).is_ok();
        let pause = self.quiesce.pause_after(address, tried, core.settings.peer_timeout);
        core.timers.set(OutgoingTimer::Seek(address.clone()), core.now + pause);
    }
}
