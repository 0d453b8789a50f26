//! Requests that prefill has given up before all of them was parked: whoever asks by their names hears of it, and does not wait
//! for what nobody computes.

use std::time::Instant;

use super::Outgoing;
use super::OutgoingTimer;
use super::registrants::Registrant;
use super::requests::OutgoingStage;
use crate::ids::{Failure, Registration, RequestId};
use crate::node::core::Core;
use crate::node::latest::Latest;

/// How many names are remembered.
const NAMES_MAX: usize = 4096;

/// The latest end under each name.
#[derive(Debug)]
pub(super) struct GivenUp(Latest<RequestId, (Instant, Failure)>);

impl Default for GivenUp {
    fn default() -> Self {
        Self(Latest::new(NAMES_MAX))
    }
}

impl<R: Clone> Outgoing<R> {
    /// What was to be found under these names does not come: those who wait for it are told, and those who ask within the time of
    /// a lease.
    pub(super) fn give_up(&mut self, core: &mut Core<R>, id: &RequestId, mut names: Vec<RequestId>, failure: &Failure) {
        // Others that have the name may still come, as the prompts of a list do.
        names.retain(|name| !self.is_known(name));
        if names.is_empty() {
            return;
        }
        let failure = Failure::new(failure.kind, format!("prefill gave {id} up: {}", failure.text));
        for name in &names {
            self.given_up.0.insert(name.clone(), (core.now, failure.clone()));
        }
        for id in self.registrants.waiting_under(&names) {
            core.timers.unset(OutgoingTimer::Registration(id.clone()));
            let ended = self.registrants.end(&id, Registration::Failed, Some(failure.clone()));
            if let Some(Registrant { route, seq, .. }) = ended {
                self.answer_registration(core, route, seq, id.1, Registration::Failed, Some(failure.clone()));
            }
        }
    }

    /// A request has these names anew.
    pub(super) fn take_up_names(&mut self, names: &[RequestId]) {
        names.iter().for_each(|name| self.given_up.0.remove(name));
    }

    /// Why nothing comes under these names, if that is known.
    pub(super) fn given_up(&mut self, core: &Core<R>, names: &[RequestId]) -> Option<Failure> {
        let lease = self.settings.lease;
        self.given_up.0.forget_while(|(at, _)| core.now.saturating_duration_since(*at) >= lease);
        names.iter().find_map(|name| self.given_up.0.get(name)).map(|(_, failure)| failure.clone())
    }

    /// Whether something is parked under this name, or will be.
    fn is_known(&self, name: &RequestId) -> bool {
        let is_parking =
            |stage: &OutgoingStage| matches!(stage, OutgoingStage::Parking { ids, .. } if ids.contains(name));
        self.requests.values().any(|request| is_parking(&request.stage))
            || self.park_leases.values().any(|lease| lease.ids.contains(name))
    }
}
