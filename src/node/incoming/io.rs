//! What the half that receives takes in, and what it tells.

use std::time::Duration;

use crate::ids::{Checksum, ChunkKey, Failure, RequestId};
use crate::node::Port;

/// A reader's question for chunks by their keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lookup {
    /// Which chunks.
    pub keys: Vec<ChunkKey>,
    /// Whether the reader has heard from the proxy that they are written: then also those are ready that an LMCache sender
    /// was granted.
    pub uncommitted: bool,
    /// Whether nobody will ask for their requests by name: a ready request of which every chunk is found has been fetched.
    pub fetches: bool,
}

/// A chunk as its sender has summed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpectedChunk {
    /// Its position in the request.
    pub index: u32,
    /// Where it starts in the buffer, in bytes.
    pub offset_bytes: u64,
    /// Its length.
    pub len_bytes: u64,
    /// Its checksum when it was read.
    pub checksum: Checksum,
}

/// What happened, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IncomingNote<R> {
    /// A peer is connected.
    PeerConnected {
        /// Which.
        instance: String,
    },
    /// A peer was refused.
    PeerRefused {
        /// Which.
        instance: String,
        /// Why.
        failure: Failure,
    },
    /// A peer is gone.
    PeerLost {
        /// Which.
        instance: String,
        /// How we know.
        reason: String,
    },
    /// A peer that is there was disconnected, because as many are connected as may be and another one came.
    PeerEvicted {
        /// Which.
        instance: String,
        /// How many may be connected.
        peers_max: usize,
    },
    /// Chunks arrived otherwise than they were sent.
    Corrupted {
        /// Which request.
        request: RequestId,
        /// Whose.
        instance: String,
        /// How many of its chunks.
        chunks: usize,
    },
    /// A request got its slots.
    Granted {
        /// Which request.
        request: RequestId,
        /// Whose.
        instance: String,
        /// Chunks in it.
        chunks: usize,
        /// Of those, chunks that were ready already.
        already_sent: usize,
        /// How long it waited for slots.
        waited: Duration,
    },
    /// A request was refused.
    Refused {
        /// Which request, if it had a name.
        request: Option<RequestId>,
        /// Whose.
        instance: String,
        /// Why.
        failure: Failure,
    },
    /// A request is ready.
    Committed {
        /// Which request.
        request: RequestId,
        /// Whose.
        instance: String,
        /// Chunks in it.
        chunks: usize,
        /// Bytes written for it.
        bytes: u64,
        /// From the grant to the commit.
        took: Duration,
    },
    /// Chunks have come that nobody has asked for.
    ArrivedAhead {
        /// What their sender calls them.
        request: RequestId,
        /// Whose.
        instance: String,
        /// Chunks in it.
        chunks: usize,
        /// Bytes written for it.
        bytes: u64,
    },
    /// Chunks that nobody has asked for do not come after all.
    AheadFailed {
        /// What their sender calls them.
        request: RequestId,
        /// Whose.
        instance: String,
        /// Why.
        failure: Failure,
        /// Slots whose writer is not known to have stopped.
        quarantined: usize,
    },
    /// A request ended without being fetched.
    Failed {
        /// Which request.
        request: RequestId,
        /// Whose.
        instance: String,
        /// Why.
        failure: Failure,
        /// Slots whose writer is not known to have stopped.
        quarantined: usize,
    },
    /// A reader has fetched a request.
    Fetched {
        /// Which request.
        request: RequestId,
        /// From the commit to here.
        after: Duration,
    },
    /// What a sender was asked for does not come.
    FetchFailed {
        /// Which request.
        request: RequestId,
        /// Whom.
        instance: String,
        /// Why.
        failure: Failure,
    },
    /// Quarantined slots are free again.
    Unquarantined {
        /// Whose they were.
        instance: String,
        /// How many.
        slots: usize,
    },
    /// A message that this port does not take.
    Unexpected {
        /// Whose.
        from: R,
        /// Which port.
        port: Port,
        /// Its type.
        message: &'static str,
    },
}

/// What the half that receives counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IncomingCounts {
    /// Requests that have not ended.
    pub requests_active: usize,
    /// Of those, requests that wait for slots.
    pub requests_waiting: usize,
    /// Readers' waits for requests.
    pub readers_waiting: usize,
    /// Requests made ready.
    pub requests_ready: u64,
    /// Requests that ended otherwise.
    pub requests_failed: u64,
    /// Bytes committed.
    pub bytes: u64,
    /// Chunks that arrived otherwise than they were sent.
    pub chunks_corrupted: u64,
    /// Chunks freed because nobody fetched or used them in time.
    pub chunks_expired: u64,
    /// Peers that are connected.
    pub peers: usize,
    /// Leases not released.
    pub leases: usize,
    /// Questions to senders for what they have parked.
    pub fetches: usize,
    /// Senders that are connected for that.
    pub sources: usize,
}
