//! Shaking hands with receivers, and losing them.

use std::collections::BTreeSet;
use std::time::Instant;

use super::requests::{Stage, Uid, clipped};
use super::{Note, Output, Port, SenderSession, Timer};
use crate::ids::{ConnectionId, Failure, FailureKind, PeerAddress, PeerId, Seq};
use crate::protocol::handshake;
use crate::wire::Message;
use crate::wire::message::{InitExtension, InitRequest, InitResponse, MemRegExtension, MemRegRequest, MemRegResponse};

/// A receiver, from the first request to it until it is lost.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) address: PeerAddress,
    state: PeerState,
    since: Instant,
    /// Its name for itself, once it has said.
    pub(super) instance: String,
    /// Slots in its buffer, once it has said.
    pub(super) slot_count: u32,
    last_used: Instant,
}

#[derive(Debug)]
enum PeerState {
    /// Transfers to a lost peer at the same address have not ended yet. A receiver takes a new handshake as our word
    /// that nothing of the old connection is in flight, so it has to wait.
    Parked,
    /// The sockets are being connected.
    Connecting,
    /// Asked who it is.
    Introducing(Seq),
    /// The engine reads its metadata.
    Loading,
    /// Asked where its memory is.
    Registering(Seq, ConnectionId),
    /// The engine connects.
    Warming(ConnectionId),
    /// It can be written to.
    Up(ConnectionId),
}

impl Peer {
    pub(super) fn connection(&self) -> Option<ConnectionId> {
        match self.state {
            PeerState::Up(connection) => Some(connection),
            _ => None,
        }
    }
}

impl SenderSession {
    /// The peer at `address`, as it is or begun now.
    pub(super) fn peer_for(&mut self, now: Instant, address: &PeerAddress) -> Result<PeerId, Failure> {
        if let Some(&peer) = self.peer_by_address.get(address) {
            if let Some(record) = self.peers.get_mut(&peer) {
                record.last_used = now;
            }
            return Ok(peer);
        }
        if self.peers.len() >= self.settings.peers_max && !self.evict_peer() {
            let text = format!("{} receivers are connected and busy, the limit; raise pd_max_peers", self.peers.len());
            return Err(Failure::new(FailureKind::Limit, text));
        }
        let peer = PeerId(self.fresh());
        let record = Peer {
            address: address.clone(),
            state: PeerState::Parked,
            since: now,
            instance: String::new(),
            slot_count: 0,
            last_used: now,
        };
        self.peers.insert(peer, record);
        self.peer_by_address.insert(address.clone(), peer);
        self.timers.set(Timer::Handshake(peer), now + self.settings.handshake_timeout);
        self.unpark(peer);
        Ok(peer)
    }

    /// Starts connecting once nothing is in flight to an earlier peer at the same address.
    fn unpark(&mut self, peer: PeerId) {
        let Some(record) = self.peers.get_mut(&peer) else { return };
        if !matches!(record.state, PeerState::Parked)
            || self.transfers.values().any(|transfer| transfer.peer != peer && transfer.address == record.address)
        {
            return;
        }
        record.state = PeerState::Connecting;
        let address = record.address.clone();
        self.outputs.push_back(Output::OpenPeer { peer, address });
    }

    /// A transfer to `address` has ended: a parked peer there may go on.
    pub(super) fn unpark_at(&mut self, address: &PeerAddress) {
        if let Some(&peer) = self.peer_by_address.get(address) {
            self.unpark(peer);
        }
    }

    /// The sockets to a receiver are connected.
    pub fn handle_peer_opened(&mut self, peer: PeerId) {
        let seq = Seq(self.fresh());
        let Some(record) = self.peers.get_mut(&peer) else { return };
        if !matches!(record.state, PeerState::Connecting) {
            return;
        }
        record.state = PeerState::Introducing(seq);
        let connected = self.connected_instances();
        let request = InitRequest {
            local_meta_bytes: self.settings.metadata.clone(),
            pd: Some(InitExtension {
                seq,
                hello: self.settings.hello.clone(),
                agent_name: self.settings.agent_name.clone(),
                connected,
            }),
        };
        self.send(peer, Port::Init, Message::NixlInitRequest(request));
    }

    /// Receivers that we are connected to, or still write to.
    fn connected_instances(&self) -> Vec<String> {
        let held = self.peers.values().filter(|record| !record.instance.is_empty()).map(|record| &record.instance);
        let written = self.transfers.values().map(|transfer| &transfer.instance);
        let instances: BTreeSet<&String> = held.chain(written).collect();
        instances.into_iter().cloned().collect()
    }

    pub(super) fn on_init_response(&mut self, peer: PeerId, response: InitResponse) {
        let Some(record) = self.peers.get_mut(&peer) else { return };
        let PeerState::Introducing(seq) = record.state else {
            return self.note_unexpected(peer, "NixlInitResponse");
        };
        let Some(extension) = response.pd else {
            let text = "the receiver is of another make (no `pd` field in its handshake); start pd-receiver there";
            return self.peer_failed(peer, Failure::new(FailureKind::HandshakeRefused, text));
        };
        if extension.seq != seq {
            return self.note_unexpected(peer, "NixlInitResponse to another question");
        }
        if let Some(refusal) = extension.refusal {
            return self.peer_failed(peer, clipped(refusal));
        }
        if let Err(failure) = handshake::check(&self.settings.hello, &extension.hello) {
            return self.peer_failed(peer, failure);
        }
        record.instance = extension.hello.instance;
        record.state = PeerState::Loading;
        let metadata = response.remote_meta_bytes;
        self.outputs.push_back(Output::LoadPeer { peer, agent_name: extension.agent_name, metadata });
    }

    /// The engine has met a receiver, or could not.
    pub fn handle_peer_loaded(&mut self, peer: PeerId, result: Result<ConnectionId, String>) {
        let seq = Seq(self.fresh());
        let loading = self.peers.get_mut(&peer).filter(|record| matches!(record.state, PeerState::Loading));
        match (loading, result) {
            (None, Ok(connection)) => self.outputs.push_back(Output::ForgetPeer(connection)),
            (None, Err(_)) => {}
            (Some(record), Ok(connection)) => {
                record.state = PeerState::Registering(seq, connection);
                let instance = self.settings.hello.instance.clone();
                let request = MemRegRequest {
                    remote_agent_name: self.settings.agent_name.clone().into_bytes(),
                    local_id: instance.clone(),
                    local_xfer_dlist_bytes: Vec::new(),
                    pd: Some(MemRegExtension { seq, instance }),
                };
                self.send(peer, Port::Init, Message::NixlMemRegRequest(request));
            }
            (Some(_), Err(text)) => {
                self.peer_failed(peer, Failure::new(FailureKind::HandshakeRefused, text));
            }
        }
    }

    pub(super) fn on_mem_reg_response(&mut self, now: Instant, peer: PeerId, response: MemRegResponse) {
        let Some(record) = self.peers.get_mut(&peer) else { return };
        let (PeerState::Registering(seq, connection), Some(extension)) = (&record.state, response.pd) else {
            return self.note_unexpected(peer, "NixlMemRegResponse");
        };
        if extension.seq != *seq {
            return self.note_unexpected(peer, "NixlMemRegResponse to another question");
        }
        if let Some(refusal) = extension.refusal {
            return self.peer_failed(peer, clipped(refusal));
        }
        let connection = *connection;
        record.slot_count = extension.slot_count;
        record.state = PeerState::Warming(connection);
        let descriptors = extension.descriptors;
        self.outputs.push_back(Output::ConnectPeer { peer, connection, descriptors });
        let (address, instance) = (record.address.clone(), record.instance.clone());
        let took = now.saturating_duration_since(record.since);
        self.note(Note::PeerUp { address, instance, slot_count: extension.slot_count, took });
    }

    /// The engine is connected to a receiver's memory, or could not.
    pub fn handle_peer_connected(&mut self, now: Instant, peer: PeerId, result: Result<(), String>) {
        let Some(record) = self.peers.get_mut(&peer) else { return };
        let PeerState::Warming(connection) = record.state else { return };
        match result {
            Ok(()) => {
                record.state = PeerState::Up(connection);
                self.timers.cancel(&Timer::Handshake(peer));
                for uid in self.requests_of(peer) {
                    self.allocate(now, uid);
                }
            }
            Err(text) => self.peer_failed(peer, Failure::new(FailureKind::PeerUnreachable, text)),
        }
    }

    /// The connections to a receiver are gone, or could not be made.
    pub fn handle_peer_closed(&mut self, peer: PeerId, failure: Failure) {
        self.drop_peer(peer, failure);
    }

    /// Gives a receiver up: closes its connections, fails its requests.
    pub(super) fn peer_failed(&mut self, peer: PeerId, failure: Failure) {
        if self.peers.contains_key(&peer) {
            // Requests first: their cancels can still be sent.
            self.drop_peer(peer, failure);
            self.outputs.push_back(Output::ClosePeer(peer));
        }
    }

    fn drop_peer(&mut self, peer: PeerId, failure: Failure) {
        let Some(record) = self.peers.get(&peer) else { return };
        let address = record.address.clone();
        let connection = match record.state {
            PeerState::Registering(_, connection) | PeerState::Warming(connection) | PeerState::Up(connection) => {
                Some(connection)
            }
            _ => None,
        };
        self.note(Note::PeerDown { address: address.clone(), failure: failure.clone() });
        for uid in self.requests_of(peer) {
            self.fail(uid, failure.clone());
        }
        self.timers.cancel(&Timer::Handshake(peer));
        self.peers.remove(&peer);
        self.peer_by_address.remove(&address);
        if let Some(connection) = connection {
            self.outputs.push_back(Output::ForgetPeer(connection));
        }
    }

    fn requests_of(&self, peer: PeerId) -> Vec<Uid> {
        let of_peer = self
            .requests
            .iter()
            .filter(|(_, request)| request.peer == peer && !matches!(request.stage, Stage::Closing { .. }));
        of_peer.map(|(&uid, _)| uid).collect()
    }

    /// Forgets the receiver that was used longest ago, of those with nothing under way.
    fn evict_peer(&mut self) -> bool {
        let idle = self.peers.iter().filter(|(peer, record)| {
            record.connection().is_some() && !self.requests.values().any(|request| request.peer == **peer)
        });
        let Some((&peer, record)) = idle.min_by_key(|(_, record)| record.last_used) else { return false };
        let (address, connection) = (record.address.clone(), record.connection());
        self.peers.remove(&peer);
        self.peer_by_address.remove(&address);
        self.outputs.push_back(Output::ClosePeer(peer));
        if let Some(connection) = connection {
            self.outputs.push_back(Output::ForgetPeer(connection));
        }
        true
    }
}
