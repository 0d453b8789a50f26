//! How attempts ended lately, for readers and senders that ask after them.

use std::time::{Duration, Instant};

use crate::ids::{Failure, GrantId, RequestId};
use crate::node::latest::Latest;
use crate::wire::message::Commit;

/// How many ends are remembered.
const ENDED_MAX: usize = 4096;
/// How long an end is remembered at least that a reader has yet to be told: longer than a serving engine keeps a request in its
/// queue, so that the reader does not wait for what is known.
const UNTOLD_MIN: Duration = Duration::from_secs(600);

/// The latest end under each name. A name may be used again, and a wait does not say which attempt it is for. So a failure
/// is told once: a wait that comes after that is for the next attempt.
#[derive(Debug)]
pub(super) struct EndedRequests(Latest<RequestId, RequestEnd>);

impl Default for EndedRequests {
    fn default() -> Self {
        Self(Latest::new(ENDED_MAX))
    }
}

#[derive(Debug)]
pub(super) struct RequestEnd {
    pub(super) failure: Failure,
    pub(super) instance: String,
    /// What had been granted.
    pub(super) grant: Option<GrantId>,
    pub(super) at: Instant,
    pub(super) audience: Audience,
}

/// Which readers have to be told of an end when they ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Audience {
    /// None: it was told. Its sender may still say its commit again.
    Nobody,
    /// The first that asks.
    Next,
    /// Each that asks: the chunks are there, for another.
    Everybody,
}

impl EndedRequests {
    /// What a reader that asks now has to be told of an end, and whose it was. `retention`: how long chunks stay.
    pub(super) fn tell(&mut self, id: &RequestId, now: Instant, retention: Duration) -> Option<(Failure, String)> {
        let end = self.0.get_mut(id).filter(|end| end.is_young(now, retention))?;
        match end.audience {
            Audience::Nobody => return None,
            Audience::Next => end.audience = Audience::Nobody,
            Audience::Everybody => {}
        }
        Some((end.failure.clone(), end.instance.clone()))
    }

    /// Readers know of this end, or do not want to.
    pub(super) fn told(&mut self, id: &RequestId) {
        if let Some(end) = self.0.get_mut(id) {
            end.audience = Audience::Nobody;
        }
    }

    /// How the attempt that a commit names ended.
    pub(super) fn of_commit(&self, commit: &Commit) -> Option<&Failure> {
        let end = self.0.get(&commit.req_id)?;
        (end.instance == commit.instance && end.grant == Some(commit.grant)).then_some(&end.failure)
    }

    pub(super) fn forget(&mut self, id: &RequestId) {
        self.0.remove(id);
    }

    /// Whether an attempt under this name has ended lately.
    pub(super) fn knows(&self, id: &RequestId, now: Instant, retention: Duration) -> bool {
        self.0.get(id).is_some_and(|end| end.is_young(now, retention))
    }

    /// Remembers an end of this moment, and forgets old ones.
    pub(super) fn remember(&mut self, retention: Duration, id: RequestId, end: RequestEnd) {
        let now = end.at;
        self.0.insert(id, end);
        self.0.forget_while(|end| !end.is_young(now, retention.max(UNTOLD_MIN)));
    }
}

impl RequestEnd {
    /// Whether it is still told.
    fn is_young(&self, now: Instant, retention: Duration) -> bool {
        let kept = match self.audience {
            // Where it tells of chunks that are there, for no longer than they are.
            Audience::Everybody | Audience::Nobody => retention,
            Audience::Next => retention.max(UNTOLD_MIN),
        };
        now.saturating_duration_since(self.at) <= kept
    }
}
