//! An LMCache receiver as a value: what it was asked, and what it holds of ours.

use std::collections::VecDeque;
use std::time::Instant;

use super::super::uid::Uid;
use super::unwritten::Unwritten;
use crate::ids::{ChunkKey, Pages, RequestId, Seq};
use crate::wire::LmcacheMode;

/// Most keys that are remembered for one receiver, unless its buffer has more pages than half of this.
const UNWRITTEN_MAX: usize = 65_536;

/// What is known of an LMCache receiver.
#[derive(Debug)]
pub(in crate::node::outgoing) struct LmcacheReceiver {
    /// What it calls us.
    pub(super) our_name: Vec<u8>,
    /// Of its engine: another process has other metadata.
    pub(super) metadata: Vec<u8>,
    pub(super) pages: Option<Pages>,
    pub(super) mode: LmcacheMode,
    /// Requests that wait for their turn to ask for room, in the order of their arrival, and until when.
    pub(super) waiting: VecDeque<(Uid, Instant)>,
    pub(super) asked: Option<Asked>,
    /// Chunks that are not written any more, of which the receiver was not told yet.
    pub(super) cancels: VecDeque<(RequestId, Vec<ChunkKey>)>,
    /// What it was told of, and has not answered yet.
    pub(super) cancelled: Option<Cancelled>,
    pub(super) unwritten: Unwritten,
    /// It is being given up: nothing more is said.
    pub(super) ending: bool,
}

/// An allocation that is not answered yet.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) uid: Uid,
    pub(super) seq: Seq,
    pub(super) request: RequestId,
    pub(super) keys: Vec<ChunkKey>,
    pub(super) since: Instant,
}

/// A cancel that is not answered yet.
#[derive(Debug)]
pub(super) struct Cancelled {
    pub(super) keys: Vec<ChunkKey>,
    pub(super) since: Instant,
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
            cancels: VecDeque::new(),
            cancelled: None,
            unwritten: Unwritten::default(),
            ending: false,
        }
    }

    /// Whether it has been asked something, or is about to be.
    pub(in crate::node::outgoing) fn is_busy(&self) -> bool {
        self.silent_since().is_some() || !self.waiting.is_empty() || !self.cancels.is_empty()
    }

    /// Since when it has been asked something.
    pub(super) fn silent_since(&self) -> Option<Instant> {
        let since = [self.asked.as_ref().map(|asked| asked.since), self.cancelled.as_ref().map(|cancel| cancel.since)];
        since.into_iter().flatten().min()
    }

    fn page_count(&self) -> u64 {
        self.pages.map_or(0, |pages| pages.count)
    }

    pub(super) fn unwritten_max(&self) -> usize {
        UNWRITTEN_MAX.max((2 * self.page_count()) as usize)
    }
}
