//! ZeroMQ sockets, and nothing that is said over them: a payload is bytes here.
//!
//! - [`router`]: many peers, each answered by the way it came; for the init, alloc, query and connector ports.
//! - [`dealer`]: one peer, as LMCache's asynchronous sender speaks to its receivers.
//! - [`push`]: one proxy, told and not listened to.
//! - [`bind`]: TCP ports and ipc names to listen on.
//! - [`guard`]: who has proved to have the secret, at a port that wants proof.
//!
//! One task owns one socket's receiving half and loops on `recv`. Sending never waits: whatever cannot be queued for a
//! peer at once is refused, so one stalled peer holds up nobody else. All of it is made for tokio's current-thread
//! runtime; there is no task and no queue between the caller and the library's own.
//!
//! `zeromq` is named in this folder and nowhere else.

mod bind;
mod dealer;
mod guard;
mod peer_tag;
mod push;
mod rate_limited;
mod router;

pub use bind::{IpcName, tcp_address};
pub use dealer::{Dealer, DealerReceiver, DealerSender};
pub use guard::{AUTHENTICATING_MAX, Access};
pub use peer_tag::PeerTag;
pub use push::PushSender;
pub use rate_limited::RateLimited;
pub use router::{Route, RouterEvent, RouterReceiver, RouterSender, RouterSocket};

use std::io;
use std::time::Duration;

use zeromq::{SocketOptions, ZmqError};

use crate::ids::PEERS_MAX;
use crate::wire::auth::AuthError;
use crate::wire::limits::MESSAGE_LEN_BYTES_MAX;

/// What the frames around a payload, and its seal, may cost beyond it.
const ENVELOPE_LEN_BYTES_MAX: usize = 1024;

/// Messages that may wait to be written to one peer.
const PEER_QUEUE_LEN_MAX: usize = 1024;

/// What one read asks for at first: any message of an ordinary request, so that it costs one system call.
const READ_LEN_BYTES: usize = 4 * 1024;
/// What one read asks for at most, when a peer has much to say.
const READ_LEN_BYTES_MAX: usize = 64 * 1024;

/// How long whoever connects to us may take over greeting and handshake, and each message over its way.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections that one bound socket keeps at a time, those still in their handshake included.
const CONNECTIONS_MAX: usize = PEERS_MAX as usize;

/// What all connections of one socket may hold together of messages that are not complete, beyond four reads of
/// [`READ_LEN_BYTES`] each: six messages of the largest size, or hundreds of ordinary long ones. The oldest makes room.
const UNFINISHED_LEN_BYTES_MAX: usize = 128 * 1024 * 1024;

/// Longest message of a connection that has not authenticated, where that is asked for. The proof takes a tenth of a
/// KiB; the rest is for peers without a secret, whose first request is to be answered with the reason.
const UNAUTHENTICATED_LEN_BYTES_MAX: usize = 64 * 1024;

/// What can go wrong with a socket, each with the address or peer concerned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SideChannelError {
    /// Somebody listens there already.
    #[error("{address} is in use by another process; choose another port or name, or stop that process")]
    AddressInUse {
        /// `tcp://host:port` or `ipc://name`.
        address: String,
    },
    /// The machine does not let us listen there.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// `tcp://host:port` or `ipc://name`.
        address: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// No address at all.
    #[error("{address:?} is no address to use: {reason}")]
    InvalidAddress {
        /// As given.
        address: String,
        /// What was expected.
        reason: String,
    },
    /// Nobody answers there, and waiting would not help: refused, no such host, no such name.
    #[error("cannot reach {address}: {reason}")]
    Unreachable {
        /// `tcp://host:port` or `ipc://name`.
        address: String,
        /// What was seen.
        reason: String,
    },
    /// Nobody has answered, or somebody who does not speak ZeroMQ.
    #[error("cannot reach {address}: no ZeroMQ handshake within {timeout_ms} ms")]
    ConnectTimeout {
        /// `tcp://host:port` or `ipc://name`.
        address: String,
        /// How long was waited.
        timeout_ms: u128,
    },
    /// What listens there is no port of a daemon.
    #[error("{address} is a {seen} socket, expected ROUTER or REP; another program listens there, check host and port")]
    WrongSocket {
        /// `tcp://host:port` or `ipc://name`.
        address: String,
        /// Its type, as ZeroMQ's handshake says it.
        seen: &'static str,
    },
    /// Somebody who speaks ZeroMQ has not answered our authentication.
    #[error(
        "{address} has not answered the authentication within {timeout_ms} ms; if it is up, it is an older release or \
         something else"
    )]
    AuthenticationTimeout {
        /// `tcp://host:port`.
        address: String,
        /// How long was waited, connecting included.
        timeout_ms: u128,
    },
    /// The connection has ended. A connecting socket does not come back by itself: make a new one.
    #[error("{peer} is gone: {reason}")]
    PeerGone {
        /// Address or identity.
        peer: String,
        /// What was seen.
        reason: String,
    },
    /// One of the two ends has a secret that the other does not have. Waiting or trying again does not help.
    #[error("{peer} is not talked to: {reason}")]
    NotAuthenticated {
        /// `tcp://host:port`.
        peer: String,
        /// What was seen, and what to do.
        reason: AuthError,
    },
    /// The peer does not read what it is sent; this message was dropped.
    #[error("{peer} does not read: {queued_max} messages wait for it already; this one is dropped")]
    QueueFull {
        /// Address or identity.
        peer: String,
        /// How many may wait.
        queued_max: usize,
    },
}

/// The options that every socket of ours has: nothing it receives costs more than a message of ours may.
fn options() -> SocketOptions {
    let mut options = SocketOptions::default();
    options
        .max_message_size(MESSAGE_LEN_BYTES_MAX + ENVELOPE_LEN_BYTES_MAX)
        .peer_send_queue_len(PEER_QUEUE_LEN_MAX)
        .max_connections(CONNECTIONS_MAX)
        .max_buffered_bytes(UNFINISHED_LEN_BYTES_MAX)
        .message_timeout(ACCEPT_TIMEOUT)
        .connect_timeout(ACCEPT_TIMEOUT)
        .connect_retry(false)
        .read_buffer(READ_LEN_BYTES, READ_LEN_BYTES_MAX, 2);
    options
}

/// An endpoint as the library wants it: an abstract ipc name starts with NUL there, and with `@` everywhere else.
fn library_endpoint(endpoint: &str) -> String {
    match endpoint.strip_prefix("ipc://@") {
        Some(name) => format!("ipc://\0{name}"),
        None => endpoint.to_owned(),
    }
}

/// Why connecting failed, in our words.
fn connect_error(address: &str, timeout: Duration, error: ZmqError) -> SideChannelError {
    let address = address.to_owned();
    match error {
        ZmqError::Endpoint(error) => SideChannelError::InvalidAddress { address, reason: error.to_string() },
        ZmqError::ConnectTimeout(_) => SideChannelError::ConnectTimeout { address, timeout_ms: timeout.as_millis() },
        ZmqError::Network(error) => SideChannelError::Unreachable { address, reason: error.to_string() },
        other => SideChannelError::Unreachable { address, reason: other.to_string() },
    }
}

/// Why a message was not queued, in our words.
fn send_error(peer: impl ToString, error: ZmqError) -> SideChannelError {
    let peer = peer.to_string();
    match error {
        ZmqError::BufferFull(_) => SideChannelError::QueueFull { peer, queued_max: PEER_QUEUE_LEN_MAX },
        ZmqError::Other(_) => SideChannelError::PeerGone { peer, reason: "the connection is closed".to_owned() },
        other => SideChannelError::PeerGone { peer, reason: other.to_string() },
    }
}
