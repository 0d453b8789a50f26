//! Whether the engine's thread takes up what it is asked: one question at a time, so that a thread which does not leaves
//! nothing behind, however often it is asked about.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;

/// How long the engine's thread may take to take up a question before it counts as stuck. A round of it is well below a
/// second; one that posts gigabytes, which some of NIXL's backends copy inside the call, is longer.
pub(super) const ENGINE_TIME_MAX: Duration = Duration::from_secs(3);

/// A question to the engine's thread.
#[derive(Debug, Clone)]
pub(super) struct Probe {
    number: u64,
    asked_at: Instant,
    /// The last question that the thread has taken up.
    taken: watch::Receiver<u64>,
}

impl Probe {
    fn is_taken(&self) -> bool {
        *self.taken.borrow() >= self.number
    }

    /// Whether the thread takes the question up in time.
    pub(super) async fn is_taken_in_time(&self) -> bool {
        let mut taken = self.taken.clone();
        // Of a thread that has ended the other end is gone, which is an error as well.
        matches!(timeout(ENGINE_TIME_MAX, taken.wait_for(|taken| *taken >= self.number)).await, Ok(Ok(_)))
    }

    /// For how long the thread has not taken it up.
    pub(super) fn silence(&self) -> Duration {
        if self.is_taken() { Duration::ZERO } else { self.asked_at.elapsed() }
    }
}

/// Asks.
#[derive(Debug)]
pub(super) struct Prober(Probe);

impl Prober {
    /// One that has asked nothing, and what its questions are to be answered with.
    pub(super) fn new() -> (Self, watch::Sender<u64>) {
        let (take, taken) = watch::channel(0);
        (Self(Probe { number: 0, asked_at: Instant::now(), taken }), take)
    }

    /// The question of this moment, given to `ask` if it is a new one: one that is open still serves.
    pub(super) fn probe(&mut self, ask: impl FnOnce(u64)) -> Probe {
        if self.0.is_taken() {
            self.0.number += 1;
            self.0.asked_at = Instant::now();
            ask(self.0.number);
        }
        self.0.clone()
    }
}
