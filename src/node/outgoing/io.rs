//! What a sender session takes in and asks of the world around it.

use std::time::Duration;

use crate::ids::{
    ByteCopy, ChunkKey, ClientId, ConnectionId, Failure, GroupIndex, IpcHandle, Pages, PeerAddress, PeerId, RequestId,
    Seq, SlotPart, StagedSlot, TransferId,
};
use crate::node::Port;
use crate::wire::Message;
use crate::wire::message::ProcessIdentity;

/// Where a receiver's memory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerMemory {
    /// Its engine's descriptors.
    Descriptors(Vec<u8>),
    /// The pages of a receiver of another make.
    Pages(Pages),
}

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
    pub receiver: PeerAddress,
    /// How long to wait for slots, if not as configured.
    pub wait: Option<Duration>,
    /// Whether to stage every chunk to send as soon as it is granted, if there are local slots at that moment.
    pub stage: bool,
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

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Connect to a receiver; `handle_peer_opened` or `handle_peer_closed` wants to know.
    OpenPeer {
        /// Its name from now on.
        peer: PeerId,
        /// Where it listens.
        address: PeerAddress,
    },
    /// Close the connections to a receiver; no `handle_peer_closed` is expected.
    ClosePeer(PeerId),
    /// Send to a receiver.
    Send {
        /// Which.
        peer: PeerId,
        /// To which of its ports.
        port: Port,
        /// What.
        message: Message,
    },
    /// Let the engine load a receiver's metadata; `handle_peer_loaded` wants the result.
    LoadPeer {
        /// Which.
        peer: PeerId,
        /// Name of its agent; a receiver of another make has not said, and its metadata does.
        agent_name: Option<String>,
        /// Its engine's metadata.
        metadata: Vec<u8>,
    },
    /// Let the engine connect to a receiver's memory; `handle_peer_connected` wants the result.
    ConnectPeer {
        /// Which.
        peer: PeerId,
        /// From `handle_peer_loaded`.
        connection: ConnectionId,
        /// Where it is.
        memory: PeerMemory,
    },
    /// A receiver's buffer has grown: let the engine learn what it writes to, before the next `Post` to it;
    /// `handle_peer_updated` wants the result.
    UpdatePeer {
        /// Which.
        peer: PeerId,
        /// From `handle_peer_loaded`.
        connection: ConnectionId,
        /// Its engine's metadata now.
        metadata: Vec<u8>,
        /// Its engine's descriptors now.
        descriptors: Vec<u8>,
    },
    /// Add the next step to our own buffer; `handle_grown` wants the result.
    GrowBuffer,
    /// Find out which of these processes have ended; `handle_processes_ended` wants to know.
    CheckProcesses {
        /// The receiver that asks.
        peer: PeerId,
        /// Of some host and pid namespace.
        processes: Vec<ProcessIdentity>,
    },
    /// Let the engine forget a receiver.
    ForgetPeer(ConnectionId),
    /// Let the engine write; `handle_transfer_done` wants to know, and the checksums asked for.
    Post {
        /// Its name.
        transfer: TransferId,
        /// To whom.
        connection: ConnectionId,
        /// What.
        copies: Vec<ByteCopy>,
        /// Which of them to sum before their bytes are read, by position.
        summed: Vec<u32>,
        /// Not before this event of the connector's process has been passed.
        after: Option<IpcHandle>,
    },
    /// A transfer that waits for an event, or to be summed, is not to be posted any more; `handle_transfer_done` wants to
    /// know when the event has been passed, for until then its slots are being written.
    Abandon {
        /// Which.
        transfer: TransferId,
        /// Whoever would pass the event is gone: it is not waited for.
        writer_gone: bool,
    },
    /// Tell the proxy that a request is ready.
    NotifyProxy {
        /// Which.
        request: RequestId,
    },
    /// Answer a client of the connector API.
    Answer {
        /// Whom.
        client: ClientId,
        /// Which of its requests.
        id: Seq,
        /// What.
        answer: Answer,
    },
    /// Tell a client how an opened request ended.
    Event {
        /// Whom.
        client: ClientId,
        /// What.
        event: Event,
    },
    /// Something for the log.
    Note(Note),
}

/// An answer to a connector.
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
        /// The receiver concerned.
        peer: Option<String>,
    },
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
    /// It was not sent.
    Failed {
        /// Which request.
        request: RequestId,
        /// Why.
        failure: Failure,
        /// The receiver.
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
pub enum Note {
    /// Our buffer has another step, or could not get it.
    Grown {
        /// Its length now, in bytes, or why it did not grow.
        result: Result<u64, String>,
    },
    /// A receiver has answered the handshake, and the engine is connected to its memory.
    PeerUp {
        /// Where.
        address: PeerAddress,
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
        address: PeerAddress,
        /// Why.
        failure: Failure,
    },
    /// A receiver that the configuration names, and one of the two refuses the other; once for each reason.
    Refused {
        /// Where.
        address: PeerAddress,
        /// Why.
        failure: Failure,
    },
    /// A request has slots at its receiver.
    Opened {
        /// Which.
        request: RequestId,
        /// Where.
        address: PeerAddress,
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
        address: PeerAddress,
        /// Chunks written.
        chunks: u32,
        /// Bytes written.
        bytes: u64,
        /// How long each phase took.
        phases: Phases,
    },
    /// A request ended otherwise.
    Failed {
        /// Which.
        request: RequestId,
        /// Where.
        address: PeerAddress,
        /// Why.
        failure: Failure,
        /// Transfers of it that the engine has not finished yet.
        in_flight: usize,
    },
    /// A message that a receiver should not have sent.
    Unexpected {
        /// From where.
        address: PeerAddress,
        /// Its type.
        message: &'static str,
    },
}

/// What a sender counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SenderCounts {
    /// Bytes that can be staged.
    pub available_bytes: u64,
    /// Slots staged, or being sent.
    pub slots_staged: u32,
    /// Requests that have not ended.
    pub requests_active: usize,
    /// Of those, requests that wait for a handshake or for slots of their receiver.
    pub requests_waiting: usize,
    /// Clients' waits for local slots.
    pub stages_waiting: usize,
    /// Requests sent.
    pub requests_sent: u64,
    /// Requests that ended otherwise.
    pub requests_failed: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Receivers that are connected.
    pub peers: usize,
    /// Transfers that the engine has not finished.
    pub transfers_in_flight: usize,
}
