//! What a daemon was told: the YAML, the command line and the model, checked into a [`Config`] that cannot be wrong.
//!
//! `load` and `secret` are the only parts that read files and `options` the only one that knows the command line; the rest takes
//! text and values and gives a [`Config`] or a [`ConfigError`], so that every refusal can be tested without either.

mod address;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod key;
mod keys;
mod load;
mod names;
mod notes;
mod options;
mod ports;
mod raw;
mod receivers;
mod resolve;
mod secret;
#[cfg(test)]
mod shipped;
mod show;
mod size;
mod values;

use std::path::PathBuf;
use std::time::Duration;

pub use crate::ids::{ChecksumMode, EngineKind, SharedSecret};
use crate::ids::{HostList, ReceiverAddress};
use crate::kv_layout::KvLayout;

pub use error::ConfigError;
pub use load::Loaded;
pub use options::Options;
pub use size::{exact_size, parse_size};

/// Which halves a daemon has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The outgoing half alone: `pd-sender`, beside a prefill worker.
    Sender,
    /// The incoming half alone: `pd-receiver`, beside a decode worker.
    Receiver,
    /// Both halves over one buffer: either binary, with `pd_role: both`.
    Both,
}

impl Role {
    /// `sender`, `receiver` or `both`: the value of `pd_role`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sender => "sender",
            Self::Receiver => "receiver",
            Self::Both => "both",
        }
    }

    /// What a person calls such a daemon.
    pub const fn daemon(self) -> &'static str {
        match self {
            Self::Sender => "pd-sender",
            Self::Receiver => "pd-receiver",
            Self::Both => "a daemon with both halves",
        }
    }

    /// Whether it has the outgoing half.
    pub const fn sends(self) -> bool {
        matches!(self, Self::Sender | Self::Both)
    }

    /// Whether it has the incoming half.
    pub const fn receives(self) -> bool {
        matches!(self, Self::Receiver | Self::Both)
    }
}

/// Where the pd_buffer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BufferDevice {
    /// Host memory.
    Cpu,
    /// Memory of this GPU.
    Cuda(u32),
}

impl std::fmt::Display for BufferDevice {
    /// The value of `pd_buffer_device`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(device) => write!(f, "cuda:{device}"),
        }
    }
}

/// The longest that any of [`Deadlines`] may be, in seconds: a day.
pub const DEADLINE_SEC_MAX: u64 = 86_400;

/// Most slots of a pd_buffer.
pub const SLOT_COUNT_MAX: u32 = 1 << 24;

/// A checked configuration: every number in range, every size whole, every name known.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Which halves this daemon has.
    pub role: Role,
    /// Tensor-parallel rank of the worker beside it.
    pub rank: u32,
    /// What a chunk is.
    pub layout: KvLayout,
    /// The pd_buffer.
    pub buffer: BufferConfig,
    /// The transfer engine.
    pub engine: EngineConfig,
    /// Address that the incoming half's ports are bound to; `pd_peer_host`.
    pub bind_host: String,
    /// Incoming half: address under which senders reach it, where that is not `bind_host`.
    pub advertise_host: Option<String>,
    /// Incoming half: port of the handshake; 0 asks for a free one.
    pub init_port: u16,
    /// Incoming half: port of allocations; 0 asks for a free one.
    pub alloc_port: u16,
    /// Incoming half: port of cache queries; none: not served.
    pub query_port: Option<u16>,
    /// Address that `rendezvous_port` is bound to; `pd_rendezvous_host`.
    pub rendezvous_host: String,
    /// Incoming half: hosts that are asked for parked chunks; none: any.
    pub prefill_hosts: Option<HostList>,
    /// Outgoing half: port at which receivers ask for what is parked; 0 asks for a free one; none: not served.
    pub rendezvous_port: Option<u16>,
    /// Outgoing half: whether parked chunks are pushed to a receiver that has not asked for them yet.
    pub push_ahead: bool,
    /// Outgoing half: receivers that it connects to at start, and keeps; no two are the same.
    pub receivers: Vec<ReceiverAddress>,
    /// Outgoing half: the proxy that is told when a request is ready; none: nobody is told.
    pub proxy: Option<ProxyConfig>,
    /// What peers have to prove to know; none: whoever reaches the ports may talk.
    pub shared_secret: Option<SecretFile>,
    /// Endpoint of the connector API; none: a name of its own, in the ready line.
    pub connector_endpoint: Option<String>,
    /// Where metrics and health are served over HTTP; none: they are not.
    pub metrics: Option<MetricsConfig>,
    /// How long everything may take.
    pub deadlines: Deadlines,
    /// How much of everything there may be.
    pub limits: Limits,
}

/// The pd_buffer, in whole chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BufferConfig {
    /// Host or GPU.
    pub device: BufferDevice,
    /// `pd_buffer_size` as configured, in bytes: the ceiling.
    pub asked_bytes: u64,
    /// Slots under that ceiling, at least one.
    pub slot_count: u32,
    /// Slots at the start, at least one; all of them unless the buffer is lazy.
    pub initial_slot_count: u32,
    /// Slots that a step adds to a lazy buffer, at least one; all of them where there is no step.
    pub step_slot_count: u32,
}

impl BufferConfig {
    /// Whether it begins shorter than it may become.
    pub const fn is_lazy(&self) -> bool {
        self.initial_slot_count < self.slot_count
    }
}

/// The transfer engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// `transfer_channel`; none: nixl where its library is found, local elsewhere.
    pub kind: Option<EngineKind>,
    /// NIXL backends, in order of preference.
    pub nixl_backends: Vec<String>,
    /// Where libnixl_capi.so is looked for first.
    pub nixl_lib_dir: Option<PathBuf>,
    /// Which chunks are summed when they are read and checked when they have arrived.
    pub checksum: ChecksumMode,
    /// Delay of NIXL's progress thread, in microseconds: 0 burns a core.
    pub nixl_progress_delay_us: u64,
}

/// The proxy that the outgoing half tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyConfig {
    /// Host name or address.
    pub host: String,
    /// Port of its PULL socket.
    pub port: u16,
}

/// Where metrics and health are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Host name or address that is bound.
    pub host: String,
    /// Port; 0 asks for a free one.
    pub port: u16,
}

/// A secret and where it was read. Its `Debug` shows the file alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretFile {
    /// Path as configured.
    pub file: PathBuf,
    /// What it holds.
    pub secret: SharedSecret,
}

/// How long everything may take. None is infinite: the longest is [`DEADLINE_SEC_MAX`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deadlines {
    /// Waiting for slots, at either side (`pd_allocation_timeout_sec`).
    pub allocation: Duration,
    /// Connecting to a peer, its handshake included.
    pub handshake: Duration,
    /// From a grant to its commit: how long a granted slot may be written to.
    pub write: Duration,
    /// Outgoing half: a commit's acknowledgement.
    pub commit: Duration,
    /// Incoming half: `wait` without a time of its own.
    pub wait: Duration,
    /// Incoming half: ready chunks that nobody fetches.
    pub retention: Duration,
    /// Outgoing half: parked chunks that nobody asks for.
    pub lease: Duration,
    /// Draining after SIGTERM (`pd_shutdown_timeout_sec`).
    pub shutdown: Duration,
    /// From one ping to the next, to each connected receiver.
    pub heartbeat: Duration,
    /// A peer of which nothing is heard for so long is given up; above `heartbeat`.
    pub peer: Duration,
}

/// How much of everything there may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Requests that have not ended, per daemon.
    pub requests_max: u32,
    /// Incoming half: requests of one sender that have not ended.
    pub peer_requests_max: u32,
    /// Chunks of one request.
    pub request_chunks_max: u32,
    /// Peers that are connected.
    pub peers_max: u32,
    /// Attached clients.
    pub clients_max: u32,
}

impl Config {
    /// Bytes in the pd_buffer, at its ceiling.
    pub fn buffer_len_bytes(&self) -> u64 {
        self.slots_bytes(self.buffer.slot_count)
    }

    /// Bytes in the pd_buffer at the start.
    pub fn buffer_initial_bytes(&self) -> u64 {
        self.slots_bytes(self.buffer.initial_slot_count)
    }

    /// Bytes that a step adds to a lazy pd_buffer.
    pub fn buffer_step_bytes(&self) -> u64 {
        self.slots_bytes(self.buffer.step_slot_count)
    }

    fn slots_bytes(&self, slot_count: u32) -> u64 {
        u64::from(slot_count) * self.layout.chunk_bytes()
    }
}
