//! Requests that NIXL has not ended.

use std::time::Instant;

use nixl_sys::XferRequest;

use crate::ids::{ConnectionId, TransferId};

/// A request that NIXL has not ended.
pub(super) struct NixlFlight {
    pub(super) purpose: FlightPurpose,
    pub(super) connection: ConnectionId,
    pub(super) request: XferRequest,
    pub(super) descriptor_count: usize,
}

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlightPurpose {
    Transfer(TransferId),
    WarmUp {
        posted: Instant,
    },
    /// A warm-up that has been reported: it took too long, or nobody wants it any more. It may still end, and the peer
    /// cannot be forgotten before.
    GivenUp,
}

impl std::fmt::Debug for NixlFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NixlFlight")
            .field("purpose", &self.purpose)
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}
