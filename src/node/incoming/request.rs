//! A request as a value: from its allocation to its end, and what it leaves behind.

use std::time::{Duration, Instant};

use super::origin::Origin;
use crate::ids::{ChunkKey, Failure, GrantId, RequestId, Seq, SlotIndex};
use crate::node::chunks::ChunkSize;
use crate::wire::Message;
use crate::wire::message::Revoke;

/// A request that has not ended.
#[derive(Debug)]
pub(super) struct IncomingRequest<R> {
    /// Whose.
    pub(super) instance: String,
    /// How its sender is answered.
    pub(super) route: R,
    /// Of its AllocRequest.
    pub(super) seq: Seq,
    pub(super) keys: Vec<ChunkKey>,
    /// What each chunk is.
    pub(super) sizes: Vec<ChunkSize>,
    /// How much of our buffer its sender knows of, in bytes.
    pub(super) known_len_bytes: u64,
    /// When it entered its stage.
    pub(super) since: Instant,
    /// How many later requests got slots before it.
    pub(super) overtaken: u32,
    /// Where it was last refused room.
    pub(super) refused_in: Option<RoomSeen>,
    /// Its commit, while its chunks are being summed.
    pub(super) verifying: Option<Verification<R>>,
    pub(super) origin: Origin,
    /// Nobody has asked for it.
    pub(super) ahead: bool,
    pub(super) stage: IncomingStage,
}

#[derive(Debug)]
pub(super) enum IncomingStage {
    /// In the queue for slots.
    Waiting { wait: Duration },
    /// Its sender writes `own`; `shared` were ready before and are held for it. Positions in `keys` come first.
    Granted { grant: GrantId, own: Vec<(u32, SlotIndex)>, shared: Vec<(u32, SlotIndex)> },
    /// Every chunk is ready and held for it, in the order of `keys`.
    Ready { grant: GrantId, slots: Vec<SlotIndex> },
}

/// A grant that was given up before its writer was known to have stopped.
#[derive(Debug)]
pub(super) struct Closing {
    pub(super) instance: String,
    /// Of its AllocRequest.
    pub(super) seq: Seq,
    pub(super) slots: Vec<SlotIndex>,
    /// To ask its writer again whether it has stopped.
    pub(super) request: RequestId,
    pub(super) reason: Failure,
}

impl IncomingStage {
    pub(super) fn grant(&self) -> Option<GrantId> {
        match self {
            Self::Waiting { .. } => None,
            Self::Granted { grant, .. } | Self::Ready { grant, .. } => Some(*grant),
        }
    }
}

impl Closing {
    pub(super) fn revoke(&self, grant: GrantId) -> Message {
        let (req_id, reason) = (self.request.clone(), self.reason.clone());
        Message::PdRevoke(Revoke { req_id, grant, reason, alloc_seq: Some(self.seq) })
    }
}

impl<R> IncomingRequest<R> {
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.stage, IncomingStage::Ready { .. })
    }

    /// Whether every chunk of it was there before.
    pub(super) fn writes_nothing(&self) -> bool {
        self.origin.is_complete() && matches!(&self.stage, IncomingStage::Granted { own, .. } if own.is_empty())
    }

    /// Slots that its sender may write.
    pub(super) fn written_slots(&self) -> usize {
        match &self.stage {
            IncomingStage::Granted { own, .. } => own.len() + self.origin.spare_slots().len(),
            _ => 0,
        }
    }
}

/// What decides, beside the request, whether it finds room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RoomSeen {
    pub(super) version: u64,
    pub(super) described_len_bytes: u64,
    pub(super) can_grow: bool,
}

/// A commit whose chunks are being summed.
#[derive(Debug)]
pub(super) struct Verification<R> {
    /// Whom to answer.
    pub(super) to: R,
    /// Which commit.
    pub(super) seq: Seq,
    pub(super) since: Instant,
}
