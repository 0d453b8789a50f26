//! Where a receiver listens.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A receiver's two ports, as a router passes them in `disagg_spec`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerAddress {
    /// Host name or address.
    pub host: String,
    /// Port of the handshake (LMCache's `pd_peer_init_port`).
    pub init_port: u16,
    /// Port of allocations and commits (LMCache's `pd_peer_alloc_port`).
    pub alloc_port: u16,
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.init_port, self.alloc_port)
    }
}
