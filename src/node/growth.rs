//! When a lazy pd_buffer grows, as far as a node decides it.

use std::time::Duration;

/// How long a node that wants more room waits after a step that failed.
pub(super) const GROW_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// What the runtime made of the buffer's next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grown {
    /// The buffer's length now, in bytes.
    pub len_bytes: u64,
    /// The engine's metadata now.
    pub metadata: Vec<u8>,
    /// The engine's descriptors now.
    pub descriptors: Vec<u8>,
}

/// One step at a time, and a pause after one that failed.
#[derive(Debug)]
pub(super) struct Growth {
    len_max_bytes: u64,
    under_way: bool,
    /// The latest step has failed, and the pause after it is not over.
    pausing: bool,
    /// Why the latest step failed, until one succeeds.
    failed: Option<String>,
}

impl Growth {
    pub(super) fn new(len_max_bytes: u64) -> Self {
        Self { len_max_bytes, under_way: false, pausing: false, failed: None }
    }

    /// How long the buffer can become, in bytes.
    pub(super) fn len_max_bytes(&self) -> u64 {
        self.len_max_bytes
    }

    /// Whether a step may still come without a pause: none has failed lately.
    pub(super) fn can_grow(&self, len_bytes: u64) -> bool {
        self.failed.is_none() && len_bytes < self.len_max_bytes
    }

    /// Whether to ask for a step now; then it is under way.
    pub(super) fn try_begin(&mut self, len_bytes: u64) -> bool {
        let begin = !self.under_way && !self.pausing && len_bytes < self.len_max_bytes;
        self.under_way |= begin;
        begin
    }

    /// The step has ended.
    pub(super) fn end(&mut self, failed: Option<String>) {
        self.under_way = false;
        self.pausing = failed.is_some();
        self.failed = failed;
    }

    /// The pause after a failed step is over, whether or not anybody waits for room now. The reason is kept for those
    /// who do.
    pub(super) fn end_pause(&mut self) {
        self.pausing = false;
    }

    /// For an error text: why there is not more room, if a step failed.
    pub(super) fn failure_note(&self) -> String {
        self.failed.as_ref().map(|text| format!("; the buffer could not grow: {text}")).unwrap_or_default()
    }
}
