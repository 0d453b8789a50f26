//! What the half that sends waits for, by name.

use super::uid::{RegistrationId, Uid};
use crate::ids::{ClientId, PeerId, ReceiverAddress, Seq};

/// A deadline.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::node) enum OutgoingTimer {
    /// A receiver has not answered the handshake in time.
    Handshake(PeerId),
    /// A request has waited long enough for its grant.
    Allocation(Uid),
    /// A grant must not be written to any more.
    Write(Uid),
    /// Nothing was heard of a commit for too long.
    Commit(Uid),
    /// A cancelled request's transfers have not ended in time.
    Cancel(Uid),
    /// A client has waited long enough for local slots.
    Stage(ClientId, Seq),
    /// A receiver is pinged, or has been silent for too long.
    Ping(PeerId),
    /// A commit is sent again.
    Recommit(Uid),
    /// A quiesce acknowledgement is sent again.
    Retransmit(Seq),
    /// A lost receiver that is owed a quiesce acknowledgement is connected to again.
    Seek(ReceiverAddress),
    /// An LMCache receiver has not answered for too long.
    Answer(PeerId),
    /// Parked chunks have been kept for long enough.
    Lease(Uid),
    /// A registration has waited long enough for a request that is not known.
    Registration(RegistrationId),
    /// A receiver of the configuration is connected to, or connected to again.
    Connect(ReceiverAddress),
}
