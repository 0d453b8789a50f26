//! The thread that owns the transfer engine: posting may block, so it never happens on the async executor.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use super::error::RuntimeError;
use crate::buffer::Memory;
use crate::ids::{ByteCopy, ConnectionId, TransferId};
use crate::transfer::{Backoff, Completion, EngineOptions, Export, StartedEngine, TransferEngine, Wait, start_engine};

/// Something for the engine to do. `P` names a peer towards the driver.
#[derive(Debug)]
pub(super) enum Command<P> {
    LoadPeer { peer: P, agent_name: String, metadata: Vec<u8> },
    Connect { peer: P, connection: ConnectionId, descriptors: Vec<u8> },
    Forget(ConnectionId),
    Post { transfer: TransferId, connection: ConnectionId, copies: Vec<ByteCopy> },
}

/// Something that the engine has done.
#[derive(Debug)]
pub(super) enum EngineEvent<P> {
    PeerLoaded { peer: P, result: Result<ConnectionId, String> },
    Connected { peer: P, result: Result<(), String> },
    Done { transfer: TransferId, result: Result<(), String> },
}

/// The running thread. Dropping it stops the engine and waits for it.
#[derive(Debug)]
pub(super) struct EngineThread<P> {
    commands: Option<mpsc::Sender<Command<P>>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What is known once the engine runs and the memory is registered.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) engine: &'static str,
    /// Which it is and why, for the log.
    pub(super) note: String,
    pub(super) export: Export,
}

impl<P: Send + 'static> EngineThread<P> {
    /// Starts the engine on a thread of its own and registers `memory` with it. Blocks until it has.
    ///
    /// Events go through `deliver`; once that fails, the thread ends.
    pub(super) fn start<E: From<EngineEvent<P>> + Send + 'static>(
        options: EngineOptions,
        memory: Arc<Memory>,
        unit_bytes: u64,
        events: UnboundedSender<E>,
    ) -> Result<(Self, Started), RuntimeError> {
        let (commands, inbox) = mpsc::channel();
        let (report, started) = mpsc::channel();
        let body = move || {
            let ready = start_engine(&options).and_then(|StartedEngine { mut engine, note }| {
                engine.register(memory, unit_bytes)?;
                let export = engine.export()?;
                Ok((Started { engine: engine.name(), note, export }, engine))
            });
            match ready {
                Ok((facts, engine)) => {
                    if report.send(Ok(facts)).is_ok() {
                        serve(engine, &inbox, &events);
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
        Ok((Self { commands: Some(commands), thread: Some(thread) }, started))
    }

    /// Queues a command. A thread that has ended reports nothing more, so that is an error for the driver to act on.
    pub(super) fn send(&self, command: Command<P>) -> Result<(), RuntimeError> {
        let sent = self.commands.as_ref().is_some_and(|commands| commands.send(command).is_ok());
        if sent { Ok(()) } else { Err(RuntimeError::Bug("the engine's thread has ended".into())) }
    }
}

impl<P> Drop for EngineThread<P> {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread panicked");
        }
    }
}

/// Serves commands until the driver hangs up. Sleeps in `recv` while nothing is in flight.
fn serve<P, E: From<EngineEvent<P>>>(
    mut engine: Box<dyn TransferEngine>,
    inbox: &mpsc::Receiver<Command<P>>,
    events: &UnboundedSender<E>,
) {
    let mut backoff = Backoff::new();
    let mut completions: Vec<Completion> = Vec::new();
    loop {
        let command = if engine.in_flight() == 0 {
            match inbox.recv() {
                Ok(command) => Some(command),
                Err(_) => return,
            }
        } else {
            match inbox.try_recv() {
                Ok(command) => Some(command),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => return,
            }
        };
        let mut progressed = command.is_some();
        if let Some(command) = command
            && let Some(event) = execute(engine.as_mut(), command)
            && events.send(event.into()).is_err()
        {
            return;
        }
        engine.poll(&mut completions);
        progressed |= !completions.is_empty();
        for Completion { transfer, result } in completions.drain(..) {
            let result = result.map_err(|error| error.to_string());
            if events.send(EngineEvent::Done { transfer, result }.into()).is_err() {
                return;
            }
        }
        if engine.in_flight() == 0 {
            backoff = Backoff::new();
            continue;
        }
        match backoff.next(progressed || engine.has_work()) {
            Wait::Spin => std::hint::spin_loop(),
            Wait::Yield => thread::yield_now(),
            Wait::Sleep(pause) => pause_for(inbox, pause, engine.as_mut(), events),
        }
    }
}

/// Sleeps, but not through a command.
fn pause_for<P, E: From<EngineEvent<P>>>(
    inbox: &mpsc::Receiver<Command<P>>,
    pause: Duration,
    engine: &mut dyn TransferEngine,
    events: &UnboundedSender<E>,
) {
    match inbox.recv_timeout(pause) {
        Ok(command) => {
            if let Some(event) = execute(engine, command) {
                // A driver that has gone is noticed at the next command.
                drop(events.send(event.into()));
            }
        }
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
    }
}

/// Executes one command. The answer, if it has one at once.
fn execute<P>(engine: &mut dyn TransferEngine, command: Command<P>) -> Option<EngineEvent<P>> {
    match command {
        Command::LoadPeer { peer, agent_name, metadata } => {
            let result = engine.load_peer(&agent_name, &metadata).map_err(|error| error.to_string());
            Some(EngineEvent::PeerLoaded { peer, result })
        }
        Command::Connect { peer, connection, descriptors } => {
            let result = engine.connect(connection, &descriptors).map_err(|error| error.to_string());
            Some(EngineEvent::Connected { peer, result })
        }
        Command::Forget(connection) => {
            engine.disconnect(connection);
            None
        }
        Command::Post { transfer, connection, copies } => {
            let error = engine.post(transfer, connection, &copies).err()?;
            Some(EngineEvent::Done { transfer, result: Err(error.to_string()) })
        }
    }
}
