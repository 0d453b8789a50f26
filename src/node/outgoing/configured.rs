//! Receivers that the configuration names (`pd_receivers`). A sender connects to them before any request names them, and again
//! when they are lost. So a pair that cannot talk is known at once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::{ConnectState, OutgoingNote};
use crate::ids::{Failure, ReceiverAddress};
use crate::node::tries::{PAUSE_MAX, Tries, is_refusal};

/// How far the sender has come with each of them.
#[derive(Debug)]
pub(super) struct ConfiguredReceivers {
    /// As the configuration has them.
    order: Vec<ReceiverAddress>,
    by_address: BTreeMap<ReceiverAddress, ConfiguredReceiver>,
}

#[derive(Debug)]
struct ConfiguredReceiver {
    state: ConnectState,
    /// When that state began.
    since: Instant,
    tries: Tries,
}

/// What follows when one of them is lost, or could not be connected.
#[derive(Debug)]
pub(super) struct AfterLoss {
    /// How long to wait before the next try.
    pub(super) pause: Duration,
    /// What to note: each change, and not every try.
    pub(super) note: Option<OutgoingNote>,
}

impl ConfiguredReceivers {
    pub(super) fn new(now: Instant, addresses: Vec<ReceiverAddress>) -> Self {
        let new = |address: &ReceiverAddress| {
            (
                address.clone(),
                ConfiguredReceiver { state: ConnectState::Connecting, since: now, tries: Tries::default() },
            )
        };
        Self { by_address: addresses.iter().map(new).collect(), order: addresses }
    }

    /// In the order of the configuration.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&ReceiverAddress, &ConnectState)> {
        self.order.iter().filter_map(|address| Some((address, &self.by_address.get(address)?.state)))
    }

    /// Whether the configuration names this receiver.
    pub(super) fn contains(&self, address: &ReceiverAddress) -> bool {
        self.by_address.contains_key(address)
    }

    /// A receiver can be written to.
    pub(super) fn connected(&mut self, now: Instant, address: &ReceiverAddress) {
        if let Some(reconnect) = self.by_address.get_mut(address) {
            (reconnect.state, reconnect.since) = (ConnectState::Connected, now);
        }
    }

    /// A receiver had to go, so that another could be connected. False: the configuration does not name it.
    pub(super) fn postponed(&mut self, now: Instant, address: &ReceiverAddress) -> bool {
        let Some(reconnect) = self.by_address.get_mut(address) else { return false };
        (reconnect.state, reconnect.since) = (ConnectState::Connecting, now);
        true
    }

    /// A receiver was lost, or could not be connected. None: the configuration does not name it.
    pub(super) fn lost(&mut self, now: Instant, address: &ReceiverAddress, failure: &Failure) -> Option<AfterLoss> {
        let reconnect = self.by_address.get_mut(address)?;
        // Its address stands beside it wherever it is shown.
        let text = failure.text.strip_prefix(&format!("receiver {address}: ")).unwrap_or(&failure.text);
        let failure = Failure::new(failure.kind, text);
        // A receiver that goes as soon as it has come does not reset the pause.
        if reconnect.state == ConnectState::Connected && now.saturating_duration_since(reconnect.since) >= PAUSE_MAX {
            reconnect.tries = Tries::default();
        }
        let pause = reconnect.tries.fail(failure.kind);
        let state = match is_refusal(failure.kind) {
            true => ConnectState::Refused(failure.clone()),
            false => ConnectState::Unreachable(failure.clone()),
        };
        let address = address.clone();
        let note = match (&reconnect.state, &state) {
            (ConnectState::Unreachable(_), ConnectState::Unreachable(_)) => None,
            (before, after @ ConnectState::Refused(_)) if before == after => None,
            (_, ConnectState::Refused(_)) => Some(OutgoingNote::Refused { address, failure }),
            _ => Some(OutgoingNote::PeerDown { address, configured: true, failure }),
        };
        if note.is_some() {
            reconnect.since = now;
        }
        reconnect.state = state;
        Some(AfterLoss { pause, note })
    }
}
