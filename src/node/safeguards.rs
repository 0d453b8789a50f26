//! What keeps bytes whole and answers right, switchable.

/// Each of these is always on. The simulation switches them off one by one, to show that it would notice their absence.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Safeguards {
    /// Slots whose writer may still be writing are not granted again.
    pub quarantine: bool,
    /// A commit or a cancel counts for the grant that it names, and not for its request's name.
    pub grant_check: bool,
    /// A request holds no slot before it has all of them.
    pub whole_requests: bool,
    /// The proxy is told after the commit was acknowledged.
    pub commit_before_notify: bool,
    /// A reader that asks after another was told of a failure waits for the next attempt.
    pub ends_told_once: bool,
    /// Of a chunk that several LMCache senders were granted, no copy is taken for written by its key.
    pub copies_told_apart: bool,
    /// Slots of an LMCache sender whose connection is gone are not granted again while what it had posted may arrive.
    pub linger: bool,
    /// What an LMCache receiver says is there, and was granted to us and never written, is written.
    pub unwritten_remembered: bool,
}

impl Default for Safeguards {
    fn default() -> Self {
        Self {
            quarantine: true,
            grant_check: true,
            whole_requests: true,
            commit_before_notify: true,
            ends_told_once: true,
            copies_told_apart: true,
            linger: true,
            unwritten_remembered: true,
        }
    }
}
