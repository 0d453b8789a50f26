//! Transfers whose bytes a GPU is still writing, and messages about slots that it still uses. They wait until an event of the
//! serving engine's process is signalled; no thread blocks for them.

use std::time::{Duration, Instant};

use crate::buffer::{BufferError, Fences, Memory};
use crate::ids::{ByteCopy, ConnectionId, Failure, FailureKind, IpcHandle, TransferId};

/// How long a process's last writes may take after its connection has ended: its context goes with the process, and
/// that is a moment later.
pub(super) const CLIENT_WRITES_OVER_AFTER: Duration = Duration::from_secs(1);

/// How many events are asked for at a time: each question costs about a microsecond of the thread that moves
/// everything.
const LOOKS_MAX: usize = 64;

/// A transfer as it will be posted.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) transfer: TransferId,
    pub(super) connection: ConnectionId,
    pub(super) copies: Vec<ByteCopy>,
    pub(super) summed: Vec<u32>,
}

/// What can wait.
#[derive(Debug)]
pub(super) enum Item {
    /// To be posted.
    Transfer(Waiting),
    /// A message that the driver holds.
    Message(u64),
}

/// Something that waits no more.
#[derive(Debug)]
pub(super) struct Signalled {
    pub(super) item: Item,
    /// Why it is not to happen.
    pub(super) failure: Option<Failure>,
}

/// What waits for which event, in the order in which it came.
#[derive(Debug)]
pub(super) struct AwaitingEvent {
    /// None for a buffer that no GPU writes.
    fences: Option<Fences>,
    waiting: Vec<AwaitingItem>,
    /// Where the next look begins: everybody's turn comes.
    next: usize,
}

#[derive(Debug)]
struct AwaitingItem {
    after: IpcHandle,
    item: Item,
    /// Nobody wants it posted any more.
    abandoned: bool,
    /// Not waited for beyond this.
    until: Option<Instant>,
}

impl AwaitingEvent {
    pub(super) fn new(memory: &Memory) -> Self {
        let fences = match memory {
            Memory::Host(_) => None,
            Memory::Cuda(cuda) => Some(Fences::new(std::sync::Arc::clone(cuda.device()))),
        };
        Self { fences, waiting: Vec::new(), next: 0 }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn push(&mut self, after: IpcHandle, item: Item) {
        self.waiting.push(AwaitingItem { after, item, abandoned: false, until: None });
    }

    /// A message that nobody holds any more.
    pub(super) fn forget(&mut self, ticket: u64) {
        self.waiting.retain(|entry| !matches!(entry.item, Item::Message(other) if other == ticket));
    }

    /// A transfer that has been posted already is past being abandoned.
    pub(super) fn abandon(&mut self, transfer: TransferId, client_gone: bool, now: Instant) {
        let is_it = |entry: &&mut AwaitingItem| matches!(&entry.item, Item::Transfer(one) if one.transfer == transfer);
        for entry in self.waiting.iter_mut().filter(is_it) {
            entry.abandoned = true;
            if client_gone {
                entry.until.get_or_insert(now + CLIENT_WRITES_OVER_AFTER);
            }
        }
    }

    /// Takes out those that wait no more. Never waits.
    pub(super) fn take_signalled(&mut self, now: Instant) -> Vec<Signalled> {
        let mut passed = Vec::new();
        for _ in 0..self.waiting.len().min(LOOKS_MAX) {
            let index = if self.next < self.waiting.len() { self.next } else { 0 };
            let Some(entry) = self.waiting.get(index) else { break };
            let seen = match &mut self.fences {
                Some(fences) => fences.is_passed(&entry.after).map_err(|error| failure_of(&error)),
                None => Err(Failure::new(FailureKind::Internal, "an event is waited for, but no GPU has this buffer")),
            };
            let overdue = entry.until.is_some_and(|until| now >= until);
            if matches!(seen, Ok(false)) && !overdue {
                self.next = index + 1;
                continue;
            }
            self.next = index;
            let AwaitingItem { item, abandoned, .. } = self.waiting.remove(index);
            let given_up = || Failure::new(FailureKind::Cancelled, "it was given up before its bytes were final");
            let failure = if abandoned { Some(given_up()) } else { seen.err() };
            passed.push(Signalled { item, failure });
        }
        passed
    }
}

fn failure_of(error: &BufferError) -> Failure {
    Failure::new(FailureKind::TransferFailed, error.to_string())
}
