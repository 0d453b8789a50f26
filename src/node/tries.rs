//! How long to wait before an address is tried again that could not be connected.

use std::time::Duration;

use crate::ids::FailureKind;

/// From a try that found no process to the next; it doubles with each.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// The longest such pause: a process that comes up is found within it.
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(5);
/// From a refusal to the next try. The same process will refuse again.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// Tries of one address in a row that found no process.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tries(u32);

impl Tries {
    /// Another has failed: how long to wait before the next.
    pub(super) fn fail(&mut self, kind: FailureKind) -> Duration {
        if is_refusal(kind) {
            return REFUSED_PAUSE;
        }
        let pause = PAUSE_MIN.saturating_mul(1 << self.0.min(8)).min(PAUSE_MAX);
        self.0 += 1;
        pause
    }
}

/// Whether a process has refused, and not just been silent.
pub(super) fn is_refusal(kind: FailureKind) -> bool {
    use FailureKind::{Deadline, PeerLost, PeerUnreachable, ShuttingDown};
    !matches!(kind, PeerUnreachable | PeerLost | Deadline | ShuttingDown)
}
