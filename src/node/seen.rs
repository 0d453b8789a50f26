//! Which messages of a peer were seen before, as far as a bounded memory can tell.

use std::collections::BTreeSet;

use crate::ids::Seq;

/// How many numbers are remembered one by one.
const SEEN_MAX: usize = 4096;

/// Numbers that one peer has used. What is too old to be told apart counts as seen: it came thousands of messages late.
#[derive(Debug)]
pub(super) struct SeenSeqs {
    /// Everything up to here counts as seen.
    floor: Seq,
    above: BTreeSet<Seq>,
}

impl SeenSeqs {
    /// Everything up to `floor` counts as seen.
    pub(super) fn above(floor: Seq) -> Self {
        Self { floor, above: BTreeSet::new() }
    }

    /// Notes a number. False: it was seen before.
    pub(super) fn insert(&mut self, seq: Seq) -> bool {
        let new = seq > self.floor && self.above.insert(seq);
        if self.above.len() > SEEN_MAX
            && let Some(lowest) = self.above.pop_first()
        {
            self.floor = lowest;
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_counts_once_and_an_old_one_never() {
        // Broken in production: an allocation that the network delivers twice takes slots that nobody ever writes.
        let mut seen = SeenSeqs::above(Seq(5));
        assert!(!seen.insert(Seq(5)) && !seen.insert(Seq(1)));
        assert!(seen.insert(Seq(9)) && seen.insert(Seq(7)));
        assert!(!seen.insert(Seq(9)) && !seen.insert(Seq(7)));
        for seq in 10..10 + SEEN_MAX as u64 {
            assert!(seen.insert(Seq(seq)));
        }
        assert!(!seen.insert(Seq(8)), "older than everything that is remembered");
        assert_eq!(seen.above.len(), SEEN_MAX);
    }
}
