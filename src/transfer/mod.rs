//! Moving bytes from our pd_buffer into a peer's, one-sided.
//!
//! An engine is owned by one thread and never touches an async executor: posting may block for as long as the
//! copy takes (NIXL over CMA copies inside `post`).
//!
//! The order of calls, on either side of a pair:
//!
//! ```text
//! receiver: register(memory)  export() ------- metadata -------> load_peer()                    :sender
//!           load_peer()  <-------- metadata ------------------- export()   register(memory)
//!                               ------- descriptors -----------> connect()   (warms the connection)
//!                                                                post() .. poll()
//!           extend()            -- metadata and descriptors --> update_peer()   (when the buffer grows)
//! ```
//!
//! Metadata and descriptors go in two steps: NIXL can leave the first transfer in progress for good when a
//! peer learns where to write before both sides have loaded each other.

mod backoff;
mod blob;
mod cut;
mod host;
mod join;
mod lmcache;
pub mod local;
pub mod nixl;
pub mod open_files;
mod start;

pub use backoff::{Backoff, Wait};
pub use cut::cut;
pub use host::PidSpace;
use join::check_next_piece;
pub use join::{check_ranges, join};
pub use lmcache::LmcacheEngine;
pub use start::{EngineOptions, StartedEngine, start_engine};

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::buffer::Memory;
use crate::ids::{ConnectionId, TransferId};

pub use crate::ids::{ByteCopy, EngineKind};

/// What a peer needs to reach us, in the engine's own encoding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The agent's name, unique per process: a restarted peer is a new peer.
    pub agent_name: String,
    /// Step one: who we are and how to reach us. Nothing that can be written with.
    pub metadata: Vec<u8>,
    /// Step two: where our registered memory is.
    pub descriptors: Vec<u8>,
}

/// A posted set of copies that has ended.
#[derive(Debug)]
pub struct Completion {
    /// Which.
    pub transfer: TransferId,
    /// Whether every byte is in the peer's buffer. After an error any part of the destination may hold any bytes,
    /// but nothing will be written any more.
    pub result: Result<(), TransferError>,
}

/// A connection that has been warmed, or cannot be.
#[derive(Debug)]
pub struct Connected {
    /// Which.
    pub connection: ConnectionId,
    /// Whether transfers can be posted to it.
    pub result: Result<(), TransferError>,
}

/// What has ended since the last look.
#[derive(Debug, Default)]
pub struct Ended {
    /// Connections that were being warmed.
    pub connections: Vec<Connected>,
    /// Transfers, those of one peer in the order in which they ended.
    pub transfers: Vec<Completion>,
}

impl Ended {
    /// How many of either.
    pub fn len(&self) -> usize {
        self.connections.len() + self.transfers.len()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes everything out of `other`.
    pub fn append(&mut self, other: &mut Self) {
        self.connections.append(&mut other.connections);
        self.transfers.append(&mut other.transfers);
    }
}

/// Moves bytes out of one registered pd_buffer into those of peers.
///
/// After an error other than [`TransferError::Unavailable`] the engine goes on serving its other connections.
pub trait TransferEngine: Send {
    /// The name in configuration and on the wire: engines of the same name can talk to each other.
    fn name(&self) -> &'static str;

    /// How long what a process had posted may still arrive after that process has ended.
    fn linger(&self) -> Duration;

    /// Makes the first `len_bytes` of `memory` readable by `post` and writable by peers. The engine keeps the memory
    /// alive for as long as it is registered. `unit_bytes` is the length that most copies have (a chunk), for prepared
    /// descriptors.
    ///
    /// # Errors
    /// When the engine cannot register that kind or amount of memory.
    fn register(&mut self, memory: Arc<Memory>, unit_bytes: u64, len_bytes: u64) -> Result<(), TransferError>;

    /// Registers one more piece of that memory, which begins where the registered part ends. What to tell peers from now
    /// on: those that are connected need not be told before somebody is to write there.
    ///
    /// # Errors
    /// When nothing is registered, the range is not the next one, or the engine cannot register it. Everything is as it
    /// was then.
    fn extend(&mut self, range: Range<u64>) -> Result<Export, TransferError>;

    /// What peers need to write into the registered memory.
    ///
    /// # Errors
    /// When nothing is registered, or the engine cannot say.
    fn export(&mut self) -> Result<Export, TransferError>;

    /// Step one: gets to know a peer by its metadata, as one more connection. Several connections may name one agent, say
    /// where the peer is written to and is a writer as well: each is connected, posted to and forgotten by itself, and each
    /// call of this needs its own [`disconnect`](Self::disconnect). What newer metadata of the agent says, later
    /// [`connect`](Self::connect)s of all of them may use; older metadata takes nothing away.
    ///
    /// # Errors
    /// [`TransferError::BadExport`] when the bytes are not what this engine writes. [`TransferError::Peer`] while a
    /// connection to the agent that was given up still writes, or when the way to it has to be made anew and a connection
    /// still writes on the old one: poll, and try again.
    fn load_peer(&mut self, agent_name: &str, metadata: &[u8]) -> Result<ConnectionId, TransferError>;

    /// What LMCache's peers need of the engine; none where they cannot reach it.
    fn lmcache(&self) -> Option<&dyn LmcacheEngine> {
        None
    }

    /// Step two: learns where the peer's memory is, and begins to warm the connection, so that the first transfer costs
    /// what the others cost. It comes back from [`poll`](Self::poll) exactly once unless this returns an error; a peer
    /// that does not answer holds nobody up, and is reported after some seconds. Until then nothing can be posted to it.
    ///
    /// # Errors
    /// [`TransferError::BadExport`], or [`TransferError::Peer`] when the peer cannot be reached.
    fn connect(&mut self, connection: ConnectionId, descriptors: &[u8]) -> Result<(), TransferError>;

    /// Learns, on a live connection, that the peer's buffer has grown. Transfers in flight go on.
    ///
    /// # Errors
    /// [`TransferError::BadExport`] when the bytes are not a longer version of what the peer said before: the connection
    /// is as it was then, unless the text says that it was given up. [`TransferError::NotConnected`].
    fn update_peer(
        &mut self,
        connection: ConnectionId,
        metadata: &[u8],
        descriptors: &[u8],
    ) -> Result<(), TransferError>;

    /// Starts the copies; `transfer` comes back from [`poll`](Self::poll) exactly once unless this returns an
    /// error. May block for as long as the copies take. Copies have any offset and length; neighbours are joined,
    /// whatever their order.
    ///
    /// # Errors
    /// When a range is outside what is registered here, or outside what the peer told of, the connection is unknown, or the engine refuses. Nothing has been
    /// or will be written then.
    fn post(
        &mut self,
        transfer: TransferId,
        connection: ConnectionId,
        copies: &[ByteCopy],
    ) -> Result<(), TransferError>;

    /// Makes progress and appends what has ended. Never waits.
    fn poll(&mut self, ended: &mut Ended);

    /// Whether the next `poll` will move bytes itself, so that waiting before it would only slow them down.
    fn has_work(&self) -> bool {
        false
    }

    /// How many transfers and connections `poll` has yet to find the end of, those among them that were given up and are
    /// still in the library's hands. While it is not 0, somebody must poll.
    fn in_flight(&self) -> usize;

    /// Forgets one connection; others to the same agent go on. Its transfers in flight end with an error from a later
    /// `poll`, the next one unless the library still writes for them; its connecting ends with the next. Once they have,
    /// this side writes nothing more through it.
    fn disconnect(&mut self, connection: ConnectionId);
}

/// Why an engine could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The engine cannot run on this machine.
    #[error("{engine}: {reason}")]
    Unavailable {
        /// Which engine.
        engine: &'static str,
        /// What was looked for, and what to do.
        reason: String,
    },
    /// This kind or amount of memory cannot be registered.
    #[error("{engine} cannot register {len_bytes} bytes of {kind} memory: {reason}")]
    Memory {
        /// Which engine.
        engine: &'static str,
        /// Host or device.
        kind: &'static str,
        /// How much.
        len_bytes: u64,
        /// Why.
        reason: String,
    },
    /// A peer's metadata or descriptors are not what this engine writes.
    #[error("{engine}: {what} of {agent} cannot be used: {reason}")]
    BadExport {
        /// Which engine.
        engine: &'static str,
        /// `metadata` or `descriptors`.
        what: &'static str,
        /// Whose.
        agent: String,
        /// What was seen and what was expected.
        reason: String,
    },
    /// Something was asked for that needs registered memory.
    #[error("{engine}: no buffer is registered")]
    NotRegistered {
        /// Which engine.
        engine: &'static str,
    },
    /// The caller named a connection that does not exist, or one that is not connected yet.
    #[error("{engine}: connection {connection} is not that of a connected peer")]
    NotConnected {
        /// Which engine.
        engine: &'static str,
        /// Which connection.
        connection: ConnectionId,
    },
    /// A copy reaches outside a buffer.
    #[error("a copy of {len_bytes} bytes at {offset} leaves the {side} buffer of {buffer_len_bytes} bytes")]
    OutOfRange {
        /// `local` or `remote`.
        side: &'static str,
        /// Where it starts.
        offset: u64,
        /// How long it is.
        len_bytes: u64,
        /// How long the buffer is.
        buffer_len_bytes: u64,
    },
    /// Our GPU failed: the peer has nothing to do with it.
    #[error("{engine}: {reason}")]
    Device {
        /// Which engine.
        engine: &'static str,
        /// What happened to which GPU, and what to do.
        reason: String,
    },
    /// The peer, or the way to it, failed.
    #[error("{engine}: {operation} with {agent} ({descriptor_count} descriptors) failed: {reason}")]
    Peer {
        /// Which engine.
        engine: &'static str,
        /// Which call.
        operation: &'static str,
        /// The peer's agent.
        agent: String,
        /// How many descriptors the call carried.
        descriptor_count: usize,
        /// What the library said.
        reason: String,
    },
}
