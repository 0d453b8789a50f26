//! What clients of the connector API are answered.

use crate::ids::{Failure, LeaseId, ReadyChunk, RequestId, StagedSlot};

/// An answer to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// To `open`.
    Opened {
        /// Which request.
        request: RequestId,
        /// Positions of the chunks that the receiver holds already.
        already_sent: Vec<u32>,
        /// One for each other chunk, if they were to be staged and there was room; none otherwise.
        slots: Vec<StagedSlot>,
    },
    /// To `stage`.
    Staged {
        /// One for each chunk asked for.
        slots: Vec<StagedSlot>,
    },
    /// To `send`.
    Accepted,
    /// To `wait`.
    Ready {
        /// Which request.
        request: RequestId,
        /// To release.
        lease: LeaseId,
        /// All its chunks, in the order of the prompt.
        chunks: Vec<ReadyChunk>,
    },
    /// To `lookup`.
    Found {
        /// To release; none when nothing was found.
        lease: Option<LeaseId>,
        /// One for each key.
        chunks: Vec<Option<ReadyChunk>>,
        /// Positions of keys that an LMCache sender was granted, and that no reader has taken.
        granted: Vec<u32>,
        /// Positions of keys whose chunks a sender is pushing ahead.
        coming: Vec<u32>,
    },
    /// To `hold`: the sender keeps what it has, or waits for it.
    Held,
    /// To `release`, and to `release_parked`.
    Released,
    /// To `cancel`.
    Cancelled {
        /// Which request.
        request: RequestId,
    },
    /// To `reset`.
    Reset,
    /// To any of them.
    Failed {
        /// Why.
        failure: Failure,
        /// The peer concerned.
        peer: Option<String>,
    },
}
