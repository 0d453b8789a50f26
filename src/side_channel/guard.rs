//! Who may talk at one port: every connection's way from stranger to peer, and the seals of those who are.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::peer_tag::PeerTag;
use super::seldom::Seldom;
use crate::ids::SharedSecret;
use crate::wire::auth::{AuthError, Channel, Opener, Refused, RouterHandshake, RouterStep, Sealed, Sealer};

/// Connections of one port that may be on their way to prove themselves. When there are more, the oldest is closed: an
/// honest peer needs two round trips, so it gets through although others come and say nothing.
pub const AUTHENTICATING_MAX: usize = 256;

/// What whoever connects to a port has to do before it is heard, or what we have to do where we connect.
#[derive(Debug, Clone)]
pub struct Access {
    /// Which port it is.
    pub channel: Channel,
    /// What has to be proved to know; none: nothing is asked for, and whoever wants to prove it is turned away.
    pub secret: Option<SharedSecret>,
    /// How long a connection may take over its proof.
    pub timeout: Duration,
}

/// The connections of one port that wants proof.
pub(super) struct Guard {
    secret: SharedSecret,
    channel: Channel,
    timeout: Duration,
    peers: BTreeMap<PeerTag, Peer>,
    /// Those that have not proved themselves, the oldest first.
    strangers: BTreeSet<(Instant, PeerTag)>,
    complaints: Seldom,
}

struct Peer {
    /// Where it comes from; empty where the library has not said.
    address: String,
    state: State,
}

enum State {
    /// Until it has proved itself.
    Stranger { since: Instant, handshake: RouterHandshake },
    /// From then on.
    Known { sealer: Sealer, opener: Opener },
}

/// What to do about a message.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It is the peer's own word.
    Deliver(Bytes),
    /// Nobody else needs to know: send this back.
    Answer(Vec<u8>),
    /// Nothing.
    Ignore,
    /// It has proved itself with this message.
    Welcome,
    /// Send this, if anything, and close the connection.
    Close {
        farewell: Option<Vec<u8>>,
        /// It had proved itself: others have heard of it.
        was_known: bool,
    },
}

impl Guard {
    pub(super) fn new(secret: SharedSecret, channel: Channel, timeout: Duration) -> Self {
        Self {
            secret,
            channel,
            timeout,
            peers: BTreeMap::new(),
            strangers: BTreeSet::new(),
            complaints: Seldom::default(),
        }
    }

    /// Somebody has connected. Returns who has to be closed to make room.
    pub(super) fn admit(&mut self, now: Instant, tag: PeerTag, address: String) -> Option<PeerTag> {
        // Its first message may have come before the news of it; and whoever chooses a name that is taken is nobody.
        if let Some(peer) = self.peers.get_mut(&tag) {
            if peer.address.is_empty() {
                peer.address = address;
            }
            return None;
        }
        let handshake = RouterHandshake::new(self.secret.clone(), self.channel, rand::random());
        self.strangers.insert((now, tag.clone()));
        self.peers.insert(tag, Peer { address, state: State::Stranger { since: now, handshake } });
        let crowded = self.strangers.len() > AUTHENTICATING_MAX;
        let (_, oldest) = if crowded { self.strangers.pop_first()? } else { return None };
        let address = self.peers.remove(&oldest).map(|peer| peer.address).unwrap_or_default();
        self.complain(now, &oldest, &address, false, "too many have not authenticated yet, and it is the oldest");
        Some(oldest)
    }

    /// A message came. Also returns who has to be closed to make room for whoever sent it.
    pub(super) fn judge(&mut self, now: Instant, tag: &PeerTag, payload: &Bytes) -> (Option<PeerTag>, Verdict) {
        let evicted = self.admit(now, tag.clone(), String::new());
        let Some(Peer { address, state }) = self.peers.remove(tag) else { return (evicted, Verdict::Ignore) };
        if let State::Stranger { since, .. } = state {
            self.strangers.remove(&(since, tag.clone()));
        }
        let was_known = matches!(state, State::Known { .. });
        let verdict = match state.hear(payload) {
            Ok((state, verdict)) => {
                match state {
                    State::Stranger { since, .. } => {
                        self.strangers.insert((since, tag.clone()));
                    }
                    State::Known { .. } if !was_known => {
                        tracing::debug!(port = %self.channel, peer = %address, "authenticated");
                    }
                    State::Known { .. } => {}
                }
                self.peers.insert(tag.clone(), Peer { address, state });
                verdict
            }
            Err(Refused { error, farewell }) => {
                self.complain(now, tag, &address, was_known, &error.to_string());
                Verdict::Close { farewell, was_known }
            }
        };
        (evicted, verdict)
    }

    /// A connection has ended. Whether it had proved itself.
    pub(super) fn forget(&mut self, tag: &PeerTag) -> bool {
        match self.peers.remove(tag).map(|peer| peer.state) {
            Some(State::Known { .. }) => true,
            Some(State::Stranger { since, .. }) => {
                self.strangers.remove(&(since, tag.clone()));
                false
            }
            None => false,
        }
    }

    /// When somebody will have taken too long.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.strangers.first().map(|(since, _)| *since + self.timeout)
    }

    /// Somebody who has taken too long, and is to be closed.
    pub(super) fn pop_late(&mut self, now: Instant) -> Option<PeerTag> {
        if self.next_deadline()? > now {
            return None;
        }
        let (_, tag) = self.strangers.pop_first()?;
        let address = self.peers.remove(&tag).map(|peer| peer.address).unwrap_or_default();
        let text = format!("it has not authenticated within {} ms", self.timeout.as_millis());
        self.complain(now, &tag, &address, false, &text);
        Some(tag)
    }

    /// Seals a message to a peer, and lets `send` send it. None: it is no peer.
    pub(super) fn seal<E>(
        &mut self,
        tag: &PeerTag,
        message: Bytes,
        send: impl FnOnce(Bytes) -> Result<(), E>,
    ) -> Option<Result<(), E>> {
        let Some(Peer { state: State::Known { sealer, .. }, .. }) = self.peers.get_mut(tag) else { return None };
        let Sealed(sealed) = sealer.seal(message.into());
        let result = send(sealed.into());
        if result.is_ok() {
            sealer.sent();
        }
        Some(result)
    }

    /// Says why a connection is closed: whose, by its address where that is known, and how many more there were.
    fn complain(&mut self, now: Instant, tag: &PeerTag, address: &str, authenticated: bool, text: &str) {
        let Some(unsaid) = self.complaints.permit(now) else { return };
        let peer = if address.is_empty() { tag.to_string() } else { address.to_owned() };
        tracing::warn!(port = %self.channel, %peer, authenticated, unsaid, "closed a connection: {text}");
    }
}

impl State {
    /// What a message makes of it.
    fn hear(self, payload: &Bytes) -> Result<(Self, Verdict), Refused> {
        match self {
            Self::Known { sealer, mut opener } => {
                let len_bytes = opener.open(payload)?;
                Ok((Self::Known { sealer, opener }, Verdict::Deliver(payload.slice(..len_bytes))))
            }
            Self::Stranger { since, handshake } => match handshake.handle(payload)? {
                RouterStep::Answer(handshake, answer) => {
                    Ok((Self::Stranger { since, handshake }, Verdict::Answer(answer)))
                }
                RouterStep::Done(sealer, opener) => Ok((Self::Known { sealer, opener }, Verdict::Welcome)),
            },
        }
    }
}

/// Says that a port without a secret was asked to authenticate.
pub(super) fn log_hello_without_secret(complaints: &mut Seldom, channel: Channel, tag: &PeerTag) {
    if let Some(unsaid) = complaints.permit(Instant::now()) {
        tracing::warn!(port = %channel, peer = %tag, unsaid, "turned a peer away: {}", AuthError::NoSecretHere);
    }
}
