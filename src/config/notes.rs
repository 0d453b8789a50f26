//! What is to be said at start about how a configuration came to be.

/// Lines for the log.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) said: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl Notes {
    pub(super) fn say(&mut self, line: String) {
        self.said.push(line);
    }

    /// What is accepted, and lets somebody in who may not be meant.
    pub(super) fn warn(&mut self, line: String) {
        self.warnings.push(line);
    }
}
