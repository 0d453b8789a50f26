//! An LMCache receiver as a value: what it was asked, and what it holds of ours.

use std::collections::VecDeque;
use std::time::Instant;

use super::super::requests::Uid;
use super::unwritten::Unwritten;
use crate::ids::{ChunkKey, Pages, RequestId, Seq};
use crate::wire::LmcacheMode;

/// Most keys that are remembered for one receiver, unless its buffer has more pages than half of this.
const UNWRITTEN_MAX: usize = 65_536;

/// What is known of an LMCache receiver.
#[derive(Debug)]
pub(in crate::protocol::sender) struct LmcacheReceiver {
    /// What it calls us.
    pub(super) our_name: Vec<u8>,
    /// Of its engine: another process has other metadata.
    pub(super) metadata: Vec<u8>,
    pub(super) pages: Option<Pages>,
    pub(super) mode: LmcacheMode,
    /// In the order of their arrival.
    pub(super) waiting: VecDeque<Question>,
    pub(super) asked: Option<Asked>,
    pub(super) unwritten: Unwritten,
    /// It is being given up: nothing more is said.
    pub(super) ending: bool,
}

/// What waits for its turn.
#[derive(Debug)]
pub(super) enum Question {
    /// Room for a request, which has waited long enough then.
    Alloc { uid: Uid, until: Instant },
    /// These are not written any more.
    Cancel { request: RequestId, keys: Vec<ChunkKey> },
}

/// What an answer is waited for.
#[derive(Debug)]
pub(super) enum Asked {
    Alloc { uid: Uid, seq: Seq, request: RequestId, keys: Vec<ChunkKey>, since: Instant },
    Cancel { keys: Vec<ChunkKey>, since: Instant },
}

impl LmcacheReceiver {
    pub(super) fn new(mode: LmcacheMode, our_name: Vec<u8>, metadata: Vec<u8>) -> Self {
        Self {
            our_name,
            metadata,
            pages: None,
            mode,
            waiting: VecDeque::new(),
            asked: None,
            unwritten: Unwritten::default(),
            ending: false,
        }
    }

    /// Whether it has been asked something, or is about to be.
    pub(in crate::protocol::sender) fn is_busy(&self) -> bool {
        self.asked.is_some() || !self.waiting.is_empty()
    }

    fn page_count(&self) -> u64 {
        self.pages.map_or(0, |pages| pages.count)
    }

    pub(super) fn unwritten_max(&self) -> usize {
        UNWRITTEN_MAX.max((2 * self.page_count()) as usize)
    }
}
