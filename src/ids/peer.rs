//! Where peers listen.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use super::printable::is_printable;

/// A receiver's two ports, as a router passes them in `disagg_spec`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ReceiverAddress {
    /// Host name or address.
    #[serde(deserialize_with = "printable_host")]
    pub host: String,
    /// Port of the handshake (LMCache's `pd_peer_init_port`).
    pub init_port: u16,
    /// Port of allocations and commits (LMCache's `pd_peer_alloc_port`).
    pub alloc_port: u16,
}

/// A sender's rendezvous port, where receivers ask for what it has parked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SourceAddress {
    /// Host name or address.
    #[serde(deserialize_with = "printable_host")]
    pub host: String,
    /// Its port (`pd_rendezvous_port`).
    pub port: u16,
}

/// Longest name of a host, in bytes, as DNS has it (RFC 1035, 2.3.4).
const HOST_LEN_BYTES_MAX: usize = 255;

impl ReceiverAddress {
    /// Whether it can be connected to.
    ///
    /// # Errors
    /// What was seen, and what was expected.
    pub fn check(&self) -> Result<(), String> {
        check(&self.host, &[self.init_port, self.alloc_port], "a host and two ports that are not 0", self)
    }
}

impl SourceAddress {
    /// As [`ReceiverAddress::check`].
    ///
    /// # Errors
    /// What was seen, and what was expected.
    pub fn check(&self) -> Result<(), String> {
        check(&self.host, &[self.port], "a host and a port that is not 0", self)
    }
}

fn check(host: &str, ports: &[u16], expected: &str, seen: &impl fmt::Display) -> Result<(), String> {
    if host.len() > HOST_LEN_BYTES_MAX {
        let len_bytes = host.len();
        return Err(format!("a host whose name has {len_bytes} bytes; expected at most {HOST_LEN_BYTES_MAX}"));
    }
    if host.is_empty() || ports.contains(&0) {
        return Err(format!("\"{seen}\"; expected {expected}"));
    }
    Ok(())
}

impl fmt::Display for SourceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// A host of a client's request. It stands in log lines and errors before anything looks it up.
fn printable_host<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let host = String::deserialize(deserializer)?;
    if is_printable(&host) {
        return Ok(host);
    }
    let seen: String = host.chars().take(80).collect();
    Err(serde::de::Error::custom(format!("a receiver's host is {seen:?}; expected a host name or an address")))
}

impl fmt::Display for ReceiverAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.init_port, self.alloc_port)
    }
}
