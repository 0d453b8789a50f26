//! A memory of so many things and no more: the oldest is forgotten first.

use std::collections::{BTreeMap, VecDeque};

/// The latest value under each key.
#[derive(Debug)]
pub(super) struct Latest<K, V> {
    len_max: usize,
    values: BTreeMap<K, (u64, V)>,
    /// The oldest first. What was removed or replaced since keeps its place here.
    order: VecDeque<(K, u64)>,
    next: u64,
}

impl<K: Ord + Clone, V> Latest<K, V> {
    pub(super) const fn new(len_max: usize) -> Self {
        Self { len_max, values: BTreeMap::new(), order: VecDeque::new(), next: 0 }
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.values.get(key).map(|(_, value)| value)
    }

    pub(super) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.values.get_mut(key).map(|(_, value)| value)
    }

    /// Sets what is remembered under a key.
    pub(super) fn insert(&mut self, key: K, value: V) {
        self.order.push_back((key.clone(), self.next));
        self.values.insert(key, (self.next, value));
        self.next += 1;
        while self.order.len() > self.len_max {
            self.forget_oldest();
        }
    }

    pub(super) fn remove(&mut self, key: &K) {
        self.values.remove(key);
    }

    /// Forgets what has this key and those that follow it, for as long as they are like this.
    pub(super) fn remove_from(&mut self, first: &K, is_meant: impl Fn(&K) -> bool) {
        let meant: Vec<K> =
            self.values.range(first..).map(|(key, _)| key).take_while(|key| is_meant(key)).cloned().collect();
        meant.iter().for_each(|key| self.remove(key));
    }

    /// Forgets the oldest for as long as they are like this.
    pub(super) fn forget_while(&mut self, is_old: impl Fn(&V) -> bool) {
        while let Some((key, number)) = self.order.front() {
            let is_kept = |(latest, value): &(u64, V)| latest == number && !is_old(value);
            if self.values.get(key).is_some_and(is_kept) {
                return;
            }
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some((key, number)) = self.order.pop_front() else { return };
        if self.values.get(&key).is_some_and(|(latest, _)| *latest == number) {
            self.values.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_forgotten_first_and_what_was_set_again_is_young() {
        // Broken in production: whoever's name sorts first is never remembered, or a memory grows for as long as the process runs.
        let mut latest = Latest::new(3);
        for (key, value) in [("z", 1), ("a", 2), ("z", 3)] {
            latest.insert(key, value);
        }
        latest.insert("b", 4);
        assert_eq!((latest.get(&"z"), latest.get(&"a"), latest.get(&"b")), (Some(&3), Some(&2), Some(&4)));
        latest.insert("c", 5);
        assert_eq!((latest.get(&"z"), latest.get(&"a"), latest.get(&"c")), (Some(&3), None, Some(&5)));
        latest.forget_while(|value| *value < 5);
        assert_eq!((latest.get(&"z"), latest.get(&"b"), latest.get(&"c")), (None, None, Some(&5)));
        latest.insert("ca", 6);
        latest.insert("d", 7);
        latest.remove_from(&"c", |key| key.starts_with('c'));
        assert_eq!((latest.get(&"c"), latest.get(&"ca"), latest.get(&"d")), (None, None, Some(&7)));
        latest.remove(&"d");
        latest.forget_while(|_| false);
        assert!(latest.values.is_empty() && latest.order.is_empty());
    }
}
