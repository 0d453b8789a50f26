//! What a receiver session asks of the world around it.

use std::time::Duration;

use crate::ids::{Checksum, ChunkKey, ClientId, ConnectionId, Failure, GrantId, LeaseId, ReadyChunk, RequestId, Seq};
use crate::protocol::Port;
use crate::slot::SlotCounts;
use crate::wire::Message;
use crate::wire::message::ProcessIdentity;

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

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output<R> {
    /// Answer, or tell, a peer.
    Send {
        /// Whom.
        to: R,
        /// From which of our ports.
        port: Port,
        /// What.
        message: Message,
    },
    /// Let the engine meet a peer; `handle_peer_loaded` wants the result.
    LoadPeer {
        /// [`Hello::instance`](crate::wire::message::Hello::instance) of the peer.
        instance: String,
        /// Name of its agent; an LMCache sender has not said, and its metadata does.
        agent_name: Option<String>,
        /// Its engine's metadata.
        metadata: Vec<u8>,
    },
    /// Let the engine forget a peer.
    ForgetPeer(ConnectionId),
    /// Watch a peer's process, if it is on this host; `handle_process_ended` wants to know, until `UnwatchProcess`. Asked
    /// for again when the peer connects again.
    WatchProcess {
        /// Whose.
        instance: String,
        /// Which.
        process: ProcessIdentity,
    },
    /// The end of that process is of no interest any more.
    UnwatchProcess {
        /// Whose.
        instance: String,
    },
    /// Add the next step to the buffer; `handle_grown` wants the result.
    GrowBuffer,
    /// Sum these chunks; `handle_verified` wants to know which of them are not as they were sent, and until then
    /// `handle_verifying`, now and then, that it is getting on.
    Verify {
        /// Whose.
        request: RequestId,
        /// Which attempt of it.
        grant: GrantId,
        /// What to sum, and what it must be.
        chunks: Vec<ExpectedChunk>,
    },
    /// The result of that is not wanted any more.
    AbandonVerification(GrantId),
    /// Answer a client of the connector API.
    Answer {
        /// Whom.
        client: ClientId,
        /// Which of its requests.
        id: Seq,
        /// What.
        answer: Answer,
    },
    /// Something for the log.
    Note(Note<R>),
}

/// An answer to a reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
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
    },
    /// To `release`.
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
pub enum Note<R> {
    /// The buffer has another step, or could not get it.
    Grown {
        /// Its length now, in bytes, or why it did not grow.
        result: Result<u64, String>,
    },
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

/// What a receiver counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReceiverCounts {
    /// Slots by state.
    pub slots: SlotCounts,
    /// Bytes that are free, or hold a chunk that nobody needs.
    pub available_bytes: u64,
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
}
