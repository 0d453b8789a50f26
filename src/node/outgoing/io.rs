//! What the half that sends takes in, and what it tells.

use std::time::Duration;

use crate::ids::{ChunkKey, Failure, GroupIndex, IpcHandle, ReceiverAddress, Registration, RequestId, SlotPart};

/// How far a sender has come with a receiver that its configuration names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectState {
    /// Not connected yet, and nothing is known against it.
    Connecting,
    /// It can be written to.
    Connected,
    /// One of the two refuses the other, for this reason. Tried again after half a minute.
    Refused(Failure),
    /// No process is there, or none any more. Tried again after some seconds at most.
    Unreachable(Failure),
}

/// A request as its connector opens it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenRequest {
    /// What the router calls it.
    pub id: RequestId,
    /// Its chunks, in the order of the prompt.
    pub keys: Vec<ChunkKey>,
    /// Of which group of layers each chunk is; empty when all are of the first.
    pub groups: Vec<GroupIndex>,
    /// Tokens in the last chunk of each group.
    pub last_chunk_tokens: u32,
    /// Where to.
    pub receiver: ReceiverAddress,
    /// How long to wait for slots, if not as configured.
    pub wait: Option<Duration>,
    /// Whether to stage every chunk to send as soon as it is granted, if there are local slots at that moment.
    pub stage: bool,
}

/// A request whose chunks are kept for whoever registers for them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkRequest {
    /// What the connector calls it.
    pub id: RequestId,
    /// What those call it who will ask for it; `id` need not be among them.
    pub ids: Vec<RequestId>,
    /// Its chunks, in the order of the prompt.
    pub keys: Vec<ChunkKey>,
    /// As in [`OpenRequest`].
    pub groups: Vec<GroupIndex>,
    /// Tokens in the last chunk of each group.
    pub last_chunk_tokens: u32,
    /// How long to wait for slots, if not as configured.
    pub wait: Option<Duration>,
    /// Whether nobody is told of it: it is pushed ahead, and kept until that has ended.
    pub unsolicited: bool,
    /// Whether it is not to be pushed ahead.
    pub stays: bool,
}

/// What a connector sends at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sending<'a> {
    /// What is final.
    pub parts: &'a [SlotPart],
    /// Whether this completes the request.
    pub last: bool,
    /// An event of the connector's process: the parts are final once it has been passed.
    pub after: Option<IpcHandle>,
}

/// How an opened request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Every chunk is committed at the receiver.
    Sent {
        /// Which request.
        request: RequestId,
        /// Chunks written.
        chunks: u32,
        /// Bytes written.
        bytes: u64,
        /// How long each phase took.
        phases: Phases,
    },
    /// Every chunk is kept for whoever registers for it, for the time of its lease.
    Parked {
        /// Which request.
        request: RequestId,
        /// Chunks kept, those that were here before included.
        chunks: u32,
    },
    /// It was not sent.
    Failed {
        /// Which request.
        request: RequestId,
        /// Why.
        failure: Failure,
        /// The receiver; empty if it was to be parked.
        peer: String,
    },
}

/// How long each phase of a request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// From `open` to the grant.
    pub alloc: Duration,
    /// From the last `send` to the engine's last byte.
    pub transfer: Duration,
    /// From then to the acknowledged commit.
    pub commit: Duration,
}

/// What happened, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutgoingNote {
    /// A receiver has answered the handshake, and the engine is connected to its memory.
    PeerUp {
        /// Where.
        address: ReceiverAddress,
        /// Its name for itself.
        instance: String,
        /// Length of its buffer, in bytes.
        len_bytes: u64,
        /// How long the handshake took.
        took: Duration,
    },
    /// A receiver is gone, or was never there. Of one that the configuration names: once, and not at every
    /// try.
    PeerDown {
        /// Where.
        address: ReceiverAddress,
        /// Whether the configuration names it; else a request did, or a receiver that asked for parked chunks.
        configured: bool,
        /// Why.
        failure: Failure,
    },
    /// A receiver that the configuration names, and one of the two refuses the other; once for each reason.
    Refused {
        /// Where.
        address: ReceiverAddress,
        /// Why.
        failure: Failure,
    },
    /// A request has slots at its receiver.
    Opened {
        /// Which.
        request: RequestId,
        /// Where.
        receiver: String,
        /// Its chunks.
        chunks: usize,
        /// Of those, chunks that the receiver held already.
        already_sent: usize,
        /// How long it took.
        took: Duration,
    },
    /// A request is sent.
    Sent {
        /// Which.
        request: RequestId,
        /// Where.
        receiver: String,
        /// Chunks written.
        chunks: u32,
        /// Bytes written.
        bytes: u64,
        /// How long each phase took.
        phases: Phases,
    },
    /// A request is parked.
    Parked {
        /// Which.
        request: RequestId,
        /// Its chunks.
        chunks: usize,
        /// How long they are kept.
        lease: Duration,
    },
    /// The lease of parked chunks has ended, or was given up: they make room when it is needed.
    LeaseEnded {
        /// Chunks.
        chunks: usize,
        /// Whether whoever registered has said that it does not want them.
        released: bool,
    },
    /// A receiver has asked for parked chunks.
    Registered {
        /// What it calls its request.
        request: RequestId,
        /// Its name for itself.
        instance: String,
        /// What became of it.
        state: Registration,
        /// Of the chunks that it asked for, those that are here or coming.
        chunks: usize,
    },
    /// A receiver has parked chunks that it has not asked for.
    PushedAhead {
        /// What they are called on their way.
        request: RequestId,
        /// Where.
        receiver: String,
        /// Chunks written.
        chunks: u32,
        /// Bytes written.
        bytes: u64,
    },
    /// Parked chunks are not pushed to a receiver that has not asked for them.
    AheadDropped {
        /// What they are called on their way.
        request: RequestId,
        /// Where.
        receiver: String,
        /// Why.
        failure: Failure,
    },
    /// Parked chunks were pushed to one receiver, and another asks for them.
    WrongGuess {
        /// What it calls its request.
        request: RequestId,
        /// Whom they were pushed to.
        guessed: String,
        /// Who asks.
        asks: String,
    },
    /// A request ended otherwise.
    Failed {
        /// Which.
        request: RequestId,
        /// Where; empty if it was to be parked.
        receiver: String,
        /// Whether it was to be sent because a receiver had asked for parked chunks.
        registered: bool,
        /// Why.
        failure: Failure,
        /// Transfers of it that the engine has not finished yet.
        in_flight: usize,
    },
    /// A message that the rendezvous port does not take.
    Misdirected {
        /// Its type.
        message: &'static str,
    },
    /// A message that a receiver should not have sent.
    Unexpected {
        /// From where.
        address: ReceiverAddress,
        /// Its type.
        message: &'static str,
    },
}

/// What the half that sends counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutgoingCounts {
    /// Requests that have not ended.
    pub requests_active: usize,
    /// Of those, requests that wait for a handshake or for slots of their receiver.
    pub requests_waiting: usize,
    /// Clients' waits for local slots.
    pub stages_waiting: usize,
    /// Requests sent.
    pub requests_sent: u64,
    /// Requests parked.
    pub requests_parked: u64,
    /// Leases on parked chunks.
    pub park_leases: usize,
    /// Registrations that have not ended.
    pub registrations: usize,
    /// Requests that ended otherwise.
    pub requests_failed: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Receivers that are connected.
    pub peers: usize,
    /// Transfers that the engine has not finished.
    pub transfers_in_flight: usize,
}
