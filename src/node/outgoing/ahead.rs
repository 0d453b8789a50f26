//! Pushing ahead: parked chunks go to the receiver that is likely to ask for them, before it does.
//!
//! A guess is worth nothing but time. It is made only of a receiver that is connected, it takes no room there that anything else
//! needs, and it ends when its parked request does. A registration that finds its chunks on their way waits for them, if they come
//! no later than it could be sent them; otherwise it is served as if there were no guess.

use std::collections::BTreeSet;
use std::time::Duration;

use super::requests::{OutgoingRequest, OutgoingStage};
use super::uid::{RegistrationId, Uid};
use super::{Outgoing, OutgoingNote};
use crate::ids::{ChunkKey, Failure, FailureKind, PeerId, ReceiverAddress, RequestId};
use crate::node::core::Core;

/// One part in so many of the requests that may be open can be guesses, and these take no place of the others.
const GUESSES: usize = 4;

/// Who was sent parked chunks because they asked for them.
#[derive(Debug, Default)]
pub(super) struct Guess {
    latest: Option<ReceiverAddress>,
    /// The one before, which may be the same.
    earlier: Option<ReceiverAddress>,
}

/// The receiver that a parked request is pushed to, by the key of its last chunk.
#[derive(Debug)]
pub(super) struct Guessed {
    receiver: ReceiverAddress,
    parked: Uid,
}

impl Guess {
    /// This receiver has asked for something, and got it.
    pub(super) fn was_sent(&mut self, receiver: &ReceiverAddress) {
        self.earlier = self.latest.replace(receiver.clone());
    }

    /// Who will ask next. Where the last two are not the same, receivers take turns: that is not guessed.
    fn receiver<'a>(
        &'a self,
        mut configured: impl Iterator<Item = &'a ReceiverAddress>,
    ) -> Option<&'a ReceiverAddress> {
        match (&self.latest, &self.earlier) {
            (Some(latest), Some(earlier)) => Some(latest).filter(|latest| *latest == earlier),
            (Some(latest), None) => Some(latest),
            (None, _) => configured.next().filter(|_| configured.next().is_none()),
        }
    }
}

impl<R: Clone> Outgoing<R> {
    /// The receiver that is likely to ask for what is parked next, if something can be pushed to it now.
    pub(super) fn guessed_receiver(&self, core: &Core<R>) -> Option<ReceiverAddress> {
        if !self.settings.push_ahead || core.draining || self.aheads() >= core.settings.requests_max.div_ceil(GUESSES) {
            return None;
        }
        let receiver = self.guess.receiver(self.configured_receivers().map(|(address, _)| address))?;
        let record = self.receivers.get(self.receiver_by_address.get(receiver)?)?;
        (record.takes_ahead && record.connection().is_some()).then(|| receiver.clone())
    }

    /// How many guesses are under way.
    pub(super) fn aheads(&self) -> usize {
        self.requests.values().filter(|request| request.ahead.is_some()).count()
    }

    /// A request begins to be parked: its chunks go to the receiver that is likely to ask for them.
    pub(super) fn push_ahead(&mut self, core: &mut Core<R>, parked: Uid) {
        let Some(request) = self.requests.get(&parked) else { return };
        let OutgoingStage::Parking { unsolicited, .. } = request.stage else { return };
        let keys = request.keys.clone();
        // Somebody has asked already, and gets it.
        let asked = |request: &OutgoingRequest| {
            request.registration.is_some() && request.keys.last().is_some_and(|last| keys.contains(last))
        };
        if !unsolicited && self.requests.values().any(asked) {
            return;
        }
        if !self.begin_push_ahead(core, parked, &keys) && unsolicited {
            self.fail(core, parked, Failure::new(FailureKind::Cancelled, "no receiver can be guessed any more"));
        }
    }

    /// False: it cannot be.
    fn begin_push_ahead(&mut self, core: &mut Core<R>, parked: Uid, keys: &[ChunkKey]) -> bool {
        let (Some(receiver), Some(last)) = (self.guessed_receiver(core), keys.last().cloned()) else { return false };
        let Ok(name) = RequestId::new(format!("ahead {} {}", core.fresh(), core.settings.hello.instance)) else {
            return false;
        };
        let found = self.find_parked(core, keys);
        let Ok(uid) = self.send_found(core, name, receiver.clone(), found, Duration::ZERO) else { return false };
        if let Some(request) = self.requests.get_mut(&uid) {
            request.ahead = Some(parked);
        }
        self.guessed.insert(last, Guessed { receiver, parked });
        self.ask_for_room(core, uid);
        true
    }

    /// Everything of a guess is at its receiver.
    pub(super) fn pushed_ahead(&mut self, core: &mut Core<R>, request: OutgoingRequest, chunks: u32) {
        let receiver = request.receiver();
        core.note(OutgoingNote::PushedAhead { request: request.id, receiver, chunks, bytes: request.bytes });
        if let Some(parked) = request.ahead {
            self.ahead_over(core, parked, request.peer, None);
        }
    }

    /// A guess is over: it is at its receiver, or was dropped.
    pub(super) fn ahead_over(&mut self, core: &mut Core<R>, parked: Uid, peer: PeerId, dropped: Option<&Failure>) {
        if dropped.is_some() {
            self.guessed.retain(|_, guessed| guessed.parked != parked);
        }
        // They may have waited for just this.
        if self.connection_of(peer).is_some() {
            let waits = |request: &OutgoingRequest| {
                request.peer == peer
                    && request.registration.is_some()
                    && matches!(request.stage, OutgoingStage::Connecting { .. })
            };
            let waiting: Vec<Uid> =
                self.requests.iter().filter(|(_, request)| waits(request)).map(|(&uid, _)| uid).collect();
            waiting.into_iter().for_each(|uid| self.ask_for_room(core, uid));
        }
        // Nobody else is told of it.
        if self.park_leases.get(&parked).is_some_and(|lease| lease.unsolicited) {
            return self.end_park_lease(core, parked, true);
        }
        let Some(request) = self.requests.get_mut(&parked) else { return };
        let OutgoingStage::Parking { unsolicited: true, released, .. } = &mut request.stage else { return };
        match dropped {
            None => *released = true,
            // But somebody waits for a beginning of it.
            Some(_) if request.keys.iter().any(|key| self.awaiting.contains_key(key)) => self.is_asked_for(parked),
            Some(failure) => {
                let text = format!("it was to be pushed ahead, and is not: {}", failure.text);
                self.fail(core, parked, Failure::new(FailureKind::Cancelled, text));
            }
        }
    }

    /// A parked request is not kept any more, and neither is what is pushed of it.
    pub(super) fn drop_ahead_of(&mut self, core: &mut Core<R>, parked: Uid) {
        self.guessed.retain(|_, guessed| guessed.parked != parked);
        let of_parked = |request: &OutgoingRequest| request.ahead == Some(parked) && !request.is_closing();
        let found = self.requests.iter().find(|(_, request)| of_parked(request)).map(|(&uid, _)| uid);
        if let Some(uid) = found {
            self.fail(core, uid, Failure::new(FailureKind::Cancelled, "its chunks are not kept any more"));
        }
    }

    /// A receiver asks for these chunks: whether they were pushed to another.
    pub(super) fn judge_guess(
        &mut self,
        core: &mut Core<R>,
        id: &RegistrationId,
        keys: &[ChunkKey],
        receiver: &ReceiverAddress,
    ) {
        for key in keys {
            let Some(Guessed { receiver: guessed, parked }) = self.guessed.remove(key) else { continue };
            // Somebody comes for it, whoever was told.
            self.is_asked_for(parked);
            if guessed != *receiver {
                let (guessed, asks) = (guessed.to_string(), receiver.to_string());
                core.note(OutgoingNote::WrongGuess { request: id.1.clone(), guessed, asks });
                self.drop_ahead_of(core, parked);
            }
        }
    }

    /// A parked request is kept like any other from now on.
    fn is_asked_for(&mut self, parked: Uid) {
        if let Some(lease) = self.park_leases.get_mut(&parked) {
            lease.unsolicited = false;
        }
        if let Some(OutgoingStage::Parking { unsolicited, .. }) =
            self.requests.get_mut(&parked).map(|request| &mut request.stage)
        {
            *unsolicited = false;
        }
    }

    /// A registration is about to be served: guesses of the same chunks that have no room yet only stand in its way.
    pub(super) fn drop_aheads_without_room(&mut self, core: &mut Core<R>, uid: Uid) {
        let Some(request) = self.requests.get(&uid) else { return };
        let keys: BTreeSet<&ChunkKey> = request.keys.iter().collect();
        let in_the_way = |ahead: &OutgoingRequest| {
            ahead.ahead.is_some()
                && ahead.peer == request.peer
                && ahead.waits()
                && ahead.keys.iter().any(|key| keys.contains(key))
        };
        let dropped: Vec<Uid> =
            self.requests.iter().filter(|(_, ahead)| in_the_way(ahead)).map(|(&uid, _)| uid).collect();
        for ahead in dropped {
            self.fail(core, ahead, Failure::new(FailureKind::Cancelled, "its receiver asks for it"));
        }
    }

    /// Whether some of what a registration asks for is on its way to its receiver, and nothing else that is on the way with it has
    /// to be computed first.
    pub(super) fn comes_ahead(&self, request: &OutgoingRequest) -> bool {
        if request.registration.is_none() {
            return false;
        }
        let keys: BTreeSet<&ChunkKey> = request.keys.iter().collect();
        let brings = |ahead: &OutgoingRequest| {
            let mut sent = ahead.keys.iter().zip(&ahead.chunks).filter(|(_, chunk)| chunk.remote.is_some()).peekable();
            let some = sent.clone().any(|(key, _)| keys.contains(key));
            some && sent.all(|(key, chunk)| chunk.local.is_some() || chunk.done_bytes > 0 || keys.contains(key))
        };
        let under_way = |ahead: &&OutgoingRequest| {
            ahead.ahead.is_some()
                && ahead.peer == request.peer
                && matches!(ahead.stage, OutgoingStage::Open { .. } | OutgoingStage::Committing { .. })
        };
        self.requests.values().filter(under_way).any(brings)
    }

    /// Checks that what is pushed ahead is of something that is parked.
    pub(super) fn check_aheads(&self) -> Result<(), String> {
        let is_parked = |parked: &Uid| {
            self.park_leases.contains_key(parked)
                || self.requests.get(parked).is_some_and(|request| request.is_parking() || request.is_closing())
        };
        let orphan = |request: &&OutgoingRequest| {
            request.ahead.as_ref().is_some_and(|parked| !request.is_closing() && !is_parked(parked))
        };
        if let Some(request) = self.requests.values().find(orphan) {
            return Err(format!("{} is pushed ahead, and is not parked any more", request.id));
        }
        match self.guessed.values().find(|guessed| !is_parked(&guessed.parked)) {
            Some(guessed) => Err(format!("{guessed:?} is remembered, and is not parked any more")),
            None => Ok(()),
        }
    }
}
