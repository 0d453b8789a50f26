//! The loop around a node: one event after the other, deadlines, and an orderly end.

use std::time::{Duration, Instant};

use tokio::sync::mpsc::{self, Receiver, Sender, UnboundedReceiver, UnboundedSender};
use tokio::time::{sleep, sleep_until, timeout};

use super::error::RuntimeError;
use super::health::{HealthResponder, Phase};
use super::lifecycle::Stop;
use super::probe::Probe;
use crate::metrics::Snapshot;

/// How many messages from sockets may wait for the driver; then their tasks wait, and their peers with them.
const MESSAGES_QUEUED_MAX: usize = 1024;
/// Outputs done before socket tasks get a turn: well below what may wait for one peer, so that a burst of our own is
/// not taken for a peer that does not read.
pub(super) const OUTPUTS_AT_ONCE: usize = 256;
/// How long the last messages may take to leave once everything has ended.
const FLUSH_TIME: Duration = Duration::from_millis(50);

/// Where the tasks around a driver send their events.
#[derive(Debug)]
pub(super) struct Mailbox<E> {
    /// From sockets: bounded, so that a flood waits in the kernel and not in our memory.
    pub(super) messages: Sender<E>,
    /// From the engine, signals and watchers: bounded by what the driver has asked for.
    pub(super) events: UnboundedSender<E>,
}

/// The driver's end of a [`Mailbox`].
#[derive(Debug)]
pub(super) struct Inbox<E> {
    messages: Receiver<E>,
    events: UnboundedReceiver<E>,
}

impl<E> Inbox<E> {
    /// Waits for a reason to stop. For the time before any other event can come.
    pub(super) async fn told_to_stop(&mut self) {
        // A mailbox that is gone has nobody left to tell.
        drop(self.events.recv().await);
    }
}

pub(super) fn mailbox<E>() -> (Mailbox<E>, Inbox<E>) {
    let (messages, message_inbox) = mpsc::channel(MESSAGES_QUEUED_MAX);
    let (events, event_inbox) = mpsc::unbounded_channel();
    (Mailbox { messages, events }, Inbox { messages: message_inbox, events: event_inbox })
}

/// What a daemon does with its events. Nothing but `listen` waits.
pub(super) trait Driven {
    type Event: From<Stop>;

    /// The next word from a connector. Cancel-safe: whoever drops the future loses nothing.
    async fn listen(&mut self) -> Self::Event;
    /// Takes one event; `Some` when it is a reason to stop.
    fn handle(&mut self, now: Instant, event: Self::Event) -> Option<Stop>;
    /// Deadlines may have passed.
    fn handle_timeout(&mut self, now: Instant);
    /// When the next one passes.
    fn next_timeout(&self) -> Option<Instant>;
    /// Does at most [`OUTPUTS_AT_ONCE`] things of what the node has put out. True: there may be more.
    ///
    /// # Errors
    /// What the daemon cannot go on without.
    fn perform(&mut self) -> Result<bool, RuntimeError>;
    /// Writes what happened to the log, and counts it.
    fn log_notes(&mut self);
    /// What it has counted and what it has.
    fn snapshot(&mut self) -> Snapshot;
    /// Asks the engine's thread whether it takes up what it is asked.
    fn probe_engine(&mut self) -> Probe;
    /// Begins to drain.
    fn begin_shutdown(&mut self, now: Instant);
    /// Whether it has drained.
    fn is_drained(&self) -> bool;
    /// Ends what has not drained.
    fn abort(&mut self);
}

/// Runs until told to stop; then drains for at most `drain`. A second signal stops at once. `responder` has answered for the
/// first time already: before the ready line was printed.
pub(super) async fn drive<D: Driven>(
    daemon: &mut D,
    mut inbox: Inbox<D::Event>,
    drain: Duration,
    mut responder: HealthResponder,
) -> Result<(), RuntimeError> {
    let mut drain_until: Option<Instant> = None;
    let mut phase = Phase::Serving;
    loop {
        while daemon.perform()? {
            tokio::task::yield_now().await;
        }
        // Answers leave before anything is said about them: a log line costs as much as a message.
        tokio::task::yield_now().await;
        daemon.log_notes();
        if drain_until.is_some_and(|until| daemon.is_drained() || Instant::now() >= until) {
            break;
        }
        let deadline = [daemon.next_timeout(), drain_until].into_iter().flatten().min();
        let event = tokio::select! {
            event = inbox.events.recv() => event,
            event = inbox.messages.recv() => event,
            event = daemon.listen() => Some(event),
            () = responder.asked() => {
                responder.answer(phase, daemon.snapshot(), daemon.probe_engine());
                None
            }
            () = sleep_until_some(deadline) => None,
        };
        let now = Instant::now();
        match event.and_then(|event| daemon.handle(now, event)) {
            Some(stop) if drain_until.is_some() => {
                tracing::warn!(?stop, "told to stop twice: stopping at once");
                break;
            }
            Some(stop) => {
                tracing::info!(?stop, drain_ms = drain.as_millis() as u64, "stopping: no new requests, draining");
                drain_until = Some(now + drain);
                phase = Phase::Draining;
                daemon.begin_shutdown(now);
            }
            None => {}
        }
        if daemon.next_timeout().is_some_and(|at| at <= now) {
            daemon.handle_timeout(now);
        }
    }
    if !daemon.is_drained() {
        tracing::warn!("not everything has drained; ending what is left");
        daemon.abort();
        while daemon.perform()? {
            tokio::task::yield_now().await;
        }
        daemon.log_notes();
    }
    // What was just put out is still on its way through the socket tasks, and a cancelled request's last transfer
    // may still report.
    let flush = async {
        while let Some(event) = inbox.events.recv().await {
            daemon.handle(Instant::now(), event);
            while daemon.perform()? {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    };
    let flushed = timeout(FLUSH_TIME, flush).await;
    tracing::info!("stopped");
    match flushed {
        Ok(result) => result,
        Err(_) => Ok(()),
    }
}

async fn sleep_until_some(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        // A year: nothing to wait for but events.
        None => sleep(Duration::from_secs(31_536_000)).await,
    }
}
