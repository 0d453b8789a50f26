//! The one line on a daemon's stdout that tells a launcher where everything is.

use serde::{Deserialize, Serialize};

/// What a daemon prints, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum StdoutLine {
    /// Once, when it can be used.
    Ready(ReadyLine),
}

/// Where everything is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyLine {
    /// `sender`, `receiver` or `both`.
    pub role: String,
    /// The daemon's process.
    pub pid: u32,
    /// Endpoint of the connector API.
    pub connector: String,
    /// Port of the handshake; a daemon that only sends has none.
    pub init_port: Option<u16>,
    /// Port of allocations; a daemon that only sends has none.
    pub alloc_port: Option<u16>,
    /// Port of cache queries, when it is served.
    pub query_port: Option<u16>,
    /// Port at which receivers ask for what is parked, when it is served.
    #[serde(default)]
    pub rendezvous_port: Option<u16>,
    /// URL of the metrics, where they are served.
    pub metrics: Option<String>,
    /// Transfer engine.
    pub engine: String,
    /// Bytes of a whole chunk of the group that has the largest.
    pub chunk_bytes: u64,
    /// Number of slots that the buffer is or can become.
    pub slot_count: u32,
}
