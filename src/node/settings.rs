//! What a node is told at start.

use std::time::Duration;

use super::ChunkShape;
#[cfg(feature = "mutants")]
use super::Safeguard;
use crate::address::AddressManager;
use crate::ids::{ChecksumMode, HostList, Pages, ReceiverAddress};
use crate::wire::message::Hello;

/// What a node is told at start. It has the halves whose settings are given.
#[derive(Debug, Clone)]
pub struct NodeSettings {
    /// Who this daemon is.
    pub hello: Hello,
    /// Name of its engine's agent.
    pub agent_name: String,
    /// Its engine's metadata.
    pub metadata: Vec<u8>,
    /// Its engine's descriptors.
    pub descriptors: Vec<u8>,
    /// The buffer as pages, for LMCache's peers; none where they cannot reach it.
    pub pages: Option<Pages>,
    /// What a chunk is.
    pub chunk: ChunkShape,
    /// The buffer's addresses. Whoever grows the buffer adds to them.
    pub addresses: AddressManager,
    /// How long the buffer can become, in bytes.
    pub len_max_bytes: u64,
    /// Longest that a request waits for slots, here and at its receiver.
    pub allocation_timeout: Duration,
    /// How long granted slots may be written to: our own, and those of LMCache's receivers, which do not say.
    pub write_timeout: Duration,
    /// Which chunks are summed when they are sent. With `full`, every chunk that arrives must come with a checksum; those
    /// that do are checked in any case.
    pub checksum: ChecksumMode,
    /// Most requests of each half that have not ended.
    pub requests_max: usize,
    /// Most chunks of one request.
    pub request_chunks_max: usize,
    /// Most peers of each half.
    pub peers_max: usize,
    /// How far pings are apart.
    pub heartbeat_interval: Duration,
    /// How long a peer may be silent; above `heartbeat_interval`.
    pub peer_timeout: Duration,
    /// For the half that sends, if the node has it.
    pub outgoing: Option<OutgoingSettings>,
    /// For the half that receives, if the node has it.
    pub incoming: Option<IncomingSettings>,
    /// What the node is to do without.
    #[cfg(feature = "mutants")]
    #[doc(hidden)]
    pub without: Option<Safeguard>,
}

/// What the half that sends is told at start.
#[derive(Debug, Clone)]
pub struct OutgoingSettings {
    /// How long connecting to a receiver may take, the handshake included.
    pub handshake_timeout: Duration,
    /// How long a receiver may take to answer beyond what it was told to wait. One that is still checking a commit says
    /// so, and has as long again from then on.
    pub commit_timeout: Duration,
    /// Receivers to connect to at start, and to keep; no two are the same.
    pub receivers: Vec<ReceiverAddress>,
    /// Whether a proxy wants to know.
    pub notify_proxy: bool,
    /// Whether chunks can be parked: they take a part of a buffer that serves both halves.
    pub parks: bool,
    /// How long parked chunks are kept that nobody asks for.
    pub lease: Duration,
    /// Whether they are pushed to a receiver that has not asked for them yet.
    pub push_ahead: bool,
}

/// What the half that receives is told at start.
#[derive(Debug, Clone)]
pub struct IncomingSettings {
    /// How long `wait` waits unless it says.
    pub wait_timeout: Duration,
    /// How long ready chunks are kept that nobody fetches or holds.
    pub retention: Duration,
    /// Most requests of one sender that have not ended.
    pub peer_requests_max: usize,
    /// How long the writes of a process that has ended may still arrive.
    pub linger: Duration,
    /// Hosts that are asked for parked chunks; none: any.
    pub prefill_hosts: Option<HostList>,
    /// Where senders reach this half, as they are told when they are asked for parked chunks; none if that is not known.
    pub advertised: Option<ReceiverAddress>,
}
