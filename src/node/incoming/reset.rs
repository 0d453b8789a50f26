//! Everything that was computed before now is void: other weights, or an operator's wish.

use std::time::Instant;

use super::{Answer, ReceiverSession};
use crate::ids::{ClientId, Failure, FailureKind, RequestId, Seq};

impl<R: Clone + PartialEq> ReceiverSession<R> {
    /// A client's serving engine has reset its cache. Requests that have not ended fail, so that what is being written
    /// for them is never read; ready chunks are found no more, and freed with their last lease.
    pub fn handle_reset(&mut self, now: Instant, client: ClientId, id: Seq) {
        let open: Vec<RequestId> = self.requests.keys().cloned().collect();
        for request in open {
            self.fail(now, &request, Failure::new(FailureKind::Cancelled, "the decode server reset its cache"));
        }
        self.slots.forget_ready();
        self.answer(client, id, Answer::Reset);
        self.admit(now);
    }
}
