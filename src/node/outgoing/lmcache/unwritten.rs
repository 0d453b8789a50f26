//! Pages that an LMCache receiver has granted to us and that do not hold their chunks yet.
//!
//! It enters a key with the grant, and from then on says of it "already sent", whether anything was written or not. So
//! what it says so of is held against this memory: a key that is in here is not sent.

use std::collections::BTreeMap;

use crate::ids::ChunkKey;

/// What one receiver process holds of ours.
#[derive(Debug, Default)]
pub(super) struct Unwritten {
    keys: BTreeMap<ChunkKey, HeldKey>,
    by_page: BTreeMap<u32, ChunkKey>,
}

#[derive(Debug, Default)]
struct HeldKey {
    /// Where it was granted, if that is known.
    page: Option<u32>,
    /// Allocations of ours that hold it and were not taken back. Each counts there as a reference of its own.
    asks: u32,
    /// An allocation was never answered: it may be entered there now or later, on a page that nobody was told of. Nothing
    /// that the same process says afterwards shows that this has not happened.
    orphaned: bool,
}

/// What "already sent" means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// What it says.
    Sent,
    /// It was granted to us, here, and still has to be written.
    Ours(u32),
    /// It may be a page of ours that was never written.
    Doubtful,
}

impl Unwritten {
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// A page was granted. It is no other key's any more.
    pub(super) fn granted(&mut self, key: &ChunkKey, page: u32) {
        if let Some(before) = self.by_page.remove(&page) {
            self.forget_page_of(&before);
        }
        self.forget_page_of(key);
        let held = self.keys.entry(key.clone()).or_default();
        held.page = Some(page);
        held.asks = 1;
        self.by_page.insert(page, key.clone());
    }

    /// A key that was asked for was said to be there already.
    pub(super) fn claimed(&mut self, key: &ChunkKey) -> Claim {
        let Some(held) = self.keys.get_mut(key) else { return Claim::Sent };
        held.asks += 1;
        held.page.map_or(Claim::Doubtful, Claim::Ours)
    }

    /// The chunk is on its page.
    pub(super) fn written(&mut self, key: &ChunkKey) {
        self.forget_page_of(key);
    }

    /// These were asked for, and what came of it will not be known.
    pub(super) fn orphaned(&mut self, keys: &[ChunkKey]) {
        for key in keys {
            self.keys.entry(key.clone()).or_default().orphaned = true;
        }
    }

    /// One allocation of the key is being taken back. Once all are, the page may be another's before we hear of it.
    pub(super) fn give_back(&mut self, key: &ChunkKey) {
        let Some(held) = self.keys.get_mut(key) else { return };
        held.asks = held.asks.saturating_sub(1);
        if held.asks == 0
            && let Some(page) = held.page.take()
        {
            self.by_page.remove(&page);
        }
    }

    /// The receiver has heard so.
    pub(super) fn given_back(&mut self, key: &ChunkKey) {
        if self.keys.get(key).is_some_and(|held| held.asks == 0 && !held.orphaned) {
            self.keys.remove(key);
        }
    }

    /// Forgets the page, and the key with it unless that would be to forget a doubt.
    fn forget_page_of(&mut self, key: &ChunkKey) {
        let Some(held) = self.keys.get_mut(key) else { return };
        if let Some(page) = held.page.take() {
            self.by_page.remove(&page);
        }
        held.asks = 0;
        if !held.orphaned {
            self.keys.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> ChunkKey {
        ChunkKey::new(name).unwrap()
    }

    #[test]
    fn a_page_is_one_keys_and_goes_when_the_key_is_written_or_given_back() {
        // Broken in production: a retry writes into a page that is another request's by now.
        let mut unwritten = Unwritten::default();
        unwritten.granted(&key("a"), 5);
        assert_eq!((unwritten.claimed(&key("a")), unwritten.claimed(&key("b"))), (Claim::Ours(5), Claim::Sent));
        unwritten.granted(&key("b"), 5);
        assert_eq!((unwritten.claimed(&key("a")), unwritten.claimed(&key("b"))), (Claim::Sent, Claim::Ours(5)));
        unwritten.granted(&key("b"), 6);
        assert_eq!(unwritten.claimed(&key("b")), Claim::Ours(6));
        unwritten.give_back(&key("b"));
        unwritten.given_back(&key("b"));
        assert_eq!(unwritten.claimed(&key("b")), Claim::Ours(6), "asked for twice, given back once");
        unwritten.give_back(&key("b"));
        unwritten.give_back(&key("b"));
        assert_eq!(unwritten.claimed(&key("b")), Claim::Doubtful, "until the receiver has heard so");
        unwritten.give_back(&key("b"));
        unwritten.given_back(&key("b"));
        assert_eq!(unwritten.claimed(&key("b")), Claim::Sent);
        unwritten.granted(&key("c"), 7);
        unwritten.written(&key("c"));
        assert_eq!(unwritten.claimed(&key("c")), Claim::Sent);
        assert!(unwritten.is_empty() && unwritten.by_page.is_empty());
    }

    #[test]
    fn a_doubt_lasts_as_long_as_the_receiver() {
        // Broken in production: an allocation that nobody waits for any more is granted after a retry was written, read and
        // freed, and the next request is reported sent into its page.
        let mut unwritten = Unwritten::default();
        unwritten.orphaned(&[key("a")]);
        assert_eq!(unwritten.claimed(&key("a")), Claim::Doubtful);
        unwritten.give_back(&key("a"));
        unwritten.given_back(&key("a"));
        assert_eq!(unwritten.claimed(&key("a")), Claim::Doubtful);
        unwritten.granted(&key("a"), 1);
        assert_eq!(unwritten.claimed(&key("a")), Claim::Ours(1));
        unwritten.written(&key("a"));
        assert_eq!(unwritten.claimed(&key("a")), Claim::Doubtful);
        assert_eq!(unwritten.len(), 1);
    }
}
