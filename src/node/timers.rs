//! Deadlines by name, without a clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

/// A set of named deadlines.
#[derive(Debug)]
pub(super) struct Timers<K> {
    by_time: BTreeSet<(Instant, K)>,
    by_key: BTreeMap<K, Instant>,
}

impl<K: Ord + Clone> Timers<K> {
    pub(super) fn new() -> Self {
        Self { by_time: BTreeSet::new(), by_key: BTreeMap::new() }
    }

    /// Sets or moves a deadline.
    pub(super) fn set(&mut self, key: impl Into<K>, at: Instant) {
        let key = key.into();
        self.unset(key.clone());
        self.by_time.insert((at, key.clone()));
        self.by_key.insert(key, at);
    }

    pub(super) fn unset(&mut self, key: impl Into<K>) {
        let key = key.into();
        if let Some(at) = self.by_key.remove(&key) {
            self.by_time.remove(&(at, key));
        }
    }

    pub(super) fn contains(&self, key: impl Into<K>) -> bool {
        self.by_key.contains_key(&key.into())
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes one deadline that has passed, the earliest first, and when that was.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<(Instant, K)> {
        if self.next()? > now {
            return None;
        }
        let (at, key) = self.by_time.pop_first()?;
        self.by_key.remove(&key);
        Some((at, key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_deadline_that_was_moved_fires_once_at_its_new_time() {
        // Broken in production: a request is failed by a deadline that no longer holds.
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut timers = Timers::new();
        timers.set("a", at(10));
        timers.set("b", at(20));
        timers.set("a", at(30));
        timers.set("c", at(5));
        timers.unset("c");
        assert_eq!(timers.next(), Some(at(20)));
        assert_eq!(timers.pop_due(at(19)), None);
        assert_eq!(timers.pop_due(at(40)), Some((at(20), "b")));
        assert_eq!(timers.pop_due(at(40)), Some((at(30), "a")));
        assert_eq!((timers.pop_due(at(40)), timers.next()), (None, None));
    }
}
