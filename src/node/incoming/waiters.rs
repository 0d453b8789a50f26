//! Readers that wait for requests: by their questions, and for each request in the order of asking.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::ids::{ClientId, RequestId, Seq};

/// A reader that waits for a request.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) request: RequestId,
    pub(super) wait: Duration,
    /// The reader knows that the request is written, whether or not its sender commits.
    pub(super) uncommitted: bool,
    /// `wait` is for the request to be announced: from then on the reader waits for its end.
    pub(super) until_announced: bool,
}

/// Every reader that waits. A step takes time that grows with the logarithm of their number.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    /// With its place in the line for its request.
    by_question: BTreeMap<(ClientId, Seq), (u64, Waiter)>,
    lines: BTreeMap<RequestId, Line>,
    /// How many waits each client has open.
    counts: BTreeMap<ClientId, usize>,
    next_place: u64,
}

/// The readers that wait for one request.
#[derive(Debug, Default)]
struct Line {
    places: BTreeMap<u64, (ClientId, Seq)>,
    /// How many of them take the request uncommitted.
    uncommitted: usize,
}

impl Waiters {
    pub(super) fn len(&self) -> usize {
        self.by_question.len()
    }

    pub(super) fn get(&self, client: ClientId, id: Seq) -> Option<&Waiter> {
        self.by_question.get(&(client, id)).map(|(_, waiter)| waiter)
    }

    /// A reader waits only for its request to be announced, and then for its end. One that is answered already does not wait.
    pub(super) fn wait_until_announced(&mut self, client: ClientId, id: Seq) {
        if let Some((_, waiter)) = self.by_question.get_mut(&(client, id)) {
            waiter.until_announced = true;
        }
    }

    pub(super) fn contains(&self, client: ClientId, id: Seq) -> bool {
        self.by_question.contains_key(&(client, id))
    }

    /// How many waits a client has open.
    pub(super) fn count_of(&self, client: ClientId) -> usize {
        self.counts.get(&client).copied().unwrap_or(0)
    }

    /// Puts a question that is not in here at the end of the line for its request.
    pub(super) fn insert(&mut self, client: ClientId, id: Seq, waiter: Waiter) {
        let place = self.next_place;
        self.next_place += 1;
        let line = self.lines.entry(waiter.request.clone()).or_default();
        line.places.insert(place, (client, id));
        line.uncommitted += usize::from(waiter.uncommitted);
        *self.counts.entry(client).or_default() += 1;
        self.by_question.insert((client, id), (place, waiter));
    }

    pub(super) fn remove(&mut self, client: ClientId, id: Seq) -> Option<Waiter> {
        let (place, waiter) = self.by_question.remove(&(client, id))?;
        if let Some(line) = self.lines.get_mut(&waiter.request) {
            line.places.remove(&place);
            line.uncommitted -= usize::from(waiter.uncommitted);
            if line.places.is_empty() {
                self.lines.remove(&waiter.request);
            }
        }
        if let Some(count) = self.counts.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&client);
            }
        }
        Some(waiter)
    }

    /// The question that has waited longest for a request.
    pub(super) fn first_for(&self, request: &RequestId) -> Option<(ClientId, Seq)> {
        self.lines.get(request)?.places.first_key_value().map(|(_, question)| *question)
    }

    /// Whether a reader waits for a request that takes it uncommitted.
    pub(super) fn takes_uncommitted(&self, request: &RequestId) -> bool {
        self.lines.get(request).is_some_and(|line| line.uncommitted > 0)
    }

    /// The requests that are waited for.
    pub(super) fn requests(&self) -> impl Iterator<Item = &RequestId> {
        self.lines.keys()
    }

    /// The questions of one client.
    pub(super) fn of_client(&self, client: ClientId) -> Vec<Seq> {
        self.by_question.range((client, Seq(0))..=(client, Seq(u64::MAX))).map(|(&(_, id), _)| id).collect()
    }
}
