//! How attempts ended lately, for readers and senders that ask after them.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

use crate::ids::{Failure, GrantId, RequestId};
use crate::wire::message::Commit;

/// How many ends are remembered.
const ENDED_MAX: usize = 4096;

/// The latest end under each name. A name may be used again, and a wait does not say which attempt it is for. So a failure
/// is told once: a wait that comes after that is for the next attempt.
#[derive(Debug, Default)]
pub(super) struct Ended {
    ends: BTreeMap<RequestId, End>,
    order: VecDeque<(RequestId, Instant)>,
}

#[derive(Debug)]
pub(super) struct End {
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

impl Ended {
    /// What a reader that asks now has to be told of an end, and whose it was, unless that was before `after`.
    pub(super) fn tell(&mut self, id: &RequestId, after: Option<Instant>) -> Option<(Failure, String)> {
        let end = self.ends.get_mut(id).filter(|end| after.is_none_or(|after| end.at >= after))?;
        match end.audience {
            Audience::Nobody => return None,
            Audience::Next => end.audience = Audience::Nobody,
            Audience::Everybody => {}
        }
        Some((end.failure.clone(), end.instance.clone()))
    }

    /// Readers know of this end, or do not want to.
    pub(super) fn told(&mut self, id: &RequestId) {
        if let Some(end) = self.ends.get_mut(id) {
            end.audience = Audience::Nobody;
        }
    }

    /// How the attempt that a commit names ended.
    pub(super) fn of_commit(&self, commit: &Commit) -> Option<&Failure> {
        let end = self.ends.get(&commit.req_id)?;
        (end.instance == commit.instance && end.grant == Some(commit.grant)).then_some(&end.failure)
    }

    pub(super) fn forget(&mut self, id: &RequestId) {
        self.ends.remove(id);
    }

    /// Remembers an end of this moment, and forgets those before `after`.
    pub(super) fn remember(&mut self, after: Option<Instant>, id: RequestId, end: End) {
        self.order.push_back((id.clone(), end.at));
        self.ends.insert(id, end);
        let too_old = |at: &Instant| after.is_some_and(|after| *at < after);
        while self.order.len() > ENDED_MAX || self.order.front().is_some_and(|(_, at)| too_old(at)) {
            let Some((oldest, at)) = self.order.pop_front() else { break };
            // The name may have been forgotten, or have ended again, since.
            if self.ends.get(&oldest).is_some_and(|latest| latest.at == at) {
                self.ends.remove(&oldest);
            }
        }
    }
}
