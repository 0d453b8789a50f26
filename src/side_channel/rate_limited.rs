//! Log lines that any process can cause which reaches a port.

use std::time::{Duration, Instant};

/// How often one kind of line is written at most.
const PAUSE: Duration = Duration::from_secs(1);

/// Lets one line a second through, or one in another time, so that nobody fills the disk with them.
#[derive(Debug)]
pub struct RateLimited {
    pause: Duration,
    said_at: Option<Instant>,
    unsaid: u64,
}

impl Default for RateLimited {
    fn default() -> Self {
        Self::every(PAUSE)
    }
}

impl RateLimited {
    /// Lets one line through in this time.
    pub const fn every(pause: Duration) -> Self {
        Self { pause, said_at: None, unsaid: 0 }
    }

    /// Whether the line may be written; if so, how many were not since the last one.
    pub fn permit(&mut self, now: Instant) -> Option<u64> {
        self.permit_with(now, 0)
    }

    /// The same of a line that stands for `others` as well, which another limit has kept back.
    pub fn permit_with(&mut self, now: Instant, others: u64) -> Option<u64> {
        self.unsaid += others;
        if self.said_at.is_some_and(|at| now.duration_since(at) < self.pause) {
            self.unsaid += 1;
            return None;
        }
        self.said_at = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_a_second_that_counts_the_others() {
        // Broken in production: a port scanner fills the disk with log lines, or nobody learns how many there were.
        let mut limited = RateLimited::default();
        let start = Instant::now();
        assert_eq!(limited.permit(start), Some(0));
        assert_eq!((0..500).filter_map(|ms| limited.permit(start + Duration::from_millis(ms))).count(), 0);
        assert_eq!(limited.permit(start + PAUSE), Some(500));
        assert_eq!(limited.permit(start + 2 * PAUSE), Some(0));
        let mut limited = RateLimited::every(60 * PAUSE);
        assert_eq!(limited.permit(start), Some(0));
        assert_eq!(limited.permit(start + 59 * PAUSE), None);
        assert_eq!(limited.permit(start + 60 * PAUSE), Some(1));
        // What another limit has kept back is not lost when this one keeps back its line.
        assert_eq!(limited.permit_with(start + 61 * PAUSE, 5), None);
        assert_eq!(limited.permit_with(start + 120 * PAUSE, 3), Some(9));
    }
}
