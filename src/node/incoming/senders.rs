//! Handshakes with senders, and losing them.

use std::collections::BTreeSet;
use std::time::Instant;

use super::lmcache::NAME_PREFIX;
use super::{Incoming, IncomingNote, IncomingTimer, Port};
use crate::ids::{ChecksumMode, ConnectionId, Failure, FailureKind, RequestId, Seq, truncate};
use crate::node::Output;
use crate::node::core::Core;
use crate::node::heard::Heard;
use crate::node::output::Remote;
use crate::node::output::To;
use crate::node::seen::SeenSeqs;
use crate::node::{PROCESSES_ASKED_MAX, handshake};
use crate::wire::Message;
use crate::wire::message::{
    CAPABILITY_CHECKSUMS, CAPABILITY_HEARTBEAT, CAPABILITY_VERIFYING, Hello, InitExtension, InitReplyExtension,
    InitResponse, MemRegExtension, MemRegReplyExtension, MemRegResponse, Ping, Pong, ProcessIdentity,
};

/// A sender that is connected, or connecting.
#[derive(Debug)]
pub(super) struct Sender<R> {
    agent_name: String,
    process: Option<ProcessIdentity>,
    state: SenderProgress<R>,
    /// Where its allocations come from: the connection that tells us when it is gone.
    pub(super) alloc_route: Option<R>,
    /// Whether it pings.
    heartbeat: bool,
    /// Whether it can be told that a commit is still being checked.
    pub(super) waits_for_verifying: bool,
    /// Of its handshake: a message with a lower number was sent before it.
    init_seq: Seq,
    /// The highest number seen from it.
    last_seq: Seq,
    /// Its allocations, so that none counts twice.
    pub(super) allocs: SeenSeqs,
    /// When it was last heard of.
    heard: Heard,
    /// When it last wanted something.
    last_used: Instant,
}

#[derive(Debug)]
enum SenderProgress<R> {
    /// The engine reads its metadata; then it is answered.
    Loading { reply_to: R, seq: Seq },
    /// Both sides know each other.
    Connected(ConnectionId),
}

impl<R: Clone + PartialEq> Incoming<R> {
    pub(super) fn on_init(&mut self, core: &mut Core<R>, from: R, extension: InitExtension, metadata: Vec<u8>) {
        let instance = extension.hello.instance.clone();
        if core.draining {
            let failure = Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down; use another");
            return self.refuse_peer(core, from, extension.seq, truncate(&instance), failure);
        }
        let checked = handshake::check_metadata(&metadata);
        let checked = checked.and_then(|()| handshake::check(&core.settings.hello, &extension.hello)).and_then(|()| {
            let fits = handshake::name_fits(&extension.agent_name);
            let text = format!("an agent's name has more than {} bytes", handshake::NAME_LEN_BYTES_MAX);
            fits.then_some(()).ok_or_else(|| Failure::new(FailureKind::Limit, text))
        });
        let checked = checked.and_then(|()| self.check_checksums(core, &extension.hello)).and_then(|()| {
            let text = format!("names that begin with {NAME_PREFIX} are given to LMCache's senders here");
            let ours = !instance.starts_with(NAME_PREFIX);
            ours.then_some(()).ok_or_else(|| Failure::new(FailureKind::BadRequest, text))
        });
        if let Err(failure) = checked {
            return self.refuse_peer(core, from, extension.seq, truncate(&instance), failure);
        }
        if instance == core.settings.hello.instance {
            let text =
                "a daemon does not send to itself: the request's receiver is this very daemon; its engine has the KV";
            return self.refuse_peer(core, from, extension.seq, instance, Failure::new(FailureKind::BadRequest, text));
        }
        // The sender knows us under another address, and may be writing: nothing of it is freed, and it is told.
        if extension.connected.contains(&core.settings.hello.instance) {
            let text = format!(
                "{} is this receiver's second address for a sender that is connected to it; use one host name for it, and its own two ports",
                core.settings.hello.instance
            );
            return self.refuse_peer(core, from, extension.seq, instance, Failure::new(FailureKind::BadRequest, text));
        }
        let seq = extension.seq;
        if self.senders.get(&instance).is_some_and(|peer| peer.init_seq == seq) {
            return core.note(IncomingNote::Unexpected { from, port: Port::Init, message: "NixlInitRequest, twice" });
        }
        // A handshake says that nothing is in flight of what was granted before it was sent. One that arrives after
        // later words of the same sender is late, or comes from a second connection: it says nothing.
        let last_seq = self.senders.get(&instance).map(|peer| peer.last_seq).or_else(|| self.lost.last_seq(&instance));
        if last_seq.is_some_and(|last_seq| last_seq >= seq) {
            let text = "this handshake was overtaken by later messages of the same sender; try again";
            return self.refuse_peer(core, from, seq, instance, Failure::new(FailureKind::BadRequest, text));
        }
        if let Some(peer) = self.senders.get_mut(&instance)
            && matches!(peer.state, SenderProgress::Loading { .. })
        {
            // The sender has given the earlier handshake up. What the engine reads serves this one as well.
            peer.state = SenderProgress::Loading { reply_to: from, seq };
            (peer.init_seq, peer.last_seq, peer.heard) = (seq, seq, Heard::at(core.now));
            peer.allocs = SeenSeqs::above(seq);
            return self.free_closing_of(core, &instance, seq);
        }
        if self.senders.contains_key(&instance) {
            self.lose_peer(core, &instance, "connects again");
        }
        self.free_closing_of(core, &instance, seq);
        if self.senders.len() >= core.settings.peers_max && !self.evict_peer(core) {
            let text = format!(
                "{} peers are connected and busy or connecting, the limit; raise pd_max_peers or use another receiver",
                self.senders.len()
            );
            return self.refuse_peer(core, from, extension.seq, instance, Failure::new(FailureKind::Limit, text));
        }
        let can = |capability| extension.hello.capabilities.iter().any(|name| name == capability);
        let peer = Sender {
            agent_name: extension.agent_name.clone(),
            process: extension.hello.process,
            state: SenderProgress::Loading { reply_to: from, seq },
            alloc_route: None,
            heartbeat: can(CAPABILITY_HEARTBEAT),
            waits_for_verifying: can(CAPABILITY_VERIFYING),
            init_seq: seq,
            last_seq: seq,
            allocs: SeenSeqs::above(seq),
            heard: Heard::at(core.now),
            last_used: core.now,
        };
        self.senders.insert(instance.clone(), peer);
        core.outputs.push_back(Output::LoadPeer {
            remote: Remote::Sender(instance),
            agent_name: Some(extension.agent_name),
            metadata,
        });
    }

    pub(in crate::node) fn on_peer_loaded(
        &mut self,
        core: &mut Core<R>,
        instance: &str,
        result: Result<ConnectionId, Failure>,
    ) {
        if self.on_lmcache_loaded(core, instance, &result) {
            return;
        }
        let Some(peer) = self.senders.get_mut(instance) else {
            if let Ok(connection) = result {
                core.outputs.push_back(Output::ForgetPeer(connection));
            }
            return;
        };
        let SenderProgress::Loading { reply_to, seq } = &peer.state else {
            // Two handshakes ran into each other: the engine knows the peer by its latest connection.
            if let (SenderProgress::Connected(old), Ok(new)) = (&mut peer.state, result) {
                let old = std::mem::replace(old, new);
                core.outputs.push_back(Output::ForgetPeer(old));
            }
            return;
        };
        let (to, seq) = (reply_to.clone(), *seq);
        let connection = match result {
            Ok(connection) => connection,
            Err(failure) => {
                self.senders.remove(instance);
                return self.refuse_peer(core, to, seq, instance.to_owned(), failure);
            }
        };
        peer.state = SenderProgress::Connected(connection);
        peer.heard = Heard::at(core.now);
        if peer.heartbeat {
            core.timers.set(IncomingTimer::Silence(instance.to_owned()), core.now + core.settings.peer_timeout);
        }
        let response = InitResponse {
            remote_agent_name: peer.agent_name.clone().into_bytes(),
            remote_meta_bytes: core.settings.metadata.clone(),
            pd: Some(InitReplyExtension {
                seq,
                hello: core.settings.hello.clone(),
                agent_name: core.settings.agent_name.clone(),
                refusal: None,
            }),
        };
        if let Some(process) = peer.process.clone() {
            core.outputs.push_back(Output::WatchProcess { instance: instance.to_owned(), process });
        }
        core.send(To::Route(to), Port::Init, Message::NixlInitResponse(response));
        core.note(IncomingNote::PeerConnected { instance: instance.to_owned() });
    }

    pub(super) fn on_mem_reg(&mut self, core: &mut Core<R>, from: R, extension: &MemRegExtension) {
        let met = self.touch_peer(core.now, &extension.instance, extension.seq);
        let refusal = (!met).then(|| unknown_peer(&extension.instance));
        let response = MemRegResponse {
            remote_xfer_dlist_bytes: Vec::new(),
            pd: Some(MemRegReplyExtension {
                seq: extension.seq,
                descriptors: if met { core.settings.descriptors.clone() } else { Vec::new() },
                len_bytes: core.described_len_bytes,
                refusal,
            }),
        };
        core.send(To::Route(from), Port::Init, Message::NixlMemRegResponse(response));
    }

    /// Whether this peer has made its handshake, and did so before it sent message `seq`; notes that it was heard of.
    pub(super) fn touch_peer(&mut self, now: Instant, instance: &str, seq: Seq) -> bool {
        match self.senders.get_mut(instance) {
            Some(peer) if matches!(peer.state, SenderProgress::Connected(_)) && seq > peer.init_seq => {
                peer.heard = Heard::at(now);
                peer.last_seq = peer.last_seq.max(seq);
                true
            }
            _ => false,
        }
    }

    /// Notes where a peer's allocations come from, and that it wants something.
    pub(super) fn use_peer(&mut self, now: Instant, instance: &str, route: &R) {
        if let Some(peer) = self.senders.get_mut(instance) {
            peer.last_used = now;
            if peer.alloc_route.as_ref() != Some(route) {
                peer.alloc_route = Some(route.clone());
            }
        }
    }

    pub(super) fn on_ping(&mut self, core: &mut Core<R>, from: R, ping: Ping) {
        let known = self.touch_peer(core.now, &ping.instance, ping.seq);
        // So that the end of its connection is noticed before it has asked for anything.
        if let Some(peer) = self.senders.get_mut(&ping.instance).filter(|peer| known && peer.alloc_route.is_none()) {
            peer.alloc_route = Some(from.clone());
        }
        let refusal = self.check_addressee(core, &ping.instance, known, &ping.receiver).err();
        let have_ended = if refusal.is_none() { self.take_ended(core, &ping) } else { Vec::new() };
        core.send(To::Route(from), Port::Alloc, Message::PdPong(Pong { seq: ping.seq, refusal, have_ended }));
    }

    /// Refuses a message of a sender that is not connected here, or whose handshake was with another receiver: the ports that
    /// it was given may be those of two receivers, and what is granted here would be written there.
    pub(super) fn check_addressee(
        &self,
        core: &Core<R>,
        instance: &str,
        known: bool,
        receiver: &str,
    ) -> Result<(), Failure> {
        let own = &core.settings.hello.instance;
        let other = !receiver.is_empty() && receiver != own;
        if known && !other {
            return Ok(());
        }
        let mut failure = unknown_peer(instance);
        if other {
            let text = format!(
                "this port for allocations is that of {own}, and the sender's handshake was with {}; the two ports belong to \
                 two receivers: correct them in the request's receiver, or in pd_receivers",
                truncate(receiver)
            );
            // A sender that is not known here may have been connected to this receiver's predecessor, and connects again.
            failure = match known {
                true => Failure::new(FailureKind::BadRequest, text),
                false => Failure::new(failure.kind, format!("{}; {text}", failure.text)),
            };
        }
        Err(failure)
    }

    /// A peer says which processes on its host have ended. Returns those that it is asked about next.
    fn take_ended(&mut self, core: &mut Core<R>, ping: &Ping) -> Vec<ProcessIdentity> {
        let Some(witness) = self.senders.get(&ping.instance).and_then(|peer| peer.process.clone()) else {
            return Vec::new();
        };
        // What can be seen from here need not be asked.
        let seen_from_here =
            |process: &ProcessIdentity| core.settings.hello.process.as_ref().is_some_and(|own| own.sees(process));
        let mut asked = BTreeSet::new();
        let mut ended = BTreeSet::new();
        for closing in self.closing.values() {
            // One that is connected speaks for itself.
            let lost = self.lost.process(&closing.instance).filter(|_| !self.senders.contains_key(&closing.instance));
            match lost {
                Some(process) if !witness.sees(process) || seen_from_here(process) => {}
                Some(process) if ping.ended.contains(process) => drop(ended.insert(closing.instance.clone())),
                Some(process) if asked.len() < PROCESSES_ASKED_MAX => drop(asked.insert(process.clone())),
                _ => {}
            }
        }
        for instance in ended {
            self.process_ended(core, &instance);
        }
        asked.into_iter().collect()
    }

    /// The process behind `instance` has ended. What it had posted may arrive for a moment yet.
    pub(in crate::node) fn process_ended(&mut self, core: &mut Core<R>, instance: &str) {
        self.lose_peer(core, instance, "ended");
        let timer = IncomingTimer::Linger(instance.to_owned());
        if !core.timers.contains(timer.clone()) {
            core.timers.set(timer, core.now + self.settings.linger);
        }
    }

    /// Gives a peer up that has been silent for too long.
    pub(super) fn check_silence(&mut self, core: &mut Core<R>, due: Instant, instance: &str) {
        let (interval, timeout) = (core.settings.heartbeat_interval, core.settings.peer_timeout);
        let Some(peer) = self.senders.get_mut(instance) else { return };
        let silent = peer.heard.silence(core.now, due, interval);
        if silent < timeout {
            let at = peer.heard.silent_for(timeout);
            return core.timers.set(IncomingTimer::Silence(instance.to_owned()), at);
        }
        let reason = format!("said nothing for {} ms (pd_peer_timeout_sec)", silent.as_millis());
        self.lose_peer(core, instance, &reason);
    }

    /// Fails everything that a peer had begun, and forgets it.
    pub(super) fn lose_peer(&mut self, core: &mut Core<R>, instance: &str, reason: &str) {
        let Some(peer) = self.senders.remove(instance) else { return };
        core.timers.unset(IncomingTimer::Silence(instance.to_owned()));
        self.lost.remember(instance, peer.last_seq, peer.process);
        if let SenderProgress::Connected(connection) = peer.state {
            core.outputs.push_back(Output::ForgetPeer(connection));
        }
        core.note(IncomingNote::PeerLost { instance: instance.to_owned(), reason: reason.to_owned() });
        let unfinished: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, request)| request.instance == instance && !request.is_ready())
            .map(|(id, _)| id.clone())
            .collect();
        for id in unfinished {
            let text = format!("sender {instance} {reason} before it had committed {id}");
            self.fail(core, &id, Failure::new(FailureKind::PeerLost, text));
        }
        self.unwatch_unless_needed(core, instance);
        self.admit(core);
    }

    /// The end of a process matters as long as its peer is connected, or may still be writing.
    pub(super) fn unwatch_unless_needed(&mut self, core: &mut Core<R>, instance: &str) {
        let may_write = || self.closing.values().any(|closing| closing.instance == instance);
        if !self.senders.contains_key(instance) && !may_write() {
            core.outputs.push_back(Output::UnwatchProcess { instance: instance.to_owned() });
        }
    }

    /// Refuses a sender whose every commit would be refused.
    fn check_checksums(&self, core: &Core<R>, theirs: &Hello) -> Result<(), Failure> {
        let all_summed = theirs.capabilities.iter().any(|name| name == CAPABILITY_CHECKSUMS);
        if core.settings.checksum != ChecksumMode::Full || all_summed {
            return Ok(());
        }
        let text = format!(
            "pd_checksum is full at {} and not at {}; set it to full there, or to sampled or off here",
            core.settings.hello.instance, theirs.instance
        );
        Err(Failure::new(FailureKind::HandshakeRefused, text))
    }

    /// A handshake at another port than that for handshakes: the sender would wait for its answer in vain.
    pub(super) fn on_misdirected_init(&mut self, core: &mut Core<R>, port: Port, from: R, extension: InitExtension) {
        let failure = handshake::misdirected(port);
        self.refuse_peer_at(core, port, from, extension.seq, truncate(&extension.hello.instance), failure);
    }

    /// A ping at another port than that for allocations, to which the sender would send all its requests.
    pub(super) fn on_misdirected_ping(&mut self, core: &mut Core<R>, port: Port, from: R, ping: &Ping) {
        let text = format!(
            "this is the port for {}, not that for allocations (pd_peer_alloc_port); correct the ports in the request's \
             receiver, or in pd_receivers",
            port.purpose()
        );
        let refusal = Some(Failure::new(FailureKind::BadRequest, text));
        core.send(To::Route(from), port, Message::PdPong(Pong { seq: ping.seq, refusal, have_ended: Vec::new() }));
    }

    fn refuse_peer(&mut self, core: &mut Core<R>, to: R, seq: Seq, instance: String, failure: Failure) {
        self.refuse_peer_at(core, Port::Init, to, seq, instance, failure);
    }

    fn refuse_peer_at(&mut self, core: &mut Core<R>, port: Port, to: R, seq: Seq, instance: String, failure: Failure) {
        core.send(To::Route(to), port, handshake::refused(&core.settings.hello, seq, failure.clone()));
        core.note(IncomingNote::PeerRefused { instance, failure });
    }

    /// Forgets the peer that has wanted nothing for longest, of those with nothing under way.
    fn evict_peer(&mut self, core: &mut Core<R>) -> bool {
        let busy = |instance: &str| {
            self.requests.values().any(|request| request.instance == instance)
                || self.closing.values().any(|closing| closing.instance == instance)
        };
        let idle = self
            .senders
            .iter()
            .filter(|(instance, peer)| matches!(peer.state, SenderProgress::Connected(_)) && !busy(instance.as_str()));
        let Some(oldest) = idle.min_by_key(|(_, peer)| peer.last_used).map(|(instance, _)| instance.clone()) else {
            return false;
        };
        if let Some(Sender { state: SenderProgress::Connected(connection), last_seq, process, .. }) =
            self.senders.remove(&oldest)
        {
            core.timers.unset(IncomingTimer::Silence(oldest.clone()));
            self.lost.remember(&oldest, last_seq, process);
            core.outputs.push_back(Output::ForgetPeer(connection));
        }
        self.unwatch_unless_needed(core, &oldest);
        core.note(IncomingNote::PeerEvicted { instance: oldest, peers_max: core.settings.peers_max });
        true
    }
}

/// The refusal that makes a sender connect again.
pub(super) fn unknown_peer(instance: &str) -> Failure {
    Failure::new(
        FailureKind::HandshakeRefused,
        format!(
            "{} is not connected to this receiver, or the receiver was restarted since; connect again",
            truncate(instance)
        ),
    )
}
