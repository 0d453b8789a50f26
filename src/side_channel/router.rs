//! A ROUTER: bound, many peers, each answered by the way it came.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use futures::channel::mpsc;
use zeromq::util::PeerIdentity;
use zeromq::{RouterRecvHalf, RouterSendHalf, Socket, SocketEvent, SocketOptions, SocketRecv, ZmqError, ZmqMessage};

use super::bind::{self, BoundPath, IpcName};
use super::guard::{self, Access, Guard, Verdict};
use super::peer_tag::PeerTag;
use super::rate_limited::RateLimited;
use super::{ENVELOPE_LEN_BYTES_MAX, SideChannelError, UNAUTHENTICATED_LEN_BYTES_MAX, options, send_error};
use crate::wire::auth::{self, Channel};
use crate::wire::limits::{INIT_MESSAGE_LEN_BYTES_MAX, MESSAGE_LEN_BYTES_MAX};

/// The way back to whoever sent a message: the connection, and whether its messages have an empty frame in front, as
/// those of REQ sockets do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    peer: PeerTag,
    delimited: bool,
}

impl Route {
    /// The connection.
    pub fn peer(&self) -> &PeerTag {
        &self.peer
    }
}

/// What a ROUTER hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouterEvent {
    /// Somebody said something.
    Message {
        /// The way back.
        peer: Route,
        /// What was said.
        payload: Bytes,
    },
    /// Something arrived that is no message, from whoever may connect.
    Garbage,
    /// A connection has ended. Nothing comes from it any more.
    Gone {
        /// Which.
        peer: PeerTag,
    },
}

/// A bound ROUTER, in its two halves.
#[derive(Debug)]
pub struct RouterSocket {
    /// Answers.
    pub sender: RouterSender,
    /// Listens. Dropping both halves closes the socket.
    pub receiver: RouterReceiver,
    /// Where it listens: `tcp://host:port`, `ipc://@name` or `ipc:///path`, as a peer would connect to it.
    pub endpoint: String,
    /// The TCP port; 0 for ipc.
    pub port: u16,
}

impl RouterSocket {
    /// Listens on a TCP port; 0 takes a free one. A host name is looked up, and its first address that can be bound
    /// is taken.
    ///
    /// # Errors
    /// [`SideChannelError::AddressInUse`], [`SideChannelError::InvalidAddress`] or [`SideChannelError::Bind`].
    pub async fn bind_tcp(host: &str, port: u16) -> Result<Self, SideChannelError> {
        Self::bind_tcp_with(options(), host, port).await
    }

    async fn bind_tcp_with(options: SocketOptions, host: &str, port: u16) -> Result<Self, SideChannelError> {
        let (listener, port) = bind::tcp(host, port).await?;
        let endpoint = bind::tcp_address(host, port);
        Self::listen(options, listener, endpoint, port, None).await
    }

    /// As [`bind_tcp`](Self::bind_tcp), for those who prove that they have the secret, if there is one: nothing else is
    /// heard from `receiver`, and what `sender` sends is sealed.
    ///
    /// # Errors
    /// As there.
    pub async fn bind_port(host: &str, port: u16, access: Access) -> Result<Self, SideChannelError> {
        let len_bytes_max = match access.channel {
            Channel::Init => INIT_MESSAGE_LEN_BYTES_MAX,
            Channel::Alloc | Channel::Query | Channel::Rendezvous => MESSAGE_LEN_BYTES_MAX,
        };
        let mut options = options();
        options.message_timeout(access.timeout).max_message_size(len_bytes_max + ENVELOPE_LEN_BYTES_MAX);
        if access.secret.is_some() {
            options.max_stranger_message_size(UNAUTHENTICATED_LEN_BYTES_MAX);
        }
        let Self { mut sender, mut receiver, endpoint, port } = Self::bind_tcp_with(options, host, port).await?;
        receiver.message_len_bytes_max = len_bytes_max;
        receiver.listener = match access.secret {
            None => Listener::Unguarded {
                channel: access.channel,
                way_back: sender.clone(),
                warnings: RateLimited::default(),
            },
            Some(secret) => {
                let guard = Arc::new(Mutex::new(Guard::new(secret, access.channel, access.timeout)));
                let way_back = sender.clone();
                sender.guard = Some(guard.clone());
                Listener::Guarded { guard, way_back }
            }
        };
        Ok(Self { sender, receiver, endpoint, port })
    }

    /// Listens on an ipc name, for processes of this user alone (and of root).
    ///
    /// # Errors
    /// [`SideChannelError::AddressInUse`], [`SideChannelError::InvalidAddress`] or [`SideChannelError::Bind`].
    pub async fn bind_ipc(name: &IpcName) -> Result<Self, SideChannelError> {
        let (listener, path) = bind::ipc(name).await?;
        let mut options = options();
        options.ipc_peer_uid(rustix::process::geteuid().as_raw());
        Self::listen(options, listener, name.endpoint(), 0, path).await
    }

    async fn listen(
        options: SocketOptions,
        listener: impl Into<zeromq::Listener> + Send,
        endpoint: String,
        port: u16,
        path: Option<BoundPath>,
    ) -> Result<Self, SideChannelError> {
        let mut socket = zeromq::RouterSocket::with_options(options);
        let monitor = socket.monitor();
        socket.bind_listener(listener).await.map_err(|error| SideChannelError::Bind {
            address: endpoint.clone(),
            source: std::io::Error::other(error.to_string()),
        })?;
        let (send_half, receive_half) = socket.split();
        Ok(Self {
            sender: RouterSender { half: send_half, guard: None },
            receiver: RouterReceiver {
                half: receive_half,
                monitor,
                addresses: BTreeMap::new(),
                listener: Listener::Open,
                malformed_count: 0,
                endpoint: endpoint.clone(),
                message_len_bytes_max: MESSAGE_LEN_BYTES_MAX,
                warnings: RateLimited::default(),
                _path: path,
            },
            endpoint,
            port,
        })
    }
}

/// The answering half of a ROUTER.
#[derive(Clone)]
pub struct RouterSender {
    half: RouterSendHalf,
    guard: Option<Arc<Mutex<Guard>>>,
}

impl RouterSender {
    /// Queues a message for a peer; never waits.
    ///
    /// # Errors
    /// [`SideChannelError::PeerGone`], or [`SideChannelError::QueueFull`] when the peer does not read. The message is
    /// dropped then, and nobody else is held up.
    pub fn try_send(&self, route: &Route, payload: Bytes) -> Result<(), SideChannelError> {
        match &self.guard {
            None => self.try_send_as_it_is(route, payload),
            Some(guard) => lock(guard)
                .seal(&route.peer, payload, |sealed| self.try_send_as_it_is(route, sealed))
                .unwrap_or_else(|| Err(send_error(&route.peer, ZmqError::Other("not connected")))),
        }
    }

    fn try_send_as_it_is(&self, route: &Route, payload: Bytes) -> Result<(), SideChannelError> {
        let mut message = ZmqMessage::from(payload);
        if route.delimited {
            message.push_front(Bytes::new());
        }
        message.push_front(route.peer.0.clone());
        self.half.try_send(message).map_err(|error| send_error(&route.peer, error))
    }

    /// Lets a connection send messages of full length.
    fn trust(&self, peer: &PeerTag) {
        if let Ok(identity) = PeerIdentity::try_from(peer.0.clone()) {
            self.half.trust(&identity);
        }
    }

    /// Closes a connection; what was queued for it still leaves.
    fn close(&self, peer: &PeerTag) {
        if let Ok(identity) = PeerIdentity::try_from(peer.0.clone()) {
            self.half.disconnect(&identity);
        }
    }
}

/// Held for a few hashes at most, and never across an await.
fn lock(guard: &Mutex<Guard>) -> MutexGuard<'_, Guard> {
    guard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who is let in.
enum Listener {
    /// Everybody: somebody else decides, or nobody.
    Open,
    /// Everybody, and whoever wants to authenticate hears that nobody does here.
    Unguarded { channel: Channel, way_back: RouterSender, warnings: RateLimited },
    /// Those who prove that they have the secret. `way_back` sends what is not sealed.
    Guarded { guard: Arc<Mutex<Guard>>, way_back: RouterSender },
}

impl Listener {
    /// When somebody who stands in it has taken too long.
    fn next_deadline(&self) -> Option<Instant> {
        match self {
            Self::Guarded { guard, .. } => lock(guard).next_deadline(),
            _ => None,
        }
    }

    /// Somebody has connected.
    fn accept(&self, peer: PeerTag, address: String) {
        if let Self::Guarded { guard, way_back } = self {
            let evicted = lock(guard).accept(Instant::now(), peer, address);
            evicted.iter().for_each(|peer| way_back.close(peer));
        }
    }

    /// Closes those who have taken too long.
    fn close_late(&self) {
        if let Self::Guarded { guard, way_back } = self {
            let now = Instant::now();
            while let Some(peer) = { lock(guard).pop_late(now) } {
                way_back.close(&peer);
            }
        }
    }

    /// A connection has ended; whether anybody has heard of it.
    fn forget(&self, peer: &PeerTag) -> bool {
        match self {
            Self::Guarded { guard, .. } => lock(guard).forget(peer),
            _ => true,
        }
    }

    /// What becomes of a message.
    fn admit(&mut self, peer: Route, payload: Bytes) -> Option<RouterEvent> {
        match self {
            Self::Open => Some(RouterEvent::Message { peer, payload }),
            Self::Unguarded { channel, way_back, warnings } => {
                if !auth::is_handshake(&payload) {
                    return Some(RouterEvent::Message { peer, payload });
                }
                guard::log_hello_without_secret(warnings, *channel, &peer.peer);
                if let Some(close_reason) = auth::refuse().close_reason {
                    // Whoever does not read it waits in vain, which is its own business.
                    drop(way_back.try_send_as_it_is(&peer, close_reason.into()));
                }
                None
            }
            Self::Guarded { guard, way_back } => {
                let (evicted, verdict) = lock(guard).admit(Instant::now(), &peer.peer, &payload);
                evicted.iter().for_each(|peer| way_back.close(peer));
                match verdict {
                    Verdict::Deliver(payload) => Some(RouterEvent::Message { peer, payload }),
                    Verdict::Ignore => None,
                    Verdict::Accept => {
                        way_back.trust(&peer.peer);
                        None
                    }
                    Verdict::Answer(answer) => {
                        drop(way_back.try_send_as_it_is(&peer, answer.into()));
                        None
                    }
                    Verdict::Close { close_reason, was_authenticated } => {
                        if let Some(close_reason) = close_reason {
                            drop(way_back.try_send_as_it_is(&peer, close_reason.into()));
                        }
                        way_back.close(&peer.peer);
                        was_authenticated.then_some(RouterEvent::Gone { peer: peer.peer })
                    }
                }
            }
        }
    }
}

/// At that time, or never.
async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

impl fmt::Debug for RouterSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouterSender").finish_non_exhaustive()
    }
}

/// The listening half of a ROUTER.
pub struct RouterReceiver {
    half: RouterRecvHalf,
    monitor: mpsc::Receiver<SocketEvent>,
    /// Where connections come from, for the log.
    addresses: BTreeMap<PeerTag, String>,
    listener: Listener,
    malformed_count: u64,
    /// Where it listens, and how long a message may be there: for the log.
    endpoint: String,
    message_len_bytes_max: usize,
    warnings: RateLimited,
    _path: Option<BoundPath>,
}

impl RouterReceiver {
    /// The next message, or the event that a peer is gone. Messages without a payload or with frames that no REQ or
    /// DEALER of ours or LMCache's sends are dropped and counted, and told as garbage. `None`: the socket is closed.
    ///
    /// Nothing is lost when the future is dropped before it is ready, nor when it is not called again for long: a
    /// connection that has ended keeps its place until that has been heard here.
    pub async fn recv(&mut self) -> Option<RouterEvent> {
        loop {
            // News of a connection that ended comes first: its identity may belong to another one by now.
            let message = tokio::select! {
                biased;
                event = self.monitor.next() => match event? {
                    SocketEvent::Disconnected(peer, _) => {
                        let peer = PeerTag(peer.into());
                        self.addresses.remove(&peer);
                        if self.listener.forget(&peer) {
                            return Some(RouterEvent::Gone { peer });
                        }
                        continue;
                    }
                    SocketEvent::Accepted(endpoint, peer, _) => {
                        let (peer, address) = (PeerTag(peer.into()), endpoint.to_string());
                        // A second connection under a name that is taken is none.
                        self.addresses.entry(peer.clone()).or_insert_with(|| address.clone());
                        self.listener.accept(peer, address);
                        continue;
                    }
                    SocketEvent::Unreadable(peer, error) => {
                        self.log_unreadable(&PeerTag(peer.into()), &error);
                        return Some(RouterEvent::Garbage);
                    }
                    SocketEvent::AcceptFailed(error) => {
                        tracing::debug!(%error, "a connection was not accepted");
                        if is_silence(&error) {
                            continue;
                        }
                        return Some(RouterEvent::Garbage);
                    }
                    _ => continue,
                },
                message = self.half.recv() => message.ok()?,
                () = at(self.listener.next_deadline()) => {
                    self.listener.close_late();
                    continue;
                }
            };
            match parse(message) {
                Some((peer, payload)) => {
                    if let Some(event) = self.listener.admit(peer, payload) {
                        return Some(event);
                    }
                }
                None => {
                    self.malformed_count += 1;
                    return Some(RouterEvent::Garbage);
                }
            }
        }
    }

    /// Where a connection comes from, if the library has said so.
    pub fn address(&self, peer: &PeerTag) -> &str {
        self.addresses.get(peer).map_or("an unknown address", String::as_str)
    }

    fn log_unreadable(&mut self, peer: &PeerTag, error: &ZmqError) {
        if let Some(unsaid) = self.warnings.permit(Instant::now()) {
            let (port, len_bytes_max) = (&self.endpoint, self.message_len_bytes_max);
            tracing::warn!(%port, %peer, unsaid, "closed a connection: {error}; a message here has at most {len_bytes_max} bytes");
        }
    }

    /// Messages dropped for their frames since the socket was bound.
    pub fn malformed_count(&self) -> u64 {
        self.malformed_count
    }
}

impl fmt::Debug for RouterReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouterReceiver").field("malformed_count", &self.malformed_count).finish_non_exhaustive()
    }
}

/// Whether a connection ended with this that has said nothing: a probe connects and leaves.
fn is_silence(error: &ZmqError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.is::<std::io::Error>() {
            return true;
        }
        cause = error.source();
    }
    // The second is how the library calls an end before the first byte.
    matches!(error, ZmqError::ConnectTimeout(_) | ZmqError::Other("Failed Greeting exchange"))
}

/// `[identity][payload]` or `[identity][][payload]`.
fn parse(message: ZmqMessage) -> Option<(Route, Bytes)> {
    let mut frames = message.into_vecdeque();
    let peer = PeerTag(frames.pop_front()?);
    debug_assert!(peer.0.len() <= PeerIdentity::MAX_LENGTH, "the library bounds identities");
    let delimited = frames.len() == 2 && frames.front().is_some_and(Bytes::is_empty);
    if delimited {
        frames.pop_front();
    }
    let payload = frames.pop_front().filter(|payload| frames.is_empty() && !payload.is_empty())?;
    Some((Route { peer, delimited }, payload))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    /// Connects as a DEALER of this name of one byte. None: it was closed.
    async fn connect(port: u16, name: u8) -> Option<TcpStream> {
        let mut greeting = [0; 64];
        (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
        greeting[12..16].copy_from_slice(b"NULL");
        let properties = b"\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x01";
        let ready = [&b"\x05READY"[..], properties, &[name]].concat();
        let hello = [&greeting[..], &[4, ready.len() as u8], &ready].concat();
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.write_all(&hello).await.ok()?;
        stream.read_exact(&mut [0; 64 + 8]).await.ok()?;
        Some(stream)
    }

    #[tokio::test]
    async fn connections_that_end_unheard_keep_their_places() {
        // Broken in production: connections that come and go while a daemon is busy fill its memory with their ends.
        const PLACES: u8 = 4;
        let mut options = options();
        options.max_connections(PLACES.into());
        let RouterSocket { sender, mut receiver, port, .. } =
            RouterSocket::bind_tcp_with(options, "127.0.0.1", 0).await.unwrap();
        for name in 0..PLACES {
            drop(connect(port, name).await.unwrap());
            // That it has ended is noticed by what cannot be written, since nobody listens.
            let route = Route { peer: PeerTag(Bytes::copy_from_slice(&[name])), delimited: false };
            while sender.try_send(&route, Bytes::from_static(b"x")).is_ok() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert!(connect(port, PLACES).await.is_none(), "there is a place, and as many ends are kept as one likes");
        for name in 0..PLACES {
            let end = RouterEvent::Gone { peer: PeerTag(Bytes::copy_from_slice(&[name])) };
            assert_eq!(receiver.recv().await, Some(end));
        }
        // Places come back when that has been heard.
        assert!(connect(port, PLACES).await.is_some());
    }
}
