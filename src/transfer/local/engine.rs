//! The engine itself: its peers, and the queue of copies.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::LOCAL_ENGINE_NAME;
use super::cursor::Cursor;
use super::descriptor::LocalBuffer;
use super::devices::Devices;
use super::flight::LocalFlight;
use super::identity::Identity;
use super::peer::{LocalPeer, PeerError};
use crate::buffer::Memory;
use crate::ids::{ConnectionId, TransferId};
use crate::transfer::{
    ByteCopy, Completion, Connected, Ended, Export, TransferEngine, TransferError, check_next_piece, check_ranges, join,
};

/// What one `poll` copies at most: a fraction of a millisecond, so that transfers take turns and a disconnect is not
/// waited for. From 2 to 64 MiB it makes no difference to the speed; 1 MiB costs some percent.
const POLL_LEN_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// What a process had put on a GPU is torn down with its context, which belongs to its end; a second is for a driver
/// that takes longer.
const DEVICE_LINGER: Duration = Duration::from_secs(1);

/// Copies into memory of other processes of the same user on the same host.
#[derive(Debug)]
pub struct LocalEngine {
    identity: Identity,
    registered: Option<RegisteredMemory>,
    connections: BTreeMap<ConnectionId, Connection>,
    connections_made: u64,
    /// Transfers that have bytes left to copy or to report, in turn.
    queue: VecDeque<Queued>,
    /// Transfers that a GPU copies, in the order in which they were posted.
    flights: Vec<LocalFlight>,
    devices: Devices,
    /// Ended, but not by copying.
    ended: Ended,
}

/// Our memory, and how much of it peers may write.
#[derive(Debug)]
struct RegisteredMemory {
    memory: Arc<Memory>,
    len_bytes: u64,
}

#[derive(Debug)]
struct Connection {
    agent_name: String,
    pid: u32,
    /// From step two on.
    peer: Option<LocalPeer>,
}

#[derive(Debug)]
struct Queued {
    transfer: TransferId,
    connection: ConnectionId,
    cursor: Cursor,
}

impl LocalEngine {
    /// An engine whose agent is called `agent_name`: a name that no other process has or had.
    ///
    /// # Errors
    /// [`TransferError::Unavailable`] when the system does not say who this process is.
    pub fn start(agent_name: impl Into<String>) -> Result<Self, TransferError> {
        Ok(Self {
            identity: Identity::of_this_process(agent_name.into())?,
            registered: None,
            connections: BTreeMap::new(),
            connections_made: 0,
            queue: VecDeque::new(),
            flights: Vec::new(),
            devices: Devices::default(),
            ended: Ended::default(),
        })
    }

    fn registered(&self) -> Result<&RegisteredMemory, TransferError> {
        self.registered.as_ref().ok_or(TransferError::NotRegistered { engine: LOCAL_ENGINE_NAME })
    }

    /// Copies up to `budget` bytes of one transfer.
    fn advance(&mut self, queued: &mut Queued, budget: &mut u64) -> Result<(), TransferError> {
        let connected = self.connections.get_mut(&queued.connection);
        let (Some(Connection { agent_name, peer: Some(peer), .. }), Some(RegisteredMemory { memory, .. })) =
            (connected, &self.registered)
        else {
            return Err(TransferError::NotConnected { engine: LOCAL_ENGINE_NAME, connection: queued.connection });
        };
        let descriptor_count = queued.cursor.copy_count();
        let failed = |reason: String| TransferError::Peer {
            engine: LOCAL_ENGINE_NAME,
            operation: "copy",
            agent: agent_name.clone(),
            descriptor_count,
            reason,
        };
        while *budget > 0
            && let Some(piece) = queued.cursor.take(*budget)
        {
            *budget -= piece.len_bytes;
            peer.write(memory, &piece).map_err(failed)?;
        }
        // After the bytes: they count only if somebody was there to have them.
        peer.check_alive().map_err(failed)
    }

    /// What becomes of a transfer whose copies by a GPU have ended.
    fn conclude(&self, flight: &LocalFlight, result: Result<(), TransferError>) -> Result<(), TransferError> {
        let alive = match self.connections.get(&flight.connection) {
            Some(Connection { peer: Some(peer), .. }) => peer.check_alive(),
            _ => Err("we disconnected".to_owned()),
        };
        result.and_then(|()| {
            alive.map_err(|reason| TransferError::Peer {
                engine: LOCAL_ENGINE_NAME,
                operation: "copy",
                agent: flight.agent_name.clone(),
                descriptor_count: flight.copy_count,
                reason,
            })
        })
    }

    /// Starts copies of the flights and takes out those that have ended.
    fn poll_flights(&mut self, ended: &mut Ended) {
        let mut index = 0;
        let mut held_up = false;
        while let Some(flight) = self.flights.get_mut(index) {
            match flight.advance(&mut held_up) {
                Ok(false) => index += 1,
                advanced => {
                    // `remove`, not `swap_remove`: transfers of one peer are reported in the order in which they end.
                    let flight = self.flights.remove(index);
                    let result = self.conclude(&flight, advanced.map(|_| ()));
                    ended.transfers.push(Completion { transfer: flight.transfer, result });
                }
            }
        }
    }
}

impl TransferEngine for LocalEngine {
    fn name(&self) -> &'static str {
        LOCAL_ENGINE_NAME
    }

    /// The copying thread ends with its process.
    fn linger(&self) -> Duration {
        match self.registered.as_ref().map(|registered| &*registered.memory) {
            Some(Memory::Cuda(_)) => DEVICE_LINGER,
            Some(Memory::Host(_)) | None => Duration::ZERO,
        }
    }

    fn register(&mut self, memory: Arc<Memory>, _unit_bytes: u64, len_bytes: u64) -> Result<(), TransferError> {
        let registered_bytes = self.registered.as_ref().map_or(0, |registered| registered.len_bytes);
        check_next_piece(LOCAL_ENGINE_NAME, &memory, registered_bytes, &(0..len_bytes))?;
        self.registered = Some(RegisteredMemory { memory, len_bytes });
        Ok(())
    }

    fn extend(&mut self, range: Range<u64>) -> Result<Export, TransferError> {
        let Some(RegisteredMemory { memory, len_bytes }) = &mut self.registered else {
            return Err(TransferError::NotRegistered { engine: LOCAL_ENGINE_NAME });
        };
        check_next_piece(LOCAL_ENGINE_NAME, memory, *len_bytes, &range)?;
        *len_bytes = range.end;
        self.export()
    }

    fn export(&mut self) -> Result<Export, TransferError> {
        let RegisteredMemory { memory, len_bytes } = self.registered()?;
        Ok(Export {
            agent_name: self.identity.agent_name.clone(),
            metadata: self.identity.encode(),
            descriptors: LocalBuffer::of(memory, *len_bytes).encode(),
        })
    }

    fn load_peer(&mut self, agent_name: &str, metadata: &[u8]) -> Result<ConnectionId, TransferError> {
        let refuse = |reason: String| TransferError::BadExport {
            engine: LOCAL_ENGINE_NAME,
            what: "metadata",
            agent: agent_name.to_owned(),
            reason,
        };
        let identity = Identity::decode(metadata).map_err(refuse)?;
        if identity.agent_name != agent_name {
            return Err(refuse(format!("it is that of {}", identity.agent_name)));
        }
        self.identity.check_peer(&identity).map_err(refuse)?;
        self.connections_made += 1;
        let connection = ConnectionId(self.connections_made);
        self.connections
            .insert(connection, Connection { agent_name: agent_name.to_owned(), pid: identity.pid, peer: None });
        Ok(connection)
    }

    fn connect(&mut self, connection: ConnectionId, descriptors: &[u8]) -> Result<(), TransferError> {
        let registered = self.registered.as_ref().ok_or(TransferError::NotRegistered { engine: LOCAL_ENGINE_NAME })?;
        let known = self
            .connections
            .get_mut(&connection)
            .ok_or(TransferError::NotConnected { engine: LOCAL_ENGINE_NAME, connection })?;
        let opened = LocalPeer::open(known.pid, descriptors, &registered.memory, &mut self.devices);
        known.peer = Some(opened.map_err(|error| peer_error(&known.agent_name, error))?);
        // Mapping is all there is to it; pages come with the copies.
        self.ended.connections.push(Connected { connection, result: Ok(()) });
        Ok(())
    }

    fn update_peer(
        &mut self,
        connection: ConnectionId,
        metadata: &[u8],
        descriptors: &[u8],
    ) -> Result<(), TransferError> {
        let Some(Connection { agent_name, pid, peer: Some(peer) }) = self.connections.get_mut(&connection) else {
            return Err(TransferError::NotConnected { engine: LOCAL_ENGINE_NAME, connection });
        };
        let refuse = |reason: String| TransferError::BadExport {
            engine: LOCAL_ENGINE_NAME,
            what: "metadata",
            agent: agent_name.clone(),
            reason,
        };
        let identity = Identity::decode(metadata).map_err(refuse)?;
        if identity.agent_name != *agent_name || identity.pid != *pid {
            return Err(refuse(format!("it is that of {} in process {}", identity.agent_name, identity.pid)));
        }
        peer.update(descriptors).map_err(|error| peer_error(agent_name, error))
    }

    fn post(
        &mut self,
        transfer: TransferId,
        connection: ConnectionId,
        copies: &[ByteCopy],
    ) -> Result<(), TransferError> {
        let RegisteredMemory { memory, len_bytes: local_len_bytes } = self.registered()?;
        let Some(Connection { agent_name, peer: Some(peer), .. }) = self.connections.get(&connection) else {
            return Err(TransferError::NotConnected { engine: LOCAL_ENGINE_NAME, connection });
        };
        check_ranges(copies, *local_len_bytes, peer.len_bytes())?;
        peer.check_alive().map_err(|reason| TransferError::Peer {
            engine: LOCAL_ENGINE_NAME,
            operation: "post",
            agent: agent_name.clone(),
            descriptor_count: copies.len(),
            reason,
        })?;
        let cursor = Cursor::new(join(copies));
        match peer.batch(memory) {
            Some(batch) => self.flights.push(LocalFlight::new(transfer, connection, agent_name.clone(), cursor, batch)),
            None => self.queue.push_back(Queued { transfer, connection, cursor }),
        }
        Ok(())
    }

    fn poll(&mut self, ended: &mut Ended) {
        ended.append(&mut self.ended);
        self.poll_flights(ended);
        let mut budget = POLL_LEN_BYTES_MAX;
        while budget > 0
            && let Some(mut queued) = self.queue.pop_front()
        {
            match self.advance(&mut queued, &mut budget) {
                Ok(()) if !queued.cursor.is_done() => self.queue.push_back(queued),
                result => ended.transfers.push(Completion { transfer: queued.transfer, result }),
            }
        }
    }

    fn has_work(&self) -> bool {
        !self.queue.is_empty() || self.flights.iter().any(LocalFlight::has_work)
    }

    fn in_flight(&self) -> usize {
        self.queue.len() + self.flights.len() + self.ended.len()
    }

    fn disconnect(&mut self, connection: ConnectionId) {
        let Some(known) = self.connections.remove(&connection) else {
            return;
        };
        // What a GPU was given cannot be called back: it is reported when it has ended.
        for flight in self.flights.iter_mut().filter(|flight| flight.connection == connection) {
            flight.leaving = true;
        }
        // This thread copies inside `poll` alone, so of the rest nothing is written from here on.
        let (gone, left): (Vec<Queued>, Vec<Queued>) =
            self.queue.drain(..).partition(|queued| queued.connection == connection);
        self.queue.extend(left);
        self.ended.transfers.extend(gone.into_iter().map(|queued| Completion {
            transfer: queued.transfer,
            result: Err(TransferError::Peer {
                engine: LOCAL_ENGINE_NAME,
                operation: "copy",
                agent: known.agent_name.clone(),
                descriptor_count: queued.cursor.copy_count(),
                reason: "we disconnected".to_owned(),
            }),
        }));
    }
}

fn peer_error(agent_name: &str, error: PeerError) -> TransferError {
    match error {
        PeerError::Descriptors(reason) => TransferError::BadExport {
            engine: LOCAL_ENGINE_NAME,
            what: "descriptors",
            agent: agent_name.to_owned(),
            reason,
        },
        PeerError::Gone(reason) => TransferError::Peer {
            engine: LOCAL_ENGINE_NAME,
            operation: "mapping memory",
            agent: agent_name.to_owned(),
            descriptor_count: 1,
            reason,
        },
    }
}
