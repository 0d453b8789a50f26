//! When a daemon has to stop: signals, and the end of its parent.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::UnboundedSender;

use super::error::RuntimeError;
use super::process;

/// Why to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// SIGTERM, SIGINT or SIGHUP: a terminal that is closed sends the last.
    Signal,
    /// The process that started us has ended.
    ParentEnded,
}

/// Sends a [`Stop`] for every signal, and one when the parent ends, if asked to.
pub(super) fn watch<E: From<Stop> + Send + 'static>(
    events: &UnboundedSender<E>,
    exit_with_parent: bool,
) -> Result<(), RuntimeError> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()] {
        let stream =
            signal(kind).map_err(|error| RuntimeError::Machine(format!("signals cannot be watched: {error}")))?;
        tokio::spawn(forward(stream, events.clone()));
    }
    if exit_with_parent {
        let events = events.clone();
        tokio::spawn(async move {
            process::parent_ended().await;
            drop(events.send(Stop::ParentEnded.into()));
        });
    }
    Ok(())
}

async fn forward<E: From<Stop>>(mut stream: Signal, events: UnboundedSender<E>) {
    while stream.recv().await.is_some() {
        if events.send(Stop::Signal.into()).is_err() {
            return;
        }
    }
}
