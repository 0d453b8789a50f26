//! What happened, counted: the notes of a node.

use std::collections::BTreeMap;
use std::time::Duration;

use super::durations::DurationCounts;
use crate::ids::{FailureKind, Registration};
use crate::node::{Note, incoming, outgoing};

/// Every end that is known to be bad. All are shown from the start, because a rate needs the 0 before the 1; a kind
/// that is not listed here appears when it first happens.
const FAILURE_KINDS: [FailureKind; 17] = [
    FailureKind::BadRequest,
    FailureKind::Unknown,
    FailureKind::Limit,
    FailureKind::Busy,
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

/// What takes time of a request that is sent.
const OUTGOING_PHASES: &[&str] = &["handshake", "alloc", "transfer", "commit"];
/// And of one that is received.
const INCOMING_PHASES: &[&str] = &["wait", "write", "fetch"];

/// Numbers by kind of failure.
pub(super) type ByKind = BTreeMap<&'static str, u64>;

/// What one daemon has counted since it started.
#[derive(Debug, Clone)]
pub struct Tally {
    /// `sender`, `receiver` or `both`.
    pub(super) role: &'static str,
    /// Whether the daemon has the half that sends.
    pub(super) sends: bool,
    /// Whether it has the half that receives.
    pub(super) receives: bool,
    pub(super) requests_sent: u64,
    pub(super) requests_ready: u64,
    pub(super) requests_failed: ByKind,
    pub(super) connector_errors: ByKind,
    pub(super) peer_failures: ByKind,
    pub(super) allocations_refused: ByKind,
    /// By what became of them.
    pub(super) registrations: ByKind,
    pub(super) fetches_failed: ByKind,
    pub(super) requests_parked: u64,
    /// Parked requests that were pushed ahead, by what became of it.
    pub(super) pushes_ahead: ByKind,
    pub(super) wrong_guesses: u64,
    pub(super) phases: BTreeMap<&'static str, DurationCounts>,
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
    /// Nothing has happened at a daemon with these halves.
    pub fn new(role: &'static str, sends: bool, receives: bool) -> Self {
        let phases = [(sends, OUTGOING_PHASES), (receives, INCOMING_PHASES)];
        let phases = phases.into_iter().filter(|(has, _)| *has).flat_map(|(_, phases)| phases);
        let kinds: ByKind = FAILURE_KINDS.into_iter().map(|kind| (kind.as_str(), 0)).collect();
        Self {
            role,
            sends,
            receives,
            requests_sent: 0,
            requests_ready: 0,
            requests_failed: kinds.clone(),
            connector_errors: kinds.clone(),
            peer_failures: kinds.clone(),
            allocations_refused: kinds.clone(),
            registrations: Registration::ALL.into_iter().map(|state| (state.as_str(), 0)).collect(),
            fetches_failed: kinds,
            requests_parked: 0,
            pushes_ahead: [("sent", 0), ("dropped", 0)].into(),
            wrong_guesses: 0,
            phases: phases.map(|phase| (*phase, DurationCounts::default())).collect(),
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

    /// Counts what a node notes.
    pub fn count<R>(&mut self, note: &Note<R>) {
        match note {
            Note::Grown { result: Ok(_) } => self.growths += 1,
            Note::Grown { result: Err(_) } => self.growths_failed += 1,
            Note::Outgoing(note) => self.count_outgoing(note),
            Note::Incoming(note) => self.count_incoming(note),
        }
    }

    fn count_outgoing(&mut self, note: &outgoing::OutgoingNote) {
        use outgoing::OutgoingNote;
        match note {
            OutgoingNote::PeerUp { took, .. } => {
                self.handshakes += 1;
                self.add_phase("handshake", *took);
            }
            OutgoingNote::PeerDown { failure, .. } | OutgoingNote::Refused { failure, .. } => {
                add(&mut self.peer_failures, failure.kind)
            }
            OutgoingNote::Opened { chunks, already_sent, took, .. } => {
                self.count_chunks(*chunks, *already_sent);
                self.add_phase("alloc", *took);
            }
            OutgoingNote::Sent { bytes, phases, .. } => {
                self.requests_sent += 1;
                self.bytes += bytes;
                self.add_phase("transfer", phases.transfer);
                self.add_phase("commit", phases.commit);
            }
            OutgoingNote::Failed { failure, .. } => self.count_failure(failure.kind),
            OutgoingNote::Parked { .. } => self.requests_parked += 1,
            OutgoingNote::LeaseEnded { .. } => {}
            OutgoingNote::PushedAhead { bytes, .. } => {
                *self.pushes_ahead.entry("sent").or_default() += 1;
                self.bytes += bytes;
            }
            OutgoingNote::AheadDropped { .. } => *self.pushes_ahead.entry("dropped").or_default() += 1,
            OutgoingNote::WrongGuess { .. } => self.wrong_guesses += 1,
            OutgoingNote::Registered { state, .. } => *self.registrations.entry(state.as_str()).or_default() += 1,
            OutgoingNote::Unexpected { .. } | OutgoingNote::Misdirected { .. } => self.unexpected_messages += 1,
        }
    }

    fn count_incoming<R>(&mut self, note: &incoming::IncomingNote<R>) {
        use incoming::IncomingNote;
        match note {
            IncomingNote::PeerConnected { .. } => self.handshakes += 1,
            IncomingNote::PeerRefused { failure, .. } => add(&mut self.peer_failures, failure.kind),
            IncomingNote::PeerLost { .. } | IncomingNote::PeerEvicted { .. } => {
                add(&mut self.peer_failures, FailureKind::PeerLost)
            }
            // The failure of its request is counted.
            IncomingNote::Corrupted { .. } => {}
            IncomingNote::Granted { chunks, already_sent, waited, .. } => {
                self.count_chunks(*chunks, *already_sent);
                self.add_phase("wait", *waited);
            }
            IncomingNote::Refused { failure, .. } => add(&mut self.allocations_refused, failure.kind),
            IncomingNote::Committed { bytes, took, .. } => {
                self.requests_ready += 1;
                self.bytes += bytes;
                self.add_phase("write", *took);
            }
            IncomingNote::ArrivedAhead { bytes, .. } => self.bytes += bytes,
            IncomingNote::AheadFailed { quarantined, .. } => self.slots_quarantined += *quarantined as u64,
            IncomingNote::Failed { failure, quarantined, .. } => {
                self.count_failure(failure.kind);
                self.slots_quarantined += *quarantined as u64;
            }
            IncomingNote::Fetched { after, .. } => self.add_phase("fetch", *after),
            IncomingNote::FetchFailed { failure, .. } => add(&mut self.fetches_failed, failure.kind),
            IncomingNote::Unquarantined { slots, .. } => self.slots_unquarantined += *slots as u64,
            IncomingNote::Unexpected { .. } => self.unexpected_messages += 1,
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
