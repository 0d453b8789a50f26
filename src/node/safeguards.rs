//! What keeps bytes whole, requests going and answers right, by name.

use super::NodeSettings;

/// Every node has all of these. With the feature `mutants`, which no released binary has, the simulation leaves out one at a
/// time, to show that it would notice its absence.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Safeguard {
    /// Slots whose writer may still be writing are not granted again.
    Quarantine,
    /// A commit or a cancel counts for the grant that it names, and not for its request's name.
    GrantCheck,
    /// A request holds no slot before it has all of them.
    #[cfg(feature = "mutants")]
    WholeRequests,
    /// The proxy is told after the commit was acknowledged.
    CommitBeforeNotify,
    /// A reader that asks after another was told of a failure waits for the next attempt.
    EndsToldOnce,
    /// Slots that a client may be filling are not used again before it knows that its request has failed.
    FailureAcknowledged,
    /// Parked chunks that are being sent stay where they are.
    SentChunksHeld,
    /// Where one buffer serves both halves, each is sure of a part of it.
    SurePart,
    /// What one half frees, the other is told of.
    OtherHalfWoken,
    /// Of a chunk that several LMCache senders were granted, no copy is taken for written by its key.
    #[cfg(any(feature = "lmcache", feature = "mutants"))]
    CopiesToldApart,
    /// Slots of an LMCache sender whose connection is gone are not granted again while what it had posted may arrive.
    #[cfg(any(feature = "lmcache", feature = "mutants"))]
    Linger,
    /// What an LMCache receiver says is there, and was granted to us and never written, is written.
    #[cfg(any(feature = "lmcache", feature = "mutants"))]
    UnwrittenRemembered,
}

impl NodeSettings {
    /// Whether the node has a safeguard.
    #[cfg(not(feature = "mutants"))]
    #[allow(clippy::unused_self)]
    pub(super) const fn keeps(&self, _: Safeguard) -> bool {
        true
    }

    /// Whether the node has a safeguard.
    #[cfg(feature = "mutants")]
    pub(super) fn keeps(&self, safeguard: Safeguard) -> bool {
        self.without != Some(safeguard)
    }
}
