//! LMCache's senders in a build without the feature `lmcache`: they are refused at their handshake.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::marker::PhantomData;

use super::{Incoming, IncomingNote, Port};
use crate::ids::{ChunkKey, ConnectionId, Failure, FailureKind, GrantId, RequestId, SlotIndex};
use crate::node::core::Core;
use crate::node::output::To;
use crate::wire::Message;
use crate::wire::message::InitResponse;

/// Reserved in every build: see the module that has them.
pub(super) const NAME_PREFIX: &str = "lmcache-";

/// There are none.
#[derive(Debug)]
pub(super) struct Senders<R>(PhantomData<R>);

/// There are none.
#[derive(Debug)]
pub(super) struct Batches(Infallible);

impl<R> Default for Senders<R> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<R> Senders<R> {
    pub(super) const fn len(&self) -> usize {
        0
    }

    pub(super) const fn is_connected(&self, _instance: &str) -> bool {
        false
    }

    pub(super) const fn forget_granted(&self, _keys: &[ChunkKey], _id: &RequestId) {}
}

impl Batches {
    pub(super) const fn is_complete(&self) -> bool {
        match self.0 {}
    }

    pub(super) const fn spare_slots(&self) -> &[SlotIndex] {
        match self.0 {}
    }
}

impl<R: Clone + PartialEq> Incoming<R> {
    pub(super) fn on_lmcache_message(&mut self, core: &mut Core<R>, port: Port, from: R, message: Message) {
        if !matches!((port, &message), (Port::Init, Message::NixlInitRequest(_))) {
            return self.refuse_misdirected(core, port, from, &message);
        }
        let text =
            "it has no `pd` field, as LMCache's have none, and this build has no LMCache (cargo feature `lmcache`)";
        let failure = Failure::new(FailureKind::HandshakeRefused, text);
        core.note(IncomingNote::PeerRefused { instance: "an LMCache sender".into(), failure });
        let refusal = InitResponse { remote_agent_name: Vec::new(), remote_meta_bytes: Vec::new(), pd: None };
        core.send(To::Route(from), Port::Init, Message::NixlInitResponse(refusal));
    }

    pub(super) const fn on_lmcache_route_gone(&self, _: &Core<R>, _route: &R) -> bool {
        false
    }

    pub(super) const fn on_lmcache_loaded(&self, _: &Core<R>, _: &str, _: &Result<ConnectionId, Failure>) -> bool {
        false
    }

    pub(super) const fn reserve_pages(
        &self,
        _: &Core<R>,
        _: &RequestId,
        _: GrantId,
        _: &[u32],
        _: &BTreeSet<SlotIndex>,
    ) -> Option<Vec<SlotIndex>> {
        None
    }

    pub(super) fn answer_pages(&self, _: &Core<R>, _: &RequestId, _: &[(u32, SlotIndex)], _: Vec<u32>) {}

    pub(super) fn refuse_pages(&self, _: &Core<R>, _: R, _: usize, _: &str, _: Option<RequestId>, _: Failure) {}

    pub(super) const fn nobody_fetched(&self, _: &Core<R>, _: &RequestId) {}

    pub(super) const fn waits_for_a_reader(&self, _: &Core<R>, _: &RequestId) -> bool {
        false
    }

    pub(super) const fn take_uncommitted(&self, _: &Core<R>, _: &[ChunkKey]) {}

    pub(super) const fn uncommitted_among(&self, _: &Core<R>, _: &[ChunkKey]) -> Vec<u32> {
        Vec::new()
    }

    pub(super) const fn can_be_taken_uncommitted(&self, _: &RequestId) -> bool {
        false
    }
}
