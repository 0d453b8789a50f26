//! What happened, counted: the notes of either session.

use std::collections::BTreeMap;
use std::time::Duration;

use super::durations::Durations;
use crate::ids::FailureKind;
use crate::protocol::{receiver, sender};

/// Every end that is known to be bad. All are shown from the start, because a rate needs the 0 before the 1; a kind
/// that is not listed here appears when it first happens.
const FAILURE_KINDS: [FailureKind; 16] = [
    FailureKind::BadRequest,
    FailureKind::Unknown,
    FailureKind::Limit,
    FailureKind::TooLarge,
    FailureKind::NoSlots,
    FailureKind::Deadline,
    FailureKind::Cancelled,
    FailureKind::Expired,
    FailureKind::PeerUnreachable,
    FailureKind::PeerLost,
    FailureKind::HandshakeRefused,
    FailureKind::LayoutMismatch,
    FailureKind::TransferFailed,
    FailureKind::ShuttingDown,
    FailureKind::Internal,
    FailureKind::Other,
];

/// Numbers by kind of failure.
pub(super) type ByKind = BTreeMap<&'static str, u64>;

/// What one daemon has counted since it started.
#[derive(Debug, Clone)]
pub struct Tally {
    /// `sender` or `receiver`.
    pub(super) role: &'static str,
    /// The outcome of a request that went well.
    pub(super) done: &'static str,
    pub(super) requests_done: u64,
    pub(super) requests_failed: ByKind,
    pub(super) connector_errors: ByKind,
    pub(super) peer_failures: ByKind,
    pub(super) allocations_refused: ByKind,
    pub(super) phases: BTreeMap<&'static str, Durations>,
    pub(super) handshakes: u64,
    pub(super) bytes: u64,
    pub(super) chunks: u64,
    pub(super) chunks_already_sent: u64,
    pub(super) slots_quarantined: u64,
    pub(super) slots_unquarantined: u64,
    pub(super) integrity_failures: u64,
    pub(super) growths: u64,
    pub(super) growths_failed: u64,
    pub(super) unexpected_messages: u64,
}

impl Tally {
    /// Nothing has happened at a sender.
    pub fn sender() -> Self {
        Self::new("sender", "sent", &["handshake", "alloc", "transfer", "commit"])
    }

    /// Nothing has happened at a receiver.
    pub fn receiver() -> Self {
        Self::new("receiver", "ready", &["wait", "write", "fetch"])
    }

    fn new(role: &'static str, done: &'static str, phases: &[&'static str]) -> Self {
        let kinds: ByKind = FAILURE_KINDS.into_iter().map(|kind| (kind.as_str(), 0)).collect();
        Self {
            role,
            done,
            requests_done: 0,
            requests_failed: kinds.clone(),
            connector_errors: kinds.clone(),
            peer_failures: kinds.clone(),
            allocations_refused: kinds,
            phases: phases.iter().map(|phase| (*phase, Durations::default())).collect(),
            handshakes: 0,
            bytes: 0,
            chunks: 0,
            chunks_already_sent: 0,
            slots_quarantined: 0,
            slots_unquarantined: 0,
            integrity_failures: 0,
            growths: 0,
            growths_failed: 0,
            unexpected_messages: 0,
        }
    }

    /// Counts what a sender's session notes.
    pub fn count_sender(&mut self, note: &sender::Note) {
        use sender::Note;
        match note {
            Note::Grown { result } => self.count_growth(result),
            Note::PeerUp { took, .. } => {
                self.handshakes += 1;
                self.add_phase("handshake", *took);
            }
            Note::PeerDown { failure, .. } | Note::Refused { failure, .. } => {
                add(&mut self.peer_failures, failure.kind)
            }
            Note::Opened { chunks, already_sent, took, .. } => {
                self.count_chunks(*chunks, *already_sent);
                self.add_phase("alloc", *took);
            }
            Note::Sent { bytes, phases, .. } => {
                self.requests_done += 1;
                self.bytes += bytes;
                self.add_phase("transfer", phases.transfer);
                self.add_phase("commit", phases.commit);
            }
            Note::Failed { failure, .. } => self.count_failure(failure.kind),
            Note::Unexpected { .. } => self.unexpected_messages += 1,
        }
    }

    /// Counts what a receiver's session notes.
    pub fn count_receiver<R>(&mut self, note: &receiver::Note<R>) {
        use receiver::Note;
        match note {
            Note::Grown { result } => self.count_growth(result),
            Note::PeerConnected { .. } => self.handshakes += 1,
            Note::PeerRefused { failure, .. } => add(&mut self.peer_failures, failure.kind),
            Note::PeerLost { .. } | Note::PeerEvicted { .. } => add(&mut self.peer_failures, FailureKind::PeerLost),
            // The failure of its request is counted.
            Note::Corrupted { .. } => {}
            Note::Granted { chunks, already_sent, waited, .. } => {
                self.count_chunks(*chunks, *already_sent);
                self.add_phase("wait", *waited);
            }
            Note::Refused { failure, .. } => add(&mut self.allocations_refused, failure.kind),
            Note::Committed { bytes, took, .. } => {
                self.requests_done += 1;
                self.bytes += bytes;
                self.add_phase("write", *took);
            }
            Note::Failed { failure, quarantined, .. } => {
                self.count_failure(failure.kind);
                self.slots_quarantined += *quarantined as u64;
            }
            Note::Fetched { after, .. } => self.add_phase("fetch", *after),
            Note::Unquarantined { slots, .. } => self.slots_unquarantined += *slots as u64,
            Note::Unexpected { .. } => self.unexpected_messages += 1,
        }
    }

    /// Counts a message that cannot be read.
    pub fn count_unreadable(&mut self) {
        self.unexpected_messages += 1;
    }

    /// Counts an `error` that a client of the connector API was answered with.
    pub fn count_connector_error(&mut self, kind: FailureKind) {
        add(&mut self.connector_errors, kind);
    }

    /// Requests that ended badly, by kind; only the kinds that happened.
    pub fn failures(&self) -> BTreeMap<String, u64> {
        let happened = self.requests_failed.iter().filter(|(_, count)| **count > 0);
        happened.map(|(kind, count)| ((*kind).to_owned(), *count)).collect()
    }

    fn count_failure(&mut self, kind: FailureKind) {
        add(&mut self.requests_failed, kind);
        if kind == FailureKind::Corrupted {
            self.integrity_failures += 1;
        }
    }

    fn count_growth(&mut self, result: &Result<u64, String>) {
        match result {
            Ok(_) => self.growths += 1,
            Err(_) => self.growths_failed += 1,
        }
    }

    fn count_chunks(&mut self, chunks: usize, already_sent: usize) {
        self.chunks += chunks as u64;
        self.chunks_already_sent += already_sent as u64;
    }

    fn add_phase(&mut self, phase: &'static str, time: Duration) {
        self.phases.entry(phase).or_default().add(time);
    }
}

fn add(counts: &mut ByKind, kind: FailureKind) {
    *counts.entry(kind.as_str()).or_default() += 1;
}
