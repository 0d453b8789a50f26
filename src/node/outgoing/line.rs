//! Requests that a receiver has no place for: its limits (`pd_max_peer_requests`, `pd_max_requests`) are reached. They stand in
//! line here, each until its own deadline, so that a receiver keeps no more than its limits say.
//!
//! The first in line is asked for again when another request of this sender has ended or has got its slots, and with each answer
//! to a ping: whether a place is free is the receiver's to say.

use super::requests::OutgoingStage;
use super::uid::Uid;
use super::{Outgoing, OutgoingTimer};
use crate::ids::{Failure, PeerId};
use crate::node::core::Core;

impl<R: Clone> Outgoing<R> {
    /// A receiver has no place for this request. Nobody waits for a place on behalf of one that is only guessed.
    pub(super) fn stand_in_line(&mut self, core: &mut Core<R>, uid: Uid, failure: Failure) {
        let Some(request) = self.requests.get_mut(&uid) else { return };
        let OutgoingStage::Allocating { open_id, wait, .. } = request.stage else { return };
        if request.ahead.is_some() {
            return self.fail(core, uid, failure);
        }
        request.stage = OutgoingStage::Connecting { open_id, wait };
        request.in_line = Some(failure);
        self.lines.insert((request.peer, uid));
        let until = *request.wait_until.get_or_insert(core.now + wait);
        core.timers.set(OutgoingTimer::Allocation(uid), until);
    }

    /// Whether others stand in line for the same receiver: then so does this request, without being asked for.
    pub(super) fn joins_line(&mut self, core: &mut Core<R>, uid: Uid) -> bool {
        let Some(request) = self.requests.get(&uid) else { return false };
        let OutgoingStage::Connecting { wait, .. } = request.stage else { return false };
        let first = self.lines.range((request.peer, 0)..).next().filter(|(peer, _)| *peer == request.peer);
        let before = first.filter(|(_, first)| *first != uid).and_then(|(_, first)| self.requests.get(first));
        let Some(why) = before.and_then(|before| before.in_line.clone()) else { return false };
        let Some(request) = self.requests.get_mut(&uid).filter(|request| request.ahead.is_none()) else { return false };
        request.in_line = Some(why);
        self.lines.insert((request.peer, uid));
        let until = *request.wait_until.get_or_insert(core.now + wait);
        core.timers.set(OutgoingTimer::Allocation(uid), until);
        true
    }

    /// A request stands in no line any more.
    pub(super) fn leave_line(&mut self, uid: Uid) {
        if let Some(request) = self.requests.get_mut(&uid)
            && request.in_line.take().is_some()
        {
            self.lines.remove(&(request.peer, uid));
        }
    }

    /// A receiver may have a place: the first in line is asked for once what is being done now is done.
    pub(super) fn place_is_free(&mut self, peer: PeerId) {
        if !self.lines.is_empty() {
            *self.places.entry(peer).or_default() += 1;
        }
    }

    /// Asks for those whose turn has come.
    pub(in crate::node) fn call_lines(&mut self, core: &mut Core<R>) {
        while let Some((peer, count)) = self.places.pop_first() {
            if self.connection_of(peer).is_none() {
                continue;
            }
            let of_peer = self.lines.range((peer, 0)..).take_while(|(other, _)| *other == peer);
            let called: Vec<Uid> = of_peer.take(count).map(|&(_, uid)| uid).collect();
            called.into_iter().for_each(|uid| self.allocate(core, uid));
        }
    }

    /// Why a request has stood in line in vain, if it does.
    pub(super) fn line_timed_out(&self, uid: Uid) -> Option<Failure> {
        let request = self.requests.get(&uid)?;
        let failure = request.in_line.as_ref()?;
        let OutgoingStage::Connecting { wait, .. } = request.stage else { return None };
        let text = format!(
            "receiver {} had no place for {} ms (pd_allocation_timeout_sec): {}",
            request.receiver(),
            wait.as_millis(),
            failure.text
        );
        Some(Failure::new(failure.kind, text))
    }

    /// Checks that those in line are requests that wait for their receiver's place.
    pub(super) fn check_lines(&self) -> Result<(), String> {
        for (peer, uid) in &self.lines {
            let stands = self.requests.get(uid).is_some_and(|request| {
                request.peer == *peer
                    && request.in_line.is_some()
                    && matches!(request.stage, OutgoingStage::Connecting { .. })
            });
            if !stands {
                return Err(format!("request {uid} is in line for receiver {peer}, and does not wait for it"));
            }
        }
        let standing = self.requests.values().filter(|request| request.in_line.is_some()).count();
        if standing != self.lines.len() {
            return Err(format!("{standing} requests stand in line, and {} are in one", self.lines.len()));
        }
        match self.places.is_empty() {
            true => Ok(()),
            false => Err("a receiver has a place, and the first in line was not asked for".to_owned()),
        }
    }
}
