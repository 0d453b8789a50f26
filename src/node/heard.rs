//! When a peer was last heard of.

use std::time::{Duration, Instant};

/// The latest sign of life of a peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heard(Instant);

impl Heard {
    pub(super) const fn at(now: Instant) -> Self {
        Self(now)
    }

    /// For how long the peer has been silent. `due` is when this look was to be, `interval` how far looks are apart. One that is
    /// late by an interval or more means that we have slept: what the peer said meanwhile is still to be read.
    pub(super) fn silence(&mut self, now: Instant, due: Instant, interval: Duration) -> Duration {
        if now.saturating_duration_since(due) >= interval {
            self.0 = now;
        }
        now.saturating_duration_since(self.0)
    }

    /// When it has been silent for so long.
    pub(super) fn silent_for(self, timeout: Duration) -> Instant {
        self.0 + timeout
    }
}
