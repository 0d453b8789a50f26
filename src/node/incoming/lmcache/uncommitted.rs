//! What they are granted, until a reader says that it is written.

use std::collections::BTreeSet;

use super::super::Incoming;
use super::super::request::{IncomingRequest, IncomingStage};
use crate::ids::{ChunkKey, Failure, FailureKind, RequestId};
use crate::node::core::Core;
use crate::node::safeguards::Safeguard;

impl<R: Clone + PartialEq> Incoming<R> {
    /// Makes chunks ready that an LMCache sender was granted: a reader knows from the proxy that they are written. Of
    /// a chunk that was granted twice it knows only that one copy is, so neither is taken: `wait` names the request.
    pub(in crate::node::incoming) fn take_uncommitted(&mut self, core: &mut Core<R>, keys: &[ChunkKey]) {
        for key in keys {
            if core.slots.find(key).is_some() {
                continue;
            }
            let told_apart = core.settings.keeps(Safeguard::CopiesToldApart);
            if let Some([id, others @ ..]) = self.lmcache.granted.get(key).map(Vec::as_slice)
                && (others.is_empty() || !told_apart)
            {
                let id = id.clone();
                self.lmcache.granted.remove(key);
                self.take_one_uncommitted(core, &id, key);
            }
        }
        self.end_those_found(core, keys);
    }

    /// Requests without a name that had nothing to write, and whose reader is this: they are held no longer for it.
    fn end_those_found(&mut self, core: &mut Core<R>, keys: &[ChunkKey]) {
        let keys: BTreeSet<&ChunkKey> = keys.iter().collect();
        let found = self.requests.iter().filter(|(_, request)| {
            request.writes_nothing()
                && request.origin.batches().is_some_and(|batches| batches.unnamed)
                && request.keys.iter().all(|key| keys.contains(key))
        });
        let found: Vec<RequestId> = found.map(|(id, _)| id.clone()).collect();
        for id in found {
            self.make_ready(core, &id);
            self.drop_ready(core, &id);
        }
    }

    /// Whether a waiting request asks for a chunk that another has been granted and no reader has taken, where a reader
    /// could not tell the copies apart.
    pub(in crate::node::incoming) fn waits_for_a_reader(&self, core: &Core<R>, id: &RequestId) -> bool {
        let unnamed = |id: &RequestId| {
            self.requests.get(id).and_then(|request| request.origin.batches()).is_some_and(|batches| batches.unnamed)
        };
        let Some(request) = self.requests.get(id).filter(|request| !request.origin.commits()) else { return false };
        let ambiguous = |key: &ChunkKey| {
            let others = self.lmcache.granted.get(key).into_iter().flatten();
            core.slots.find(key).is_none() && others.into_iter().any(|other| unnamed(id) || unnamed(other))
        };
        request.keys.iter().any(ambiguous)
    }

    fn take_one_uncommitted(&mut self, core: &mut Core<R>, id: &RequestId, key: &ChunkKey) {
        let Some(request) = self.requests.get_mut(id) else { return };
        let IncomingStage::Granted { grant, own, shared } = &mut request.stage else { return };
        let Some(at) = own.iter().position(|&(index, _)| request.keys[index as usize] == *key) else { return };
        let (index, slot) = own.remove(at);
        let committed = core.slots.commit(slot, *grant, key.clone(), request.sizes[index as usize].group);
        debug_assert!(committed, "slot {slot} was granted with {grant} and is not reserved");
        shared.push((index, slot));
        let all = own.is_empty() && request.origin.batches().is_some_and(|batches| batches.complete);
        if all {
            // The reader takes the chunks by their keys, so the request has served its purpose.
            self.make_ready(core, id);
            self.drop_ready(core, id);
        }
    }

    /// No reader has fetched a request in time.
    pub(in crate::node::incoming) fn nobody_fetched(&mut self, core: &mut Core<R>, id: &RequestId) {
        if self.requests.get(id).is_some_and(IncomingRequest::writes_nothing) {
            // It only held what others had brought.
            self.make_ready(core, id);
            return self.drop_ready(core, id);
        }
        let text = format!(
            "nobody fetched it within {} ms of its grant (pd_retention_sec), and its sender does not say when it is written",
            self.settings.retention.as_millis()
        );
        self.end(core, id, Failure::new(FailureKind::Expired, text), false);
    }

    /// Whether a request is granted as a whole, so that a reader that knows it to be written can have it.
    pub(in crate::node::incoming) fn can_be_taken_uncommitted(&self, id: &RequestId) -> bool {
        self.requests.get(id).is_some_and(|request| {
            matches!(request.stage, IncomingStage::Granted { .. })
                && request.origin.batches().is_some_and(|batches| batches.complete)
        })
    }

    /// Positions of the chunks that are granted and that no reader has taken.
    pub(in crate::node::incoming) fn uncommitted_among(&self, core: &Core<R>, keys: &[ChunkKey]) -> Vec<u32> {
        let granted =
            |(_, key): &(u32, &ChunkKey)| self.lmcache.granted.contains_key(key) && core.slots.find(key).is_none();
        (0..).zip(keys).filter(granted).map(|(index, _)| index).collect()
    }
}
