use super::error::{CodecError, CodecResult};

use futures::ready;
use parking_lot::Mutex;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// What all connections of a socket hold together of messages that are not complete. When there
/// is no room for more, the connection whose message has been under way for longest is closed:
/// an honest message is complete in a moment.
#[derive(Debug)]
pub(crate) struct Budget {
    max: usize,
    holders: Mutex<Holders>,
}

#[derive(Debug, Default)]
struct Holders {
    held: usize,
    // Of that, what those hold that have been told to close.
    leaving: usize,
    next_number: u64,
    // By age.
    by_number: BTreeMap<u64, Holder>,
}

#[derive(Debug)]
struct Holder {
    bytes: usize,
    leaving: bool,
    waker: Waker,
}

/// One connection's part of it, given back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    // While something is held.
    number: Option<u64>,
}

impl Budget {
    pub(crate) fn new(max: usize) -> Self {
        Self {
            max,
            holders: Mutex::default(),
        }
    }

    pub(crate) fn is_bounded(&self) -> bool {
        self.max != usize::MAX
    }

    pub(crate) fn share(self: &Arc<Self>) -> Share {
        Share {
            budget: self.clone(),
            number: None,
        }
    }
}

impl Share {
    /// Makes what this connection holds `bytes` in all, as soon as there is room. An error: the
    /// connection has to close, so that others have room.
    pub(crate) fn poll_hold(
        &mut self,
        bytes: usize,
        cx: &mut Context<'_>,
    ) -> Poll<CodecResult<()>> {
        if !self.budget.is_bounded() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_stay(cx))?;
        if bytes == 0 {
            self.release();
            return Poll::Ready(Ok(()));
        }
        let holders = &mut *self.budget.holders.lock();
        let mine = self
            .number
            .and_then(|number| holders.by_number.get(&number));
        let mine = mine.map_or(0, |holder| holder.bytes);
        let others = holders.held - mine;
        if others.saturating_add(bytes) <= self.budget.max {
            let number = *self.number.get_or_insert_with(|| {
                holders.next_number += 1;
                holders.next_number
            });
            let holder = Holder {
                bytes,
                leaving: false,
                waker: cx.waker().clone(),
            };
            holders.by_number.insert(number, holder);
            holders.held = others + bytes;
            return Poll::Ready(Ok(()));
        }
        let mut staying = others - holders.leaving;
        for (number, holder) in &mut holders.by_number {
            if staying.saturating_add(bytes) <= self.budget.max {
                break;
            }
            if holder.leaving {
                continue;
            }
            if self.number == Some(*number) {
                return Poll::Ready(Err(NO_ROOM));
            }
            holder.leaving = true;
            holders.leaving += holder.bytes;
            staying -= holder.bytes;
            holder.waker.wake_by_ref();
        }
        if staying.saturating_add(bytes) > self.budget.max {
            return Poll::Ready(Err(NO_ROOM));
        }
        // Those that leave were woken before, so they are gone after a round or two.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// An error when the connection has to close, so that others have room. Never waits.
    pub(crate) fn poll_stay(&mut self, cx: &mut Context<'_>) -> Poll<CodecResult<()>> {
        if let Some(number) = self.number {
            if let Some(holder) = self.budget.holders.lock().by_number.get_mut(&number) {
                if holder.leaving {
                    return Poll::Ready(Err(NO_ROOM));
                }
                holder.waker.clone_from(cx.waker());
            }
        }
        Poll::Ready(Ok(()))
    }

    pub(crate) fn release(&mut self) {
        let Some(number) = self.number.take() else {
            return;
        };
        let holders = &mut *self.budget.holders.lock();
        if let Some(holder) = holders.by_number.remove(&number) {
            holders.held -= holder.bytes;
            if holder.leaving {
                holders.leaving -= holder.bytes;
            }
        }
    }
}

const NO_ROOM: CodecError = CodecError::Decode("Incomplete messages exceed the configured maximum");

impl Drop for Share {
    fn drop(&mut self) {
        self.release();
    }
}
