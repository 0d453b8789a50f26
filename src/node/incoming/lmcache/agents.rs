//! Their handshakes: metadata for metadata, pages for pages.

use super::super::{Incoming, IncomingNote, Port};
use super::{AgentState, LmcacheAgent, NAME_PREFIX};
use crate::ids::{ChecksumMode, ConnectionId, Failure, FailureKind, Pages, truncate};
use crate::node::Output;
use crate::node::core::Core;
use crate::node::handshake;
use crate::node::output::Remote;
use crate::node::output::To;
use crate::wire::message::{InitResponse, MemRegRequest, MemRegResponse};
use crate::wire::{Message, descriptor_list};

impl<R: Clone + PartialEq> Incoming<R> {
    /// `NixlInitRequest` without our part.
    pub(super) fn on_lmcache_init(&mut self, core: &mut Core<R>, from: R, metadata: Vec<u8>) {
        let checked = handshake::check_metadata(&metadata).and_then(|()| self.check_lmcache_served(core));
        if let Err(failure) = checked.and_then(|()| self.make_room_for_agent(core)) {
            core.note(IncomingNote::PeerRefused { instance: "an LMCache sender".into(), failure });
            let refusal = InitResponse { remote_agent_name: Vec::new(), remote_meta_bytes: Vec::new(), pd: None };
            return core.send(To::Route(from), Port::Init, Message::NixlInitResponse(refusal));
        }
        let number = self.lmcache.fresh();
        let instance = format!("{NAME_PREFIX}agent-{number}");
        let agent = LmcacheAgent { number, state: AgentState::Loading { reply_to: from } };
        self.lmcache.agents.insert(instance.clone(), agent);
        core.outputs.push_back(Output::LoadPeer { remote: Remote::Sender(instance), agent_name: None, metadata });
    }

    /// Whether LMCache senders can be served at all.
    pub(super) fn check_lmcache_served(&self, core: &Core<R>) -> Result<(), Failure> {
        let refuse = |text: &str| Err(Failure::new(FailureKind::HandshakeRefused, text));
        if core.settings.checksum == ChecksumMode::Full {
            return refuse("pd_checksum is full here, and LMCache's senders sum nothing; set it to sampled or off");
        }
        if core.settings.pages.is_none() {
            return refuse("LMCache's senders write through NIXL alone; set transfer_channel: nixl");
        }
        if let Some(why) = core.settings.chunk.beyond_lmcache() {
            return refuse(&format!("{why}; use pd-sender"));
        }
        if core.draining {
            return Err(Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down; use another"));
        }
        Ok(())
    }

    /// Forgets the one whose handshake came first, where there are as many as may be. Those that the engine is reading cannot be
    /// forgotten.
    fn make_room_for_agent(&mut self, core: &mut Core<R>) -> Result<(), Failure> {
        let count = self.lmcache.agents.len();
        if count < core.settings.peers_max {
            return Ok(());
        }
        let met = |agent: &LmcacheAgent<R>| match agent.state {
            AgentState::Loading { .. } => None,
            AgentState::Connected(connection) | AgentState::Told(connection) => Some(connection),
        };
        let agents = self.lmcache.agents.iter();
        let oldest = agents.filter_map(|(name, agent)| Some((agent.number, name.clone(), met(agent)?))).min();
        let Some((_, instance, connection)) = oldest else {
            let text = format!("{count} senders are in their handshake, the limit; raise pd_max_peers, or try again");
            return Err(Failure::new(FailureKind::Limit, text));
        };
        self.lmcache.agents.remove(&instance);
        core.outputs.push_back(Output::ForgetPeer(connection));
        core.note(IncomingNote::PeerEvicted { instance, peers_max: core.settings.peers_max });
        Ok(())
    }

    /// The engine has met an LMCache sender, or could not. False: this is none.
    pub(in crate::node::incoming) fn on_lmcache_loaded(
        &mut self,
        core: &mut Core<R>,
        instance: &str,
        result: &Result<ConnectionId, Failure>,
    ) -> bool {
        let Some(agent) = self.lmcache.agents.get_mut(instance) else { return false };
        let AgentState::Loading { reply_to } = &agent.state else { return false };
        let to = reply_to.clone();
        let response = match result {
            Ok(connection) => {
                agent.state = AgentState::Connected(*connection);
                core.note(IncomingNote::PeerConnected { instance: instance.to_owned() });
                // It names itself by this in its next message.
                let remote_agent_name = instance.as_bytes().to_vec();
                InitResponse { remote_agent_name, remote_meta_bytes: core.settings.metadata.clone(), pd: None }
            }
            Err(failure) => {
                self.lmcache.agents.remove(instance);
                core.note(IncomingNote::PeerRefused { instance: instance.to_owned(), failure: failure.clone() });
                InitResponse { remote_agent_name: Vec::new(), remote_meta_bytes: Vec::new(), pd: None }
            }
        };
        core.send(To::Route(to), Port::Init, Message::NixlInitResponse(response));
        true
    }

    /// `NixlMemRegRequest` without our part: its pages for ours.
    pub(super) fn on_lmcache_mem_reg(&mut self, core: &mut Core<R>, from: R, request: &MemRegRequest) {
        let instance = truncate(&String::from_utf8_lossy(&request.remote_agent_name));
        let remote_xfer_dlist_bytes = match self.pages_for(core, &instance, &request.local_xfer_dlist_bytes) {
            Ok(list) => list,
            Err(failure) => {
                core.note(IncomingNote::PeerRefused { instance, failure });
                // Its binding cannot load this, which is an error at its side and nothing else.
                Vec::new()
            }
        };
        let response = MemRegResponse { remote_xfer_dlist_bytes, pd: None };
        core.send(To::Route(from), Port::Init, Message::NixlMemRegResponse(response));
    }

    fn pages_for(&mut self, core: &mut Core<R>, instance: &str, list: &[u8]) -> Result<Vec<u8>, Failure> {
        let refuse = |kind: FailureKind, text: String| Err(Failure::new(kind, text));
        self.check_lmcache_served(core)?;
        // Once for each handshake: the answer is a thousand times as long as the question may be.
        let connection = match self.lmcache.agents.get(instance).map(|agent| &agent.state) {
            Some(AgentState::Connected(connection)) => Some(*connection),
            _ => None,
        };
        let (Some(pages), Some(connection)) = (core.settings.pages, connection) else {
            let text = "it has made no handshake, or was told before where the pages are; restart that sender";
            return refuse(FailureKind::HandshakeRefused, text.into());
        };
        let (module, theirs) = match descriptor_list::decode(list) {
            Ok(decoded) => decoded,
            Err(error) => return refuse(FailureKind::BadRequest, error.to_string()),
        };
        if theirs.page_bytes != pages.page_bytes {
            let text = format!(
                "its chunks have {} bytes and this receiver's {}; start both sides for the same model, dtype, chunk_size \
                 and tensor-parallel size",
                theirs.page_bytes, pages.page_bytes
            );
            return refuse(FailureKind::LayoutMismatch, text);
        }
        if let Some(agent) = self.lmcache.agents.get_mut(instance) {
            agent.state = AgentState::Told(connection);
        }
        let count = core.described_len_bytes / pages.page_bytes;
        let known_len_bytes = count * pages.page_bytes;
        self.lmcache.known_len_bytes =
            Some(self.lmcache.known_len_bytes.map_or(known_len_bytes, |known| known.min(known_len_bytes)));
        Ok(descriptor_list::encode(&module, &Pages { count, ..pages }))
    }
}
