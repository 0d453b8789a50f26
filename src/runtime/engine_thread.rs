//! The handle of the thread that owns the transfer engine: posting may block, so it never happens on the async executor.

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use super::engine_server::{DriverGone, Server};
use super::engine_work::{EngineCommand, EngineEvent, Work};
use super::error::RuntimeError;
use super::message_budget::MessageBudget;
use super::probe::{Probe, Prober};
use crate::buffer::MemoryManager;
use crate::ids::Pages;
use crate::node::Grown;
use crate::transfer::{EngineOptions, Export, StartedEngine, start_engine};

/// The running thread. Dropping it stops the engine and waits for it.
#[derive(Debug)]
pub(super) struct EngineThread {
    work: Option<mpsc::Sender<Work>>,
    manager: MemoryManager,
    prober: Prober,
    thread: Option<thread::JoinHandle<()>>,
}

/// What is known once the engine runs and the memory is registered.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) engine: &'static str,
    /// Which it is and why, for the log.
    pub(super) note: String,
    pub(super) export: Export,
    /// [`TransferEngine::linger`].
    pub(super) linger: Duration,
    /// [`LmcacheEngine::pages`](crate::transfer::LmcacheEngine::pages), one for each chunk.
    pub(super) pages: Option<Pages>,
}

impl EngineThread {
    /// Starts the engine on a thread of its own and registers what `manager` has so far with it. Blocks until it has.
    ///
    /// Events go through `deliver`; once that fails, the thread ends.
    pub(super) fn start<E: From<EngineEvent> + Send + 'static>(
        options: EngineOptions,
        manager: MemoryManager,
        unit_bytes: u64,
        events: UnboundedSender<E>,
    ) -> Result<(Self, Started), RuntimeError> {
        let (work, inbox) = mpsc::channel();
        let (report, started) = mpsc::channel();
        let ours = manager.clone();
        let (prober, probed) = Prober::new();
        let body = move || {
            let ready = start_engine(&options).and_then(|StartedEngine { mut engine, note }| {
                engine.register(Arc::clone(manager.memory()), unit_bytes, manager.usage().present.len_bytes)?;
                let export = engine.export()?;
                Ok((
                    Started {
                        engine: engine.name(),
                        note,
                        export,
                        linger: engine.linger(),
                        pages: engine.lmcache().and_then(|lmcache| lmcache.pages(unit_bytes)),
                    },
                    engine,
                ))
            });
            match ready {
                Ok((facts, engine)) => {
                    if report.send(Ok(facts)).is_ok() {
                        // It ends when the driver does.
                        let (Ok(()) | Err(DriverGone)) =
                            Server::new(engine, manager.memory(), &events, probed).serve(&inbox);
                    }
                }
                // Whoever waits for the report has gone: there is nobody to tell.
                Err(error) => drop(report.send(Err(error))),
            }
        };
        let thread = thread::Builder::new()
            .name("engine".into())
            .spawn(body)
            .map_err(|source| RuntimeError::Machine(format!("the engine's thread cannot start: {source}")))?;
        let started = started
            .recv()
            .map_err(|_| RuntimeError::Bug("the engine's thread ended before it had started".into()))??;
        Ok((Self { work: Some(work), manager: ours, prober, thread: Some(thread) }, started))
    }

    /// Queues a command. A thread that has ended reports nothing more, so that is an error for the driver to act on.
    pub(super) fn send(&self, command: EngineCommand) -> Result<(), RuntimeError> {
        self.queue(Work::EngineCommand(command))
    }

    /// As [`send`](Self::send), with what a peer has said in the command, and the part of the budget that it takes.
    pub(super) fn send_with(&self, command: EngineCommand, budget: Option<MessageBudget>) -> Result<(), RuntimeError> {
        self.queue(Work::FromPeer(command, budget))
    }

    /// The way to keep the thread busy.
    #[cfg(test)]
    pub(super) fn work(&self) -> Option<mpsc::Sender<Work>> {
        self.work.clone()
    }

    fn queue(&self, work: Work) -> Result<(), RuntimeError> {
        let sent = self.work.as_ref().is_some_and(|queue| queue.send(work).is_ok());
        if sent { Ok(()) } else { Err(RuntimeError::Bug("the engine's thread has ended".into())) }
    }

    /// Asks the thread whether it takes up what it is asked.
    pub(super) fn probe(&mut self) -> Probe {
        let work = self.work.as_ref();
        // A thread that has ended takes nothing up, which is what whoever asks is to see.
        self.prober.probe(|number| {
            if let Some(work) = work {
                drop(work.send(Work::Probe(number)));
            }
        })
    }

    /// Lets our buffer grow by a step: pages, registration, addresses; [`EngineEvent::Grown`] says how it went.
    ///
    /// Filling a step with pages takes as long as writing it. That happens on a thread of its own, which asks the engine's
    /// thread for the registration alone, so that transfers go on meanwhile. Steps that are asked for together follow each
    /// other.
    pub(super) fn grow(&self) -> Result<(), RuntimeError> {
        let Some(work) = self.work.clone() else {
            return Err(RuntimeError::Bug("the engine's thread has ended".into()));
        };
        let manager = self.manager.clone();
        let body = move || {
            let result = grow(&manager, &work);
            // An engine's thread that has ended has nobody to tell.
            drop(work.send(Work::Grown(result)));
        };
        match thread::Builder::new().name("growth".into()).spawn(body) {
            Ok(_) => Ok(()),
            Err(error) => self.queue(Work::Grown(Err(format!("the thread that fills a step cannot start: {error}")))),
        }
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        // Nothing can be moved any more: a step that is still being filled gives its pages back.
        self.manager.addresses().close();
        // Said, because a thread that fills a step with pages has the queue as well, and fills for seconds.
        if let Some(work) = self.work.take() {
            drop(work.send(Work::Stop));
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread panicked");
        }
    }
}

/// One step: the manager populates it here, the engine's thread registers it, and only then it has addresses.
fn grow(manager: &MemoryManager, work: &mpsc::Sender<Work>) -> Result<Grown, String> {
    let mut export = None;
    let step = manager.grow_step(|step| {
        let gone = || "the engine's thread has ended".to_owned();
        let (reply, answer) = mpsc::channel();
        work.send(Work::Extend { step, reply }).map_err(|_| gone())?;
        export = Some(answer.recv().map_err(|_| gone())??);
        Ok::<_, String>(())
    });
    let range = step.map_err(|error| error.to_string())?;
    match export {
        Some(Export { metadata, descriptors, .. }) => Ok(Grown { len_bytes: range.end, metadata, descriptors }),
        None => Err("the step was not registered".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Mutex;

    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;
    use crate::buffer::{BufferError, HostHandle, HostMapping, MachineSteps, Memory, MemoryOptions, StepSource};
    use crate::ids::{ByteCopy, Checksum, ConnectionId, EngineKind, GrantId, PeerId, RequestId, TransferId};
    use crate::node::incoming::ExpectedChunk;
    use crate::node::{PeerMemory, Remote};
    use crate::transfer::nixl::NixlOptions;

    const SLOT: u64 = 8192;

    type Events = UnboundedReceiver<EngineEvent>;

    fn start(name: &str, initial_slots: u64) -> (EngineThread, Started, Events, MemoryManager) {
        start_with(name, initial_slots, Box::new(MachineSteps))
    }

    fn start_with(
        name: &str,
        initial_slots: u64,
        steps: Box<dyn StepSource>,
    ) -> (EngineThread, Started, Events, MemoryManager) {
        let options = MemoryOptions {
            ceiling_bytes: 8 * SLOT,
            initial_bytes: initial_slots * SLOT,
            step_bytes: 3 * SLOT,
            alignment: 64,
            slot_bytes: SLOT,
        };
        let manager = MemoryManager::with_steps(options, steps).unwrap();
        let options = EngineOptions {
            kind: Some(EngineKind::Local),
            nixl: NixlOptions::new(format!("{name}-{}", std::process::id())),
        };
        let (events, inbox) = unbounded_channel();
        let (thread, started) = EngineThread::start(options, manager.clone(), SLOT, events).unwrap();
        (thread, started, inbox, manager)
    }

    fn handle(manager: &MemoryManager) -> HostHandle {
        let Memory::Host(host) = &**manager.memory() else { panic!("it is host memory") };
        host.handle()
    }

    fn next(events: &mut Events) -> EngineEvent {
        events.blocking_recv().unwrap()
    }

    fn post(thread: &EngineThread, events: &mut Events, copy: (ConnectionId, u64)) -> Result<(), String> {
        let (connection, slot) = copy;
        let copies = vec![ByteCopy { local_offset: 0, remote_offset: slot * SLOT, len_bytes: SLOT }];
        thread
            .send(EngineCommand::Post { transfer: TransferId(slot), connection, copies, summed: vec![0], after: None })
            .unwrap();
        match next(events) {
            EngineEvent::Done { transfer: TransferId(done), result } if done == slot => {
                result.map(|sums| assert_eq!(sums.len(), 1, "one was asked for")).map_err(|failure| failure.text)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_flipped_bit_is_found_and_named() {
        // Broken in production: success is reported on a corrupted page.
        let (receiver, _, mut events, memory) = start("verifier", 4);
        let mapping = HostMapping::open(&handle(&memory)).unwrap();
        mapping.write(SLOT, &[5; 100]).unwrap();
        let chunk = |index: u32, offset_bytes, byte| ExpectedChunk {
            index,
            offset_bytes,
            len_bytes: 100,
            checksum: Checksum::of(&[byte; 100]),
        };
        let mut verify = |chunks: Vec<ExpectedChunk>| {
            let request = RequestId::new("r").unwrap();
            receiver.send(EngineCommand::Verify { request, grant: GrantId(3), chunks }).unwrap();
            match next(&mut events) {
                EngineEvent::Verified { grant: GrantId(3), corrupted, .. } => corrupted,
                other => panic!("{other:?}"),
            }
        };
        assert!(verify(vec![chunk(0, 0, 0), chunk(4, SLOT, 5)]).is_empty());
        mapping.write(SLOT + 99, &[4]).unwrap();
        assert_eq!(verify(vec![chunk(0, 0, 0), chunk(4, SLOT, 5)]), [4]);
        assert_eq!(verify(vec![chunk(9, 8 * SLOT, 0)]), [9], "what cannot be read is not as it was sent");
    }

    #[test]
    fn both_sides_grow_and_the_writer_is_told() {
        // Broken in production: a receiver grants slots of a step that nobody can write to, or grows once and never again.
        let (receiver, theirs, mut receiver_events, receiver_memory) = start("receiver", 2);
        let (sender, _, mut sender_events, sender_memory) = start("sender", 8);
        let Export { agent_name, metadata, descriptors } = theirs.export;
        sender
            .send(EngineCommand::LoadPeer {
                remote: Remote::Receiver(PeerId(1)),
                agent_name: Some(agent_name),
                metadata,
            })
            .unwrap();
        let EngineEvent::PeerLoaded { result: Ok(connection), .. } = next(&mut sender_events) else {
            panic!("loading")
        };
        sender
            .send(EngineCommand::Connect { peer: PeerId(1), connection, memory: PeerMemory::Descriptors(descriptors) })
            .unwrap();
        assert!(matches!(next(&mut sender_events), EngineEvent::Connected { peer: PeerId(1), result: Ok(()) }));
        HostMapping::open(&handle(&sender_memory)).unwrap().write(0, &[7; SLOT as usize]).unwrap();
        post(&sender, &mut sender_events, (connection, 1)).unwrap();
        assert!(post(&sender, &mut sender_events, (connection, 2)).unwrap_err().contains("leaves the remote buffer"));
        for len_bytes in [5 * SLOT, 8 * SLOT] {
            receiver.grow().unwrap();
            let EngineEvent::Grown { result: Ok(grown) } = next(&mut receiver_events) else { panic!("growing") };
            assert_eq!(grown.len_bytes, len_bytes);
            assert_eq!(receiver_memory.addresses().usage().len_bytes, len_bytes);
            let Grown { metadata, descriptors, .. } = grown;
            sender.send(EngineCommand::UpdatePeer { peer: PeerId(1), connection, metadata, descriptors }).unwrap();
            let updated = next(&mut sender_events);
            assert!(
                matches!(&updated, EngineEvent::Updated { peer: PeerId(1), connection: told, result: Ok(()) } if *told == connection),
                "{updated:?}"
            );
            let last = len_bytes / SLOT - 1;
            post(&sender, &mut sender_events, (connection, last)).unwrap();
            let mut seen = [0; SLOT as usize];
            HostMapping::open(&handle(&receiver_memory)).unwrap().read(last * SLOT, &mut seen).unwrap();
            assert_eq!(seen, [7; SLOT as usize]);
        }
        // At the ceiling: an answer, and the thread goes on serving.
        receiver.grow().unwrap();
        match next(&mut receiver_events) {
            EngineEvent::Grown { result: Err(text) } => assert!(text.contains("pd_buffer_size"), "{text}"),
            other => panic!("{other:?}"),
        }
        let unknown = ConnectionId(connection.0 + 1);
        let nothing = Vec::new;
        let update = EngineCommand::UpdatePeer {
            peer: PeerId(2),
            connection: unknown,
            metadata: nothing(),
            descriptors: nothing(),
        };
        sender.send(update).unwrap();
        assert!(matches!(next(&mut sender_events), EngineEvent::Updated { peer: PeerId(2), result: Err(_), .. }));
        post(&sender, &mut sender_events, (connection, 0)).unwrap();
    }

    /// Steps whose pages come when the test lets them.
    #[derive(Debug)]
    struct Gated(Mutex<mpsc::Receiver<Result<(), BufferError>>>);

    impl StepSource for Gated {
        fn populate(&self, memory: &Memory, range: Range<u64>) -> Result<(), BufferError> {
            if range.start > 0 {
                self.0.lock().unwrap().recv().unwrap()?;
            }
            MachineSteps.populate(memory, range)
        }

        fn release(&self, memory: &Memory, range: Range<u64>) {
            MachineSteps.release(memory, range);
        }
    }

    #[test]
    fn transfers_go_on_while_a_step_is_filled_and_a_failed_step_is_an_answer() {
        // Broken in production: all transfers of a daemon stop for as long as its buffer takes to grow.
        let (_receiver, theirs, _receiver_events, _receiver_memory) = start("receiver-of-gated", 8);
        let (gate, gated) = mpsc::channel();
        let (sender, _, mut events, memory) = start_with("gated", 2, Box::new(Gated(Mutex::new(gated))));
        let Export { agent_name, metadata, descriptors } = theirs.export;
        sender
            .send(EngineCommand::LoadPeer {
                remote: Remote::Receiver(PeerId(1)),
                agent_name: Some(agent_name),
                metadata,
            })
            .unwrap();
        let EngineEvent::PeerLoaded { result: Ok(connection), .. } = next(&mut events) else { panic!("loading") };
        sender.grow().unwrap();
        sender
            .send(EngineCommand::Connect { peer: PeerId(1), connection, memory: PeerMemory::Descriptors(descriptors) })
            .unwrap();
        assert!(matches!(next(&mut events), EngineEvent::Connected { result: Ok(()), .. }));
        post(&sender, &mut events, (connection, 4)).unwrap();
        assert_eq!(memory.usage().present.len_bytes, 2 * SLOT);
        gate.send(Err(BufferError::Allocate { len_bytes: 3 * SLOT, reason: "5 bytes are free".to_owned() })).unwrap();
        match next(&mut events) {
            EngineEvent::Grown { result: Err(text) } => assert!(text.contains("5 bytes are free"), "{text}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(memory.usage().present.len_bytes, 2 * SLOT);
        // Whoever stops does not wait for a step that is being filled.
        let (_gate, gated) = mpsc::channel();
        let (stopped, ..) = start_with("stopped", 2, Box::new(Gated(Mutex::new(gated))));
        stopped.grow().unwrap();
        drop(stopped);
        // Two steps that are asked for together follow each other, and the driver may leave before they have ended.
        sender.grow().unwrap();
        sender.grow().unwrap();
        gate.send(Ok(())).unwrap();
        let EngineEvent::Grown { result: Ok(grown) } = next(&mut events) else { panic!("growing") };
        assert_eq!(grown.len_bytes, 5 * SLOT);
        gate.send(Ok(())).unwrap();
        drop(sender);
        memory.check().unwrap();
    }
}
