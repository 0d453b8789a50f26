//! Handshakes with receivers, and losing them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::link::{LMCACHE_INSTANCE, Link};
use super::requests::{OutgoingStage, truncated};
use super::uid::Uid;
use super::{Outgoing, OutgoingNote, OutgoingTimer, Port};
use crate::ids::{ConnectionId, Failure, FailureKind, PeerId, ReceiverAddress, Seq, SourceAddress, truncate};
use crate::node::Output;
use crate::node::PeerMemory;
use crate::node::core::Core;
use crate::node::heard::Heard;
use crate::node::output::Remote;
use crate::node::output::To;
use crate::node::{PROCESSES_ASKED_MAX, handshake};
use crate::wire::message::{
    CAPABILITY_AHEAD, CAPABILITY_HEARTBEAT, InitExtension, InitRequest, InitResponse, MemRegResponse, MemoryUpdate,
    Ping, Pong, ProcessIdentity,
};
use crate::wire::{LmcacheMode, Message};

/// A receiver, from the first request to it until it is lost.
#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) address: ReceiverAddress,
    state: ReceiverProgress,
    since: Instant,
    /// Its name for itself, once it has said.
    pub(super) instance: String,
    /// Where it may be asked for what it has parked itself, if it has said so.
    pub(super) rendezvous: Option<SourceAddress>,
    /// How much of its buffer the engine knows, in bytes.
    pub(super) len_bytes: u64,
    last_used: Instant,
    pub(super) link: Link,
    /// The mode of LMCache, if LMCache runs there.
    pub(super) lmcache_mode: LmcacheMode,
    /// Whether it answers pings.
    heartbeat: bool,
    /// Whether it takes chunks that it has not asked for.
    pub(super) takes_ahead: bool,
    /// When anything was last heard of it.
    heard: Heard,
}

#[derive(Debug)]
enum ReceiverProgress {
    /// Transfers to a lost peer at the same address have not ended yet. A handshake tells a receiver that nothing of the old
    /// connection is in flight, so the handshake has to wait for their end.
    AwaitingOldWrites,
    /// The sockets are being connected.
    Connecting,
    /// Asked who it is.
    Introducing(Seq),
    /// The engine reads its metadata.
    Loading,
    /// Asked where its memory is.
    Registering(Seq, ConnectionId),
    /// The engine connects; the handshake took so long.
    Warming(ConnectionId, Duration),
    /// It can be written to.
    Up(ConnectionId),
}

impl Receiver {
    pub(super) fn connection(&self) -> Option<ConnectionId> {
        match self.state {
            ReceiverProgress::Up(connection) => Some(connection),
            _ => None,
        }
    }

    /// What the engine has of it, connected or not yet.
    fn held(&self) -> Option<ConnectionId> {
        match self.state {
            ReceiverProgress::Registering(_, connection)
            | ReceiverProgress::Warming(connection, _)
            | ReceiverProgress::Up(connection) => Some(connection),
            _ => None,
        }
    }

    /// Its name for itself, or what stands for one.
    pub(super) fn name(&self) -> String {
        if self.link.lmcache().is_some() { LMCACHE_INSTANCE.to_owned() } else { self.instance.clone() }
    }
}

impl<R: Clone> Outgoing<R> {
    /// The peer at `address`, as it is or begun now.
    pub(super) fn peer_for(&mut self, core: &mut Core<R>, address: &ReceiverAddress) -> Result<PeerId, Failure> {
        if let Some(&peer) = self.receiver_by_address.get(address) {
            if let Some(record) = self.receivers.get_mut(&peer) {
                record.last_used = core.now;
            }
            return Ok(peer);
        }
        if self.receivers.len() >= core.settings.peers_max && !self.evict_peer(core, true) {
            let text =
                format!("{} receivers are connected and busy, the limit; raise pd_max_peers", self.receivers.len());
            return Err(Failure::new(FailureKind::Limit, text));
        }
        let peer = PeerId(core.fresh());
        let record = Receiver {
            address: address.clone(),
            state: ReceiverProgress::AwaitingOldWrites,
            since: core.now,
            instance: String::new(),
            rendezvous: None,
            len_bytes: 0,
            last_used: core.now,
            link: Link::Pd,
            lmcache_mode: LmcacheMode::Sync,
            heartbeat: false,
            takes_ahead: false,
            heard: Heard::at(core.now),
        };
        self.receivers.insert(peer, record);
        self.receiver_by_address.insert(address.clone(), peer);
        core.timers.set(OutgoingTimer::Handshake(peer), core.now + self.settings.handshake_timeout);
        self.connect_when_drained(core, peer);
        Ok(peer)
    }

    /// Starts connecting once nothing is in flight to an earlier peer at the same address.
    fn connect_when_drained(&mut self, core: &mut Core<R>, peer: PeerId) {
        let Some(record) = self.receivers.get_mut(&peer) else { return };
        if !matches!(record.state, ReceiverProgress::AwaitingOldWrites)
            || self
                .transfers
                .values()
                .any(|transfer| transfer.peer != peer && transfer.address.as_ref() == Some(&record.address))
        {
            return;
        }
        record.state = ReceiverProgress::Connecting;
        let address = record.address.clone();
        core.outputs.push_back(Output::OpenPeer { peer, address });
    }

    /// A transfer to `address` has ended: a peer that waits for it may connect.
    pub(super) fn drained_at(&mut self, core: &mut Core<R>, address: &ReceiverAddress) {
        if let Some(&peer) = self.receiver_by_address.get(address) {
            self.connect_when_drained(core, peer);
        }
    }

    /// The sockets to a receiver are connected. If it turns out to be LMCache's, it runs in this mode.
    pub(in crate::node) fn handle_peer_opened(&mut self, core: &mut Core<R>, peer: PeerId, lmcache_mode: LmcacheMode) {
        let seq = Seq(core.fresh());
        let Some(record) = self.receivers.get_mut(&peer) else { return };
        if !matches!(record.state, ReceiverProgress::Connecting) {
            return;
        }
        record.state = ReceiverProgress::Introducing(seq);
        record.lmcache_mode = lmcache_mode;
        let connected = self.connected_instances();
        if connected.len() > handshake::CONNECTED_MAX {
            let text = format!(
                "{} receivers are connected or still written to, more than the {} that a handshake can name; try again when \
                 transfers to lost receivers have ended",
                connected.len(),
                handshake::CONNECTED_MAX
            );
            return self.peer_failed(core, peer, Failure::new(FailureKind::Limit, text));
        }
        let request = InitRequest {
            local_meta_bytes: core.settings.metadata.clone(),
            pd: Some(InitExtension {
                seq,
                hello: core.settings.hello.clone(),
                agent_name: core.settings.agent_name.clone(),
                connected,
            }),
        };
        core.send(To::Peer(peer), Port::Init, Message::NixlInitRequest(request));
    }

    /// Receivers that we are connected to, or still write to.
    fn connected_instances(&self) -> Vec<String> {
        let held = self.receivers.values().filter(|record| !record.instance.is_empty()).map(|record| &record.instance);
        let written = self.transfers.values().map(|transfer| &transfer.instance).filter(|name| !name.is_empty());
        let instances: BTreeSet<&String> = held.chain(written).collect();
        instances.into_iter().cloned().collect()
    }

    pub(super) fn on_init_response(&mut self, core: &mut Core<R>, peer: PeerId, response: InitResponse) {
        let Some(record) = self.receivers.get_mut(&peer) else { return };
        let ReceiverProgress::Introducing(seq) = record.state else {
            return self.note_unexpected(core, peer, "NixlInitResponse");
        };
        // No receiver of ours leaves `pd` out.
        let Some(extension) = response.pd else { return self.on_lmcache_init_response(core, peer, response) };
        if extension.seq != seq {
            return self.note_unexpected(core, peer, "NixlInitResponse to another question");
        }
        if let Some(refusal) = extension.refusal {
            return self.peer_failed(core, peer, truncated(refusal));
        }
        let checked = handshake::check_metadata(&response.remote_meta_bytes);
        if let Err(failure) = checked.and_then(|()| handshake::check(&core.settings.hello, &extension.hello)) {
            return self.peer_failed(core, peer, failure);
        }
        let can = |capability: &str| extension.hello.capabilities.iter().any(|name| name == capability);
        (record.heartbeat, record.takes_ahead) = (can(CAPABILITY_HEARTBEAT), can(CAPABILITY_AHEAD));
        record.instance = extension.hello.instance;
        record.rendezvous = extension.hello.rendezvous;
        self.load(core, peer, Link::Pd, Some(extension.agent_name), response.remote_meta_bytes);
    }

    /// A receiver has introduced itself: the engine reads its metadata.
    pub(super) fn load(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        link: Link,
        agent_name: Option<String>,
        metadata: Vec<u8>,
    ) {
        let Some(record) = self.receivers.get_mut(&peer) else { return };
        record.link = link;
        record.state = ReceiverProgress::Loading;
        // Our handshake has told a receiver of ours that nothing is in flight. Where an LMCache receiver is now, there is
        // none of ours any more.
        let address = record.address.clone();
        self.forget_owed_ack(core, &address);
        core.outputs.push_back(Output::LoadPeer { remote: Remote::Receiver(peer), agent_name, metadata });
    }

    /// The engine has loaded a receiver's metadata, or could not.
    pub(in crate::node) fn handle_peer_loaded(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        result: Result<ConnectionId, Failure>,
    ) {
        let seq = Seq(core.fresh());
        let loading = self.receivers.get_mut(&peer).filter(|record| matches!(record.state, ReceiverProgress::Loading));
        match (loading, result) {
            (None, Ok(connection)) => core.outputs.push_back(Output::ForgetPeer(connection)),
            (None, Err(_)) => {}
            (Some(record), Ok(connection)) => {
                record.state = ReceiverProgress::Registering(seq, connection);
                self.ask_memory(core, peer, seq);
            }
            (Some(_), Err(failure)) => self.peer_failed(core, peer, failure),
        }
    }

    pub(super) fn on_mem_reg_response(&mut self, core: &mut Core<R>, peer: PeerId, response: MemRegResponse) {
        let Some(record) = self.receivers.get(&peer) else { return };
        let ReceiverProgress::Registering(seq, connection) = record.state else {
            return self.note_unexpected(core, peer, "NixlMemRegResponse");
        };
        self.on_memory_told(core, peer, (seq, connection), response);
    }

    /// A receiver has said where its memory is.
    pub(super) fn warm(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        connection: ConnectionId,
        len_bytes: u64,
        memory: PeerMemory,
    ) {
        let Some(record) = self.receivers.get_mut(&peer) else { return };
        record.len_bytes = len_bytes;
        record.state = ReceiverProgress::Warming(connection, core.now.saturating_duration_since(record.since));
        core.outputs.push_back(Output::ConnectPeer { peer, connection, memory });
    }

    /// A receiver's buffer has grown. Nothing is granted beyond what the sender was told of, so it is told with a grant.
    pub(super) fn on_memory_update(&mut self, core: &mut Core<R>, peer: PeerId, update: MemoryUpdate) {
        let Some(record) = self.receivers.get_mut(&peer) else { return };
        // Two grants may carry the same update.
        if let ReceiverProgress::Up(connection) = record.state
            && update.len_bytes > record.len_bytes
        {
            record.len_bytes = update.len_bytes;
            let MemoryUpdate { metadata, descriptors, .. } = update;
            core.outputs.push_back(Output::UpdatePeer { peer, connection, metadata, descriptors });
        }
    }

    /// The engine knows a receiver's buffer as it is now, or could not learn it: then the receiver is connected to again.
    pub(in crate::node) fn handle_peer_updated(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        connection: ConnectionId,
        result: Result<(), String>,
    ) {
        if let Err(text) = result
            && self.connection_of(peer) == Some(connection)
        {
            self.peer_failed(core, peer, Failure::new(FailureKind::PeerLost, text));
        }
    }

    /// The engine is connected to a receiver's memory, or could not.
    pub(in crate::node) fn handle_peer_connected(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        result: Result<(), String>,
    ) {
        let Some(record) = self.receivers.get_mut(&peer) else { return };
        let ReceiverProgress::Warming(connection, took) = record.state else { return };
        match result {
            Ok(()) => {
                record.state = ReceiverProgress::Up(connection);
                record.heard = Heard::at(core.now);
                let heartbeat = record.heartbeat;
                let (address, instance, len_bytes) = (record.address.clone(), record.name(), record.len_bytes);
                core.timers.unset(OutgoingTimer::Handshake(peer));
                self.note_connected(core, &address);
                core.note(OutgoingNote::PeerUp { address, instance, len_bytes, took });
                // At once, so that a port for allocations that is not this receiver's is noticed before it is used.
                if heartbeat {
                    self.ping(core, core.now, peer);
                }
                for uid in self.requests_of(peer) {
                    self.ask_for_room(core, uid);
                }
            }
            Err(text) => self.peer_failed(core, peer, Failure::new(FailureKind::PeerUnreachable, text)),
        }
    }

    /// The connections to a receiver are gone, or could not be made.
    pub(in crate::node) fn handle_peer_closed(&mut self, core: &mut Core<R>, peer: PeerId, failure: Failure) {
        self.drop_peer(core, peer, failure);
    }

    /// Gives a receiver up: closes its connections, fails its requests.
    pub(super) fn peer_failed(&mut self, core: &mut Core<R>, peer: PeerId, failure: Failure) {
        if self.receivers.contains_key(&peer) {
            // Requests first: their cancels can still be sent. Where the connection itself has ended (`handle_peer_closed`), they go nowhere.
            self.drop_peer(core, peer, failure);
            core.outputs.push_back(Output::ClosePeer(peer));
        }
    }

    fn drop_peer(&mut self, core: &mut Core<R>, peer: PeerId, failure: Failure) {
        let Some(record) = self.receivers.get(&peer) else { return };
        let address = record.address.clone();
        let connection = record.held();
        // Before the requests fail: afterwards none of them has a grant any more.
        self.note_owed_ack(core, peer);
        self.end_lmcache(core, peer);
        self.note_lost(core, &address, &failure);
        // The text may name one of its ports alone.
        let told = match failure.text.contains(&address.to_string()) {
            true => failure,
            false => Failure::new(failure.kind, format!("receiver {address}: {}", failure.text)),
        };
        for uid in self.requests_of(peer) {
            self.fail(core, uid, told.clone());
        }
        core.timers.unset(OutgoingTimer::Handshake(peer));
        core.timers.unset(OutgoingTimer::Ping(peer));
        self.forget_pending_acks(core, peer);
        self.receiver_by_address.remove(&address);
        if let Some(record) = self.receivers.remove(&peer) {
            self.remember_lmcache(core, record);
        }
        if let Some(connection) = connection {
            core.outputs.push_back(Output::ForgetPeer(connection));
        }
    }

    pub(super) fn handshake_timed_out(&mut self, core: &mut Core<R>, peer: PeerId) {
        let limit_ms = self.settings.handshake_timeout.as_millis();
        let draining =
            self.receivers.get(&peer).is_some_and(|record| matches!(record.state, ReceiverProgress::AwaitingOldWrites));
        let why = if draining { ": transfers to it from before have not ended yet" } else { "" };
        let text = format!("no handshake within {limit_ms} ms (pd_handshake_timeout_sec){why}");
        self.peer_failed(core, peer, Failure::new(FailureKind::PeerUnreachable, text));
    }

    /// Something arrived from a receiver.
    pub(super) fn hear_of(&mut self, now: Instant, peer: PeerId) {
        if let Some(record) = self.receivers.get_mut(&peer) {
            record.heard = Heard::at(now);
        }
    }

    /// Asks a receiver whether it is there; gives it up when it has been silent for too long.
    pub(super) fn ping(&mut self, core: &mut Core<R>, due: Instant, peer: PeerId) {
        let (interval, timeout) = (core.settings.heartbeat_interval, core.settings.peer_timeout);
        let seq = Seq(core.fresh());
        let Some(record) = self.receivers.get_mut(&peer) else { return };
        let silent = record.heard.silence(core.now, due, interval);
        if silent >= timeout {
            let text = format!(
                "receiver {} ({}) said nothing for {} ms (pd_peer_timeout_sec)",
                record.address,
                truncate(&record.instance),
                silent.as_millis()
            );
            return self.peer_failed(core, peer, Failure::new(FailureKind::PeerLost, text));
        }
        let receiver = record.instance.clone();
        let instance = core.settings.hello.instance.clone();
        core.timers.set(OutgoingTimer::Ping(peer), core.now + interval);
        core.send(To::Peer(peer), Port::Alloc, Message::PdPing(Ping { seq, instance, ended: Vec::new(), receiver }));
    }

    pub(super) fn on_pong(&mut self, core: &mut Core<R>, peer: PeerId, pong: Pong) {
        match pong.refusal {
            // It has forgotten us, or is another process by now.
            Some(refusal) if refusal.kind == FailureKind::HandshakeRefused => {
                return self.reconnect(core, peer, truncated(refusal));
            }
            // Another handshake would be answered alike.
            Some(refusal) => return self.peer_failed(core, peer, truncated(refusal)),
            None => {}
        }
        let mut processes = pong.have_ended;
        processes.truncate(PROCESSES_ASKED_MAX);
        if !processes.is_empty() {
            core.outputs.push_back(Output::CheckProcesses { peer, processes });
        }
    }

    /// Of the processes that a receiver asked after, these have ended.
    pub(in crate::node) fn handle_processes_ended(
        &mut self,
        core: &mut Core<R>,
        peer: PeerId,
        ended: Vec<ProcessIdentity>,
    ) {
        let Some(record) = self.receivers.get(&peer).filter(|record| record.connection().is_some()) else { return };
        if !ended.is_empty() {
            let receiver = record.instance.clone();
            let (seq, instance) = (Seq(core.fresh()), core.settings.hello.instance.clone());
            core.send(To::Peer(peer), Port::Alloc, Message::PdPing(Ping { seq, instance, ended, receiver }));
        }
    }

    /// The receiver does not know us: it has given us up, has forgotten us in favour of another, or was restarted
    /// behind the same connection. Requests without slots ask again, once; the others have lost theirs.
    pub(super) fn reconnect(&mut self, core: &mut Core<R>, peer: PeerId, refusal: Failure) {
        let Some(record) = self.receivers.get(&peer) else { return };
        let address = record.address.clone();
        let mut again = Vec::new();
        for uid in self.requests_of(peer) {
            let Some(request) = self.requests.get_mut(&uid) else { continue };
            let (open_id, wait, asked) = match request.stage {
                OutgoingStage::Allocating { open_id, seq, wait } => (open_id, wait, Some(seq)),
                // It waits for what is pushed ahead.
                OutgoingStage::Connecting { open_id, wait } => (open_id, wait, None),
                _ => continue,
            };
            if request.ahead.is_some() || std::mem::replace(&mut request.reconnected, true) {
                continue;
            }
            request.set_aside(core.now, open_id, wait);
            if let Some(seq) = asked {
                self.awaited.remove(&seq);
            }
            core.timers.unset(OutgoingTimer::Allocation(uid));
            again.push(uid);
        }
        let text = format!("receiver {address} has forgotten this sender: {}", refusal.text);
        self.peer_failed(core, peer, Failure::new(FailureKind::PeerLost, text));
        self.take_up(core, &address, again);
    }

    /// Requests that were set aside wait for a new handshake.
    pub(super) fn take_up(&mut self, core: &mut Core<R>, address: &ReceiverAddress, requests: Vec<Uid>) {
        for uid in requests {
            match self.peer_for(core, address) {
                Ok(peer) => {
                    if let Some(request) = self.requests.get_mut(&uid) {
                        request.peer = peer;
                    }
                }
                Err(failure) => self.fail(core, uid, failure),
            }
        }
    }

    pub(super) fn requests_of(&self, peer: PeerId) -> Vec<Uid> {
        let of_peer = self
            .requests
            .iter()
            .filter(|(_, request)| request.peer == peer && !matches!(request.stage, OutgoingStage::Closing { .. }));
        of_peer.map(|(&uid, _)| uid).collect()
    }

    /// Forgets the receiver that was used longest ago, of those with nothing under way. One that the configuration names goes
    /// last, and only with `configured_too`.
    pub(super) fn evict_peer(&mut self, core: &mut Core<R>, configured_too: bool) -> bool {
        let idle = self.receivers.iter().filter(|(peer, record)| {
            let configured = self.configured.contains(&record.address);
            // One that is connecting because the configuration names it has nothing under way either.
            (if configured { configured_too } else { record.connection().is_some() })
                && !self.requests.values().any(|request| request.peer == **peer)
                && !self.quiesce.is_pending(**peer)
                && !record.link.is_busy()
        });
        let last = idle.min_by_key(|(_, record)| (self.configured.contains(&record.address), record.last_used));
        let Some((&peer, record)) = last else { return false };
        let (address, connection) = (record.address.clone(), record.held());
        core.timers.unset(OutgoingTimer::Handshake(peer));
        core.timers.unset(OutgoingTimer::Ping(peer));
        self.postpone_connecting(core, &address);
        self.receiver_by_address.remove(&address);
        if let Some(record) = self.receivers.remove(&peer) {
            self.remember_lmcache(core, record);
        }
        core.outputs.push_back(Output::ClosePeer(peer));
        if let Some(connection) = connection {
            core.outputs.push_back(Output::ForgetPeer(connection));
        }
        true
    }
}
