//! Everything that was computed before now is void: other weights, or an operator's wish.

use super::Incoming;
use crate::ids::{Failure, FailureKind, RequestId};
use crate::node::core::Core;

impl<R: Clone + PartialEq> Incoming<R> {
    /// A client's serving engine has reset its cache. Requests that have not ended fail, so that what is being written
    /// for them is never read; ready chunks are found no more, and freed with their last lease.
    pub(in crate::node) fn handle_reset(&mut self, core: &mut Core<R>) {
        let open: Vec<RequestId> = self.requests.keys().cloned().collect();
        for request in open {
            self.fail(core, &request, Failure::new(FailureKind::Cancelled, "the decode server reset its cache"));
        }
        // What senders have parked was computed before as well.
        let asked: Vec<RequestId> = self.fetches.keys().cloned().collect();
        for request in asked {
            let failure = Failure::new(FailureKind::Cancelled, "the decode server reset its cache");
            self.fail_waiters(core, &request, &failure, "");
            self.give_up_fetch(core, &request);
        }
        core.slots.forget_ready();
        self.admit(core);
    }
}
