//! LMCache's receivers in a build without the feature `lmcache`: they are refused at their handshake.

use self::receiver::LmcacheReceiver;
use super::Outgoing;
use super::receivers::Receiver;
use super::uid::Uid;
use crate::ids::{ChunkKey, Failure, FailureKind, Pages, PeerId, RequestId};
use crate::node::core::Core;
use crate::wire::Message;
use crate::wire::message::{InitResponse, MemRegRequest, MemRegResponse};

pub(super) mod receiver {
    use std::convert::Infallible;

    /// There are none.
    #[derive(Debug)]
    pub(in crate::node::outgoing) struct LmcacheReceiver(pub(super) Infallible);

    impl LmcacheReceiver {
        pub(in crate::node::outgoing) const fn is_busy(&self) -> bool {
            match self.0 {}
        }
    }
}

/// There are none.
#[derive(Debug, Default)]
pub(super) struct RememberedReceivers(());

impl<R: Clone> Outgoing<R> {
    pub(super) fn on_lmcache_init_response(&mut self, core: &mut Core<R>, peer: PeerId, _: InitResponse) {
        let text = "it answers without a `pd` field, as LMCache does, and this build has no LMCache (cargo feature \
                    `lmcache`); start pd-receiver there";
        self.peer_failed(core, peer, Failure::new(FailureKind::HandshakeRefused, text));
    }

    pub(super) fn on_lmcache_message(&self, _: &Core<R>, _: PeerId, _: Message) {}

    pub(super) fn lmcache_registration(&self, _: &Core<R>, receiver: &LmcacheReceiver) -> MemRegRequest {
        match receiver.0 {}
    }

    pub(super) fn lmcache_pages(&self, _: &Core<R>, _: PeerId, _: &MemRegResponse) -> Result<Pages, Failure> {
        Err(Failure::new(FailureKind::Internal, "an LMCache receiver in a build without LMCache"))
    }

    pub(super) fn queue_allocation(&self, _: &Core<R>, _: PeerId, _: Uid) {}

    pub(super) fn lmcache_allocation_timed_out(&self, _: &Core<R>, _: Uid) -> Option<Failure> {
        None
    }

    pub(super) fn give_back_pages(&self, _: &Core<R>, _: PeerId, _: RequestId, _: Vec<ChunkKey>) {}

    pub(super) fn lmcache_written(&self, _: PeerId, _: &[ChunkKey]) {}

    pub(super) fn answer_timed_out(&self, _: &Core<R>, _: PeerId) {}

    pub(super) fn end_lmcache(&self, _: &Core<R>, _: PeerId) {}

    pub(super) fn remember_lmcache(&self, _: &Core<R>, _: Receiver) {}
}
