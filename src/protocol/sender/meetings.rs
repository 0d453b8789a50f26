//! Receivers that a sender was told of at start: met before any request names them, and met again when they are lost, so
//! that a pair that cannot talk is known at once.

use std::time::{Duration, Instant};

use super::{Acquaintance, Note, SenderSession, Timer};
use crate::ids::{Failure, FailureKind, PeerAddress, PeerId};

/// From a try that found nobody to the next; it doubles with each.
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// The longest such pause: a receiver that comes up is met within it.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// From a refusal to the next try. Whoever refuses will do so again, until it is restarted as another.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);

/// How far it has come with one of them.
#[derive(Debug)]
pub(super) struct Meeting {
    state: Acquaintance,
    /// When that state began.
    since: Instant,
    /// Tries in a row that found nobody.
    tries: u32,
}

impl SenderSession {
    /// Everybody that we were told of is met as soon as time begins to pass.
    pub(super) fn begin_meetings(&mut self, now: Instant) {
        for address in self.settings.receivers.clone() {
            self.timers.set(Timer::Meet(address.clone()), now);
            self.meetings.insert(address, Meeting { state: Acquaintance::Meeting, since: now, tries: 0 });
        }
    }

    /// The receivers that we were told of, in that order, and how far each has been met.
    pub fn receivers(&self) -> impl Iterator<Item = (&PeerAddress, &Acquaintance)> {
        let known = |address| self.meetings.get(address).map(|meeting| (address, &meeting.state));
        self.settings.receivers.iter().filter_map(known)
    }

    /// Whether it is one that we were told of.
    pub(super) fn is_awaited(&self, address: &PeerAddress) -> bool {
        self.meetings.contains_key(address)
    }

    /// Tries to meet one of them.
    pub(super) fn meet(&mut self, now: Instant, address: &PeerAddress) {
        // Of one that is being met already the end is heard.
        if self.draining || self.peer_by_address.contains_key(address) {
            return;
        }
        let room = self.peers.len() < self.settings.peers_max || self.evict_peer(false);
        if !room || self.peer_for(now, address).is_err() {
            self.timers.set(Timer::Meet(address.clone()), now + PAUSE_MAX);
        }
    }

    /// A receiver can be written to.
    pub(super) fn met(&mut self, now: Instant, address: &PeerAddress) {
        self.timers.cancel(&Timer::Meet(address.clone()));
        if let Some(meeting) = self.meetings.get_mut(address) {
            (meeting.state, meeting.since) = (Acquaintance::Met, now);
        }
    }

    /// A receiver was lost, or not met: notes it, and tries again later. Of one that we were told of the news is noted, and
    /// not every try.
    pub(super) fn missed(&mut self, address: &PeerAddress, failure: &Failure) {
        let Some(meeting) = self.meetings.get_mut(address) else {
            return self.note(Note::PeerDown { address: address.clone(), failure: failure.clone() });
        };
        let now = self.now;
        // Its address stands beside it wherever it is shown.
        let text = failure.text.strip_prefix(&format!("receiver {address}: ")).unwrap_or(&failure.text);
        let failure = Failure::new(failure.kind, text);
        // One that goes as soon as it has come is not sought as often as it likes.
        if meeting.state == Acquaintance::Met && now.saturating_duration_since(meeting.since) >= PAUSE_MAX {
            meeting.tries = 0;
        }
        let (state, pause) = if is_refusal(failure.kind) {
            (Acquaintance::Refused(failure.clone()), REFUSED_PAUSE)
        } else {
            let pause = PAUSE_MIN.saturating_mul(1 << meeting.tries.min(8)).min(PAUSE_MAX);
            meeting.tries += 1;
            (Acquaintance::Unreachable(failure.clone()), pause)
        };
        let (refused, known) = match (&meeting.state, &state) {
            (Acquaintance::Unreachable(_), Acquaintance::Unreachable(_)) => (false, true),
            (before, after @ Acquaintance::Refused(_)) => (true, before == after),
            _ => (false, false),
        };
        if !known {
            meeting.since = now;
        }
        meeting.state = state;
        if !self.draining {
            self.timers.set(Timer::Meet(address.clone()), now + pause);
        }
        if !known {
            let address = address.clone();
            self.note(if refused { Note::Refused { address, failure } } else { Note::PeerDown { address, failure } });
        }
    }

    /// A receiver had to go, so that another could be met.
    pub(super) fn put_off_meeting(&mut self, address: &PeerAddress) {
        if let Some(meeting) = self.meetings.get_mut(address) {
            (meeting.state, meeting.since) = (Acquaintance::Meeting, self.now);
            self.timers.set(Timer::Meet(address.clone()), self.now + PAUSE_MAX);
        }
    }

    /// Checks that everybody is either met, being met, or about to be.
    pub(super) fn check_meetings(&self) -> Result<(), String> {
        for (address, meeting) in &self.meetings {
            let peer: Option<&PeerId> = self.peer_by_address.get(address);
            let met = peer.is_some_and(|peer| self.connection_of(*peer).is_some());
            if met != (meeting.state == Acquaintance::Met) {
                return Err(format!("receiver {address} is said to be {:?}, and connected: {met}", meeting.state));
            }
            if peer.is_none() && !self.draining && !self.timers.contains(&Timer::Meet(address.clone())) {
                return Err(format!("nobody is going to meet receiver {address}"));
            }
        }
        Ok(())
    }
}

/// Whether somebody has said no, and not just nothing.
fn is_refusal(kind: FailureKind) -> bool {
    use FailureKind::{Deadline, PeerLost, PeerUnreachable, ShuttingDown};
    !matches!(kind, PeerUnreachable | PeerLost | Deadline | ShuttingDown)
}
