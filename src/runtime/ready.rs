//! The one line on stdout that tells a launcher where everything is.

use std::io::Write;

use serde::Serialize;

use super::error::RuntimeError;

/// Printed once, when the daemon can be used.
#[derive(Debug, Serialize)]
pub(super) struct ReadyLine {
    /// Always `ready`.
    pub(super) event: &'static str,
    pub(super) role: &'static str,
    pub(super) pid: u32,
    /// Endpoint of the connector API.
    pub(super) connector: String,
    /// Port of the handshake; a sender has none.
    pub(super) init_port: Option<u16>,
    /// Port of allocations; a sender has none.
    pub(super) alloc_port: Option<u16>,
    /// Port of cache queries, when it is served.
    pub(super) query_port: Option<u16>,
    /// URL of the metrics, where they are served.
    pub(super) metrics: Option<String>,
    pub(super) engine: &'static str,
    pub(super) chunk_bytes: u64,
    pub(super) slot_count: u32,
}

impl ReadyLine {
    pub(super) fn print(&self) -> Result<(), RuntimeError> {
        let line =
            serde_json::to_string(self).map_err(|error| RuntimeError::Bug(format!("the ready line: {error}")))?;
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{line}")
            .and_then(|()| stdout.flush())
            .map_err(|error| RuntimeError::Machine(format!("the ready line cannot be written to stdout: {error}")))
    }
}
