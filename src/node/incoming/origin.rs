//! Whose request it is.

use super::lmcache::Batches;
use crate::ids::SlotIndex;

/// The dialect of a request's sender.
#[derive(Debug)]
pub(super) enum Origin {
    /// Ours.
    Pd,
    /// LMCache's.
    Lmcache(Batches),
}

impl Origin {
    /// Whether its sender commits what it has written, and answers when it is asked to stop.
    pub(super) const fn commits(&self) -> bool {
        matches!(self, Self::Pd)
    }

    /// Whether its sender can be told of a buffer that has grown since its handshake.
    pub(super) const fn can_use_growth(&self) -> bool {
        matches!(self, Self::Pd)
    }

    /// What an LMCache sender has announced; none of a pd-sender.
    pub(super) const fn batches(&self) -> Option<&Batches> {
        match self {
            Self::Pd => None,
            Self::Lmcache(batches) => Some(batches),
        }
    }

    /// As [`batches`](Self::batches), to change.
    pub(super) const fn batches_mut(&mut self) -> Option<&mut Batches> {
        match self {
            Self::Pd => None,
            Self::Lmcache(batches) => Some(batches),
        }
    }

    /// Whether its sender has announced all chunks of the request.
    pub(super) fn is_complete(&self) -> bool {
        self.batches().is_none_or(Batches::is_complete)
    }

    /// Slots that are reserved for chunks which its sender has not announced yet.
    pub(super) fn spare_slots(&self) -> &[SlotIndex] {
        self.batches().map_or(&[], Batches::spare_slots)
    }
}
