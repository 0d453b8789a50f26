//! What a node notes, as log lines and counted: which peer, which request, how many chunks and bytes, how long each phase.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};

use super::ports::RouteKey;
use crate::config::Role;
use crate::ids::{FailureKind, ReceiverAddress};
use crate::metrics::Tally;
use crate::node::{Note, Port, incoming, outgoing};
use crate::side_channel::RateLimited;

/// Milliseconds, to the microsecond.
fn ms(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// Notes that were not logged yet, and the counts of all.
pub(super) struct Notes {
    unlogged: Vec<Note<RouteKey>>,
    log: Log,
    tally: Tally,
}

impl Notes {
    pub(super) fn new(role: Role) -> Self {
        Self {
            unlogged: Vec::new(),
            log: Log::default(),
            tally: Tally::new(role.as_str(), role.sends(), role.receives()),
        }
    }

    pub(super) fn push(&mut self, note: Note<RouteKey>) {
        self.unlogged.push(note);
    }

    /// Counts an `error` that a client of the connector API was answered with.
    pub(super) fn count_connector_error(&mut self, kind: FailureKind) {
        self.tally.count_connector_error(kind);
    }

    /// Counts a message of a peer that cannot be read.
    pub(super) fn count_unreadable(&mut self) {
        self.tally.count_unreadable();
    }

    /// Counts and logs what was noted since.
    pub(super) fn log(&mut self) {
        for note in self.unlogged.drain(..) {
            self.tally.count(&note);
            match note {
                Note::Grown { result } => log_grown(result),
                Note::Outgoing(note) => self.log.outgoing(note),
                Note::Incoming(note) => self.log.incoming(note),
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

/// The log of one daemon. A peer can cause some kinds of line as often as it likes: of each of these, and for each kind of
/// failure in it, one is written a second. The others are counted in the next one as `unsaid`.
#[derive(Debug, Default)]
struct Log {
    limits: BTreeMap<LineKind, RateLimited>,
    receivers: BTreeMap<ReceiverAddress, LostReceiver>,
}

/// A receiver that was given up. It may come and go for as long as it is configured wrongly: the same reason is a line a
/// minute.
#[derive(Debug)]
struct LostReceiver {
    reason: FailureKind,
    limit: RateLimited,
    /// The latest line about its loss was not written, and the one about its return is not either.
    quiet: bool,
}

/// Most receivers that are remembered for that.
const RECEIVERS_MAX: usize = 4096;

/// Nothing but the configuration ends it, and it goes on as fast as senders come back: a line a minute is enough.
const EVICTED: &str = "a sender is evicted";
const MINUTE: Duration = Duration::from_secs(60);

/// A kind of note, and of the failure in it.
type LineKind = (&'static str, Option<FailureKind>);

impl Log {
    /// How many lines of a limited kind were not written since the last one. None: this one is not written either.
    fn permit(&mut self, limited: Option<LineKind>) -> Option<u64> {
        limited.map_or(Some(0), |kind| self.limit(kind).permit(Instant::now()))
    }

    fn limit(&mut self, kind: LineKind) -> &mut RateLimited {
        let fresh = || if kind == (EVICTED, None) { RateLimited::every(MINUTE) } else { RateLimited::default() };
        self.limits.entry(kind).or_insert_with(fresh)
    }

    fn incoming(&mut self, note: incoming::IncomingNote<RouteKey>) {
        use incoming::IncomingNote;
        let limited = match &note {
            IncomingNote::PeerRefused { failure, .. } => Some(("a sender is refused", Some(failure.kind))),
            IncomingNote::Refused { failure, .. } => Some(("a request is refused", Some(failure.kind))),
            IncomingNote::Unexpected { message, .. } => Some((*message, None)),
            IncomingNote::PeerEvicted { .. } => Some((EVICTED, None)),
            IncomingNote::FetchFailed { failure, .. } => Some(("nothing is fetched", Some(failure.kind))),
            _ => None,
        };
        let Some(unsaid) = self.permit(limited) else { return };
        match note {
            IncomingNote::PeerConnected { instance } => info!(sender = %instance, "connected"),
            IncomingNote::PeerRefused { instance, failure } => {
                warn!(sender = %instance, kind = %failure.kind, unsaid, "refused: {}", failure.text);
            }
            IncomingNote::PeerLost { instance, reason } => info!(sender = %instance, "sender {reason}"),
            IncomingNote::PeerEvicted { instance, peers_max } => warn!(
                sender = %instance, unsaid, "{peers_max} senders are connected, the limit, and one that is in use was disconnected \
                 to make room for another; it comes back, and another has to go: raise pd_max_peers to the number of senders \
                 that name this receiver"
            ),
            IncomingNote::Corrupted { request, instance, chunks } => warn!(
                %request, sender = %instance, chunks, "chunks arrived otherwise than they were sent"
            ),
            IncomingNote::Granted { request, instance, chunks, already_sent, waited } => debug!(
                %request, sender = %instance, chunks, already_sent, waited_ms = ms(waited), "granted"
            ),
            IncomingNote::Refused { request, instance, failure } => {
                let request = request.map_or_else(|| "-".to_owned(), |id| id.to_string());
                warn!(%request, sender = %instance, kind = %failure.kind, unsaid, "refused: {}", failure.text);
            }
            IncomingNote::Committed { request, instance, chunks, bytes, took } => info!(
                %request, sender = %instance, chunks, bytes, write_ms = ms(took), "ready"
            ),
            IncomingNote::ArrivedAhead { request, instance, chunks, bytes } => debug!(
                %request, sender = %instance, chunks, bytes, "here before anybody asks"
            ),
            IncomingNote::AheadFailed { request, instance, failure, quarantined } => debug!(
                %request, sender = %instance, kind = %failure.kind, quarantined, "not pushed ahead: {}", failure.text
            ),
            // Somebody wanted it so.
            IncomingNote::Failed { request, instance, failure, quarantined }
                if failure.kind == FailureKind::Cancelled =>
            {
                info!(%request, sender = %instance, quarantined, "cancelled: {}", failure.text);
            }
            IncomingNote::Failed { request, instance, failure, quarantined } => warn!(
                %request, sender = %instance, kind = %failure.kind, quarantined, "failed: {}", failure.text
            ),
            IncomingNote::Fetched { request, after } => debug!(%request, after_ms = ms(after), "fetched"),
            IncomingNote::FetchFailed { request, instance, failure } => {
                warn!(%request, sender = %instance, kind = %failure.kind, unsaid, "not fetched: {}", failure.text);
            }
            IncomingNote::Unquarantined { instance, slots } => {
                debug!(sender = %instance, slots, "writer has stopped, slots are free again");
            }
            IncomingNote::Unexpected { from, port, message } => warn!(
                %from, seen = message, unsaid, "not taken at the port for {}, which takes {} and pd-sender's own messages, each once; \
                 correct the ports that this sender was given", port.purpose(), port.accepted()
            ),
        }
    }

    /// A receiver is given up. As [`permit`](Self::permit). A receiver that the configuration does not name may be anything that
    /// was asked for at the rendezvous port: all of those together are limited as well.
    fn permit_loss(&mut self, address: &ReceiverAddress, reason: FailureKind, configured: bool) -> Option<u64> {
        if self.receivers.len() >= RECEIVERS_MAX && !self.receivers.contains_key(address) {
            self.receivers.clear();
        }
        let fresh = || LostReceiver { reason, limit: RateLimited::every(MINUTE), quiet: false };
        let receiver = self.receivers.entry(address.clone()).or_insert_with(fresh);
        if receiver.reason != reason {
            *receiver = fresh();
        }
        let now = Instant::now();
        let mut unsaid = receiver.limit.permit(now);
        if let Some(others) = unsaid.filter(|_| !configured) {
            unsaid = self.limit(("a receiver is given up", Some(reason))).permit_with(now, others);
        }
        if let Some(receiver) = self.receivers.get_mut(address) {
            receiver.quiet = unsaid.is_none();
        }
        unsaid
    }

    fn outgoing(&mut self, note: outgoing::OutgoingNote) {
        use outgoing::OutgoingNote;
        let limited = match &note {
            OutgoingNote::Unexpected { message, .. } | OutgoingNote::Misdirected { message } => Some((*message, None)),
            OutgoingNote::Failed { failure, registered: true, .. } => {
                Some(("what a receiver asked for is not sent", Some(failure.kind)))
            }
            _ => None,
        };
        let Some(unsaid) = self.permit(limited) else { return };
        match note {
            OutgoingNote::PeerUp { address, .. }
                if self.receivers.get(&address).is_some_and(|receiver| receiver.quiet) => {}
            OutgoingNote::PeerUp { address, instance, len_bytes, took } => info!(
                receiver = %address, instance, buffer_bytes = len_bytes, took_ms = ms(took), "connected"
            ),
            OutgoingNote::PeerDown { address, configured, failure } => {
                if let Some(unsaid) = self.permit_loss(&address, failure.kind, configured) {
                    warn!(receiver = %address, kind = %failure.kind, unsaid, "receiver given up: {}", failure.text);
                }
            }
            OutgoingNote::Refused { address, failure } => {
                error!(receiver = %address, kind = %failure.kind, "receiver refused: {}", failure.text);
            }
            OutgoingNote::Parked { request, chunks, lease } => debug!(%request, chunks, lease_ms = ms(lease), "parked"),
            OutgoingNote::LeaseEnded { chunks, released } => debug!(chunks, released, "parked chunks may make room"),
            OutgoingNote::Registered { request, instance, state, chunks } => {
                debug!(%request, receiver = %instance, ?state, chunks, "asked for what is parked");
            }
            OutgoingNote::PushedAhead { request, receiver, chunks, bytes } => {
                debug!(%request, receiver, chunks, bytes, "pushed ahead");
            }
            OutgoingNote::AheadDropped { request, receiver, failure } => {
                debug!(%request, receiver, kind = %failure.kind, "not pushed ahead: {}", failure.text);
            }
            OutgoingNote::WrongGuess { request, guessed, asks } => {
                debug!(%request, guessed, asks, "pushed ahead to another receiver than the one that asks");
            }
            OutgoingNote::Opened { request, receiver, chunks, already_sent, took } => debug!(
                %request, receiver, chunks, already_sent, alloc_ms = ms(took), "opened"
            ),
            OutgoingNote::Sent { request, receiver, chunks, bytes, phases } => info!(
                %request, receiver, chunks, bytes,
                alloc_ms = ms(phases.alloc), transfer_ms = ms(phases.transfer), commit_ms = ms(phases.commit), "sent"
            ),
            OutgoingNote::Failed { request, receiver, failure, in_flight, .. }
                if failure.kind == FailureKind::Cancelled =>
            {
                info!(%request, receiver, in_flight, unsaid, "cancelled: {}", failure.text);
            }
            OutgoingNote::Failed { request, receiver, failure, in_flight, .. } => warn!(
                %request, receiver, kind = %failure.kind, in_flight, unsaid, "failed: {}", failure.text
            ),
            OutgoingNote::Misdirected { message } => warn!(
                seen = message,
                unsaid,
                "not taken at the port for {}, which takes {}; correct the port that it was sent to",
                Port::Rendezvous.purpose(),
                Port::Rendezvous.accepted()
            ),
            OutgoingNote::Unexpected { address, message } => {
                warn!(receiver = %address, seen = message, unsaid, "an unexpected message, ignored");
            }
        }
    }
}
