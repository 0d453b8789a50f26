//! Where a receiver's dialect decides: the messages of its port for allocations, the second step of the handshake, asking for
//! slots, the end of a request. A pd-receiver takes allocations at any time, and takes commits and quiesce acknowledgements; an
//! LMCache receiver knows none of these. This file is the boundary: what it asks of an LMCache receiver is in
//! [`lmcache`](super::lmcache).

use super::link::Link;
use super::requests::truncated;
use super::uid::Uid;
use super::{Outgoing, Port};
use crate::ids::{ChunkKey, ConnectionId, Failure, FailureKind, GrantId, PeerId, RequestId, Seq};
use crate::node::PeerMemory;
use crate::node::core::Core;
use crate::node::output::To;
use crate::wire::Message;
use crate::wire::message::{MemRegExtension, MemRegRequest, MemRegResponse};

impl<R: Clone> Outgoing<R> {
    fn link_of(&self, peer: PeerId) -> &Link {
        self.receivers.get(&peer).map_or(&Link::Pd, |record| &record.link)
    }

    /// Whether a receiver makes chunks readable with a commit, and not before.
    pub(super) fn takes_commits(&self, peer: PeerId) -> bool {
        matches!(self.link_of(peer), Link::Pd)
    }

    /// A message from a receiver at its port for allocations.
    pub(super) fn on_alloc_message(&mut self, core: &mut Core<R>, peer: PeerId, message: Message) {
        if let Link::Lmcache(_) = self.link_of(peer) {
            return self.on_lmcache_message(core, peer, message);
        }
        match message {
            Message::AllocResponse(response) => self.on_alloc_response(core, peer, response),
            Message::PdCommitAck(ack) => self.on_commit_ack(core, peer, ack),
            Message::PdVerifying(verifying) => self.on_verifying(core, peer, &verifying),
            Message::PdRevoke(revoke) => self.on_revoke(core, peer, revoke),
            Message::PdPong(pong) => self.on_pong(core, peer, pong),
            message => self.note_unexpected(core, peer, message.type_name()),
        }
    }

    /// The engine has loaded a receiver: asks where its memory is, and tells an LMCache receiver where ours is.
    pub(super) fn ask_memory(&mut self, core: &mut Core<R>, peer: PeerId, seq: Seq) {
        let request = match self.link_of(peer) {
            Link::Lmcache(receiver) => self.lmcache_registration(core, receiver),
            Link::Pd => {
                let instance = core.settings.hello.instance.clone();
                MemRegRequest {
                    remote_agent_name: core.settings.agent_name.clone().into_bytes(),
                    local_id: instance.clone(),
                    local_xfer_dlist_bytes: Vec::new(),
                    pd: Some(MemRegExtension { seq, instance }),
                }
            }
        };
        core.send(To::Peer(peer), Port::Init, Message::NixlMemRegRequest(request));
    }

    /// A receiver has said where its memory is.
    pub(super) fn on_memory_told(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        (seq, connection): (Seq, ConnectionId),
        response: MemRegResponse,
    ) {
        if let Link::Lmcache(_) = self.link_of(peer) {
            return match self.lmcache_pages(core, peer, &response) {
                Ok(pages) => self.warm(core, peer, connection, pages.len_bytes(), PeerMemory::Pages(pages)),
                Err(failure) => self.peer_failed(core, peer, failure),
            };
        }
        let Some(extension) = response.pd.filter(|extension| extension.seq == seq) else {
            return self.note_unexpected(core, peer, "NixlMemRegResponse to another question");
        };
        if let Some(refusal) = extension.refusal {
            let Failure { kind, text } = truncated(refusal);
            // Its handshake was a moment ago: it has forgotten us since, or was restarted, which says nothing against the pair.
            let kind = if kind == FailureKind::HandshakeRefused { FailureKind::PeerLost } else { kind };
            return self.peer_failed(core, peer, Failure::new(kind, text));
        }
        let memory = PeerMemory::Descriptors(extension.descriptors);
        self.warm(core, peer, connection, extension.len_bytes, memory);
    }

    /// A request wants slots of its receiver, which is connected.
    pub(super) fn ask_for_room(&mut self, core: &mut Core<R>, uid: Uid) {
        let Some(request) = self.requests.get(&uid) else { return };
        // Once that is there, nothing of it has to be written again.
        if self.comes_ahead(request) {
            return;
        }
        let peer = request.peer;
        match self.link_of(peer) {
            Link::Pd => {
                if !self.joins_line(core, uid) {
                    self.allocate(core, uid);
                }
            }
            Link::Lmcache(_) => self.queue_allocation(core, peer, uid),
        }
    }

    /// Chunks are in their places at a receiver.
    pub(super) fn chunks_written(&mut self, peer: PeerId, keys: &[ChunkKey]) {
        if let Link::Lmcache(_) = self.link_of(peer) {
            self.lmcache_written(peer, keys);
        }
    }

    /// Everything of a request is written.
    pub(super) fn all_written(&mut self, core: &mut Core<R>, peer: PeerId, uid: Uid) {
        match self.link_of(peer) {
            Link::Pd => self.commit(core, uid),
            // An LMCache receiver takes no commit.
            Link::Lmcache(_) => self.finish_sent(core, uid, true),
        }
    }

    /// A request has failed and transfers of it are in flight: decode need not wait for their end to learn of it. Sends a `CancelNotif`
    /// without `writer_stopped`, after which the receiver quarantines the slots.
    pub(super) fn tell_failed(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        id: RequestId,
        grant: Option<GrantId>,
        alloc_seq: Option<Seq>,
    ) {
        if self.receivers.contains_key(&peer) && self.link_of(peer).takes_quiesce_ack() {
            self.acknowledge_quiesce(core, peer, id, grant, alloc_seq, false);
        }
    }

    /// A request has failed and nothing writes for it any more.
    pub(super) fn give_back(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        (id, keys): (RequestId, Vec<ChunkKey>),
        grant: Option<GrantId>,
        alloc_seq: Option<Seq>,
    ) {
        if !self.receivers.contains_key(&peer) {
            return; // It is lost: the next handshake says it, see `note_owed_ack`.
        }
        match self.link_of(peer) {
            Link::Pd => self.acknowledge_quiesce(core, peer, id, grant, alloc_seq, true),
            // An allocation that was not answered yet is given back when it is.
            Link::Lmcache(_) if grant.is_some() => self.give_back_pages(core, peer, id, keys),
            Link::Lmcache(_) => {}
        }
    }
}
