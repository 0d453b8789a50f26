//! What they are granted, until a reader says that it is written.

use std::collections::BTreeSet;
use std::time::Instant;

use super::super::ReceiverSession;
use super::super::request::{Request, Stage};
use crate::ids::{ChunkKey, Failure, FailureKind, RequestId};

impl<R: Clone + PartialEq> ReceiverSession<R> {
    /// Makes chunks ready that an LMCache sender was granted: a reader knows from the proxy that they are written. Of
    /// a chunk that was granted twice it knows only that one copy is, so neither is taken: `wait` names the request.
    pub(in crate::node::incoming) fn take_uncommitted(&mut self, now: Instant, keys: &[ChunkKey]) {
        for key in keys {
            if self.slots.find(key).is_some() {
                continue;
            }
            let told_apart = self.settings.safeguards.copies_told_apart;
            if let Some([id, others @ ..]) = self.lmcache.granted.get(key).map(Vec::as_slice)
                && (others.is_empty() || !told_apart)
            {
                let id = id.clone();
                self.lmcache.granted.remove(key);
                self.take_one_uncommitted(now, &id, key);
            }
        }
        self.end_those_found(now, keys);
    }

    /// Requests without a name that had nothing to write, and whose reader is this: they are held no longer for it.
    fn end_those_found(&mut self, now: Instant, keys: &[ChunkKey]) {
        let keys: BTreeSet<&ChunkKey> = keys.iter().collect();
        let found = self.requests.iter().filter(|(_, request)| {
            request.writes_nothing()
                && request.origin.batches().is_some_and(|batches| batches.unnamed)
                && request.keys.iter().all(|key| keys.contains(key))
        });
        let found: Vec<RequestId> = found.map(|(id, _)| id.clone()).collect();
        for id in found {
            self.make_ready(now, &id);
            self.drop_ready(now, &id);
        }
    }

    /// Whether a waiting request asks for a chunk that another has been granted and no reader has taken, where a reader
    /// could not tell the copies apart.
    pub(in crate::node::incoming) fn waits_for_a_reader(&self, id: &RequestId) -> bool {
        let unnamed = |id: &RequestId| {
            self.requests.get(id).and_then(|request| request.origin.batches()).is_some_and(|batches| batches.unnamed)
        };
        let Some(request) = self.requests.get(id).filter(|request| !request.origin.commits()) else { return false };
        let ambiguous = |key: &ChunkKey| {
            let others = self.lmcache.granted.get(key).into_iter().flatten();
            self.slots.find(key).is_none() && others.into_iter().any(|other| unnamed(id) || unnamed(other))
        };
        request.keys.iter().any(ambiguous)
    }

    fn take_one_uncommitted(&mut self, now: Instant, id: &RequestId, key: &ChunkKey) {
        let Some(request) = self.requests.get_mut(id) else { return };
        let Stage::Granted { grant, own, shared } = &mut request.stage else { return };
        let Some(at) = own.iter().position(|&(index, _)| request.keys[index as usize] == *key) else { return };
        let (index, slot) = own.remove(at);
        let committed = self.slots.commit(slot, *grant, key.clone(), request.sizes[index as usize].group);
        debug_assert!(committed, "slot {slot} was granted with {grant} and is not reserved");
        shared.push((index, slot));
        let all = own.is_empty() && request.origin.batches().is_some_and(|batches| batches.complete);
        if all {
            // The reader takes the chunks by their keys, so the request has served its purpose.
            self.make_ready(now, id);
            self.drop_ready(now, id);
        }
    }

    /// No reader has fetched a request in time.
    pub(in crate::node::incoming) fn nobody_fetched(&mut self, now: Instant, id: &RequestId) {
        if self.requests.get(id).is_some_and(Request::writes_nothing) {
            // It only held what others had brought.
            self.make_ready(now, id);
            return self.drop_ready(now, id);
        }
        let text = format!(
            "nobody fetched it within {} ms of its grant (pd_retention_sec), and its sender does not say when it is written",
            self.settings.retention.as_millis()
        );
        self.end(now, id, Failure::new(FailureKind::Expired, text), false);
    }

    /// Whether a request is granted as a whole, so that a reader that knows it to be written can have it.
    pub(in crate::node::incoming) fn can_be_taken_uncommitted(&self, id: &RequestId) -> bool {
        self.requests.get(id).is_some_and(|request| {
            matches!(request.stage, Stage::Granted { .. })
                && request.origin.batches().is_some_and(|batches| batches.complete)
        })
    }

    /// Positions of the chunks that are granted and that no reader has taken.
    pub(in crate::node::incoming) fn uncommitted_among(&self, keys: &[ChunkKey]) -> Vec<u32> {
        let granted =
            |(_, key): &(u32, &ChunkKey)| self.lmcache.granted.contains_key(key) && self.slots.find(key).is_none();
        (0..).zip(keys).filter(granted).map(|(index, _)| index).collect()
    }
}
