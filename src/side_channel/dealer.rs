//! A DEALER: connected to one peer, with the framing of LMCache's senders.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::channel::mpsc;
use futures::{FutureExt, StreamExt};
use zeromq::{
    DealerRecvHalf, DealerSendHalf, DealerSocket, Socket, SocketEvent, SocketRecv, SocketType, ZmqError, ZmqMessage,
};

use super::guard::Access;
use super::{SideChannelError, connect_error, library_endpoint, options, send_error};
use crate::wire::auth::{self, AuthError, DealerHandshake, Opener, Refused, Sealed, Sealer};

/// Connects.
#[derive(Debug)]
pub struct Dealer;

impl Dealer {
    /// Connects to `tcp://host:port`, `ipc://@name` or `ipc:///path`. A refusal is returned at once, so that whoever
    /// waits for a peer to start chooses how often to ask; `timeout` is for connecting and handshake together.
    ///
    /// # Errors
    /// [`SideChannelError::Unreachable`], [`SideChannelError::ConnectTimeout`], [`SideChannelError::InvalidAddress`] or
    /// [`SideChannelError::WrongSocket`].
    pub async fn connect(
        endpoint: &str,
        timeout: Duration,
    ) -> Result<(DealerSender, DealerReceiver), SideChannelError> {
        let mut options = options();
        options.connect_timeout(timeout);
        let mut socket = DealerSocket::with_options(options);
        let mut monitor = socket.monitor();
        let wrong =
            |seen: SocketType| SideChannelError::WrongSocket { address: endpoint.to_owned(), seen: seen.as_str() };
        socket.connect(&library_endpoint(endpoint)).await.map_err(|error| match error {
            ZmqError::IncompatiblePeer(seen) => wrong(seen),
            error => connect_error(endpoint, timeout, error),
        })?;
        let mut peer_socket = None;
        while let Some(Some(event)) = monitor.next().now_or_never() {
            if let SocketEvent::Connected(_, _, socket_type) = event {
                peer_socket = socket_type;
                break;
            }
        }
        // A DEALER may be connected to another, which answers nobody.
        if let Some(seen) = peer_socket.filter(|seen| ![SocketType::ROUTER, SocketType::REP].contains(seen)) {
            return Err(wrong(seen));
        }
        let (send_half, receive_half) = socket.split();
        Ok((
            DealerSender { half: send_half, endpoint: endpoint.to_owned(), sealer: None },
            DealerReceiver {
                half: receive_half,
                monitor,
                is_rep: peer_socket == Some(SocketType::REP),
                endpoint: endpoint.to_owned(),
                malformed_count: 0,
                trust: Trust::Anything,
                gone: None,
            },
        ))
    }

    /// As [`connect`](Self::connect), to a port of a receiver, which has to prove that it has the secret, if there is one.
    /// `access.timeout` is for all of it.
    ///
    /// # Errors
    /// As there; [`SideChannelError::NotAuthenticated`] when only one of the two ends has a secret, or each has its own;
    /// [`SideChannelError::PeerGone`] when it closes the connection.
    pub async fn connect_port(
        endpoint: &str,
        access: &Access,
    ) -> Result<(DealerSender, DealerReceiver), SideChannelError> {
        let started = Instant::now();
        let (mut sender, mut receiver) = Self::connect(endpoint, access.timeout).await?;
        let Some(secret) = &access.secret else {
            receiver.trust = Trust::AnythingButRefusals;
            return Ok((sender, receiver));
        };
        let handshake = DealerHandshake::new(secret, access.channel, rand::random());
        sender.try_send(Bytes::copy_from_slice(handshake.hello()))?;
        let left = access.timeout.saturating_sub(started.elapsed());
        let answer = tokio::time::timeout(left, receiver.recv()).await.map_err(|_| {
            SideChannelError::AuthenticationTimeout {
                address: endpoint.to_owned(),
                timeout_ms: access.timeout.as_millis(),
            }
        })??;
        match handshake.handle_answer(&answer) {
            Ok((proof, sealer, opener)) => {
                sender.try_send(proof.into())?;
                sender.sealer = Some(Mutex::new(sealer));
                receiver.trust = Trust::Sealed(opener);
                Ok((sender, receiver))
            }
            Err(Refused { error, close_reason }) => {
                if let Some(close_reason) = close_reason {
                    // So that its log says why we left; whether it does is its own business.
                    drop(sender.try_send(close_reason.into()));
                }
                Err(SideChannelError::NotAuthenticated { peer: endpoint.to_owned(), reason: error })
            }
        }
    }
}

/// The sending half of a DEALER.
pub struct DealerSender {
    half: DealerSendHalf,
    endpoint: String,
    /// Once the peer is authenticated.
    sealer: Option<Mutex<Sealer>>,
}

impl DealerSender {
    /// Queues a message, behind an empty frame as REQ sockets send it; never waits.
    ///
    /// # Errors
    /// [`SideChannelError::PeerGone`], or [`SideChannelError::QueueFull`] when the peer does not read. The message is
    /// dropped then.
    pub fn try_send(&self, payload: Bytes) -> Result<(), SideChannelError> {
        let Some(sealer) = &self.sealer else { return self.try_send_as_it_is(payload) };
        let mut sealer = sealer.lock().unwrap_or_else(PoisonError::into_inner);
        let Sealed(sealed) = sealer.seal(payload.into());
        self.try_send_as_it_is(sealed.into())?;
        sealer.sent();
        Ok(())
    }

    fn try_send_as_it_is(&self, payload: Bytes) -> Result<(), SideChannelError> {
        let mut message = ZmqMessage::from(payload);
        message.push_front(Bytes::new());
        self.half.try_send(message).map_err(|error| send_error(&self.endpoint, error))
    }
}

impl fmt::Debug for DealerSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DealerSender").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// The receiving half of a DEALER.
pub struct DealerReceiver {
    half: DealerRecvHalf,
    monitor: mpsc::Receiver<SocketEvent>,
    is_rep: bool,
    endpoint: String,
    malformed_count: u64,
    trust: Trust,
    gone: Option<Gone>,
}

/// What is taken for the peer's word.
enum Trust {
    Anything,
    /// Anything, but the peer may say that it wants authentication.
    AnythingButRefusals,
    /// What has the right seal.
    Sealed(Opener),
}

/// Why nothing more is heard.
#[derive(Clone)]
enum Gone {
    Closed(String),
    Refused(AuthError),
}

impl DealerReceiver {
    /// Whether the peer listens with a REP socket, as LMCache's synchronous backend does. ZMTP's READY says so (RFC 23).
    pub const fn peer_is_rep(&self) -> bool {
        self.is_rep
    }

    /// The next message, without the empty frame in front. Messages with other frames are dropped and counted.
    /// Nothing is lost when the future is dropped before it is ready.
    ///
    /// # Errors
    /// [`SideChannelError::PeerGone`], from then on always: connect anew. [`SideChannelError::NotAuthenticated`], from then
    /// on always: the peer wants another secret, or what came is not the peer's.
    pub async fn recv(&mut self) -> Result<Bytes, SideChannelError> {
        let gone = match &self.gone {
            Some(gone) => gone.clone(),
            None => match self.recv_connected().await {
                Ok(payload) => return Ok(payload),
                Err(gone) => self.gone.insert(gone).clone(),
            },
        };
        let peer = self.endpoint.clone();
        Err(match gone {
            Gone::Closed(reason) => SideChannelError::PeerGone { peer, reason },
            Gone::Refused(reason) => SideChannelError::NotAuthenticated { peer, reason },
        })
    }

    /// Messages dropped for their frames.
    pub fn malformed_count(&self) -> u64 {
        self.malformed_count
    }

    async fn recv_connected(&mut self) -> Result<Bytes, Gone> {
        loop {
            // What was said before the connection ended is heard first. The library's receiving half stays silent
            // about the end; its monitor tells.
            let message = tokio::select! {
                biased;
                message = self.half.recv() => message.map_err(|error| Gone::Closed(error.to_string()))?,
                event = self.monitor.next() => match event {
                    None | Some(SocketEvent::Disconnected(..)) => {
                        return Err(Gone::Closed("it closed the connection".to_owned()));
                    }
                    Some(_) => continue,
                },
            };
            let mut frames = message.into_vecdeque();
            if frames.len() == 2 && frames.front().is_some_and(Bytes::is_empty) {
                frames.pop_front();
            }
            match frames.pop_front() {
                Some(payload) if frames.is_empty() && !payload.is_empty() => {
                    return self.trust.admit(payload).map_err(Gone::Refused);
                }
                _ => self.malformed_count += 1,
            }
        }
    }
}

impl Trust {
    fn admit(&mut self, payload: Bytes) -> Result<Bytes, AuthError> {
        match self {
            Self::Anything => Ok(payload),
            Self::AnythingButRefusals => match auth::is_handshake(&payload).then(|| auth::refusal_of(&payload)) {
                Some(Some(reason)) => Err(AuthError::ByPeer(reason)),
                _ => Ok(payload),
            },
            Self::Sealed(opener) => opener.open(&payload).map(|len_bytes| payload.slice(..len_bytes)),
        }
    }
}

impl fmt::Debug for DealerReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DealerReceiver").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}
