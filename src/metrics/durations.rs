//! Times, counted in buckets.

use std::time::Duration;

/// Upper bounds of the buckets, in seconds: from a round trip on one host to the longest waits that are configured.
const BOUNDS_S: [f64; 20] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    120.0, 300.0,
];

/// A histogram of times.
#[derive(Debug, Clone, Default)]
pub(super) struct DurationCounts {
    /// One for each bound, and one for what is longer than all of them.
    counts: [u64; BOUNDS_S.len() + 1],
    /// Whole nanoseconds, so that a small time still counts when the sum is large.
    sum: Duration,
}

impl DurationCounts {
    pub(super) fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.counts[BOUNDS_S.partition_point(|bound| *bound < seconds)] += 1;
        self.sum = self.sum.saturating_add(time);
    }

    pub(super) fn sum_s(&self) -> f64 {
        self.sum.as_secs_f64()
    }

    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Each bucket's upper bound in seconds, the last one infinite, with how many times are in it and in none before.
    pub(super) fn buckets(&self) -> Vec<(f64, u64)> {
        BOUNDS_S.iter().copied().chain([f64::INFINITY]).zip(self.counts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_is_in_one_bucket_and_a_bound_belongs_to_its_own() {
        // Broken in production: a latency alert looks at a bucket that misses what is exactly on its bound, or all that is
        // longer than the last.
        let mut durations = DurationCounts::default();
        for time_us in [0, 100, 101, 1_000_000, 300_000_000, 400_000_000] {
            durations.add(Duration::from_micros(time_us));
        }
        let filled: Vec<(f64, u64)> = durations.buckets().into_iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(filled, [(0.0001, 2), (0.00025, 1), (1.0, 1), (300.0, 1), (f64::INFINITY, 1)]);
        assert_eq!(durations.count(), 6);
        assert!((durations.sum_s() - 701.000_201).abs() < 1e-9, "{}", durations.sum_s());
        assert!(BOUNDS_S.is_sorted());
    }
}
