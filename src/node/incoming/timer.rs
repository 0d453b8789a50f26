//! What the half that receives waits for, by name.

use crate::ids::{ClientId, GrantId, LeaseId, RequestId, Seq};

/// A deadline.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::node) enum IncomingTimer {
    /// A request has waited long enough for slots.
    Allocation(RequestId),
    /// A grant has not been committed in time.
    Write(RequestId),
    /// A ready request has not been fetched in time.
    Retention(RequestId),
    /// A reader has waited long enough.
    Wait(ClientId, Seq),
    /// A peer may have been silent for too long.
    Silence(String),
    /// What a process had posted before it ended has had its time to arrive: its slots are freed.
    Linger(String),
    /// The lease of an LMCache query is over; those of clients have no deadline.
    Lease(ClientId, LeaseId),
    /// A writer has not acknowledged yet that it has stopped: it is asked again.
    Revoke(GrantId),
    /// A sender is asked again for what it has parked.
    Ask(RequestId),
}
