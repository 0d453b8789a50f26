//! Requests that a reader gave up before a sender announced them: their senders are refused, and do not fill slots for nobody.

use std::time::{Duration, Instant};

use crate::ids::RequestId;
use crate::node::latest::Latest;

/// How many names are remembered.
const NAMES_MAX: usize = 4096;
/// How long a name is remembered. It is refused once at most, and not at all once a reader wants it again.
const KEPT: Duration = Duration::from_secs(600);

/// Names of requests that nobody wants, and since when.
#[derive(Debug)]
pub(super) struct Unwanted(Latest<RequestId, Instant>);

impl Default for Unwanted {
    fn default() -> Self {
        Self(Latest::new(NAMES_MAX))
    }
}

impl Unwanted {
    /// A reader gives up what no sender has announced.
    pub(super) fn given_up(&mut self, now: Instant, id: RequestId) {
        self.0.forget_while(|since| now.saturating_duration_since(*since) > KEPT);
        self.0.insert(id, now);
    }

    /// A reader asks for it: what is announced from now on is for that reader.
    pub(super) fn wanted(&mut self, id: &RequestId) {
        self.0.remove(id);
    }

    /// A sender announces it. Whether to refuse that; the next attempt under this name is served as any.
    pub(super) fn take(&mut self, now: Instant, id: &RequestId) -> bool {
        let given_up = self.0.get(id).is_some_and(|since| now.saturating_duration_since(*since) <= KEPT);
        self.0.remove(id);
        given_up
    }
}
