//! The engine itself: requests to NIXL and what becomes of them.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nixl_sys::NixlError;

use super::agent::OwnedAgent;
use super::agents::{Agents, News, Way};
use super::descriptors::{NixlBuffer, unit_indices};
use super::errors::{bad_descriptors, bad_metadata, explain, peer_error, with_shortage};
use super::flights::{FlightPurpose, NixlFlight};
use super::metadata::check_metadata;
use super::peers::{NixlPeer, Peers, RemoteBuffer};
use super::{NIXL_ENGINE_NAME, NixlOptions};
use crate::buffer::Memory;
use crate::ids::{ConnectionId, TransferId};
use crate::transfer::{
    ByteCopy, Completion, Connected, Ended, Export, TransferEngine, TransferError, check_ranges, cut, join,
};

/// How long the first write of a connection may take; it takes some milliseconds between idle processes, and nobody else
/// waits for it.
const WARM_UP_MAX: Duration = Duration::from_secs(5);
/// Over TCP a dead process's bytes go on arriving for as long as the kernels hold some, and the receiving side's progress
/// thread is up to 10 ms late. What UCX chose is not known here, so this holds for CMA as well, which leaves nothing.
const LINGER: Duration = Duration::from_secs(2);

/// Copies through NIXL.
///
/// Fields are dropped in declared order: requests, then what is prepared for peers, then the agent with its memory.
#[derive(Debug)]
pub struct NixlEngine {
    flights: Vec<NixlFlight>,
    peers: Peers,
    agents: Agents,
    agent: OwnedAgent,
    agent_name: String,
    /// Ended inside another call.
    ended: Ended,
}

impl NixlEngine {
    /// Loads the library, starts an agent and its backends.
    ///
    /// # Errors
    /// [`TransferError::Unavailable`] when the library or a backend is missing or does not work.
    pub fn start(options: NixlOptions) -> Result<Self, TransferError> {
        let agent = OwnedAgent::start(&options)?;
        Ok(Self {
            flights: Vec::new(),
            peers: Peers::default(),
            agents: Agents::default(),
            agent,
            agent_name: options.agent_name,
            ended: Ended::default(),
        })
    }

    /// Drops a connection that is leaving, unless a request of it is in progress.
    ///
    /// NIXL goes on knowing its agent for other connections to it, and for when it is met again if the way to it is sound:
    /// each time that NIXL 1.5.1 forgets a living agent, UCX leaves the TCP connection that had been made to it open in
    /// both processes.
    fn release_if_idle(&mut self, connection: ConnectionId) {
        let idle = self.peers.any_mut(connection).is_some_and(|peer| peer.requests_in_progress == 0);
        if !idle {
            return;
        }
        let Some(NixlPeer { agent_name, buffer, .. }) = self.peers.remove(connection) else {
            return;
        };
        // What was prepared from the agent's metadata goes before the metadata.
        drop(buffer);
        if let Some(unwanted) = self.agents.released(&agent_name) {
            self.forget(&unwanted);
        }
    }

    /// No request to the agent may be in progress.
    fn forget(&mut self, agent_name: &str) {
        self.peers.drop_prepared(agent_name);
        if let Err(error) = self.agent.forget_remote(agent_name) {
            tracing::warn!(agent = agent_name, %error, "NIXL does not forget a peer");
        }
        self.agents.forgotten(agent_name);
    }

    fn load(&mut self, agent_name: &str, metadata: &[u8]) -> Result<(), NixlError> {
        self.agent.load_remote(metadata)?;
        self.agents.loaded(agent_name, metadata);
        Ok(())
    }

    /// Loads more of an agent that is known, under the requests that are in progress.
    fn load_more(&mut self, agent_name: &str, metadata: &[u8]) -> Result<(), NixlError> {
        let loaded = self.agent.load_remote(metadata);
        match loaded {
            Ok(_) => self.agents.grown(agent_name, metadata),
            // Then NIXL has forgotten the agent as a whole: what was prepared for it must not be used again.
            Err(_) => {
                self.peers.drop_prepared(agent_name);
                self.agents.forgotten(agent_name);
            }
        }
        loaded.map(|_| ())
    }

    /// Makes another way to an agent, for all connections that name it. No request to the agent may be in progress.
    fn load_anew(&mut self, agent_name: &str, metadata: &[u8]) -> Result<(), NixlError> {
        self.forget(agent_name);
        self.load(agent_name, metadata)?;
        for buffer in self.peers.buffers_of(agent_name) {
            // Where this fails, ranges are written one by one, and NIXL says what it lacks.
            if let Ok(prepared) = RemoteBuffer::prepare(&self.agent, agent_name, buffer.descriptor.clone()) {
                *buffer = prepared;
            }
        }
        Ok(())
    }

    /// Begins the first write of a connection. Whether it is in progress, as the last flight.
    fn warm_up(
        &mut self,
        connection: ConnectionId,
        agent_name: &str,
        remote: &NixlBuffer,
    ) -> Result<bool, TransferError> {
        let Some(request) = self.agent.warm_up(agent_name, remote)? else { return Ok(false) };
        let purpose = FlightPurpose::WarmUp { posted: Instant::now() };
        self.take_off(NixlFlight { purpose, connection, request, descriptor_count: 1 });
        Ok(true)
    }

    /// A way that was there before this connection may have broken meanwhile: then NIXL makes another one.
    fn warm_up_anew(
        &mut self,
        connection: ConnectionId,
        agent_name: &str,
        remote: &NixlBuffer,
        error: TransferError,
    ) -> Result<bool, TransferError> {
        let reused = self.peers.any_mut(connection).is_some_and(|peer| std::mem::take(&mut peer.reused));
        if !reused || self.peers.requests_to(agent_name) != (0, 0) {
            self.agents.broke(agent_name);
            return Err(error);
        }
        tracing::debug!(agent = agent_name, %error, "a kept connection has broken, making another");
        let metadata = self.agents.metadata(agent_name).to_vec();
        let loaded = self
            .load_anew(agent_name, &metadata)
            .map_err(|error| peer_error("load_remote_md", agent_name, 0, with_shortage(error.to_string())));
        let warmed = loaded.and_then(|()| self.warm_up(connection, agent_name, remote));
        if warmed.is_err() {
            self.agents.broke(agent_name);
        }
        warmed
    }

    fn take_off(&mut self, flight: NixlFlight) {
        if let Some(peer) = self.peers.any_mut(flight.connection) {
            peer.requests_in_progress += 1;
        }
        self.flights.push(flight);
    }

    /// The connection is warm: from here on it can be posted to.
    fn finish_connecting(&mut self, connection: ConnectionId) -> Result<(), TransferError> {
        let not_connected = TransferError::NotConnected { engine: NIXL_ENGINE_NAME, connection };
        let Some(peer) = self.peers.any_mut(connection) else {
            return Err(not_connected);
        };
        let Some(descriptor) = peer.connecting.take() else {
            return Err(not_connected);
        };
        peer.buffer = Some(RemoteBuffer::prepare(&self.agent, &peer.agent_name, descriptor)?);
        Ok(())
    }

    /// Reports a connection that is still being warmed as failed; its request stays until NIXL has ended it.
    fn give_up_connecting(&mut self, flight_index: usize, reason: String) {
        let Some(flight) = self.flights.get_mut(flight_index) else { return };
        flight.purpose = FlightPurpose::GivenUp;
        let connection = flight.connection;
        if let Some(peer) = self.peers.any_mut(connection) {
            peer.connecting = None;
            let result = Err(peer_error("first write", &peer.agent_name, 1, reason));
            self.ended.connections.push(Connected { connection, result });
        }
    }
}

impl NixlEngine {
    /// What is registered, if anything is.
    #[cfg(feature = "lmcache")]
    pub(super) fn buffer(&self) -> Option<&NixlBuffer> {
        self.agent.buffer().ok()
    }
}

impl TransferEngine for NixlEngine {
    fn name(&self) -> &'static str {
        NIXL_ENGINE_NAME
    }

    fn linger(&self) -> Duration {
        LINGER
    }

    fn register(&mut self, memory: Arc<Memory>, unit_bytes: u64, len_bytes: u64) -> Result<(), TransferError> {
        self.agent.register(memory, unit_bytes, len_bytes)
    }

    fn extend(&mut self, range: Range<u64>) -> Result<Export, TransferError> {
        let metadata = self.agent.extend(range)?;
        let descriptors = self.agent.buffer()?.encode();
        Ok(Export { agent_name: self.agent_name.clone(), metadata, descriptors })
    }

    fn export(&mut self) -> Result<Export, TransferError> {
        let descriptors = self.agent.buffer()?.encode();
        let metadata = self.agent.metadata().map_err(|error| TransferError::Unavailable {
            engine: NIXL_ENGINE_NAME,
            reason: format!("get_local_md of {}: {error}", self.agent_name),
        })?;
        Ok(Export { agent_name: self.agent_name.clone(), metadata, descriptors })
    }

    fn load_peer(&mut self, agent_name: &str, metadata: &[u8]) -> Result<ConnectionId, TransferError> {
        let refuse = |reason: String| bad_metadata(agent_name, reason);
        let named = check_metadata(metadata).map_err(refuse)?.agent_name;
        if named != agent_name {
            return Err(refuse(format!("it is that of {named}")));
        }
        if named == self.agent_name {
            return Err(refuse("it is our own; an agent does not connect to itself".to_owned()));
        }
        let way = self.agents.way_to(agent_name, metadata);
        let (leaving, staying) = self.peers.requests_to(agent_name);
        if leaving > 0 || (way == Way::Anew && staying > 0) {
            let reason = format!("{} requests of its earlier connections have not ended", leaving + staying);
            return Err(peer_error("load_remote_md", agent_name, 0, reason));
        }
        let reused = match way {
            Way::Known => Ok(true),
            Way::New => self.load(agent_name, metadata).map(|()| false),
            Way::Anew => self.load_anew(agent_name, metadata).map(|()| false),
            Way::Grown => match self.load_more(agent_name, metadata) {
                Ok(()) => Ok(true),
                Err(_) => self.load_anew(agent_name, metadata).map(|()| false),
            },
        };
        let reused = reused.map_err(|error| refuse(with_shortage(format!("load_remote_md: {error}"))))?;
        self.agents.named(agent_name);
        Ok(self.peers.insert(agent_name.to_owned(), reused))
    }

    #[cfg(feature = "lmcache")]
    fn lmcache(&self) -> Option<&dyn crate::transfer::LmcacheEngine> {
        Some(self)
    }

    fn connect(&mut self, connection: ConnectionId, descriptors: &[u8]) -> Result<(), TransferError> {
        // Without memory of our own nothing could be posted.
        let ours = self.agent.buffer()?;
        let Some(peer) = self.peers.present(connection) else {
            return Err(TransferError::NotConnected { engine: NIXL_ENGINE_NAME, connection });
        };
        let agent_name = peer.agent_name.clone();
        if peer.connecting.is_some() {
            return Err(peer_error("connect", &agent_name, 1, "it is being connected already".to_owned()));
        }
        let descriptor = NixlBuffer::decode(descriptors).map_err(|reason| bad_descriptors(&agent_name, reason))?;
        descriptor.check_kind(ours).map_err(|reason| bad_descriptors(&agent_name, reason))?;
        self.agent.check_covered(&agent_name, &descriptor)?;
        let in_progress = match self.warm_up(connection, &agent_name, &descriptor) {
            Ok(in_progress) => in_progress,
            Err(error) => self.warm_up_anew(connection, &agent_name, &descriptor, error)?,
        };
        if let Some(peer) = self.peers.any_mut(connection) {
            peer.connecting = Some(descriptor);
        }
        if !in_progress {
            self.finish_connecting(connection)?;
            self.ended.connections.push(Connected { connection, result: Ok(()) });
        }
        Ok(())
    }

    fn update_peer(
        &mut self,
        connection: ConnectionId,
        metadata: &[u8],
        descriptors: &[u8],
    ) -> Result<(), TransferError> {
        let not_connected = TransferError::NotConnected { engine: NIXL_ENGINE_NAME, connection };
        let Some(NixlPeer { agent_name, buffer, connecting, .. }) = self.peers.present(connection) else {
            return Err(not_connected);
        };
        let Some(before) = buffer.as_ref().map(|remote| &remote.descriptor).or(connecting.as_ref()) else {
            return Err(not_connected);
        };
        let agent_name = agent_name.clone();
        let news = self.agents.news(&agent_name, metadata).map_err(|reason| bad_metadata(&agent_name, reason))?;
        let descriptor = NixlBuffer::decode(descriptors)
            .and_then(|after| after.check_grown_from(before).map(|()| after))
            .map_err(|reason| bad_descriptors(&agent_name, reason))?;
        if news == News::Grown
            && let Err(error) = self.load_more(&agent_name, metadata)
        {
            self.disconnect(connection);
            return Err(bad_metadata(&agent_name, format!("load_remote_md: {error}; the connection is given up")));
        }
        self.agent.check_covered(&agent_name, &descriptor)?;
        if let Some(connecting) = self.peers.any_mut(connection).and_then(|peer| peer.connecting.as_mut()) {
            *connecting = descriptor;
            return Ok(());
        }
        // Requests in progress have their own copies of what was prepared before.
        let prepared = RemoteBuffer::prepare(&self.agent, &agent_name, descriptor)?;
        let Some(peer) = self.peers.any_mut(connection) else {
            return Err(not_connected);
        };
        peer.buffer = Some(prepared);
        Ok(())
    }

    fn post(
        &mut self,
        transfer: TransferId,
        connection: ConnectionId,
        copies: &[ByteCopy],
    ) -> Result<(), TransferError> {
        let local = self.agent.buffer()?;
        let not_connected = TransferError::NotConnected { engine: NIXL_ENGINE_NAME, connection };
        let Some(peer) = self.peers.present(connection) else {
            return Err(not_connected);
        };
        let Some(remote) = &peer.buffer else {
            return Err(not_connected);
        };
        check_ranges(copies, local.len_bytes(), remote.descriptor.len_bytes())?;
        let mut joined = join(copies);
        let (local_ends, remote_ends) = (&local.piece_ends, &remote.descriptor.piece_ends);
        if local_ends.len() > 1 || remote_ends.len() > 1 {
            joined = cut(&joined, local_ends, remote_ends);
        }
        if joined.is_empty() {
            self.ended.transfers.push(Completion { transfer, result: Ok(()) });
            return Ok(());
        }
        let failed = |operation: &'static str, error: &NixlError| {
            peer_error(operation, &peer.agent_name, joined.len(), explain(error))
        };
        let mut request = None;
        if let Some(units) = &remote.units
            && let Some((local_units, remote_units)) = unit_indices(&joined, local.unit_bytes)
        {
            request = self
                .agent
                .request_units(units, &local_units, &remote_units)
                .map_err(|error| failed("make_xfer_req", &error))?;
        }
        let request = match request {
            Some(request) => request,
            None => self
                .agent
                .request_ranges(&peer.agent_name, local, &remote.descriptor, &joined)
                .map_err(|error| failed("create_xfer_req", &error))?,
        };
        match self.agent.post(&request) {
            Ok(false) => self.ended.transfers.push(Completion { transfer, result: Ok(()) }),
            // Some of the bytes may be written, so it has been posted, and has ended.
            Err(error) => {
                let result = Err(failed("post_xfer_req", &error));
                self.ended.transfers.push(Completion { transfer, result });
                self.agents.broke(&peer.agent_name);
            }
            Ok(true) => {
                let descriptor_count = joined.len();
                let purpose = FlightPurpose::Transfer(transfer);
                self.take_off(NixlFlight { purpose, connection, request, descriptor_count });
            }
        }
        Ok(())
    }

    fn poll(&mut self, ended: &mut Ended) {
        let mut index = 0;
        while let Some(flight) = self.flights.get(index) {
            let status = self.agent.in_progress(&flight.request);
            if matches!(status, Ok(true)) {
                if let FlightPurpose::WarmUp { posted } = flight.purpose
                    && posted.elapsed() > WARM_UP_MAX
                {
                    self.give_up_connecting(index, format!("no answer within {} ms", WARM_UP_MAX.as_millis()));
                }
                index += 1;
                continue;
            }
            // `remove`, not `swap_remove`: transfers of one peer are reported in the order in which they end.
            let NixlFlight { purpose, connection, request, descriptor_count } = self.flights.remove(index);
            drop(request);
            let Some(peer) = self.peers.any_mut(connection) else {
                continue;
            };
            peer.requests_in_progress = peer.requests_in_progress.saturating_sub(1);
            if status.is_err() {
                self.agents.broke(&peer.agent_name);
            }
            let leaving = peer.leaving;
            let operation = if matches!(purpose, FlightPurpose::Transfer(_)) { "transfer" } else { "first write" };
            let failed = |reason: String| peer_error(operation, &peer.agent_name, descriptor_count, reason);
            let mut result = match status {
                Err(error) => Err(failed(explain(&error))),
                Ok(_) if leaving => Err(failed("we disconnected".to_owned())),
                Ok(_) => Ok(()),
            };
            match purpose {
                FlightPurpose::Transfer(transfer) => self.ended.transfers.push(Completion { transfer, result }),
                FlightPurpose::WarmUp { .. } => {
                    if result.is_ok() {
                        result = self.finish_connecting(connection);
                    } else {
                        peer.connecting = None;
                    }
                    self.ended.connections.push(Connected { connection, result });
                }
                FlightPurpose::GivenUp => {}
            }
            if leaving {
                self.release_if_idle(connection);
            }
        }
        ended.append(&mut self.ended);
    }

    fn in_flight(&self) -> usize {
        self.ended.len() + self.flights.len()
    }

    /// A request in progress cannot be called back: releasing it leaves UCX writing. So the peer is let go when the
    /// last one has ended by itself, and until then `poll` does not report them. A connection that is being warmed moves
    /// no bytes that count: it is reported at once.
    fn disconnect(&mut self, connection: ConnectionId) {
        let warming_up = |flight: &NixlFlight| {
            flight.connection == connection && matches!(flight.purpose, FlightPurpose::WarmUp { .. })
        };
        if let Some(index) = self.flights.iter().position(warming_up) {
            self.give_up_connecting(index, "we disconnected".to_owned());
        }
        if let Some(peer) = self.peers.any_mut(connection) {
            peer.leaving = true;
            self.release_if_idle(connection);
        }
    }
}
