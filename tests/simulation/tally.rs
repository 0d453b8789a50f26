//! What a run has seen.

/// How often things happened, so that a run that tests nothing is noticed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Tally {
    pub events: u64,
    pub sent: u64,
    pub failed: u64,
    pub cancelled: u64,
    pub fetched: u64,
    pub lost_messages: u64,
    pub repeated_messages: u64,
    pub crashes: u64,
    pub pauses: u64,
    pub growths: u64,
    pub landed_late: u64,
    pub vanished: u64,
    pub vouched: u64,
    pub verifying: u64,
    /// Of those fetched: by readers that had asked after an earlier attempt's end was told, and before theirs was granted.
    pub fetched_again: u64,
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        let Self { events, sent, failed, cancelled, fetched, lost_messages, repeated_messages, crashes, .. } = other;
        let Self { pauses, growths, landed_late, vanished, vouched, verifying, fetched_again, .. } = other;
        self.events += events;
        self.sent += sent;
        self.failed += failed;
        self.cancelled += cancelled;
        self.fetched += fetched;
        self.lost_messages += lost_messages;
        self.repeated_messages += repeated_messages;
        self.crashes += crashes;
        self.pauses += pauses;
        self.growths += growths;
        self.landed_late += landed_late;
        self.vanished += vanished;
        self.vouched += vouched;
        self.verifying += verifying;
        self.fetched_again += fetched_again;
    }

    /// A run in which something never happened has not tested it.
    pub fn assert_everything_happened(&self) {
        let counts = [self.sent, self.failed, self.cancelled, self.fetched, self.lost_messages, self.repeated_messages];
        let rare = [self.crashes, self.pauses, self.growths, self.landed_late, self.vanished, self.vouched];
        let rare = rare.iter().chain([&self.verifying, &self.fetched_again]);
        assert!(counts.iter().chain(rare).all(|&count| count >= 20), "too few of something: {self:?}");
    }
}
