//! Checksums that the engine's thread sums: of transfers before they are posted, and of commits before they are taken.

use std::time::{Duration, Instant};

use super::awaiting_event::Waiting;
use super::sum_queue::{SumQueue, SumRange, Sums};
use crate::buffer::{BufferError, Memory};
use crate::ids::{Checksum, Failure, FailureKind, GrantId, RequestId, TransferId};
use crate::node::incoming::ExpectedChunk;

/// How far apart the driver is told that checksums are being summed.
const TOLD_EVERY: Duration = Duration::from_millis(250);

/// What checksums are summed for.
enum SumPurpose {
    /// A transfer that is posted then: what is summed later may be what was written wrongly.
    Transfer(Waiting),
    /// A commit that is taken then, if they are as they must be.
    Commit { request: RequestId, grant: GrantId, chunks: Vec<ExpectedChunk> },
}

/// What has been summed.
pub(super) enum Summed {
    /// A transfer that can be posted, with its checksums, or that cannot be read.
    Transfer(Waiting, Result<Vec<Checksum>, Failure>),
    /// A commit, with the positions of the chunks that are not as they were sent.
    Commit { request: RequestId, grant: GrantId, corrupted: Vec<u32> },
}

/// What is left to sum.
pub(super) struct SummingJobs {
    queue: SumQueue<SumPurpose>,
    told_at: Instant,
}

impl SummingJobs {
    pub(super) const fn new(now: Instant) -> Self {
        Self { queue: SumQueue::new(), told_at: now }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sums what a transfer's peer will check. Gives back a transfer of which it checks nothing.
    pub(super) fn push_transfer(&mut self, waiting: Waiting) -> Option<Waiting> {
        let range = |&at: &u32| {
            let copy = waiting.copies.get(at as usize)?;
            Some(SumRange { offset_bytes: copy.local_offset, len_bytes: copy.len_bytes })
        };
        let ranges: Vec<SumRange> = waiting.summed.iter().filter_map(range).collect();
        if ranges.is_empty() {
            return Some(waiting);
        }
        self.queue.push(SumPurpose::Transfer(waiting), ranges);
        None
    }

    pub(super) fn push_commit(&mut self, request: RequestId, grant: GrantId, chunks: Vec<ExpectedChunk>) {
        let range =
            |&ExpectedChunk { offset_bytes, len_bytes, .. }: &ExpectedChunk| SumRange { offset_bytes, len_bytes };
        let ranges = chunks.iter().map(range).collect();
        self.queue.push(SumPurpose::Commit { request, grant, chunks }, ranges);
    }

    /// Whether that transfer was waiting for its sums; it is not any more.
    pub(super) fn abandon_transfer(&mut self, transfer: TransferId) -> bool {
        let is_it = |purpose: &SumPurpose| matches!(purpose, SumPurpose::Transfer(one) if one.transfer == transfer);
        self.queue.remove(is_it).is_some()
    }

    pub(super) fn abandon_commit(&mut self, grant: GrantId) {
        self.queue.remove(|purpose| matches!(purpose, SumPurpose::Commit { grant: one, .. } if *one == grant));
    }

    /// Sums one slice. Returns what that was the last slice of.
    pub(super) fn advance(&mut self, memory: &Memory) -> Option<Summed> {
        let (purpose, sums) = self.queue.advance(memory)?;
        Some(match purpose {
            SumPurpose::Transfer(waiting) => {
                let sums = sums.into_iter().collect::<Result<Vec<_>, BufferError>>();
                let unreadable = |error: BufferError| Failure::new(FailureKind::TransferFailed, error.to_string());
                Summed::Transfer(waiting, sums.map_err(unreadable))
            }
            SumPurpose::Commit { request, grant, chunks } => {
                Summed::Commit { request, grant, corrupted: corrupted(&chunks, &sums) }
            }
        })
    }

    /// Whether the driver has not been told for a while that there is something to sum. It is told then.
    pub(super) fn is_to_be_told(&mut self, now: Instant) -> bool {
        let is_due = now.saturating_duration_since(self.told_at) >= TOLD_EVERY;
        if is_due {
            self.told_at = now;
        }
        is_due
    }
}

/// The positions of those that are not as they were sent. What cannot be read is not.
fn corrupted(chunks: &[ExpectedChunk], sums: &Sums) -> Vec<u32> {
    let differs =
        |(chunk, sum): &(&ExpectedChunk, &Result<Checksum, BufferError>)| sum.as_ref().ok() != Some(&chunk.checksum);
    chunks.iter().zip(sums).filter(differs).map(|(chunk, _)| chunk.index).collect()
}
