//! Authentication at one port: what each connection has proved, and the seals of those that are authenticated.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::peer_tag::PeerTag;
use super::rate_limited::RateLimited;
use crate::ids::SharedSecret;
use crate::wire::auth::{AuthError, Channel, Opener, Refused, RouterHandshake, RouterStep, Sealed, Sealer};

/// Most connections of one port that are not authenticated yet. When there are more, the oldest is closed. An honest peer
/// needs two round trips, so it gets through beside connections that say nothing.
pub const AUTHENTICATING_MAX: usize = 256;

/// What a process that connects to a port has to do before its messages are read; or what we have to do where we connect.
#[derive(Debug, Clone)]
pub struct Access {
    /// Which port it is.
    pub channel: Channel,
    /// The secret that both ends prove to know. None: nothing is asked for, and a peer that asks for proof is refused.
    pub secret: Option<SharedSecret>,
    /// How long a connection may take over its proof.
    pub timeout: Duration,
}

/// The connections of one port that has a secret.
pub(super) struct Guard {
    secret: SharedSecret,
    channel: Channel,
    timeout: Duration,
    peers: BTreeMap<PeerTag, GuardedPeer>,
    /// Connections that are not authenticated yet, the oldest first.
    unauthenticated: BTreeSet<(Instant, PeerTag)>,
    warnings: RateLimited,
}

struct GuardedPeer {
    /// The address that it connects from; empty where the library has not said.
    address: String,
    state: State,
}

enum State {
    /// Until it has proved to know the secret.
    Unauthenticated { since: Instant, handshake: RouterHandshake },
    /// From then on.
    Authenticated { sealer: Sealer, opener: Opener },
}

/// What to do about a message.
#[derive(Debug)]
pub(super) enum Verdict {
    /// An authenticated peer has sent this.
    Deliver(Bytes),
    /// Send this back; it is part of the handshake.
    Answer(Vec<u8>),
    /// Nothing.
    Ignore,
    /// The connection is authenticated with this message.
    Accept,
    /// Close the connection, after sending the close reason if there is one.
    Close {
        close_reason: Option<Vec<u8>>,
        /// It was authenticated: the driver has heard of it.
        was_authenticated: bool,
    },
}

impl Guard {
    pub(super) fn new(secret: SharedSecret, channel: Channel, timeout: Duration) -> Self {
        Self {
            secret,
            channel,
            timeout,
            peers: BTreeMap::new(),
            unauthenticated: BTreeSet::new(),
            warnings: RateLimited::default(),
        }
    }

    /// A connection was made. Returns the connection that has to be closed to make room.
    pub(super) fn accept(&mut self, now: Instant, tag: PeerTag, address: String) -> Option<PeerTag> {
        // Its first message may have come before this event; and a connection that chose a name which is taken is ignored.
        if let Some(peer) = self.peers.get_mut(&tag) {
            if peer.address.is_empty() {
                peer.address = address;
            }
            return None;
        }
        let handshake = RouterHandshake::new(self.secret.clone(), self.channel, rand::random());
        self.unauthenticated.insert((now, tag.clone()));
        self.peers.insert(tag, GuardedPeer { address, state: State::Unauthenticated { since: now, handshake } });
        let crowded = self.unauthenticated.len() > AUTHENTICATING_MAX;
        let (_, oldest) = if crowded { self.unauthenticated.pop_first()? } else { return None };
        let address = self.peers.remove(&oldest).map(|peer| peer.address).unwrap_or_default();
        self.warn(now, &oldest, &address, false, "too many have not authenticated yet, and it is the oldest");
        Some(oldest)
    }

    /// A message came. Also returns the connection that has to be closed to make room for its sender.
    pub(super) fn admit(&mut self, now: Instant, tag: &PeerTag, payload: &Bytes) -> (Option<PeerTag>, Verdict) {
        let evicted = self.accept(now, tag.clone(), String::new());
        let Some(GuardedPeer { address, state }) = self.peers.remove(tag) else { return (evicted, Verdict::Ignore) };
        if let State::Unauthenticated { since, .. } = state {
            self.unauthenticated.remove(&(since, tag.clone()));
        }
        let was_authenticated = matches!(state, State::Authenticated { .. });
        let verdict = match state.hear(payload) {
            Ok((state, verdict)) => {
                match state {
                    State::Unauthenticated { since, .. } => {
                        self.unauthenticated.insert((since, tag.clone()));
                    }
                    State::Authenticated { .. } if !was_authenticated => {
                        tracing::debug!(port = %self.channel, peer = %address, "authenticated");
                    }
                    State::Authenticated { .. } => {}
                }
                self.peers.insert(tag.clone(), GuardedPeer { address, state });
                verdict
            }
            Err(Refused { error, close_reason }) => {
                self.warn(now, tag, &address, was_authenticated, &error.to_string());
                Verdict::Close { close_reason, was_authenticated }
            }
        };
        (evicted, verdict)
    }

    /// A connection has ended. Whether it was authenticated.
    pub(super) fn forget(&mut self, tag: &PeerTag) -> bool {
        match self.peers.remove(tag).map(|peer| peer.state) {
            Some(State::Authenticated { .. }) => true,
            Some(State::Unauthenticated { since, .. }) => {
                self.unauthenticated.remove(&(since, tag.clone()));
                false
            }
            None => false,
        }
    }

    /// When the oldest unauthenticated connection will have taken too long.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.unauthenticated.first().map(|(since, _)| *since + self.timeout)
    }

    /// A connection that has taken too long, and is to be closed.
    pub(super) fn pop_late(&mut self, now: Instant) -> Option<PeerTag> {
        if self.next_deadline()? > now {
            return None;
        }
        let (_, tag) = self.unauthenticated.pop_first()?;
        let address = self.peers.remove(&tag).map(|peer| peer.address).unwrap_or_default();
        let text = format!("it has not authenticated within {} ms", self.timeout.as_millis());
        self.warn(now, &tag, &address, false, &text);
        Some(tag)
    }

    /// Seals a message to a peer, and lets `send` send it. None: the connection is not authenticated.
    pub(super) fn seal<E>(
        &mut self,
        tag: &PeerTag,
        message: Bytes,
        send: impl FnOnce(Bytes) -> Result<(), E>,
    ) -> Option<Result<(), E>> {
        let Some(GuardedPeer { state: State::Authenticated { sealer, .. }, .. }) = self.peers.get_mut(tag) else {
            return None;
        };
        let Sealed(sealed) = sealer.seal(message.into());
        let result = send(sealed.into());
        if result.is_ok() {
            sealer.sent();
        }
        Some(result)
    }

    /// Logs why a connection is closed, with its address where that is known, and how many closed ones were not logged.
    fn warn(&mut self, now: Instant, tag: &PeerTag, address: &str, authenticated: bool, text: &str) {
        let Some(unsaid) = self.warnings.permit(now) else { return };
        let peer = if address.is_empty() { tag.to_string() } else { address.to_owned() };
        tracing::warn!(port = %self.channel, %peer, authenticated, unsaid, "closed a connection: {text}");
    }
}

impl State {
    /// The state after a message, and what to do.
    fn hear(self, payload: &Bytes) -> Result<(Self, Verdict), Refused> {
        match self {
            Self::Authenticated { sealer, mut opener } => {
                let len_bytes = opener.open(payload)?;
                Ok((Self::Authenticated { sealer, opener }, Verdict::Deliver(payload.slice(..len_bytes))))
            }
            Self::Unauthenticated { since, handshake } => match handshake.handle(payload)? {
                RouterStep::Answer(handshake, answer) => {
                    Ok((Self::Unauthenticated { since, handshake }, Verdict::Answer(answer)))
                }
                RouterStep::Done(sealer, opener) => Ok((Self::Authenticated { sealer, opener }, Verdict::Accept)),
            },
        }
    }
}

/// Logs that a port without a secret was asked to authenticate.
pub(super) fn log_hello_without_secret(warnings: &mut RateLimited, channel: Channel, tag: &PeerTag) {
    if let Some(unsaid) = warnings.permit(Instant::now()) {
        tracing::warn!(port = %channel, peer = %tag, unsaid, "turned a peer away: {}", AuthError::NoSecretHere);
    }
}
