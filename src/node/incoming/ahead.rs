//! Chunks that a sender pushes ahead: nobody has asked for them, and they are looked up once they are here.
//!
//! They are granted room that nothing waits for, at once or not at all, and give it back when something that was asked for needs it.

use std::collections::{BTreeMap, BTreeSet};

use super::request::{IncomingRequest, IncomingStage};
use super::{Incoming, IncomingNote};
use crate::ids::{ChunkKey, Failure, FailureKind, RequestId};
use crate::node::core::Core;

/// One part in so many of the requests that may be open, and of the room that can be reserved, can be pushed ahead. The requests
/// take no place of others.
const PUSHED_AHEAD: usize = 2;

/// Chunks that are being pushed ahead, and by how many requests each.
#[derive(Debug, Default)]
pub(super) struct Coming(BTreeMap<ChunkKey, usize>);

impl Coming {
    pub(super) fn contains(&self, key: &ChunkKey) -> bool {
        self.0.contains_key(key)
    }

    fn enter<'a>(&mut self, keys: impl Iterator<Item = &'a ChunkKey>) {
        keys.for_each(|key| *self.0.entry(key.clone()).or_default() += 1);
    }

    fn leave<'a>(&mut self, keys: impl Iterator<Item = &'a ChunkKey>) {
        for key in keys {
            if let Some(count) = self.0.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    self.0.remove(key);
                }
            }
        }
    }
}

/// The positions of the chunks that are written for a request.
fn written<R>(request: &IncomingRequest<R>) -> impl Iterator<Item = usize> {
    let own = match &request.stage {
        IncomingStage::Granted { own, .. } => &own[..],
        _ => &[],
    };
    own.iter().map(|(index, _)| *index as usize)
}

fn written_keys<R>(request: &IncomingRequest<R>) -> impl Iterator<Item = &ChunkKey> {
    written(request).map(|at| &request.keys[at])
}

impl<R: Clone + PartialEq> Incoming<R> {
    /// How many requests that have not ended were asked for, of those that count.
    pub(super) fn asked_for(&self) -> usize {
        self.requests.values().filter(|request| !request.ahead).count()
    }

    /// Grants a request that was pushed ahead its room now, or refuses it.
    pub(super) fn admit_ahead(&mut self, core: &mut Core<R>, id: &RequestId) {
        let may_have = self.waiting.is_empty() && self.ahead_may_have(core, id);
        if may_have && self.try_reserve(core, id, true) {
            if let Some(request) = self.requests.get(id) {
                self.coming.enter(written_keys(request));
            }
            return;
        }
        if may_have {
            // For the next one.
            core.ask_to_grow();
        }
        let Some(request) = self.requests.remove(id) else { return };
        let text = "there is no room here for what nobody has asked for yet";
        self.tell_refused(core, request.route, request.seq, Failure::new(FailureKind::NoSlots, text));
    }

    /// Whether what is pushed ahead stays within its part with this request.
    fn ahead_may_have(&self, core: &Core<R>, id: &RequestId) -> bool {
        let Some(request) = self.requests.get(id) else { return false };
        let ahead: Vec<&IncomingRequest<R>> = self.requests.values().filter(|request| request.ahead).collect();
        let here: BTreeSet<u32> = core.ready_of(&request.keys, &request.sizes).into_iter().map(|(at, _)| at).collect();
        let missing = (0u32..).zip(&request.sizes).filter(|(at, _)| !here.contains(at)).map(|(_, size)| size.len_bytes);
        let bytes = missing.sum::<u64>()
            + ahead.iter().map(|other| written(other).map(|at| other.sizes[at].len_bytes).sum::<u64>()).sum::<u64>();
        let most_bytes = core.slots.most_reserved_bytes(core.growth.len_max_bytes());
        ahead.len() <= core.settings.requests_max.div_ceil(PUSHED_AHEAD) && bytes <= most_bytes / PUSHED_AHEAD as u64
    }

    /// Something that was asked for waits for room: what is pushed ahead gives its own back. False: nothing is.
    pub(super) fn make_room_for_what_was_asked_for(&mut self, core: &mut Core<R>) -> bool {
        self.withdraw_ahead(core, &Failure::new(FailureKind::NoSlots, "its room is needed for what was asked for"))
    }

    /// Everything that is pushed ahead is given up.
    pub(super) fn withdraw_ahead(&mut self, core: &mut Core<R>, why: &Failure) -> bool {
        let ahead: Vec<RequestId> =
            self.requests.iter().filter(|(_, request)| request.ahead).map(|(id, _)| id.clone()).collect();
        for id in &ahead {
            self.fail(core, id, why.clone());
        }
        !ahead.is_empty()
    }

    /// What was pushed ahead is complete: whoever looks finds it, and it makes room for whatever needs it.
    pub(super) fn arrived_ahead(&mut self, core: &mut Core<R>, id: &RequestId, bytes: u64) {
        let Some(request) = self.requests.get(id) else { return };
        let (chunks, instance) = (request.keys.len(), request.instance.clone());
        self.drop_ready(core, id);
        core.note(IncomingNote::ArrivedAhead { request: id.clone(), instance, chunks, bytes });
    }

    /// A request is not written any more: it is committed, or has failed.
    pub(super) fn comes_no_more(&mut self, id: &RequestId) {
        if let Some(request) = self.requests.get(id).filter(|request| request.ahead) {
            self.coming.leave(written_keys(request));
        }
    }

    /// Checks that what is coming is what is granted.
    pub(super) fn check_coming(&self) -> Result<(), String> {
        let mut coming = Coming::default();
        self.requests.values().filter(|request| request.ahead).for_each(|request| coming.enter(written_keys(request)));
        if coming.0 != self.coming.0 {
            return Err(format!("{:?} are said to come, and {:?} do", self.coming, coming));
        }
        Ok(())
    }
}
