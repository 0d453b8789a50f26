//! Senders that this half has connected to, to ask for what they have parked.

use std::time::Instant;

use super::Incoming;
use super::fetches::Fetch;
use crate::ids::{Failure, FailureKind, PeerId, RequestId, SourceAddress};
use crate::node::Output;
use crate::node::core::Core;
use crate::node::heard::Heard;
use crate::node::latest::Latest;
use crate::node::tries::Tries;
use crate::wire::Message;

/// A sender's rendezvous port.
#[derive(Debug)]
pub(super) struct Source {
    address: SourceAddress,
    /// Whether it is connected.
    open: bool,
    /// Whether it has ever said anything.
    answered: bool,
    /// When it was last heard of, or first asked after a pause.
    heard: Heard,
    /// Since when it has been asked and has said nothing.
    unanswered: Option<Instant>,
}

/// How many addresses are remembered that could not be connected.
const UNREACHABLE_MAX: usize = 4096;

/// Where no sender has answered lately. Any client of the decode server can name such an address, as often as it likes.
#[derive(Debug)]
pub(super) struct Unreachable(Latest<SourceAddress, Unanswered>);

/// What came of the tries of one of them.
#[derive(Debug)]
struct Unanswered {
    tries: Tries,
    failure: Failure,
    at: Instant,
    /// Not tried again before that.
    until: Instant,
}

impl Default for Unreachable {
    fn default() -> Self {
        Self(Latest::new(UNREACHABLE_MAX))
    }
}

impl Unreachable {
    fn check(&self, now: Instant, address: &SourceAddress) -> Result<(), Failure> {
        let Some(Unanswered { failure, at, until, .. }) =
            self.0.get(address).filter(|unanswered| now < unanswered.until)
        else {
            return Ok(());
        };
        let text = format!(
            "{} ({} ms ago; not tried again for {} ms)",
            failure.text,
            now.saturating_duration_since(*at).as_millis(),
            until.saturating_duration_since(now).as_millis()
        );
        Err(Failure::new(failure.kind, text))
    }

    fn note(&mut self, now: Instant, address: SourceAddress, failure: Failure) {
        let mut tries = self.0.get(&address).map(|unanswered| unanswered.tries).unwrap_or_default();
        let until = now + tries.fail(failure.kind);
        self.0.insert(address, Unanswered { tries, failure, at: now, until });
    }
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
            let interval = core.settings.heartbeat_interval;
            let hangs = |source: &Source| {
                source.unanswered.is_some_and(|since| core.now.saturating_duration_since(since) >= interval)
            };
            match self.sources.get_mut(&peer) {
                Some(_) if is_asked => return Ok(peer),
                Some(source) if source.open && !hangs(source) => {
                    source.heard = Heard::at(core.now);
                    return Ok(peer);
                }
                // What asked for it is over, and was not answered: this connection is as likely to hang again.
                _ => self.disconnect_source(core, peer),
            }
        }
        self.unreachable.check(core.now, address)?;
        if self.sources.len() >= core.settings.peers_max && !self.evict_source(core) {
            let text = format!("{} senders are being asked, the limit; raise pd_max_peers", self.sources.len());
            return Err(Failure::new(FailureKind::Limit, text));
        }
        let peer = PeerId(core.fresh());
        let source = Source {
            address: address.clone(),
            open: false,
            answered: false,
            heard: Heard::at(core.now),
            unanswered: None,
        };
        self.sources.insert(peer, source);
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
        (source.heard, source.unanswered) = (Heard::at(core.now), None);
        if !std::mem::replace(&mut source.answered, true) {
            self.unreachable.0.remove(&source.address);
        }
        if let Message::PdRegistered(registered) = message {
            self.on_registered(core, peer, registered);
        }
    }

    /// The connection to a source is gone, or could not be made.
    pub(in crate::node) fn handle_source_closed(&mut self, core: &mut Core<R>, peer: PeerId, failure: &Failure) {
        let asked = self.asked_of(peer);
        let Some(source) = self.sources.remove(&peer) else { return };
        let failure = Failure::new(failure.kind, format!("{}: {}", source.address, failure.text));
        if !source.answered {
            self.unreachable.note(core.now, source.address.clone(), failure.clone());
        }
        for id in asked {
            if self.fetches.get(&id).is_some_and(Fetch::may_be_asked_anew)
                && let Ok(another) = self.source_for(core, &source.address)
            {
                self.ask_anew(core, &id, another);
                continue;
            }
            self.fetch_failed(core, &id, failure.clone(), &source.address.to_string());
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
        let why = match source.open && !source.answered {
            true => ": something listens there, and it is not a sender's rendezvous port, or the sender hangs",
            false => "",
        };
        let text = format!("it said nothing for {} ms (pd_peer_timeout_sec){why}", silent.as_millis());
        self.handle_source_closed(core, peer, &Failure::new(kind, text));
        core.outputs.push_back(Output::ClosePeer(peer));
        true
    }

    /// Something is asked of a source.
    pub(super) fn source_is_asked(&mut self, now: Instant, peer: PeerId) {
        if let Some(source) = self.sources.get_mut(&peer) {
            source.unanswered.get_or_insert(now);
        }
    }

    fn asked_of(&self, peer: PeerId) -> Vec<RequestId> {
        self.fetches.iter().filter(|(_, fetch)| fetch.source == peer).map(|(id, _)| id.clone()).collect()
    }
}
