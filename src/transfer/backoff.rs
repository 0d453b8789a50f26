//! How long to wait between two polls.

use std::time::Duration;

/// Polls that follow each other at once after progress: short copies end within them.
const SPIN_COUNT: u32 = 64;
/// Polls that then give the core away in between, to a progress thread or the peer.
const YIELD_COUNT: u32 = 64;
/// First sleep, doubled from poll to poll.
const SLEEP_MIN: Duration = Duration::from_micros(5);
/// Longest sleep: what a long transfer's end can be noticed late by.
const SLEEP_MAX: Duration = Duration::from_micros(100);

/// What to do before the next poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Nothing, or `std::hint::spin_loop`.
    Spin,
    /// `std::thread::yield_now`.
    Yield,
    /// `std::thread::sleep`, or wait for work that long.
    Sleep(Duration),
}

/// Polite polling: keen after progress, then less and less.
///
/// Two sides that spin on two cores are slower than two that let each other run, and than the threads of the
/// transfer library in between. For use while something is in flight; an idle engine thread waits for work instead.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    idle_polls: u32,
}

impl Backoff {
    /// Keen.
    pub const fn new() -> Self {
        Self { idle_polls: 0 }
    }

    /// What to do now, after a poll that `progressed` or did not: it completed something, or the engine
    /// [has work](super::TransferEngine::has_work) for the next one.
    pub fn next(&mut self, progressed: bool) -> Wait {
        if progressed {
            self.idle_polls = 0;
            return Wait::Spin;
        }
        let idle_polls = self.idle_polls;
        self.idle_polls = idle_polls.saturating_add(1);
        if idle_polls < SPIN_COUNT {
            return Wait::Spin;
        }
        let after_spin = idle_polls - SPIN_COUNT;
        if after_spin < YIELD_COUNT {
            return Wait::Yield;
        }
        let doublings = (after_spin - YIELD_COUNT).min(16);
        Wait::Sleep((SLEEP_MIN * (1 << doublings)).min(SLEEP_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_in_bounded_sleeps_and_progress_makes_it_keen_again() {
        // Broken in production: a daemon with a stalled transfer burns a core, or notices its end seconds late.
        let mut backoff = Backoff::new();
        assert_eq!(backoff.next(false), Wait::Spin);
        let waits: Vec<Wait> = (0..1000).map(|_| backoff.next(false)).collect();
        let rank = |wait: &Wait| match wait {
            Wait::Spin => Duration::ZERO,
            Wait::Yield => Duration::from_nanos(1),
            Wait::Sleep(time) => *time,
        };
        assert!(waits.is_sorted_by_key(rank));
        assert!(waits.contains(&Wait::Yield) && waits.contains(&Wait::Sleep(SLEEP_MIN)));
        assert_eq!(waits.last(), Some(&Wait::Sleep(SLEEP_MAX)));
        backoff.idle_polls = u32::MAX;
        assert_eq!(backoff.next(false), Wait::Sleep(SLEEP_MAX));
        assert_eq!(backoff.next(true), Wait::Spin);
        assert_eq!(backoff.next(false), Wait::Spin);
    }
}
