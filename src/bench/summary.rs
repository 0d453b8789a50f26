//! Many durations in three numbers.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// A minute and a half hour is more than any wait here; a longer one counts as this long.
const LONGEST_NS: u64 = 5_400_000_000_000;

/// Durations, to three significant figures.
#[derive(Debug, Clone)]
pub(super) struct Durations {
    histogram: Histogram<u64>,
}

/// Median, 99th percentile and largest, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Summary {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Durations {
    pub(super) fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("the bounds are in order");
        Self { histogram }
    }

    pub(super) fn add(&mut self, duration: Duration) {
        self.histogram.saturating_record(u64::try_from(duration.as_nanos()).unwrap_or(LONGEST_NS));
    }

    pub(super) fn add_us(&mut self, micros: u64) {
        self.add(Duration::from_micros(micros));
    }

    /// All zero when nothing was added.
    pub(super) fn summary_ms(&self) -> Summary {
        Summary { p50: self.quantile_ms(0.5), p99: self.quantile_ms(0.99), max: self.quantile_ms(1.0) }
    }

    /// In milliseconds; 0 when nothing was added.
    pub(super) fn quantile_ms(&self, quantile: f64) -> f64 {
        if self.histogram.is_empty() {
            return 0.0;
        }
        self.histogram.value_at_quantile(quantile) as f64 / 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_in_milliseconds_and_of_what_was_added() {
        // Broken in production: a table in the wrong unit, or a panic when no request was counted.
        let mut durations = Durations::new();
        assert_eq!(durations.summary_ms(), Summary { p50: 0.0, p99: 0.0, max: 0.0 });
        for millis in 1..=100 {
            durations.add(Duration::from_millis(millis));
        }
        let summary = durations.summary_ms();
        assert!((summary.p50 - 50.0).abs() < 0.1, "{summary:?}");
        assert!((summary.p99 - 99.0).abs() < 0.2, "{summary:?}");
        assert!((summary.max - 100.0).abs() < 0.2, "{summary:?}");
        durations.add(Duration::from_secs(1_000_000));
        assert!(durations.summary_ms().max >= 5_400_000.0);
    }
}
