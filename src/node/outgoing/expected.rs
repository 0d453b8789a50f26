//! Requests that a client's serving engine has, and has not begun to compute: they stand in its queue. A receiver that asks for one
//! of them by name waits for as long as it stands there, and hears at once when it is given up.

use std::collections::BTreeMap;

use super::Outgoing;
use crate::ids::{ClientId, Failure, FailureKind, REQUEST_IDS_MAX, RequestId, Seq};
use crate::node::Answer;
use crate::node::core::Core;

/// Most requests that are expected at the same time.
const EXPECTED_MAX: usize = 8192;

/// Every request that is expected.
#[derive(Debug, Default)]
pub(super) struct Expected {
    /// What those call it who will ask for it, by what its client will park it as.
    names: BTreeMap<(ClientId, RequestId), Vec<RequestId>>,
    /// How many of them have each of these names.
    counts: BTreeMap<RequestId, usize>,
}

impl Expected {
    /// Whether a request of one of these names is expected.
    pub(super) fn knows(&self, names: &[RequestId]) -> bool {
        names.iter().any(|name| self.counts.contains_key(name))
    }

    pub(super) fn contains(&self, client: ClientId, request: &RequestId) -> bool {
        self.names.contains_key(&(client, request.clone()))
    }

    fn insert(&mut self, client: ClientId, request: RequestId, names: Vec<RequestId>) {
        for name in &names {
            *self.counts.entry(name.clone()).or_default() += 1;
        }
        self.names.insert((client, request), names);
    }

    /// It is parked now, or not expected any more. The names that it had.
    pub(super) fn remove(&mut self, client: ClientId, request: &RequestId) -> Option<Vec<RequestId>> {
        let names = self.names.remove(&(client, request.clone()))?;
        for name in &names {
            if let Some(count) = self.counts.get_mut(name) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(name);
                }
            }
        }
        Some(names)
    }

    fn of_client(&self, client: ClientId) -> Vec<RequestId> {
        self.names.keys().filter(|(owner, _)| *owner == client).map(|(_, request)| request.clone()).collect()
    }

    /// Checks that names are counted as they are there.
    ///
    /// # Errors
    /// What is not.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut counts: BTreeMap<&RequestId, usize> = BTreeMap::new();
        for name in self.names.values().flatten() {
            *counts.entry(name).or_default() += 1;
        }
        match counts.into_iter().eq(self.counts.iter().map(|(name, &count)| (name, count))) {
            true => Ok(()),
            false => Err("the names of expected requests are not counted as they are".to_owned()),
        }
    }
}

impl<R: Clone> Outgoing<R> {
    /// A client's serving engine has a request that it will park under this name.
    pub(in crate::node) fn handle_expect(
        &mut self,
        core: &mut Core<R>,
        client: ClientId,
        id: Seq,
        request: RequestId,
        names: Vec<RequestId>,
    ) {
        if names.len() > REQUEST_IDS_MAX {
            let text = format!("{request} is to be known by {} names, the limit is {REQUEST_IDS_MAX}", names.len());
            return core.refuse(client, id, Failure::new(FailureKind::Limit, text), None);
        }
        self.expected.remove(client, &request);
        if self.expected.names.len() >= EXPECTED_MAX {
            let text = format!("{EXPECTED_MAX} requests are expected, the limit");
            return core.refuse(client, id, Failure::new(FailureKind::Busy, text), None);
        }
        self.expect_names(&names);
        self.expected.insert(client, request, names);
        core.answer(client, id, Answer::Accepted);
    }

    /// An expected request does not come: who waits for it is told. False: it is not expected.
    pub(super) fn expect_no_more(&mut self, core: &mut Core<R>, client: ClientId, request: &RequestId) -> bool {
        let Some(names) = self.expected.remove(client, request) else { return false };
        self.give_up_expected(core, request, &names);
        true
    }

    /// A client is gone: nothing that it has announced comes.
    pub(super) fn expect_nothing_of(&mut self, core: &mut Core<R>, client: ClientId) {
        for request in self.expected.of_client(client) {
            self.expect_no_more(core, client, &request);
        }
    }
}
