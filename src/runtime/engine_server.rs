//! The loop on the engine's thread: takes commands, lets the engine make progress, and says what has ended.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::engine_thread::{Command, EngineEvent, Work};
use super::fenced::{Fenced, Item, Passed, Waiting};
use crate::buffer::Memory;
use crate::ids::{ByteCopy, Checksum, ConnectionId, Failure, FailureKind, TransferId};
use crate::protocol::receiver::ExpectedChunk;
use crate::protocol::sender::PeerMemory;
use crate::transfer::{Backoff, Completion, Connected, Ended, TransferEngine, TransferError, Wait};

/// The driver has gone: there is nobody to serve.
#[derive(Debug)]
pub(super) struct Gone;

/// What the thread works with.
pub(super) struct Server<'a, P, E> {
    engine: Box<dyn TransferEngine>,
    memory: &'a Memory,
    /// Who waits for a connection.
    connecting: BTreeMap<ConnectionId, P>,
    /// Checksums of what is being written.
    sums: BTreeMap<TransferId, Vec<Checksum>>,
    /// Transfers whose bytes are not final yet.
    fenced: Fenced,
    events: &'a UnboundedSender<E>,
}

impl<'a, P, E: From<EngineEvent<P>>> Server<'a, P, E> {
    /// One that has nothing to do yet. Events go to `events`.
    pub(super) fn new(engine: Box<dyn TransferEngine>, memory: &'a Memory, events: &'a UnboundedSender<E>) -> Self {
        Self { engine, memory, connecting: BTreeMap::new(), sums: BTreeMap::new(), fenced: Fenced::new(memory), events }
    }

    /// Works until the driver hangs up. Sleeps in `recv` while nothing is in flight.
    pub(super) fn serve(&mut self, inbox: &mpsc::Receiver<Work<P>>) -> Result<(), Gone> {
        let mut backoff = Backoff::new();
        let mut ended = Ended::default();
        loop {
            let work = if self.is_idle() {
                Some(inbox.recv().map_err(|_| Gone)?)
            } else {
                match inbox.try_recv() {
                    Ok(work) => Some(work),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return Err(Gone),
                }
            };
            let mut progressed = work.is_some();
            if let Some(work) = work {
                self.take(work)?;
            }
            progressed |= self.post_passed()?;
            self.engine.poll(&mut ended);
            progressed |= !ended.is_empty();
            self.report(&mut ended)?;
            if self.is_idle() {
                backoff = Backoff::new();
                continue;
            }
            match backoff.next(progressed || self.engine.has_work()) {
                Wait::Spin => std::hint::spin_loop(),
                Wait::Yield => thread::yield_now(),
                // Not through work that comes.
                Wait::Sleep(pause) => match inbox.recv_timeout(pause) {
                    Ok(work) => self.take(work)?,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Err(Gone),
                },
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.engine.in_flight() == 0 && self.fenced.is_empty()
    }

    /// Posts what has waited for an event that has been passed since, and says whether there was any.
    fn post_passed(&mut self) -> Result<bool, Gone> {
        let passed = self.fenced.take_passed(Instant::now());
        let progressed = !passed.is_empty();
        for Passed { item, failure } in passed {
            match item {
                Item::Message(ticket) => {
                    self.send(EngineEvent::Passed { ticket, result: failure.map_or(Ok(()), Err) })?;
                }
                Item::Transfer(Waiting { transfer, connection, copies, summed }) => {
                    let posted = match failure {
                        Some(failure) => Err(failure),
                        None => self.post(transfer, connection, &copies, &summed),
                    };
                    if let Err(failure) = posted {
                        self.send(EngineEvent::Done { transfer, result: Err(failure) })?;
                    }
                }
            }
        }
        Ok(progressed)
    }

    fn send(&self, event: EngineEvent<P>) -> Result<(), Gone> {
        self.events.send(event.into()).map_err(|_| Gone)
    }

    /// Tells the driver what has ended.
    fn report(&mut self, ended: &mut Ended) -> Result<(), Gone> {
        for Connected { connection, result } in ended.connections.drain(..) {
            // One that was forgotten meanwhile is nobody's news: the peer may be shaking hands anew already.
            if let Some(peer) = self.connecting.remove(&connection) {
                self.send(EngineEvent::Connected { peer, result: result.map_err(|error| error.to_string()) })?;
            }
        }
        for Completion { transfer, result } in ended.transfers.drain(..) {
            let sums = self.sums.remove(&transfer).unwrap_or_default();
            self.send(EngineEvent::Done {
                transfer,
                result: result.map(|()| sums).map_err(|error| transfer_failure(&error)),
            })?;
        }
        Ok(())
    }

    fn connect(&mut self, connection: ConnectionId, memory: &PeerMemory) -> Result<(), TransferError> {
        match memory {
            PeerMemory::Descriptors(descriptors) => self.engine.connect(connection, descriptors),
            PeerMemory::Pages(pages) => {
                let descriptors = self.engine.describe(pages)?;
                self.engine.connect(connection, &descriptors)
            }
        }
    }

    /// Starts a transfer, after summing what its peer will check: what is summed later may be what was written wrongly.
    fn post(
        &mut self,
        transfer: TransferId,
        connection: ConnectionId,
        copies: &[ByteCopy],
        summed: &[u32],
    ) -> Result<(), Failure> {
        let copies_to_sum = summed.iter().filter_map(|&at| copies.get(at as usize));
        let sum = |copy: &ByteCopy| self.memory.checksum(copy.local_offset, copy.len_bytes);
        let sums: Vec<Checksum> = copies_to_sum
            .map(sum)
            .collect::<Result<_, _>>()
            .map_err(|error| Failure::new(FailureKind::TransferFailed, error.to_string()))?;
        self.engine.post(transfer, connection, copies).map_err(|error| transfer_failure(&error))?;
        if !sums.is_empty() {
            self.sums.insert(transfer, sums);
        }
        Ok(())
    }

    fn take(&mut self, work: Work<P>) -> Result<(), Gone> {
        match work {
            Work::Command(command) => self.execute(command),
            Work::FromPeer(command, room) => {
                let executed = self.execute(command);
                drop(room);
                executed
            }
            Work::Extend { step, reply } => {
                // Whoever fills the step waits for this.
                drop(reply.send(self.engine.extend(step).map_err(|error| error.to_string())));
                Ok(())
            }
            Work::Grown(result) => self.send(EngineEvent::Grown { result }),
            Work::Stop => Err(Gone),
            #[cfg(test)]
            Work::Call(call) => {
                call();
                Ok(())
            }
        }
    }

    /// Executes one command, and answers it unless the answer comes later.
    fn execute(&mut self, command: Command<P>) -> Result<(), Gone> {
        match command {
            Command::LoadPeer { peer, agent_name, metadata } => {
                let agent_name = agent_name.map_or_else(|| self.engine.agent_name_in(&metadata), Ok);
                let loaded = agent_name.and_then(|agent_name| self.engine.load_peer(&agent_name, &metadata));
                let result = loaded.map_err(|error| error.to_string());
                self.send(EngineEvent::PeerLoaded { peer, result })
            }
            Command::Connect { peer, connection, memory } => match self.connect(connection, &memory) {
                Ok(()) => {
                    self.connecting.insert(connection, peer);
                    Ok(())
                }
                Err(error) => self.send(EngineEvent::Connected { peer, result: Err(error.to_string()) }),
            },
            Command::UpdatePeer { peer, connection, metadata, descriptors } => {
                let updated = self.engine.update_peer(connection, &metadata, &descriptors);
                let result = updated.map_err(|error| error.to_string());
                self.send(EngineEvent::Updated { peer, connection, result })
            }
            Command::Forget(connection) => {
                self.connecting.remove(&connection);
                self.engine.disconnect(connection);
                Ok(())
            }
            Command::Post { transfer, connection, copies, summed, after: Some(after) } => {
                self.fenced.push(after, Item::Transfer(Waiting { transfer, connection, copies, summed }));
                Ok(())
            }
            Command::Await { ticket, after } => {
                self.fenced.push(after, Item::Message(ticket));
                Ok(())
            }
            Command::Unawait { ticket } => {
                self.fenced.forget(ticket);
                Ok(())
            }
            Command::Abandon { transfer, writer_gone } => {
                self.fenced.abandon(transfer, writer_gone, Instant::now());
                Ok(())
            }
            Command::Post { transfer, connection, copies, summed, after: None } => {
                match self.post(transfer, connection, &copies, &summed) {
                    Ok(()) => Ok(()),
                    Err(failure) => self.send(EngineEvent::Done { transfer, result: Err(failure) }),
                }
            }
            Command::Verify { request, grant, chunks } => {
                let differs = |chunk: &&ExpectedChunk| {
                    self.memory.checksum(chunk.offset_bytes, chunk.len_bytes).ok() != Some(chunk.checksum)
                };
                let corrupted = chunks.iter().filter(differs).map(|chunk| chunk.index).collect();
                self.send(EngineEvent::Verified { request, grant, corrupted })
            }
        }
    }
}

/// What failed with the peer, or on the way to it, takes the connection along: an engine notices a killed peer before its
/// heartbeat is missed.
fn transfer_failure(error: &TransferError) -> Failure {
    let kind = match error {
        TransferError::Peer { .. } => FailureKind::PeerLost,
        _ => FailureKind::TransferFailed,
    };
    Failure::new(kind, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_with_the_peer_is_a_lost_peer_and_nothing_else_is() {
        // Broken in production: a killed decode worker is reported as a broken engine; or one bad range of ours closes the
        // connection under everybody else's requests.
        let peer = TransferError::Peer {
            engine: "nixl",
            operation: "transfer",
            agent: "receiver-1".to_owned(),
            descriptor_count: 3,
            reason: "it has ended".to_owned(),
        };
        let failure = transfer_failure(&peer);
        assert_eq!(failure.kind, FailureKind::PeerLost);
        assert!(failure.text.contains("receiver-1") && failure.text.contains("it has ended"), "{failure}");
        let ours = TransferError::NotRegistered { engine: "nixl" };
        assert_eq!(transfer_failure(&ours).kind, FailureKind::TransferFailed);
    }
}
