//! Receivers that the configuration names (`pd_receivers`). A sender connects to them before any request names them, and again
//! when they are lost. So a pair that cannot talk is known at once.

use std::time::{Duration, Instant};

use super::{ConnectState, Note, SenderSession, Timer};
use crate::ids::{Failure, FailureKind, PeerAddress, PeerId};

/// From a try that found no process to the next; it doubles with each.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// The longest such pause: a receiver that comes up is connected within it.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// From a refusal to the next try. The same process will refuse again.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// How far the sender has come with one of them.
#[derive(Debug)]
pub(super) struct Reconnect {
    state: ConnectState,
    /// When that state began.
    since: Instant,
    /// Tries in a row that found no process.
    tries: u32,
}

impl SenderSession {
    /// Begins to connect to all of them, at the first timeout.
    pub(super) fn begin_connecting(&mut self, now: Instant) {
        for address in self.settings.receivers.clone() {
            self.timers.set(Timer::Connect(address.clone()), now);
            self.reconnects.insert(address, Reconnect { state: ConnectState::Connecting, since: now, tries: 0 });
        }
    }

    /// The receivers that the configuration names, in that order, and how far the sender has come with each.
    pub fn receivers(&self) -> impl Iterator<Item = (&PeerAddress, &ConnectState)> {
        let known = |address| self.reconnects.get(address).map(|reconnect| (address, &reconnect.state));
        self.settings.receivers.iter().filter_map(known)
    }

    /// Whether the configuration names this receiver.
    pub(super) fn is_configured(&self, address: &PeerAddress) -> bool {
        self.reconnects.contains_key(address)
    }

    /// Tries to connect to one of them.
    pub(super) fn connect_configured(&mut self, now: Instant, address: &PeerAddress) {
        // If it is being connected already, `note_connected` or `note_lost` follows.
        if self.draining || self.peer_by_address.contains_key(address) {
            return;
        }
        let room = self.peers.len() < self.settings.peers_max || self.evict_peer(false);
        if !room || self.peer_for(now, address).is_err() {
            self.timers.set(Timer::Connect(address.clone()), now + PAUSE_MAX);
        }
    }

    /// A receiver can be written to.
    pub(super) fn note_connected(&mut self, now: Instant, address: &PeerAddress) {
        self.timers.cancel(&Timer::Connect(address.clone()));
        if let Some(reconnect) = self.reconnects.get_mut(address) {
            (reconnect.state, reconnect.since) = (ConnectState::Connected, now);
        }
    }

    /// A receiver was lost, or could not be connected. Notes it, and tries again later if the configuration names it; then a
    /// note is made of each change, and not of every try.
    pub(super) fn note_lost(&mut self, address: &PeerAddress, failure: &Failure) {
        let Some(reconnect) = self.reconnects.get_mut(address) else {
            return self.note(Note::PeerDown { address: address.clone(), failure: failure.clone() });
        };
        let now = self.now;
        // Its address stands beside it wherever it is shown.
        let text = failure.text.strip_prefix(&format!("receiver {address}: ")).unwrap_or(&failure.text);
        let failure = Failure::new(failure.kind, text);
        // A receiver that goes as soon as it has come does not reset the pause.
        if reconnect.state == ConnectState::Connected && now.saturating_duration_since(reconnect.since) >= PAUSE_MAX {
            reconnect.tries = 0;
        }
        let (state, pause) = if is_refusal(failure.kind) {
            (ConnectState::Refused(failure.clone()), REFUSED_PAUSE)
        } else {
            let pause = PAUSE_MIN.saturating_mul(1 << reconnect.tries.min(8)).min(PAUSE_MAX);
            reconnect.tries += 1;
            (ConnectState::Unreachable(failure.clone()), pause)
        };
        let (refused, known) = match (&reconnect.state, &state) {
            (ConnectState::Unreachable(_), ConnectState::Unreachable(_)) => (false, true),
            (before, after @ ConnectState::Refused(_)) => (true, before == after),
            _ => (false, false),
        };
        if !known {
            reconnect.since = now;
        }
        reconnect.state = state;
        if !self.draining {
            self.timers.set(Timer::Connect(address.clone()), now + pause);
        }
        if !known {
            let address = address.clone();
            self.note(if refused { Note::Refused { address, failure } } else { Note::PeerDown { address, failure } });
        }
    }

    /// A receiver had to go, so that another could be connected.
    pub(super) fn postpone_connecting(&mut self, address: &PeerAddress) {
        if let Some(reconnect) = self.reconnects.get_mut(address) {
            (reconnect.state, reconnect.since) = (ConnectState::Connecting, self.now);
            self.timers.set(Timer::Connect(address.clone()), self.now + PAUSE_MAX);
        }
    }

    /// Checks that each of them is connected, connecting, or about to be.
    pub(super) fn check_reconnects(&self) -> Result<(), String> {
        for (address, reconnect) in &self.reconnects {
            let peer: Option<&PeerId> = self.peer_by_address.get(address);
            let connected = peer.is_some_and(|peer| self.connection_of(*peer).is_some());
            if connected != (reconnect.state == ConnectState::Connected) {
                return Err(format!(
                    "receiver {address} is said to be {:?}, and connected: {connected}",
                    reconnect.state
                ));
            }
            if peer.is_none() && !self.draining && !self.timers.contains(&Timer::Connect(address.clone())) {
                return Err(format!("nothing will connect to receiver {address}"));
            }
        }
        Ok(())
    }
}

/// Whether a process has refused, and not just been silent.
fn is_refusal(kind: FailureKind) -> bool {
    use FailureKind::{Deadline, PeerLost, PeerUnreachable, ShuttingDown};
    !matches!(kind, PeerUnreachable | PeerLost | Deadline | ShuttingDown)
}
