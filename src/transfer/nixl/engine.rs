//! The engine itself: requests to NIXL and what becomes of them.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nixl_sys::{NixlError, XferDlistHandle, XferRequest};

use super::agent::{OwnedAgent, Side};
use super::descriptors::{BufferDescriptor, unit_indices};
use super::metadata::check_metadata;
use super::peers::{Peer, Peers, RemoteBuffer, Retired};
use super::{NIXL_ENGINE_NAME, NixlOptions};
use crate::buffer::Memory;
use crate::ids::{ConnectionId, TransferId};
use crate::transfer::{
    ByteCopy, Completion, Connected, Ended, Export, TransferEngine, TransferError, check_ranges, cut, join, open_files,
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
    flights: Vec<Flight>,
    peers: Peers,
    agent: OwnedAgent,
    agent_name: String,
    /// Ended inside another call.
    ended: Ended,
}

/// A request that NIXL has not ended.
struct Flight {
    purpose: Purpose,
    connection: ConnectionId,
    request: XferRequest,
    descriptor_count: usize,
}

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Transfer(TransferId),
    WarmUp {
        posted: Instant,
    },
    /// A warm-up that has been reported: it took too long, or nobody wants it any more. It may still end, and the peer
    /// cannot be forgotten before.
    GivenUp,
}

impl std::fmt::Debug for Flight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flight")
            .field("purpose", &self.purpose)
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
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
            agent,
            agent_name: options.agent_name,
            ended: Ended::default(),
        })
    }

    /// Drops what is prepared for a peer, unless a request to it is in progress.
    ///
    /// NIXL goes on knowing it if its connection is sound, for when it is met again: each time that NIXL 1.5.1 forgets a
    /// living agent, UCX leaves the TCP connection that had been made to it open in both processes.
    fn retire_if_idle(&mut self, connection: ConnectionId) {
        let idle = self.peers.any_mut(connection).is_some_and(|peer| peer.requests_in_progress == 0);
        if !idle {
            return;
        }
        let Some(Peer { agent_name, metadata, broken, connecting, buffer, .. }) = self.peers.remove(connection) else {
            return;
        };
        // What was prepared from the peer's metadata goes before the metadata.
        drop((connecting, buffer));
        let retired = Retired { agent_name, metadata };
        let unwanted = if broken { Some(retired) } else { self.peers.retire(retired) };
        if let Some(Retired { agent_name, .. }) = unwanted {
            self.forget(&agent_name);
        }
    }

    fn forget(&self, agent_name: &str) {
        if let Err(error) = self.agent.forget_remote(agent_name) {
            tracing::warn!(agent = agent_name, %error, "NIXL does not forget a peer");
        }
    }

    /// Whether an agent that NIXL knows from an earlier connection is the same still, told of anew where it has grown.
    /// Otherwise NIXL does not know it any more.
    fn renew(&self, agent_name: &str, metadata: &[u8], before: &Retired) -> bool {
        if metadata == before.metadata {
            return true;
        }
        let grown = check_metadata(metadata)
            .and_then(|after| after.check_grown_from(&check_metadata(&before.metadata)?))
            .is_ok();
        if !grown {
            self.forget(agent_name);
            return false;
        }
        // When it does not take it, it has forgotten the agent as a whole.
        self.agent.load_remote(metadata).is_ok()
    }

    /// Says so unless the peer's metadata covers the memory that its descriptors name.
    fn check_covered(&self, agent_name: &str, descriptor: &BufferDescriptor) -> Result<(), TransferError> {
        let reason = match self.agent.knows_remote(agent_name, descriptor) {
            Ok(true) => return Ok(()),
            Ok(false) => {
                format!("{} bytes at {:#x} are not in its metadata", descriptor.len_bytes(), descriptor.address)
            }
            Err(error) => format!("check_remote_md: {error}"),
        };
        Err(bad_descriptors(agent_name, reason))
    }

    /// The peer's units, if they are as long as ours.
    fn prepare_remote_units(
        &self,
        agent_name: &str,
        descriptor: &BufferDescriptor,
        unit_bytes: u64,
    ) -> Result<Option<XferDlistHandle>, TransferError> {
        if descriptor.unit_bytes != unit_bytes {
            return Ok(None);
        }
        let prepared = self.agent.prepare_units(Side::Of(agent_name), descriptor);
        prepared.map_err(|error| bad_descriptors(agent_name, format!("prepare_xfer_dlist: {error}")))
    }

    /// Writes into the peer's scratch memory, which otherwise the first transfer would pay for: UCX wires an endpoint
    /// up, and chooses how to write, when it is first written to. `make_connection` and a notification do not do that;
    /// a read does half of it. True while it is in progress, as the last flight. A peer without scratch memory stays cold.
    fn warm_up(
        &mut self,
        connection: ConnectionId,
        agent_name: &str,
        remote: &BufferDescriptor,
    ) -> Result<bool, TransferError> {
        let failed = |operation: &'static str, reason: String| peer_error(operation, agent_name, 1, reason);
        self.agent.make_connection(agent_name).map_err(|error| failed("make_connection", explain(&error)))?;
        let Some(scratch_address) = remote.scratch_address else { return Ok(false) };
        let request = self
            .agent
            .request_warm_up(agent_name, remote, scratch_address)
            .map_err(|error| failed("create_xfer_req", explain(&error)))?;
        let in_progress = self.agent.post(&request).map_err(|error| failed("first post_xfer_req", explain(&error)))?;
        if in_progress {
            let purpose = Purpose::WarmUp { posted: Instant::now() };
            self.take_off(Flight { purpose, connection, request, descriptor_count: 1 });
        }
        Ok(in_progress)
    }

    /// A way that had been kept from an earlier connection may have broken meanwhile: then NIXL makes another one.
    fn warm_up_anew(
        &mut self,
        connection: ConnectionId,
        agent_name: &str,
        remote: &BufferDescriptor,
        error: TransferError,
    ) -> Result<bool, TransferError> {
        let Some(peer) = self.peers.any_mut(connection) else { return Err(error) };
        if !std::mem::take(&mut peer.reused) {
            peer.broken = true;
            return Err(error);
        }
        let metadata = peer.metadata.clone();
        tracing::debug!(agent = agent_name, %error, "a kept connection has broken, making another");
        self.forget(agent_name);
        let loaded = self
            .agent
            .load_remote(&metadata)
            .map_err(|error| peer_error("load_remote_md", agent_name, 0, with_shortage(error.to_string())));
        let warmed = loaded.and_then(|_| self.warm_up(connection, agent_name, remote));
        if warmed.is_err()
            && let Some(peer) = self.peers.any_mut(connection)
        {
            peer.broken = true;
        }
        warmed
    }

    fn take_off(&mut self, flight: Flight) {
        if let Some(peer) = self.peers.any_mut(flight.connection) {
            peer.requests_in_progress += 1;
        }
        self.flights.push(flight);
    }

    /// The connection is warm: from here on it can be posted to.
    fn finish_connecting(&mut self, connection: ConnectionId) -> Result<(), TransferError> {
        let not_connected = TransferError::NotConnected { engine: NIXL_ENGINE_NAME, connection };
        let unit_bytes = self.agent.buffer()?.unit_bytes;
        let Some(peer) = self.peers.any_mut(connection) else {
            return Err(not_connected);
        };
        let Some(descriptor) = peer.connecting.take() else {
            return Err(not_connected);
        };
        let agent_name = peer.agent_name.clone();
        let units = self.prepare_remote_units(&agent_name, &descriptor, unit_bytes)?;
        if let Some(peer) = self.peers.any_mut(connection) {
            peer.buffer = Some(RemoteBuffer { units, descriptor });
        }
        Ok(())
    }

    /// Reports a connection that is still being warmed as failed; its request stays until NIXL has ended it.
    fn give_up_connecting(&mut self, flight_index: usize, reason: String) {
        let Some(flight) = self.flights.get_mut(flight_index) else { return };
        flight.purpose = Purpose::GivenUp;
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
    pub(super) fn buffer(&self) -> Option<&BufferDescriptor> {
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
        let refuse = |reason: String| TransferError::BadExport {
            engine: NIXL_ENGINE_NAME,
            what: "metadata",
            agent: agent_name.to_owned(),
            reason,
        };
        let named = check_metadata(metadata).map_err(refuse)?.agent_name;
        if named != agent_name {
            return Err(refuse(format!("it is that of {named}")));
        }
        if named == self.agent_name {
            return Err(refuse("it is our own; an agent does not connect to itself".to_owned()));
        }
        if let Some((earlier, peer)) = self.peers.of_agent(agent_name) {
            if peer.requests_in_progress > 0 {
                let reason = format!("{} requests of its earlier connection have not ended", peer.requests_in_progress);
                return Err(peer_error("load_remote_md", agent_name, 0, reason));
            }
            self.retire_if_idle(earlier);
        }
        let retired = self.peers.take_retired(agent_name);
        let reused = retired.is_some_and(|before| self.renew(agent_name, metadata, &before));
        if !reused {
            self.agent
                .load_remote(metadata)
                .map_err(|error| refuse(with_shortage(format!("load_remote_md: {error}"))))?;
        }
        Ok(self.peers.insert(agent_name.to_owned(), metadata.to_vec(), reused))
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
        let descriptor =
            BufferDescriptor::decode(descriptors).map_err(|reason| bad_descriptors(&agent_name, reason))?;
        descriptor.check_kind(ours).map_err(|reason| bad_descriptors(&agent_name, reason))?;
        self.check_covered(&agent_name, &descriptor)?;
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
        let unit_bytes = self.agent.buffer()?.unit_bytes;
        let not_connected = TransferError::NotConnected { engine: NIXL_ENGINE_NAME, connection };
        let Some(Peer { agent_name, metadata: metadata_before, buffer, connecting, .. }) =
            self.peers.present(connection)
        else {
            return Err(not_connected);
        };
        let Some(before) = buffer.as_ref().map(|remote| &remote.descriptor).or(connecting.as_ref()) else {
            return Err(not_connected);
        };
        let agent_name = agent_name.clone();
        let refuse = |what: &'static str, reason: String| TransferError::BadExport {
            engine: NIXL_ENGINE_NAME,
            what,
            agent: agent_name.clone(),
            reason,
        };
        let grown =
            check_metadata(metadata).and_then(|after| after.check_grown_from(&check_metadata(metadata_before)?));
        grown.map_err(|reason| refuse("metadata", reason))?;
        let descriptor = BufferDescriptor::decode(descriptors)
            .and_then(|after| after.check_grown_from(before).map(|()| after))
            .map_err(|reason| refuse("descriptors", reason))?;
        if let Err(error) = self.agent.load_remote(metadata) {
            // NIXL has forgotten it as a whole: what was prepared for it must not be used again.
            self.disconnect(connection);
            return Err(refuse("metadata", format!("load_remote_md: {error}; the connection is given up")));
        }
        if let Some(peer) = self.peers.any_mut(connection) {
            peer.metadata = metadata.to_vec();
        }
        self.check_covered(&agent_name, &descriptor)?;
        if let Some(connecting) = self.peers.any_mut(connection).and_then(|peer| peer.connecting.as_mut()) {
            *connecting = descriptor;
            return Ok(());
        }
        // Requests in progress have their own copies of what was prepared before.
        let units = self.prepare_remote_units(&agent_name, &descriptor, unit_bytes)?;
        match self.peers.any_mut(connection) {
            Some(peer) => {
                peer.buffer = Some(RemoteBuffer { units, descriptor });
                Ok(())
            }
            None => Err(not_connected),
        }
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
                if let Some(peer) = self.peers.any_mut(connection) {
                    peer.broken = true;
                }
            }
            Ok(true) => {
                let descriptor_count = joined.len();
                let purpose = Purpose::Transfer(transfer);
                self.take_off(Flight { purpose, connection, request, descriptor_count });
            }
        }
        Ok(())
    }

    fn poll(&mut self, ended: &mut Ended) {
        let mut index = 0;
        while let Some(flight) = self.flights.get(index) {
            let status = self.agent.in_progress(&flight.request);
            if matches!(status, Ok(true)) {
                if let Purpose::WarmUp { posted } = flight.purpose
                    && posted.elapsed() > WARM_UP_MAX
                {
                    self.give_up_connecting(index, format!("no answer within {} ms", WARM_UP_MAX.as_millis()));
                }
                index += 1;
                continue;
            }
            // `remove`, not `swap_remove`: transfers of one peer are reported in the order in which they end.
            let Flight { purpose, connection, request, descriptor_count } = self.flights.remove(index);
            drop(request);
            let Some(peer) = self.peers.any_mut(connection) else {
                continue;
            };
            peer.requests_in_progress = peer.requests_in_progress.saturating_sub(1);
            peer.broken |= status.is_err();
            let leaving = peer.leaving;
            let operation = if matches!(purpose, Purpose::Transfer(_)) { "transfer" } else { "first write" };
            let failed = |reason: String| peer_error(operation, &peer.agent_name, descriptor_count, reason);
            let mut result = match status {
                Err(error) => Err(failed(explain(&error))),
                Ok(_) if leaving => Err(failed("we disconnected".to_owned())),
                Ok(_) => Ok(()),
            };
            match purpose {
                Purpose::Transfer(transfer) => self.ended.transfers.push(Completion { transfer, result }),
                Purpose::WarmUp { .. } => {
                    if result.is_ok() {
                        result = self.finish_connecting(connection);
                    } else {
                        peer.connecting = None;
                    }
                    self.ended.connections.push(Connected { connection, result });
                }
                Purpose::GivenUp => {}
            }
            if leaving {
                self.retire_if_idle(connection);
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
        let warming_up =
            |flight: &Flight| flight.connection == connection && matches!(flight.purpose, Purpose::WarmUp { .. });
        if let Some(index) = self.flights.iter().position(warming_up) {
            self.give_up_connecting(index, "we disconnected".to_owned());
        }
        if let Some(peer) = self.peers.any_mut(connection) {
            peer.leaving = true;
            self.retire_if_idle(connection);
        }
    }
}

fn bad_descriptors(agent: &str, reason: String) -> TransferError {
    TransferError::BadExport { engine: NIXL_ENGINE_NAME, what: "descriptors", agent: agent.to_owned(), reason }
}

fn peer_error(operation: &'static str, agent: &str, descriptor_count: usize, reason: String) -> TransferError {
    TransferError::Peer { engine: NIXL_ENGINE_NAME, operation, agent: agent.to_owned(), descriptor_count, reason }
}

/// NIXL does not say that the process cannot open anything more.
fn with_shortage(reason: String) -> String {
    match open_files::shortage() {
        Some(shortage) => format!("{reason}; {shortage}"),
        None => reason,
    }
}

/// NIXL's statuses are few: what each means here.
fn explain(error: &NixlError) -> String {
    match error {
        NixlError::BackendError => with_shortage(format!("{error}; the peer has ended, or cannot be reached")),
        NixlError::NotFound => format!("{error}; the peer's metadata does not cover it"),
        other => other.to_string(),
    }
}
