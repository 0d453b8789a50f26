//! Requests that prefill has given up before all of them was parked: whoever asks for them hears of it, and does not wait for what
//! nobody computes.
//!
//! A name alone is no request: the prompts of a list share one, and clients choose some. Whoever asks for a request has one of its
//! names, and the key of its last chunk, which the whole prompt is in.

use std::time::Instant;

use super::Outgoing;
use super::OutgoingTimer;
use super::registrants::Registrant;
use super::requests::{OutgoingRequest, OutgoingStage};
use super::uid::{RegistrationId, Uid};
use crate::ids::{ChunkKey, Failure, FailureKind, Registration, RequestId};
use crate::node::core::Core;
use crate::node::latest::Latest;

/// How many names are remembered.
const NAMES_MAX: usize = 4096;

/// The latest end under each name, by the last chunk, which is always there: none comes before all of a name.
#[derive(Debug)]
pub(super) struct GivenUp(Latest<(RequestId, Option<ChunkKey>), (Instant, Failure)>);

impl Default for GivenUp {
    fn default() -> Self {
        Self(Latest::new(NAMES_MAX))
    }
}

impl<R: Clone> Outgoing<R> {
    /// What was to be found under these names does not come: those who wait for it are told, and those who ask within the time of
    /// a lease. `last`: its last chunk.
    pub(super) fn give_up(
        &mut self,
        core: &mut Core<R>,
        id: &RequestId,
        names: &[RequestId],
        last: &ChunkKey,
        failure: &Failure,
    ) {
        if self.comes_otherwise(core, last) {
            return;
        }
        let failure = Failure::new(failure.kind, format!("prefill gave {id} up: {}", failure.text));
        for name in names {
            self.given_up.0.insert((name.clone(), Some(last.clone())), (core.now, failure.clone()));
        }
        for id in self.registrants.waiting_under(names, Some(last)) {
            self.end_waiting(core, &id, &failure);
        }
    }

    /// A request that ends with this chunk has these names anew.
    pub(super) fn take_up_names(&mut self, names: &[RequestId], last: &ChunkKey) {
        names.iter().for_each(|name| self.given_up.0.remove(&(name.clone(), Some(last.clone()))));
    }

    /// Requests of these names are expected, of which nothing else is known yet.
    pub(super) fn expect_names(&mut self, names: &[RequestId]) {
        for name in names {
            self.given_up.0.remove_from(&(name.clone(), None), |(other, _)| other == name);
        }
    }

    /// Requests that had these names are not computed, and no chunk of them is known: those who wait under a name that nothing else has
    /// are told.
    pub(super) fn give_up_expected(&mut self, core: &mut Core<R>, id: &RequestId, names: &[RequestId]) {
        let failure = Failure::new(FailureKind::Cancelled, format!("prefill gave {id} up: it was not computed"));
        let gone: Vec<RequestId> = names.iter().filter(|name| !self.is_known(name)).cloned().collect();
        for id in self.registrants.waiting_under(&gone, None) {
            self.end_waiting(core, &id, &failure);
        }
    }

    /// Whether something is parked under this name, or will be.
    fn is_known(&self, name: &RequestId) -> bool {
        let is_parking =
            |stage: &OutgoingStage| matches!(stage, OutgoingStage::Parking { ids, .. } if ids.contains(name));
        self.expected.knows(std::slice::from_ref(name))
            || self.requests.values().any(|request| is_parking(&request.stage))
            || self.park_leases.values().any(|lease| lease.ids.contains(name))
    }

    /// Tells one that waits that it waits for nothing.
    fn end_waiting(&mut self, core: &mut Core<R>, id: &RegistrationId, failure: &Failure) {
        core.timers.unset(OutgoingTimer::Registration(id.clone()));
        let ended = self.registrants.end(id, Registration::Failed, Some(failure.clone()));
        if let Some(Registrant { route, seq, .. }) = ended {
            self.answer_registration(core, route, seq, id.1.clone(), Registration::Failed, Some(failure.clone()));
        }
    }

    /// Why what ends with this chunk does not come under any of these names, if that is known.
    pub(super) fn given_up(&mut self, core: &Core<R>, names: &[RequestId], last: Option<&ChunkKey>) -> Option<Failure> {
        let lease = self.settings.lease;
        self.given_up.0.forget_while(|(at, _)| core.now.saturating_duration_since(*at) >= lease);
        let end = |name: &RequestId| self.given_up.0.get(&(name.clone(), Some(last?.clone())));
        names.iter().find_map(end).map(|(_, failure)| failure.clone())
    }

    /// Whether this chunk is here, or another request computes it: another sample of the prompt, say.
    fn comes_otherwise(&self, core: &Core<R>, last: &ChunkKey) -> bool {
        let is_parking = |uid: &Uid| self.requests.get(uid).is_some_and(OutgoingRequest::is_parking);
        core.slots.find(last).is_some() || self.coming.get(last).is_some_and(|uids| uids.iter().any(is_parking))
    }
}
