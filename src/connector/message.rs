//! The messages of the connector API, msgpack maps with a `type`. docs/connector-api.md shows each of them.
//!
//! A client speaks first and chooses `id`; every request gets exactly one reply with that `id`. Events have no `id`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{
    ChunkKey, DeviceId, Failure, FailureKind, GroupIndex, IpcHandle, LeaseId, ReadyChunk, ReceiverAddress, RequestId,
    Seq, SlotPart, SourceAddress, StagedSlot, nil_is_left_out,
};

/// The version of this API.
pub const CONNECTOR_API_VERSION: u16 = 2;

/// From the engine's process to the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Request {
    /// First message of every client.
    Attach {
        /// Pairs the reply.
        id: Seq,
        /// [`CONNECTOR_API_VERSION`] of the client.
        version: u16,
        /// What to call it in logs.
        client: String,
    },
    /// Last message: gives back leases, cancels requests.
    Detach {
        /// Pairs the reply.
        id: Seq,
    },
    /// Counters of the daemon.
    Status {
        /// Pairs the reply.
        id: Seq,
    },
    /// Sender: a request will send these chunks to that receiver. Answered by `opened` once the receiver has granted
    /// slots for all of them.
    Open {
        /// Pairs the reply.
        id: Seq,
        /// What the router calls the request.
        req_id: RequestId,
        /// The chunks' keys, in the order of the prompt.
        keys: Vec<ChunkKey>,
        /// Tokens in the last chunk of each group, 1 to chunk_tokens.
        last_chunk_tokens: u32,
        /// Where to.
        receiver: ReceiverAddress,
        /// How long to wait for slots, in milliseconds; the configured time when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait_ms: Option<u64>,
        /// Of which group of layers each chunk is, as a position in `attached`'s `groups`; all of the first when left
        /// out.
        #[serde(default, deserialize_with = "nil_is_left_out", skip_serializing_if = "Vec::is_empty")]
        groups: Vec<GroupIndex>,
        /// Whether `opened` is to bring slots for every chunk to send, if there are any free at that moment.
        #[serde(default, skip_serializing_if = "is_false", deserialize_with = "nil_is_left_out")]
        stage: bool,
    },
    /// Sender: a request's chunks are to be kept for whoever asks for them. Answered by `opened`, once there are slots for all
    /// of them: `already_sent` are chunks that are kept here already, `slots` has one for each other. Then `send` as for any
    /// request, and the event `parked` at its end.
    Park {
        /// Pairs the reply.
        id: Seq,
        /// What to call the request here.
        req_id: RequestId,
        /// As in `open`.
        keys: Vec<ChunkKey>,
        /// As in `open`.
        last_chunk_tokens: u32,
        /// What those call it who will ask for it.
        #[serde(default, deserialize_with = "nil_is_left_out", skip_serializing_if = "Vec::is_empty")]
        ids: Vec<RequestId>,
        /// As in `open`.
        #[serde(default, deserialize_with = "nil_is_left_out", skip_serializing_if = "Vec::is_empty")]
        groups: Vec<GroupIndex>,
        /// As in `open`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait_ms: Option<u64>,
        /// Whether nobody is told where they are kept: they are only pushed ahead, and kept until that has ended. Refused where no
        /// receiver can be guessed.
        #[serde(default, skip_serializing_if = "is_false", deserialize_with = "nil_is_left_out")]
        unsolicited: bool,
        /// Whether they are not to be pushed ahead: somebody may come for them, later and perhaps.
        #[serde(default, skip_serializing_if = "is_false", deserialize_with = "nil_is_left_out")]
        stays: bool,
    },
    /// Sender: local slots to fill, one for each of these chunks. Answered by `staged`, all at once.
    Stage {
        /// Pairs the reply.
        id: Seq,
        /// An opened request.
        req_id: RequestId,
        /// Positions in `keys`.
        chunks: Vec<u32>,
        /// How long to wait for slots, in milliseconds; the configured time when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait_ms: Option<u64>,
    },
    /// Sender: these staged bytes are final, write them. A slot belongs to the daemon again once all bytes of its
    /// chunk are sent.
    Send {
        /// Pairs the reply.
        id: Seq,
        /// An opened request.
        req_id: RequestId,
        /// What to write; may be empty when `last`.
        parts: Vec<SlotPart>,
        /// Whether this completes the request: every byte of every chunk that the receiver lacked is then sent.
        last: bool,
        /// An event of the client's process: the parts are final once the GPU has passed it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<IpcHandle>,
    },
    /// Either: give the request up. A sender answers when nothing is written for it any more, or `deadline`; a receiver at once.
    Cancel {
        /// Pairs the reply.
        id: Seq,
        /// Which.
        req_id: RequestId,
        /// As in `release`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<IpcHandle>,
        /// Only says that the client knows of the event `failed`: ends nothing that has not failed.
        #[serde(default, skip_serializing_if = "is_false", deserialize_with = "nil_is_left_out")]
        acknowledges: bool,
    },
    /// Receiver: which of these chunks are ready? Takes a lease on those.
    Lookup {
        /// Pairs the reply.
        id: Seq,
        /// Which chunks.
        keys: Vec<ChunkKey>,
        /// The caller has heard from the proxy that they are written: what an LMCache sender was granted counts as
        /// ready.
        #[serde(default, skip_serializing_if = "is_false", deserialize_with = "nil_is_left_out")]
        uncommitted: bool,
        /// Nobody will wait for their requests by name: a ready request of which every chunk is found counts as fetched.
        #[serde(default, skip_serializing_if = "is_false", deserialize_with = "nil_is_left_out")]
        fetch: bool,
    },
    /// Receiver: answered by `ready` with a lease on all chunks of the request, or by `error`.
    Wait {
        /// Pairs the reply.
        id: Seq,
        /// Which; it need not have been announced by a sender yet.
        req_id: RequestId,
        /// How long, in milliseconds; the configured time when left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait_ms: Option<u64>,
        /// As in `lookup`.
        #[serde(default, skip_serializing_if = "is_false", deserialize_with = "nil_is_left_out")]
        uncommitted: bool,
    },
    /// Receiver: a sender has parked chunks, or will have: have it send those that it has. Answered as `wait` is; of `ready` the
    /// chunks are those that it had. With `hold` they are only to be kept while decode waits its turn; answered by `held`, and
    /// a `fetch` of the same name follows.
    Fetch {
        /// Pairs the reply.
        id: Seq,
        /// What to call it here; no other request has this name.
        req_id: RequestId,
        /// Where they are parked.
        source: SourceAddress,
        /// Which chunks, in the order of the prompt.
        keys: Vec<ChunkKey>,
        /// What the prefill server calls the request.
        #[serde(default, deserialize_with = "nil_is_left_out", skip_serializing_if = "Vec::is_empty")]
        ids: Vec<RequestId>,
        /// As in `wait`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        wait_ms: Option<u64>,
        /// How long the sender may wait for a request that it has not heard of, in milliseconds; left out where prefill has
        /// answered already.
        #[serde(default, skip_serializing_if = "is_zero", deserialize_with = "nil_is_left_out")]
        register_wait_ms: u64,
        /// Whether they are only to be kept.
        #[serde(default, skip_serializing_if = "is_false", deserialize_with = "nil_is_left_out")]
        hold: bool,
    },
    /// Receiver: what a sender has parked under these names is not wanted. Answered by `released`, before the sender is told.
    ReleaseParked {
        /// Pairs the reply.
        id: Seq,
        /// As in `fetch`, whose question it ends.
        req_id: RequestId,
        /// Where it is parked.
        source: SourceAddress,
        /// As in `fetch`.
        #[serde(default, deserialize_with = "nil_is_left_out", skip_serializing_if = "Vec::is_empty")]
        ids: Vec<RequestId>,
    },
    /// Receiver: the chunks of this lease have been copied.
    Release {
        /// Pairs the reply.
        id: Seq,
        /// From `found` or `ready`.
        lease: LeaseId,
        /// An event of the client's process: this is said once the GPU has passed it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<IpcHandle>,
    },
    /// Either: nothing that was computed before this is to be used. Ready chunks are dropped, and what has not ended fails.
    Reset {
        /// Pairs the reply.
        id: Seq,
    },
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

fn is_false(value: &bool) -> bool {
    !*value
}

impl Request {
    /// The `id` that the reply carries.
    pub const fn id(&self) -> Seq {
        match self {
            Self::Attach { id, .. }
            | Self::Detach { id }
            | Self::Status { id }
            | Self::Open { id, .. }
            | Self::Park { id, .. }
            | Self::Fetch { id, .. }
            | Self::ReleaseParked { id, .. }
            | Self::Stage { id, .. }
            | Self::Send { id, .. }
            | Self::Cancel { id, .. }
            | Self::Lookup { id, .. }
            | Self::Wait { id, .. }
            | Self::Release { id, .. }
            | Self::Reset { id } => *id,
        }
    }

    /// Takes out the event that the message itself has to wait for. Of a `send` it is what is sent that waits.
    pub const fn take_after(&mut self) -> Option<IpcHandle> {
        match self {
            Self::Cancel { after, .. } | Self::Release { after, .. } => after.take(),
            _ => None,
        }
    }
}

/// From the daemon to the engine's process: replies carry the request's `id`, events none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Reply {
    /// To `attach`.
    Attached {
        /// From the request.
        id: Seq,
        /// [`CONNECTOR_API_VERSION`] of the daemon.
        version: u16,
        /// `sender`, `receiver` or `both`.
        role: String,
        /// How to map the pd_buffer.
        buffer: BufferHandle,
        /// Bytes of a slot: of a whole chunk of the group that has the largest.
        chunk_bytes: u64,
        /// Number of slots that the buffer is or can become.
        slot_count: u32,
        /// Tokens in a whole chunk.
        chunk_tokens: u32,
        /// The groups of layers that keep the same shape of cache, at least one.
        groups: Vec<Group>,
        /// What a chunk is, as the handshake compares it.
        layout: Vec<(String, String)>,
    },
    /// To `detach`.
    Detached {
        /// From the request.
        id: Seq,
    },
    /// To `status`.
    Status {
        /// From the request.
        id: Seq,
        /// What is counted.
        status: Status,
    },
    /// To `open`: the receiver has room. To `park`: this daemon has.
    Opened {
        /// From the request.
        id: Seq,
        /// Which request.
        req_id: RequestId,
        /// Positions in `keys` of chunks that the receiver holds already: neither staged nor sent.
        already_sent: Vec<u32>,
        /// One for each other chunk, as in `staged`; none if `stage` was not asked for, or not enough were free.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        slots: Vec<StagedSlot>,
    },
    /// To `stage`.
    Staged {
        /// From the request.
        id: Seq,
        /// One for each chunk asked for, in that order.
        slots: Vec<StagedSlot>,
    },
    /// To `send`: the parts are queued. `sent` or `failed` follows once for the whole request.
    Accepted {
        /// From the request.
        id: Seq,
    },
    /// To `cancel`.
    Cancelled {
        /// From the request.
        id: Seq,
        /// Which request.
        req_id: RequestId,
    },
    /// To `lookup`.
    Found {
        /// From the request.
        id: Seq,
        /// To release; absent when nothing was found.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease: Option<LeaseId>,
        /// One for each key asked for, in that order; nil where there is no ready chunk.
        chunks: Vec<Option<ReadyChunk>>,
        /// Positions of keys that an LMCache sender was granted: written, perhaps, and not committed, since such a
        /// sender does not say.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        granted: Vec<u32>,
        /// Positions of keys whose chunks a sender is pushing ahead: looked up again a moment later they are ready, or are not
        /// coming.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        coming: Vec<u32>,
    },
    /// To `wait`, and to `fetch`.
    Ready {
        /// From the request.
        id: Seq,
        /// Which request.
        req_id: RequestId,
        /// To release.
        lease: LeaseId,
        /// All chunks of the request, in the order of the prompt; to `fetch`, those from the first one on that could be had.
        chunks: Vec<ReadyChunk>,
    },
    /// To `fetch` with `hold`.
    Held {
        /// From the request.
        id: Seq,
    },
    /// To `release` and `release_parked`.
    Released {
        /// From the request.
        id: Seq,
    },
    /// To `reset`.
    Reset {
        /// From the request.
        id: Seq,
    },
    /// To any request that was refused or failed.
    Error {
        /// From the request.
        id: Seq,
        /// For programs.
        kind: FailureKind,
        /// For people: what was seen, what was expected, what to do.
        text: String,
        /// The peer concerned, if any.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        peer: Option<String>,
    },
    /// Event: the receiver has committed every chunk.
    Sent {
        /// Which request.
        req_id: RequestId,
        /// Chunks written, those already there not counted.
        chunks: u32,
        /// Bytes written.
        bytes: u64,
        /// How long each phase took.
        timings: Timings,
    },
    /// Event: every chunk of a parked request is kept from now on, for the time of its lease.
    Parked {
        /// Which request.
        req_id: RequestId,
        /// Its chunks.
        chunks: u32,
    },
    /// Event: the request has ended without being sent.
    Failed {
        /// Which request.
        req_id: RequestId,
        /// For programs.
        kind: FailureKind,
        /// For people.
        text: String,
        /// The peer concerned.
        peer: String,
    },
}

impl Reply {
    /// The `id` of the request that this answers; none for an event.
    pub const fn id(&self) -> Option<Seq> {
        match self {
            Self::Attached { id, .. }
            | Self::Detached { id }
            | Self::Status { id, .. }
            | Self::Opened { id, .. }
            | Self::Staged { id, .. }
            | Self::Accepted { id }
            | Self::Cancelled { id, .. }
            | Self::Found { id, .. }
            | Self::Ready { id, .. }
            | Self::Held { id }
            | Self::Released { id }
            | Self::Reset { id }
            | Self::Error { id, .. } => Some(*id),
            Self::Sent { .. } | Self::Parked { .. } | Self::Failed { .. } => None,
        }
    }
}

/// Layers that keep the same shape of cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// What it is called; empty for the only one.
    pub name: String,
    /// Bytes of one token.
    pub token_bytes: u64,
}

/// Phases of a sent request, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// From `open` until the receiver had granted, the handshake with a new peer included.
    pub alloc_us: u64,
    /// From the last `send` until the transfer engine had written everything.
    pub transfer_us: u64,
    /// From then until the receiver had acknowledged the commit.
    pub commit_us: u64,
}

/// How another process of the same user gets at a pd_buffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum BufferHandle {
    /// Host memory: a memfd of the daemon.
    Host {
        /// The daemon's process.
        pid: u32,
        /// Its descriptor: map `/proc/<pid>/fd/<fd>`.
        fd: i32,
        /// Length of the mapping.
        len_bytes: u64,
        /// Inode of the memfd, to tell it from another file behind a reused pid.
        inode: u64,
        /// How much of it has its pages, from the start, in bytes. The rest comes when the buffer grows: a client that
        /// touched it would take memory that the daemon has not.
        present_bytes: u64,
    },
    /// Memory of a GPU: an allocation of the daemon.
    Cuda {
        /// The daemon's process.
        pid: u32,
        /// The GPU's UUID.
        device: DeviceId,
        /// The daemon's number for that GPU; another process may have another one.
        ordinal: u32,
        /// What the driver opens the whole allocation by.
        ipc_handle: IpcHandle,
        /// Where the buffer starts in the allocation.
        offset_bytes: u64,
        /// Length of the allocation.
        allocation_bytes: u64,
        /// Length of the buffer.
        len_bytes: u64,
    },
}

/// What a daemon counts. Counters start at 0 with the process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// `sender`, `receiver` or `both`.
    pub role: String,
    /// Transfer engine.
    pub engine: String,
    /// Slots that the buffer is or can become.
    pub slot_count: u32,
    /// Slots' worth of bytes that are free, or hold a chunk that nobody needs; of a buffer that grows, as it is now.
    pub slots_free: u32,
    /// Slots being filled or written.
    pub slots_reserved: u32,
    /// Receiver: slots that hold a committed chunk.
    pub slots_ready: u32,
    /// Receiver: slots whose writer may still be writing.
    pub slots_quarantined: u32,
    /// Requests that have not ended.
    pub requests_active: u32,
    /// Requests that ended well: sent, or made ready.
    pub requests_done: u64,
    /// Requests that ended otherwise.
    pub requests_failed: u64,
    /// Bytes written to peers, or committed by them.
    pub bytes: u64,
    /// Peers that are connected.
    pub peers: u32,
    /// Attached clients.
    pub clients: u32,
    /// The buffer's bytes.
    pub buffer: BufferUsage,
    /// Receiver: of the ready slots, those that a request or a lease needs; the others make room when it is needed.
    #[serde(default)]
    pub slots_held: u32,
    /// Sender: of the ready slots, those that are kept for whoever asks for them.
    #[serde(default)]
    pub slots_parked: u32,
    /// Of the active requests, those that wait for slots of the receiver.
    #[serde(default)]
    pub requests_waiting: u32,
    /// Clients' calls that wait: `stage` at a sender, `wait` at a receiver.
    #[serde(default)]
    pub waits: u32,
    /// Receiver: leases that clients have not released.
    #[serde(default)]
    pub leases: u32,
    /// Sender: transfers that the engine has not finished.
    #[serde(default)]
    pub transfers_in_flight: u32,
    /// Receiver: chunks freed because nobody fetched or used them in time.
    #[serde(default)]
    pub chunks_expired: u64,
    /// Whether it was told to stop, and takes no new requests.
    #[serde(default)]
    pub draining: bool,
    /// `requests_failed` by kind of failure; kinds that have not happened are left out.
    #[serde(default)]
    pub failures: BTreeMap<String, u64>,
    /// For how many ms the engine's thread has not taken up what it was asked; left out when it is 0. Above some seconds
    /// it is stuck.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub engine_silent_ms: u64,
    /// Sender: the receivers that it was told of at start (`pd_receivers`), in that order.
    #[serde(default, deserialize_with = "nil_is_left_out", skip_serializing_if = "Vec::is_empty")]
    pub receivers: Vec<ReceiverStatus>,
    /// Sender: rendezvous ports of the receivers that it is connected to, of those that park chunks themselves.
    #[serde(default, deserialize_with = "nil_is_left_out", skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceAddress>,
}

/// A receiver that a sender was told of at start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverStatus {
    /// Where it is.
    pub address: ReceiverAddress,
    /// How far the sender has come with it.
    pub state: ReceiverState,
    /// Why it is refused or unreachable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// How far a sender has come with a receiver that it was told of at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReceiverState {
    /// It has not answered yet.
    Connecting,
    /// It can be sent to.
    Connected,
    /// One of the two will not talk to the other.
    Refused,
    /// Nobody is there, or nobody any more.
    Unreachable,
}

impl ReceiverState {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Connecting, Self::Connected, Self::Refused, Self::Unreachable];

    /// The name here and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
        }
    }
}

/// How full and how fragmented a pd_buffer is, all of one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BufferUsage {
    /// Its length now, in bytes.
    pub len_bytes: u64,
    /// How long it can become, in bytes.
    pub len_max_bytes: u64,
    /// Bytes taken: chunks that are being written, are ready, or are quarantined.
    pub used_bytes: u64,
    /// Bytes free.
    pub free_bytes: u64,
    /// Longest free range, in bytes.
    pub largest_free_bytes: u64,
    /// Number of free ranges.
    pub free_range_count: u64,
    /// For each group, how many more of its whole chunks fit now, with nothing let go.
    pub chunks_fit: Vec<u64>,
}
