//! What a node asks of the world around it.

use super::Port;
use super::answer::Answer;
use super::incoming::io as incoming;
use super::outgoing::io as outgoing;
use crate::ids::{
    ByteCopy, ClientId, ConnectionId, GrantId, IpcHandle, Pages, PeerId, ReceiverAddress, RequestId, Seq,
    SourceAddress, TransferId,
};
use crate::wire::Message;
use crate::wire::message::ProcessIdentity;

/// Whom a message goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To<R> {
    /// A receiver, or a source, that this node has connected to.
    Peer(PeerId),
    /// Whoever sent a message to one of our ports.
    Route(R),
}

/// A peer as the transfer engine is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remote {
    /// One that this node has connected to in order to write to it.
    Receiver(PeerId),
    /// One that has connected to this node: [`Hello::instance`](crate::wire::message::Hello::instance).
    Sender(String),
}

/// Where a receiver's memory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerMemory {
    /// Its engine's descriptors.
    Descriptors(Vec<u8>),
    /// The pages of a receiver of another make.
    Pages(Pages),
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output<R> {
    /// Connect to a receiver; `handle_peer_opened` or `handle_peer_closed` wants to know.
    OpenPeer {
        /// Its name from now on.
        peer: PeerId,
        /// Where it listens.
        address: ReceiverAddress,
    },
    /// Connect to a sender's rendezvous port; `handle_peer_opened` or `handle_peer_closed` wants to know.
    OpenSource {
        /// Its name from now on.
        peer: PeerId,
        /// Where it listens.
        address: SourceAddress,
    },
    /// Close the connections to a peer; no `handle_peer_closed` is expected.
    ClosePeer(PeerId),
    /// Send a message.
    Send {
        /// To whom.
        to: To<R>,
        /// To which port of a peer, or from which of ours.
        port: Port,
        /// What.
        message: Message,
    },
    /// Let the engine load a peer's metadata; `handle_loaded` wants the result.
    LoadPeer {
        /// Which.
        remote: Remote,
        /// Name of its agent; a peer of another make has not said, and its metadata does.
        agent_name: Option<String>,
        /// Its engine's metadata.
        metadata: Vec<u8>,
    },
    /// Let the engine connect to a receiver's memory; `handle_peer_connected` wants the result.
    ConnectPeer {
        /// Which.
        peer: PeerId,
        /// From `handle_loaded`.
        connection: ConnectionId,
        /// Where it is.
        memory: PeerMemory,
    },
    /// A receiver's buffer has grown: let the engine learn what it writes to, before the next `Post` to it;
    /// `handle_peer_updated` wants the result.
    UpdatePeer {
        /// Which.
        peer: PeerId,
        /// From `handle_loaded`.
        connection: ConnectionId,
        /// Its engine's metadata now.
        metadata: Vec<u8>,
        /// Its engine's descriptors now.
        descriptors: Vec<u8>,
    },
    /// Let the transfer engine forget a peer. `handle_transfer_done` still comes for each of its transfers, once nothing of it is written.
    ForgetPeer(ConnectionId),
    /// Add the next step to the buffer; `handle_grown` wants the result.
    GrowBuffer,
    /// Find out which of these processes have ended; `handle_processes_ended` wants to know.
    CheckProcesses {
        /// The receiver that asks.
        peer: PeerId,
        /// Of some host and pid namespace.
        processes: Vec<ProcessIdentity>,
    },
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
    /// Wait for this event of the connector's process to be passed; `handle_transfer_done` wants to know. Nothing is written.
    Await {
        /// Its name.
        transfer: TransferId,
        /// The event.
        after: IpcHandle,
    },
    /// A transfer that waits for an event, or to be summed, is not to be posted any more; `handle_transfer_done` wants to
    /// know when the event has been passed, for until then its slots are being written.
    Abandon {
        /// Which.
        transfer: TransferId,
        /// Whoever would pass the event is gone: it is not waited for.
        client_gone: bool,
    },
    /// Sum these chunks; `handle_verified` wants to know which of them are not as they were sent, and until then
    /// `handle_verifying`, now and then, that it is getting on.
    Verify {
        /// Whose.
        request: RequestId,
        /// Which attempt of it.
        grant: GrantId,
        /// What to sum, and what it must be.
        chunks: Vec<incoming::ExpectedChunk>,
    },
    /// The result of that is not wanted any more.
    AbandonVerification(GrantId),
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
        event: outgoing::Event,
    },
    /// Something for the log.
    Note(Note<R>),
}

/// What happened, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note<R> {
    /// The buffer has another step, or could not get it.
    Grown {
        /// Its length now, in bytes, or why it did not grow.
        result: Result<u64, String>,
    },
    /// To a request that is sent, or a receiver.
    Outgoing(outgoing::OutgoingNote),
    /// To a request that is received, or a sender.
    Incoming(incoming::IncomingNote<R>),
}

impl<R> From<outgoing::OutgoingNote> for Note<R> {
    fn from(note: outgoing::OutgoingNote) -> Self {
        Self::Outgoing(note)
    }
}

impl<R> From<incoming::IncomingNote<R>> for Note<R> {
    fn from(note: incoming::IncomingNote<R>) -> Self {
        Self::Incoming(note)
    }
}
