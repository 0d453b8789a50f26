//! The engine itself: requests to NIXL and what becomes of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nixl_sys::{NixlError, XferRequest};

use super::agent::{OwnedAgent, Side};
use super::descriptors::{BufferDescriptor, unit_indices};
use super::metadata::check_metadata;
use super::peers::{Peers, RemoteBuffer};
use super::{NIXL_ENGINE_NAME, NixlOptions};
use crate::buffer::Memory;
use crate::ids::{ConnectionId, TransferId};
use crate::transfer::{Backoff, ByteCopy, Completion, Export, TransferEngine, TransferError, Wait, check_ranges, join};

/// How long the first write of a connection may take; it takes some milliseconds between idle processes.
const WARM_UP_MAX: Duration = Duration::from_secs(2);

/// Copies through NIXL.
///
/// Fields are dropped in declared order: requests, then what is prepared for peers, then the agent with its memory.
#[derive(Debug)]
pub struct NixlEngine {
    flights: Vec<Flight>,
    peers: Peers,
    agent: OwnedAgent,
    agent_name: String,
    /// Ended inside `post`.
    ended: Vec<Completion>,
}

/// A request that NIXL has not ended.
struct Flight {
    /// `None` for a warm-up that took too long.
    transfer: Option<TransferId>,
    connection: ConnectionId,
    request: XferRequest,
    descriptor_count: usize,
}

impl std::fmt::Debug for Flight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flight")
            .field("transfer", &self.transfer)
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
            ended: Vec::new(),
        })
    }

    /// Drops what is prepared for a peer and lets NIXL forget it, unless a request to it is in progress.
    fn forget_if_idle(&mut self, connection: ConnectionId) {
        let idle = self.peers.any_mut(connection).is_some_and(|peer| peer.requests_in_progress == 0);
        if !idle {
            return;
        }
        let Some(peer) = self.peers.remove(connection) else {
            return;
        };
        let agent_name = peer.agent_name.clone();
        // What was prepared from the peer's metadata goes before the metadata.
        drop(peer);
        if let Err(error) = self.agent.forget_remote(&agent_name) {
            tracing::warn!(agent = agent_name, %error, "NIXL does not forget a peer");
        }
    }

    /// Writes into the peer's scratch memory, which otherwise the first transfer would pay for: UCX wires an endpoint
    /// up, and chooses how to write, when it is first written to. `make_connection` and a notification do not do that;
    /// a read does half of it.
    fn warm_up(
        &mut self,
        connection: ConnectionId,
        agent_name: &str,
        remote: &BufferDescriptor,
    ) -> Result<(), TransferError> {
        let failed = |operation: &'static str, reason: String| peer_error(operation, agent_name, 1, reason);
        self.agent.make_connection(agent_name).map_err(|error| failed("make_connection", explain(&error)))?;
        let request = self
            .agent
            .request_warm_up(agent_name, remote)
            .map_err(|error| failed("create_xfer_req", explain(&error)))?;
        let mut in_progress =
            self.agent.post(&request).map_err(|error| failed("first post_xfer_req", explain(&error)))?;
        let started = Instant::now();
        let mut backoff = Backoff::new();
        while in_progress {
            if started.elapsed() > WARM_UP_MAX {
                // It may still end: the peer cannot be forgotten before.
                if let Some(peer) = self.peers.any_mut(connection) {
                    peer.requests_in_progress += 1;
                }
                self.flights.push(Flight { transfer: None, connection, request, descriptor_count: 1 });
                return Err(failed("first write", format!("no answer within {} ms", WARM_UP_MAX.as_millis())));
            }
            match backoff.next(false) {
                Wait::Spin => std::hint::spin_loop(),
                Wait::Yield => std::thread::yield_now(),
                Wait::Sleep(time) => std::thread::sleep(time),
            }
            in_progress = self.agent.in_progress(&request).map_err(|error| failed("first write", explain(&error)))?;
        }
        Ok(())
    }
}

impl TransferEngine for NixlEngine {
    fn name(&self) -> &'static str {
        NIXL_ENGINE_NAME
    }

    fn register(&mut self, memory: Arc<Memory>, unit_bytes: u64) -> Result<(), TransferError> {
        self.agent.register(memory, unit_bytes)
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
        let named = check_metadata(metadata).map_err(refuse)?;
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
            // NIXL does not take new metadata of an agent that it knows.
            self.forget_if_idle(earlier);
        }
        let loaded = self.agent.load_remote(metadata).map_err(|error| refuse(format!("load_remote_md: {error}")))?;
        Ok(self.peers.insert(loaded))
    }

    fn connect(&mut self, connection: ConnectionId, descriptors: &[u8]) -> Result<(), TransferError> {
        let unit_bytes = self.agent.buffer()?.unit_bytes;
        let not_connected = TransferError::NotConnected { engine: NIXL_ENGINE_NAME, connection };
        let Some(peer) = self.peers.present(connection) else {
            return Err(not_connected);
        };
        let agent_name = peer.agent_name.clone();
        let refuse = |reason: String| TransferError::BadExport {
            engine: NIXL_ENGINE_NAME,
            what: "descriptors",
            agent: agent_name.clone(),
            reason,
        };
        let descriptor = BufferDescriptor::decode(descriptors).map_err(refuse)?;
        let known = self.agent.knows_remote(&agent_name, &descriptor);
        if !known.map_err(|error| refuse(format!("check_remote_md: {error}")))? {
            return Err(refuse(format!(
                "{} bytes at {:#x} are not in its metadata",
                descriptor.len_bytes, descriptor.address
            )));
        }
        self.warm_up(connection, &agent_name, &descriptor)?;
        let units = if descriptor.unit_bytes == unit_bytes {
            let prepared = self.agent.prepare_units(Side::Of(&agent_name), &descriptor);
            prepared.map_err(|error| refuse(format!("prepare_xfer_dlist: {error}")))?
        } else {
            None
        };
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
        check_ranges(copies, local.len_bytes, remote.descriptor.len_bytes)?;
        let joined = join(copies);
        if joined.is_empty() {
            self.ended.push(Completion { transfer, result: Ok(()) });
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
            Ok(false) => self.ended.push(Completion { transfer, result: Ok(()) }),
            // Some of the bytes may be written, so it has been posted, and has ended.
            Err(error) => {
                let result = Err(failed("post_xfer_req", &error));
                self.ended.push(Completion { transfer, result });
            }
            Ok(true) => {
                self.flights.push(Flight {
                    transfer: Some(transfer),
                    connection,
                    request,
                    descriptor_count: joined.len(),
                });
                if let Some(peer) = self.peers.any_mut(connection) {
                    peer.requests_in_progress += 1;
                }
            }
        }
        Ok(())
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) {
        completions.append(&mut self.ended);
        let mut index = 0;
        while let Some(flight) = self.flights.get(index) {
            let status = self.agent.in_progress(&flight.request);
            if matches!(status, Ok(true)) {
                index += 1;
                continue;
            }
            // `remove`, not `swap_remove`: transfers of one peer are reported in the order in which they end.
            let Flight { transfer, connection, request, descriptor_count } = self.flights.remove(index);
            drop(request);
            let Some(peer) = self.peers.any_mut(connection) else {
                continue;
            };
            peer.requests_in_progress = peer.requests_in_progress.saturating_sub(1);
            let failed = |reason: String| peer_error("transfer", &peer.agent_name, descriptor_count, reason);
            let result = match status {
                Err(error) => Err(failed(explain(&error))),
                Ok(_) if peer.leaving => Err(failed("we disconnected".to_owned())),
                Ok(_) => Ok(()),
            };
            if let Some(transfer) = transfer {
                completions.push(Completion { transfer, result });
            }
            if peer.leaving {
                self.forget_if_idle(connection);
            }
        }
    }

    fn in_flight(&self) -> usize {
        self.ended.len() + self.flights.iter().filter(|flight| flight.transfer.is_some()).count()
    }

    /// A request in progress cannot be called back: releasing it leaves UCX writing. So the peer is forgotten when the
    /// last one has ended by itself, and until then `poll` does not report them.
    fn disconnect(&mut self, connection: ConnectionId) {
        if let Some(peer) = self.peers.any_mut(connection) {
            peer.leaving = true;
            self.forget_if_idle(connection);
        }
    }
}

fn peer_error(operation: &'static str, agent: &str, descriptor_count: usize, reason: String) -> TransferError {
    TransferError::Peer { engine: NIXL_ENGINE_NAME, operation, agent: agent.to_owned(), descriptor_count, reason }
}

/// NIXL's statuses are few: what each means here.
fn explain(error: &NixlError) -> String {
    match error {
        NixlError::BackendError => format!("{error}; the peer has ended, or cannot be reached"),
        NixlError::NotFound => format!("{error}; the peer's metadata does not cover it"),
        other => other.to_string(),
    }
}
