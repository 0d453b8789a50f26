//! What a node notes, as log lines and counted: which peer, which request, how many chunks and bytes, how long each phase.

use std::time::Duration;

use tracing::{debug, error, info, warn};

use crate::config::Role;
use crate::ids::FailureKind;
use crate::metrics::Tally;
use crate::node::{Note, incoming, outgoing};

/// Milliseconds, to the microsecond.
fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// Notes that were not logged yet, and the counts of all.
pub(super) struct Notes {
    unlogged: Vec<Note>,
    tally: Tally,
}

impl Notes {
    pub(super) fn new(role: Role) -> Self {
        Self { unlogged: Vec::new(), tally: Tally::new(role.as_str(), role.sends(), role.receives()) }
    }

    pub(super) fn push(&mut self, note: Note) {
        self.unlogged.push(note);
    }

    /// Counts an `error` that a client of the connector API was answered with.
    pub(super) fn count_connector_error(&mut self, kind: FailureKind) {
        self.tally.count_connector_error(kind);
    }

    /// Counts and logs what was noted since.
    pub(super) fn log(&mut self) {
        for note in self.unlogged.drain(..) {
            self.tally.count(&note);
            match note {
                Note::Grown { result } => log_grown(result),
                Note::Outgoing(note) => log_outgoing(note),
                Note::Incoming(note) => log_incoming(note),
            }
        }
    }

    pub(super) const fn tally(&self) -> &Tally {
        &self.tally
    }
}

fn log_grown(result: Result<u64, String>) {
    match result {
        Ok(len_bytes) => info!(len_bytes, "pd_buffer has grown"),
        Err(text) => warn!("pd_buffer could not grow: {text}"),
    }
}

fn log_incoming(note: incoming::Note) {
    use incoming::Note;
    match note {
        Note::PeerConnected { instance } => info!(sender = %instance, "connected"),
        Note::PeerRefused { instance, failure } => {
            warn!(sender = %instance, kind = %failure.kind, "refused: {}", failure.text);
        }
        Note::PeerLost { instance, reason } => info!(sender = %instance, "sender {reason}"),
        Note::Corrupted { request, instance, chunks } => warn!(
            %request, sender = %instance, chunks, "chunks arrived otherwise than they were sent"
        ),
        Note::Granted { request, instance, chunks, already_sent, waited } => debug!(
            %request, sender = %instance, chunks, already_sent, waited_ms = ms(waited), "granted"
        ),
        Note::Refused { request, instance, failure } => {
            let request = request.map_or_else(|| "-".to_owned(), |id| id.to_string());
            warn!(%request, sender = %instance, kind = %failure.kind, "refused: {}", failure.text);
        }
        Note::Committed { request, instance, chunks, bytes, took } => info!(
            %request, sender = %instance, chunks, bytes, write_ms = ms(took), "ready"
        ),
        // Somebody wanted it so.
        Note::Failed { request, instance, failure, quarantined } if failure.kind == FailureKind::Cancelled => {
            info!(%request, sender = %instance, quarantined, "cancelled: {}", failure.text);
        }
        Note::Failed { request, instance, failure, quarantined } => warn!(
            %request, sender = %instance, kind = %failure.kind, quarantined, "failed: {}", failure.text
        ),
        Note::Fetched { request, after } => debug!(%request, after_ms = ms(after), "fetched"),
        Note::Unquarantined { instance, slots } => {
            debug!(sender = %instance, slots, "writer has stopped, slots are free again");
        }
        Note::Unexpected { port, message } => warn!(?port, message, "a message that this port does not take, ignored"),
    }
}

fn log_outgoing(note: outgoing::Note) {
    use outgoing::Note;
    match note {
        Note::PeerUp { address, instance, len_bytes, took } => info!(
            receiver = %address, instance, buffer_bytes = len_bytes, took_ms = ms(took), "connected"
        ),
        Note::PeerDown { address, failure } => {
            warn!(receiver = %address, kind = %failure.kind, "receiver given up: {}", failure.text);
        }
        Note::Refused { address, failure } => {
            error!(receiver = %address, kind = %failure.kind, "receiver refused: {}", failure.text);
        }
        Note::Opened { request, address, chunks, already_sent, took } => debug!(
            %request, receiver = %address, chunks, already_sent, alloc_ms = ms(took), "opened"
        ),
        Note::Sent { request, address, chunks, bytes, phases } => info!(
            %request, receiver = %address, chunks, bytes,
            alloc_ms = ms(phases.alloc), transfer_ms = ms(phases.transfer), commit_ms = ms(phases.commit), "sent"
        ),
        Note::Failed { request, address, failure, in_flight } if failure.kind == FailureKind::Cancelled => {
            info!(%request, receiver = %address, in_flight, "cancelled: {}", failure.text);
        }
        Note::Failed { request, address, failure, in_flight } => warn!(
            %request, receiver = %address, kind = %failure.kind, in_flight, "failed: {}", failure.text
        ),
        Note::Unexpected { address, message } => {
            warn!(receiver = %address, message, "an unexpected message, ignored");
        }
    }
}
