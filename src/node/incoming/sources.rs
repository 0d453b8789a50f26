//! Senders that this half has connected to, to ask for what they have parked.

use super::Incoming;
use super::fetches::Fetch;
use crate::ids::{Failure, FailureKind, PeerId, RequestId, SourceAddress};
use crate::node::Output;
use crate::node::core::Core;
use crate::node::heard::Heard;
use crate::wire::Message;

/// A sender's rendezvous port.
#[derive(Debug)]
pub(super) struct Source {
    address: SourceAddress,
    /// Whether it is connected.
    open: bool,
    /// When it was last heard of, or first asked after a pause.
    heard: Heard,
}

impl<R: Clone + PartialEq> Incoming<R> {
    pub(in crate::node) fn has_source(&self, peer: PeerId) -> bool {
        self.sources.contains_key(&peer)
    }

    pub(super) fn sources_open(&self) -> usize {
        self.sources.values().filter(|source| source.open).count()
    }

    /// Whether it is known and connected.
    pub(super) fn is_source_open(&self, peer: PeerId) -> bool {
        self.sources.get(&peer).is_some_and(|source| source.open)
    }

    /// The source at `address`, as it is or begun now.
    pub(super) fn source_for(&mut self, core: &mut Core<R>, address: &SourceAddress) -> Result<PeerId, Failure> {
        let known = self.sources.iter().find(|(_, source)| source.address == *address).map(|(&peer, _)| peer);
        if let Some(peer) = known {
            let is_asked = self.fetches.values().any(|fetch| fetch.source == peer);
            match self.sources.get_mut(&peer) {
                Some(source) if source.open || is_asked => {
                    if !is_asked {
                        source.heard = Heard::at(core.now);
                    }
                    return Ok(peer);
                }
                // It was asked for by something that is over, and never answered: that try is as likely to hang again.
                _ => self.disconnect_source(core, peer),
            }
        }
        if self.sources.len() >= core.settings.peers_max && !self.evict_source(core) {
            let text = format!("{} senders are being asked, the limit; raise pd_max_peers", self.sources.len());
            return Err(Failure::new(FailureKind::Limit, text));
        }
        let peer = PeerId(core.fresh());
        self.sources.insert(peer, Source { address: address.clone(), open: false, heard: Heard::at(core.now) });
        core.outputs.push_back(Output::OpenSource { peer, address: address.clone() });
        Ok(peer)
    }

    /// Disconnects one that nothing is asked of.
    fn evict_source(&mut self, core: &mut Core<R>) -> bool {
        let idle = self.sources.keys().find(|peer| !self.fetches.values().any(|fetch| fetch.source == **peer));
        let Some(&peer) = idle else { return false };
        self.disconnect_source(core, peer);
        true
    }

    fn disconnect_source(&mut self, core: &mut Core<R>, peer: PeerId) {
        self.sources.remove(&peer);
        core.outputs.push_back(Output::ClosePeer(peer));
    }

    /// A source is connected: it is asked what there is to ask.
    pub(in crate::node) fn handle_source_opened(&mut self, core: &mut Core<R>, peer: PeerId) {
        let Some(source) = self.sources.get_mut(&peer) else { return };
        (source.open, source.heard) = (true, Heard::at(core.now));
        for id in self.asked_of(peer) {
            self.ask_source(core, &id);
        }
    }

    /// A message arrived from a source.
    pub(in crate::node) fn handle_source_message(&mut self, core: &mut Core<R>, peer: PeerId, message: Message) {
        let Some(source) = self.sources.get_mut(&peer) else { return };
        source.heard = Heard::at(core.now);
        if let Message::PdRegistered(registered) = message {
            self.on_registered(core, peer, registered);
        }
    }

    /// The connection to a source is gone, or could not be made.
    pub(in crate::node) fn handle_source_closed(&mut self, core: &mut Core<R>, peer: PeerId, failure: &Failure) {
        let asked = self.asked_of(peer);
        let Some(source) = self.sources.remove(&peer) else { return };
        for id in asked {
            if self.fetches.get(&id).is_some_and(Fetch::may_be_asked_anew)
                && let Ok(another) = self.source_for(core, &source.address)
            {
                self.ask_anew(core, &id, another);
                continue;
            }
            let failure = Failure::new(failure.kind, format!("{}: {}", source.address, failure.text));
            self.fetch_failed(core, &id, failure, &source.address.to_string());
        }
    }

    /// Gives a source up that has said nothing for too long.
    pub(super) fn source_is_silent(&mut self, core: &mut Core<R>, peer: PeerId) -> bool {
        let (interval, timeout) = (core.settings.heartbeat_interval, core.settings.peer_timeout);
        let Some(source) = self.sources.get_mut(&peer) else { return true };
        let silent = source.heard.silence(core.now, core.now, interval);
        if silent < timeout {
            return false;
        }
        let kind = if source.open { FailureKind::PeerLost } else { FailureKind::PeerUnreachable };
        let text = format!("it said nothing for {} ms (pd_peer_timeout_sec)", silent.as_millis());
        self.handle_source_closed(core, peer, &Failure::new(kind, text));
        core.outputs.push_back(Output::ClosePeer(peer));
        true
    }

    fn asked_of(&self, peer: PeerId) -> Vec<RequestId> {
        self.fetches.iter().filter(|(_, fetch)| fetch.source == peer).map(|(id, _)| id.clone()).collect()
    }
}
