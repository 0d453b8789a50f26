//! Quiesce acknowledgements: a sender tells a receiver that it has stopped writing the slots of a grant.
//!
//! A receiver quarantines the slots of a grant that has failed until it has this acknowledgement. So the acknowledgement is
//! retransmitted until the receiver answers it. A handshake says the same of all grants before it; so a receiver that is lost
//! before it has answered is connected to again.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ids::{PeerId, ReceiverAddress, Seq};
use crate::wire::message::CancelNotif;

/// How often a commit is sent within its timeout. A quiesce acknowledgement is sent as often in the same time.
pub(super) const TRANSMISSIONS: u32 = 3;
/// How often a quiesce acknowledgement is sent to a receiver that answers other messages. Then the receiver is taken for
/// lost, and connected to again.
pub(super) const ACK_TRIES_MAX: u32 = 20;
/// Longest pause between two attempts to connect to a lost receiver.
const SEEK_PAUSE_MAX: Duration = Duration::from_secs(60);
/// How often that is tried: for some hours.
const SEEK_TRIES_MAX: u32 = 240;

/// How many lost receivers are remembered.
const OWED_ACKS_MAX: usize = 4096;

/// What receivers must still be told.
#[derive(Debug, Default)]
pub(super) struct Quiesce {
    /// Acknowledgements that their receivers have not answered yet.
    pending: BTreeMap<Seq, PendingAck>,
    /// Lost receivers that are owed an acknowledgement, and how often connecting to them was tried.
    owed: BTreeMap<ReceiverAddress, u32>,
}

#[derive(Debug)]
struct PendingAck {
    peer: PeerId,
    cancel: CancelNotif,
    transmissions: u32,
}

/// What to do about an acknowledgement that was not answered in time.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// Send it again.
    Retransmit(PeerId, CancelNotif),
    /// The receiver answers other messages and not this one: it is taken for lost.
    GiveUp(PeerId),
}

impl Quiesce {
    /// An acknowledgement is on its way.
    pub(super) fn sent(&mut self, seq: Seq, peer: PeerId, cancel: CancelNotif) {
        self.pending.insert(seq, PendingAck { peer, cancel, transmissions: 1 });
    }

    /// The answer to an acknowledgement is late. None: it was answered.
    pub(super) fn unanswered(&mut self, seq: Seq) -> Option<Unanswered> {
        let ack = self.pending.get_mut(&seq)?;
        ack.transmissions += 1;
        if ack.transmissions > ACK_TRIES_MAX {
            return Some(Unanswered::GiveUp(ack.peer));
        }
        Some(Unanswered::Retransmit(ack.peer, ack.cancel.clone()))
    }

    /// A receiver has answered message `seq`. False: that was no acknowledgement.
    pub(super) fn answered(&mut self, peer: PeerId, seq: Seq) -> bool {
        let answered = self.pending.get(&seq).is_some_and(|ack| ack.peer == peer);
        if answered {
            self.pending.remove(&seq);
        }
        answered
    }

    /// Whether this receiver has still to answer one.
    pub(super) fn is_pending(&self, peer: PeerId) -> bool {
        self.pending.values().any(|ack| ack.peer == peer)
    }

    /// The receivers that have still to answer one.
    pub(super) fn pending_peers(&self) -> impl Iterator<Item = PeerId> {
        self.pending.values().map(|ack| ack.peer)
    }

    /// A receiver is gone: it learns from the next handshake what these would have told it. Returns the acknowledgements.
    pub(super) fn forget_pending(&mut self, peer: PeerId) -> Vec<Seq> {
        let of_peer: Vec<Seq> = self.pending.iter().filter(|(_, ack)| ack.peer == peer).map(|(&seq, _)| seq).collect();
        self.pending.retain(|_, ack| ack.peer != peer);
        of_peer
    }

    /// A lost receiver is owed an acknowledgement. False: it is known already, or too many are; beyond the limit a receiver is
    /// told by the handshake of the next request to it.
    pub(super) fn owe(&mut self, address: &ReceiverAddress) -> bool {
        let new = !self.owed.contains_key(address) && self.owed.len() < OWED_ACKS_MAX;
        if new {
            self.owed.insert(address.clone(), 0);
        }
        new
    }

    /// A receiver has been told by a handshake.
    pub(super) fn paid(&mut self, address: &ReceiverAddress) {
        self.owed.remove(address);
    }

    /// Whether to try once more to connect to a lost receiver.
    pub(super) fn wants_try(&self, address: &ReceiverAddress) -> bool {
        self.owed.get(address).is_some_and(|&tries| tries < SEEK_TRIES_MAX)
    }

    /// How long to wait for the next try. `tried`: connecting has begun.
    pub(super) fn pause_after(&mut self, address: &ReceiverAddress, tried: bool, pause_min: Duration) -> Duration {
        let tries = self.owed.entry(address.clone()).or_default();
        *tries += u32::from(tried);
        pause_min.saturating_mul(1 << (*tries).min(8)).min(SEEK_PAUSE_MAX)
    }
}
