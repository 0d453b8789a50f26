//! What the engine says of NIXL's refusals.

use nixl_sys::NixlError;

use super::NIXL_ENGINE_NAME;
use crate::transfer::{TransferError, open_files};

pub(super) fn bad_metadata(agent: &str, reason: String) -> TransferError {
    TransferError::BadExport { engine: NIXL_ENGINE_NAME, what: "metadata", agent: agent.to_owned(), reason }
}

pub(super) fn bad_descriptors(agent: &str, reason: String) -> TransferError {
    TransferError::BadExport { engine: NIXL_ENGINE_NAME, what: "descriptors", agent: agent.to_owned(), reason }
}

pub(super) fn peer_error(
    operation: &'static str,
    agent: &str,
    descriptor_count: usize,
    reason: String,
) -> TransferError {
    TransferError::Peer { engine: NIXL_ENGINE_NAME, operation, agent: agent.to_owned(), descriptor_count, reason }
}

/// NIXL does not say that the process cannot open anything more.
pub(super) fn with_shortage(reason: String) -> String {
    match open_files::shortage() {
        Some(shortage) => format!("{reason}; {shortage}"),
        None => reason,
    }
}

/// NIXL's statuses are few: what each means here.
pub(super) fn explain(error: &NixlError) -> String {
    match error {
        NixlError::BackendError => with_shortage(format!("{error}; the peer has ended, or cannot be reached")),
        NixlError::NotFound => format!("{error}; the peer's metadata does not cover it"),
        other => other.to_string(),
    }
}
