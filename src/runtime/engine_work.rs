//! What the driver and the engine's thread say to each other.

use std::ops::Range;
use std::sync::mpsc;

use super::message_budget::MessageBudget;
use crate::ids::{ByteCopy, Checksum, ConnectionId, Failure, GrantId, IpcHandle, PeerId, RequestId, TransferId};
use crate::node::Grown;
use crate::node::incoming::ExpectedChunk;
use crate::node::{PeerMemory, Remote};
use crate::transfer::Export;

/// Something for the engine to do.
#[derive(Debug)]
pub(super) enum EngineCommand {
    LoadPeer {
        remote: Remote,
        /// Where the peer does not say, its metadata does.
        agent_name: Option<String>,
        metadata: Vec<u8>,
    },
    Connect {
        peer: PeerId,
        connection: ConnectionId,
        memory: PeerMemory,
    },
    /// A connected peer's buffer has grown.
    UpdatePeer {
        peer: PeerId,
        connection: ConnectionId,
        metadata: Vec<u8>,
        descriptors: Vec<u8>,
    },
    Forget(ConnectionId),
    Post {
        transfer: TransferId,
        connection: ConnectionId,
        copies: Vec<ByteCopy>,
        /// Which of them to sum, by position.
        summed: Vec<u32>,
        /// Not before this event has been passed.
        after: Option<IpcHandle>,
    },
    /// A transfer that waits for an event, or for its checksums, is not posted any more.
    Abandon {
        transfer: TransferId,
        client_gone: bool,
    },
    /// A message that the driver defers until an event has been passed.
    AwaitForMessage {
        ticket: u64,
        after: IpcHandle,
    },
    /// The driver wants it no more.
    Unawait {
        ticket: u64,
    },
    /// Bytes that a peer has written, to be compared with what it has read.
    Verify {
        request: RequestId,
        grant: GrantId,
        chunks: Vec<ExpectedChunk>,
    },
    /// Nobody waits for that any more.
    AbandonVerification(GrantId),
}

/// What reaches the thread.
pub(super) enum Work {
    EngineCommand(EngineCommand),
    /// What a peer's message has led to. Its part of the budget is free when that is done.
    FromPeer(EngineCommand, Option<MessageBudget>),
    /// The pages of a step are there: it is to be registered.
    Extend {
        step: Range<u64>,
        reply: mpsc::Sender<Result<Export, String>>,
    },
    /// The step is over.
    Grown(Result<Grown, String>),
    /// Somebody asks whether the thread is at work.
    Probe(u64),
    /// The driver has gone.
    Stop,
    /// The thread is busy for as long as this takes.
    #[cfg(test)]
    Call(Box<dyn FnOnce() + Send>),
}

/// Something that the engine has done.
#[derive(Debug)]
pub(super) enum EngineEvent {
    PeerLoaded {
        remote: Remote,
        result: Result<ConnectionId, Failure>,
    },
    Connected {
        peer: PeerId,
        result: Result<(), String>,
    },
    Updated {
        peer: PeerId,
        connection: ConnectionId,
        result: Result<(), String>,
    },
    Grown {
        result: Result<Grown, String>,
    },
    /// The event of a deferred message has been passed, or cannot be asked for.
    EventSignalled {
        ticket: u64,
        result: Result<(), Failure>,
    },
    /// With the checksums that were asked for.
    Done {
        transfer: TransferId,
        result: Result<Vec<Checksum>, Failure>,
    },
    /// With the positions of the chunks that are not as they were sent.
    Verified {
        request: RequestId,
        grant: GrantId,
        corrupted: Vec<u32>,
    },
    /// Checksums are being summed. Said now and then, as long as there are any.
    Summing,
}
