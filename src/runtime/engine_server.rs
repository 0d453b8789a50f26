//! The loop on the engine's thread: takes commands, lets the engine make progress, and says what has ended.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use super::awaiting_event::{AwaitingEvent, Item, Signalled, Waiting};
use super::engine_work::{EngineCommand, EngineEvent, Work};
use super::summing::{Summed, SummingJobs};
use crate::buffer::Memory;
use crate::ids::{Checksum, ConnectionId, Failure, FailureKind, PeerId, TransferId};
use crate::node::PeerMemory;
use crate::transfer::{Backoff, Completion, Connected, Ended, LmcacheEngine, TransferEngine, TransferError, Wait};

/// The driver has gone: there is nobody to serve.
#[derive(Debug)]
pub(super) struct DriverGone;

/// What the thread works with.
pub(super) struct Server<'a, E> {
    engine: Box<dyn TransferEngine>,
    memory: &'a Memory,
    /// Who waits for a connection.
    connecting: BTreeMap<ConnectionId, PeerId>,
    /// Checksums of what is being written.
    sums: BTreeMap<TransferId, Vec<Checksum>>,
    /// Transfers whose bytes are not final yet.
    awaiting: AwaitingEvent,
    /// Checksums that are not summed yet.
    summing: SummingJobs,
    /// The last probe that was taken.
    probed: watch::Sender<u64>,
    events: &'a UnboundedSender<E>,
}

impl<'a, E: From<EngineEvent>> Server<'a, E> {
    /// One that has nothing to do yet. Events go to `events`, the numbers of the probes that it takes to `probed`.
    pub(super) fn new(
        engine: Box<dyn TransferEngine>,
        memory: &'a Memory,
        events: &'a UnboundedSender<E>,
        probed: watch::Sender<u64>,
    ) -> Self {
        Self {
            engine,
            memory,
            connecting: BTreeMap::new(),
            sums: BTreeMap::new(),
            awaiting: AwaitingEvent::new(memory),
            summing: SummingJobs::new(Instant::now()),
            probed,
            events,
        }
    }

    /// Works until the driver hangs up. Sleeps in `recv` while nothing is in flight. One round takes one command, lets the
    /// engine make progress once, and sums one slice.
    pub(super) fn serve(&mut self, inbox: &mpsc::Receiver<Work>) -> Result<(), DriverGone> {
        let mut backoff = Backoff::new();
        let mut ended = Ended::default();
        loop {
            let work = if self.is_idle() {
                Some(inbox.recv().map_err(|_| DriverGone)?)
            } else {
                match inbox.try_recv() {
                    Ok(work) => Some(work),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return Err(DriverGone),
                }
            };
            let mut progressed = work.is_some();
            if let Some(work) = work {
                self.take(work)?;
            }
            progressed |= self.post_signalled()?;
            progressed |= self.sum_a_slice()?;
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
                    Err(RecvTimeoutError::Disconnected) => return Err(DriverGone),
                },
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.engine.in_flight() == 0 && self.awaiting.is_empty() && self.summing.is_empty()
    }

    /// Posts what has waited for an event that has been passed since, and says whether there was any.
    fn post_signalled(&mut self) -> Result<bool, DriverGone> {
        let passed = self.awaiting.take_signalled(Instant::now());
        let progressed = !passed.is_empty();
        for Signalled { item, failure } in passed {
            match item {
                Item::Message(ticket) => {
                    self.send(EngineEvent::EventSignalled { ticket, result: failure.map_or(Ok(()), Err) })?;
                }
                Item::Transfer(waiting) => match failure {
                    Some(failure) => self.fail_transfer(waiting.transfer, failure)?,
                    None => self.begin(waiting)?,
                },
            }
        }
        Ok(progressed)
    }

    fn send(&self, event: EngineEvent) -> Result<(), DriverGone> {
        self.events.send(event.into()).map_err(|_| DriverGone)
    }

    /// Tells the driver what has ended.
    fn report(&mut self, ended: &mut Ended) -> Result<(), DriverGone> {
        for Connected { connection, result } in ended.connections.drain(..) {
            // The result of a connection that was forgotten meanwhile is dropped: the peer may be connecting again already.
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
                let descriptors = self.lmcache()?.describe(pages);
                self.engine.connect(connection, &descriptors)
            }
        }
    }

    fn lmcache(&self) -> Result<&dyn LmcacheEngine, TransferError> {
        let reason = "LMCache's peers cannot reach this engine".to_owned();
        self.engine.lmcache().ok_or(TransferError::Unavailable { engine: self.engine.name(), reason })
    }

    /// Takes a transfer whose bytes are final: posts it, after summing what its peer will check.
    fn begin(&mut self, waiting: Waiting) -> Result<(), DriverGone> {
        // Only its event was waited for.
        if waiting.copies.is_empty() {
            return self.send(EngineEvent::Done { transfer: waiting.transfer, result: Ok(Vec::new()) });
        }
        match self.summing.push_transfer(waiting) {
            Some(waiting) => self.post(&waiting, Vec::new()),
            None => Ok(()),
        }
    }

    fn post(&mut self, waiting: &Waiting, sums: Vec<Checksum>) -> Result<(), DriverGone> {
        let Waiting { transfer, connection, copies, .. } = waiting;
        if let Err(error) = self.engine.post(*transfer, *connection, copies) {
            return self.fail_transfer(*transfer, transfer_failure(&error));
        }
        if !sums.is_empty() {
            self.sums.insert(*transfer, sums);
        }
        Ok(())
    }

    fn fail_transfer(&self, transfer: TransferId, failure: Failure) -> Result<(), DriverGone> {
        self.send(EngineEvent::Done { transfer, result: Err(failure) })
    }

    /// Sums one slice, and says whether there was any.
    fn sum_a_slice(&mut self) -> Result<bool, DriverGone> {
        if self.summing.is_empty() {
            return Ok(false);
        }
        match self.summing.advance(self.memory) {
            Some(Summed::Transfer(waiting, Ok(sums))) => self.post(&waiting, sums)?,
            Some(Summed::Transfer(waiting, Err(failure))) => self.fail_transfer(waiting.transfer, failure)?,
            Some(Summed::Commit { request, grant, corrupted }) => {
                self.send(EngineEvent::Verified { request, grant, corrupted })?;
            }
            None => {}
        }
        if self.summing.is_to_be_told(Instant::now()) {
            self.send(EngineEvent::Summing)?;
        }
        Ok(true)
    }

    fn take(&mut self, work: Work) -> Result<(), DriverGone> {
        match work {
            Work::EngineCommand(command) => self.execute(command),
            Work::FromPeer(command, budget) => {
                let executed = self.execute(command);
                drop(budget);
                executed
            }
            Work::Extend { step, reply } => {
                // Whoever fills the step waits for this.
                drop(reply.send(self.engine.extend(step).map_err(|error| error.to_string())));
                Ok(())
            }
            Work::Grown(result) => self.send(EngineEvent::Grown { result }),
            Work::Probe(number) => {
                self.probed.send_replace(number);
                Ok(())
            }
            Work::Stop => Err(DriverGone),
            #[cfg(test)]
            Work::Call(call) => {
                call();
                Ok(())
            }
        }
    }

    /// Executes one command, and answers it unless the answer comes later.
    fn execute(&mut self, command: EngineCommand) -> Result<(), DriverGone> {
        match command {
            EngineCommand::LoadPeer { remote, agent_name, metadata } => {
                let agent_name = agent_name.map_or_else(|| self.lmcache()?.agent_name_in(&metadata), Ok);
                let loaded = agent_name.and_then(|agent_name| self.engine.load_peer(&agent_name, &metadata));
                let result = loaded.map_err(|error| load_failure(&error));
                self.send(EngineEvent::PeerLoaded { remote, result })
            }
            EngineCommand::Connect { peer, connection, memory } => match self.connect(connection, &memory) {
                Ok(()) => {
                    self.connecting.insert(connection, peer);
                    Ok(())
                }
                Err(error) => self.send(EngineEvent::Connected { peer, result: Err(error.to_string()) }),
            },
            EngineCommand::UpdatePeer { peer, connection, metadata, descriptors } => {
                let updated = self.engine.update_peer(connection, &metadata, &descriptors);
                let result = updated.map_err(|error| error.to_string());
                self.send(EngineEvent::Updated { peer, connection, result })
            }
            EngineCommand::Forget(connection) => {
                self.connecting.remove(&connection);
                self.engine.disconnect(connection);
                Ok(())
            }
            EngineCommand::Post { transfer, connection, copies, summed, after: Some(after) } => {
                self.awaiting.push(after, Item::Transfer(Waiting { transfer, connection, copies, summed }));
                Ok(())
            }
            EngineCommand::AwaitForMessage { ticket, after } => {
                self.awaiting.push(after, Item::Message(ticket));
                Ok(())
            }
            EngineCommand::Unawait { ticket } => {
                self.awaiting.forget(ticket);
                Ok(())
            }
            EngineCommand::Abandon { transfer, client_gone } => {
                self.awaiting.abandon(transfer, client_gone, Instant::now());
                if !self.summing.abandon_transfer(transfer) {
                    return Ok(());
                }
                let text = "it was given up before its bytes were summed";
                self.fail_transfer(transfer, Failure::new(FailureKind::Cancelled, text))
            }
            EngineCommand::Post { transfer, connection, copies, summed, after: None } => {
                self.begin(Waiting { transfer, connection, copies, summed })
            }
            EngineCommand::Verify { request, grant, chunks } => {
                self.summing.push_commit(request, grant, chunks);
                Ok(())
            }
            EngineCommand::AbandonVerification(grant) => {
                self.summing.abandon_commit(grant);
                Ok(())
            }
        }
    }
}

/// What is in the way now may be gone at the next try; what a peer's metadata says will not.
fn load_failure(error: &TransferError) -> Failure {
    let kind = match error {
        TransferError::Peer { .. } => FailureKind::PeerUnreachable,
        _ => FailureKind::HandshakeRefused,
    };
    Failure::new(kind, error.to_string())
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
    use std::sync::{Arc, Mutex};

    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::super::played_engine::PlayedEngine;
    use super::super::sum_queue::SLICE_LEN_BYTES_MAX;
    use super::*;
    use crate::buffer::HostMemory;
    use crate::ids::{ByteCopy, GrantId, RequestId};
    use crate::node::Remote;
    use crate::node::incoming::ExpectedChunk;

    type Event = EngineEvent;

    /// A server on a thread of its own, which has `work` to do before it begins.
    struct Bench {
        work: mpsc::Sender<Work>,
        events: UnboundedReceiver<Event>,
        posted: Arc<Mutex<Vec<TransferId>>>,
        probed: watch::Receiver<u64>,
        thread: Option<thread::JoinHandle<()>>,
    }

    /// What commits are of, all zeros, and as much again to send.
    const CHECKED_LEN_BYTES: u64 = 4 * SLICE_LEN_BYTES_MAX;

    impl Bench {
        fn start(commands: Vec<EngineCommand>, gate: Option<mpsc::Receiver<()>>) -> Self {
            let memory = Arc::new(Memory::Host(HostMemory::allocate(2 * CHECKED_LEN_BYTES).unwrap()));
            let posted = Arc::new(Mutex::new(Vec::new()));
            let ended = Ended::default();
            let engine = PlayedEngine { memory: memory.clone(), posted: posted.clone(), ended, gate };
            let (work, inbox) = mpsc::channel();
            let (events, heard) = unbounded_channel();
            let (probed, taken) = watch::channel(0);
            for command in commands {
                work.send(Work::EngineCommand(command)).unwrap();
            }
            let body = move || {
                let (Ok(()) | Err(DriverGone)) = Server::new(Box::new(engine), &memory, &events, probed).serve(&inbox);
            };
            Self { work, events: heard, posted, probed: taken, thread: Some(thread::spawn(body)) }
        }

        /// The next thing that has happened, but for word that there is something to sum.
        fn next(&mut self) -> Event {
            loop {
                match self.events.blocking_recv().unwrap() {
                    EngineEvent::Summing => {}
                    event => return event,
                }
            }
        }
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            drop(self.work.send(Work::Stop));
            let ended = self.thread.take().map(thread::JoinHandle::join);
            assert!(thread::panicking() || matches!(ended, Some(Ok(()))), "the server panicked");
        }
    }

    /// A commit that takes sixteen slices.
    fn verify(grant: u64) -> EngineCommand {
        let checksum = Checksum::of(&vec![0; CHECKED_LEN_BYTES as usize]);
        let chunk = |index| ExpectedChunk { index, offset_bytes: 0, len_bytes: CHECKED_LEN_BYTES, checksum };
        let chunks = (0..4).map(chunk).collect();
        EngineCommand::Verify { request: RequestId::new("r").unwrap(), grant: GrantId(grant), chunks }
    }

    fn post(transfer: u64, local_offset: u64, len_bytes: u64, summed: bool) -> EngineCommand {
        let copies = vec![ByteCopy { local_offset, remote_offset: 0, len_bytes }];
        let summed = if summed { vec![0] } else { Vec::new() };
        EngineCommand::Post { transfer: TransferId(transfer), connection: ConnectionId(1), copies, summed, after: None }
    }

    /// The name of a transfer that has ended well, and its checksums.
    fn done(event: Event) -> (u64, Vec<Checksum>) {
        match event {
            EngineEvent::Done { transfer, result: Ok(sums) } => (transfer.0, sums),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn transfers_commands_and_small_commits_go_on_while_large_commits_are_checked() {
        // Broken in production: sixteen large commits at once, and for seconds nothing else of that daemon moves: right
        // transfers fail by their deadlines.
        let mut commands: Vec<_> = (0..8).map(verify).collect();
        commands.push(EngineCommand::LoadPeer {
            remote: Remote::Receiver(PeerId(1)),
            agent_name: Some("p".to_owned()),
            metadata: Vec::new(),
        });
        let tiny = |index| ExpectedChunk { index, offset_bytes: 1, len_bytes: 1, checksum: Checksum::of(&[0]) };
        let chunks = vec![tiny(0), ExpectedChunk { checksum: Checksum(1), ..tiny(1) }];
        commands.push(EngineCommand::Verify { request: RequestId::new("small").unwrap(), grant: GrantId(99), chunks });
        commands.push(post(7, CHECKED_LEN_BYTES, 1, false));
        let mut bench = Bench::start(commands, None);
        assert!(matches!(bench.next(), EngineEvent::PeerLoaded { remote: Remote::Receiver(PeerId(1)), result: Ok(_) }));
        assert_eq!(done(bench.next()).0, 7);
        let mut checked = Vec::new();
        for _ in 0..9 {
            let EngineEvent::Verified { grant, corrupted, .. } = bench.next() else {
                panic!("nothing else was asked for")
            };
            let expected: &[u32] = if grant.0 == 99 { &[1] } else { &[] };
            assert_eq!(corrupted, expected);
            checked.push(grant.0);
        }
        assert_eq!(checked[0], 99, "the small one");
        checked.sort_unstable();
        assert_eq!(checked, [0, 1, 2, 3, 4, 5, 6, 7, 99], "each once");
    }

    #[test]
    fn what_is_summed_is_what_was_there_before_the_engine_had_it() {
        // Broken in production: the sums are those of what was written wrongly, and a corrupted page is taken for right.
        let commands = vec![post(1, 0, CHECKED_LEN_BYTES, true), post(2, CHECKED_LEN_BYTES, 1, false)];
        let mut bench = Bench::start(commands, None);
        assert_eq!(done(bench.next()), (2, Vec::new()), "it has nothing to sum, and nothing to wait for");
        let before = Checksum::of(&vec![0; CHECKED_LEN_BYTES as usize]);
        assert_eq!(done(bench.next()), (1, vec![before]));
        assert_eq!(*bench.posted.lock().unwrap(), [TransferId(2), TransferId(1)]);
    }

    #[test]
    fn what_is_given_up_is_neither_checked_nor_posted() {
        // Broken in production: requests that were cancelled are summed to the end while others wait, and written.
        let commands = vec![
            verify(1),
            post(1, 0, CHECKED_LEN_BYTES, true),
            EngineCommand::Abandon { transfer: TransferId(1), client_gone: false },
            EngineCommand::AbandonVerification(GrantId(1)),
            verify(2),
        ];
        let mut bench = Bench::start(commands, None);
        match bench.next() {
            EngineEvent::Done { transfer: TransferId(1), result: Err(failure) } => {
                assert_eq!(failure.kind, FailureKind::Cancelled, "{failure}");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(bench.next(), EngineEvent::Verified { grant: GrantId(2), .. }));
        assert!(bench.posted.lock().unwrap().is_empty());
    }

    #[test]
    fn a_probe_is_taken_up_between_two_slices_and_not_by_an_engine_that_hangs() {
        // Broken in production: a daemon that has much to sum is killed for being stuck, or one that is stuck is not.
        let (open, gate) = mpsc::channel();
        let mut bench = Bench::start((0..4).map(verify).collect(), Some(gate));
        bench.work.send(Work::Probe(1)).unwrap();
        for _ in 0..3 {
            open.send(()).unwrap();
        }
        // It cannot come beyond its fourth poll.
        assert_eq!(*bench.probed.borrow(), 0);
        for _ in 0..1000 {
            open.send(()).unwrap();
        }
        let mut checked = 0;
        while checked < 4 {
            checked += u64::from(matches!(bench.next(), EngineEvent::Verified { .. }));
            assert_eq!(*bench.probed.borrow(), 1, "before the first of them is summed");
        }
    }

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
