//! The connections of the outgoing half: two sockets for each receiver, and the tasks that read them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender;
use tokio::task::JoinHandle;

use super::ports::channel;
use super::room::{Room, Rooms};
use crate::ids::{Failure, FailureKind, PeerAddress, PeerId, SharedSecret, truncate};
use crate::node::Port;
use crate::side_channel::{Access, Dealer, DealerReceiver, DealerSender, RateLimited, SideChannelError, tcp_address};
use crate::wire::{LmcacheMode, Message, encode};

/// What the links tell the driver.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// Both sockets are connected.
    Opened { peer: PeerId, links: Box<Links> },
    /// A message arrived. It takes its room until it is dealt with.
    Message { peer: PeerId, port: Port, message: Box<Message>, room: Room },
    /// The connections could not be made, or are gone.
    Closed { peer: PeerId, failure: Failure },
}

/// The sending halves of the two sockets to one receiver.
#[derive(Debug)]
pub(super) struct Links {
    init: DealerSender,
    alloc: DealerSender,
    /// The mode of LMCache, if LMCache runs there.
    pub(super) lmcache_mode: LmcacheMode,
}

/// All receivers that are connected or being connected.
#[derive(Debug)]
pub(super) struct PeerLinks<E> {
    links: BTreeMap<PeerId, Links>,
    tasks: BTreeMap<PeerId, JoinHandle<()>>,
    events: Sender<E>,
    /// Of all links' init and alloc sockets.
    rooms: [Rooms; 2],
    secret: Option<SharedSecret>,
    timeout: Duration,
}

impl<E: From<LinkEvent> + Send + 'static> PeerLinks<E> {
    pub(super) fn new(events: Sender<E>, secret: Option<SharedSecret>, timeout: Duration) -> Self {
        let rooms = [Rooms::for_handshakes(), Rooms::for_messages()];
        Self { links: BTreeMap::new(), tasks: BTreeMap::new(), events, rooms, secret, timeout }
    }

    /// Begins to connect; [`LinkEvent::Opened`] or [`LinkEvent::Closed`] follows.
    pub(super) fn open(&mut self, peer: PeerId, address: PeerAddress) {
        let access = |port| Access { channel: channel(port), secret: self.secret.clone(), timeout: self.timeout };
        let access = [access(Port::Init), access(Port::Alloc)];
        let task = tokio::spawn(run_links(peer, address, access, self.rooms.clone(), self.events.clone()));
        self.tasks.insert(peer, task);
    }

    /// Keeps the sockets that were opened, unless the peer was closed meanwhile.
    pub(super) fn keep(&mut self, peer: PeerId, links: Links) -> bool {
        let wanted = self.tasks.contains_key(&peer);
        if wanted {
            self.links.insert(peer, links);
        }
        wanted
    }

    /// Sends, or says why the link is as good as gone.
    pub(super) fn send(&mut self, peer: PeerId, port: Port, message: &Message) -> Result<(), Failure> {
        let Some(links) = self.links.get_mut(&peer) else {
            return Err(Failure::new(FailureKind::PeerLost, "the connection to the receiver is gone"));
        };
        let socket = if port == Port::Init { &mut links.init } else { &mut links.alloc };
        socket.try_send(encode(message).into()).map_err(|error| Failure::new(FailureKind::PeerLost, error.to_string()))
    }

    /// Closes both sockets. What was sent before still leaves.
    pub(super) fn close(&mut self, peer: PeerId) {
        self.links.remove(&peer);
        if let Some(task) = self.tasks.remove(&peer) {
            task.abort();
        }
    }
}

/// Connects, then reads both sockets until one of them ends.
async fn run_links<E: From<LinkEvent>>(
    peer: PeerId,
    address: PeerAddress,
    access: [Access; 2],
    [for_init, for_alloc]: [Rooms; 2],
    events: Sender<E>,
) {
    let failure = match connect(&address, &access).await {
        Ok((links, init, alloc)) => {
            if events.send(LinkEvent::Opened { peer, links: Box::new(links) }.into()).await.is_err() {
                return;
            }
            // Reading is cancel-safe here: whichever ends, the other is dropped with its connection.
            tokio::select! {
                failure = read(peer, Port::Init, init, &for_init, &events) => failure,
                failure = read(peer, Port::Alloc, alloc, &for_alloc, &events) => failure,
            }
        }
        Err(failure) => failure,
    };
    let failure = Failure::new(failure.kind, format!("receiver {address}: {}", failure.text));
    // A driver that has gone does not care.
    drop(events.send(LinkEvent::Closed { peer, failure }.into()).await);
}

async fn connect(
    address: &PeerAddress,
    access: &[Access; 2],
) -> Result<(Links, DealerReceiver, DealerReceiver), Failure> {
    let endpoint = |port| tcp_address(&address.host, port);
    let failed = |error| link_failure(FailureKind::PeerUnreachable, &error);
    let [for_init, for_alloc] = access;
    let (init, init_inbox) = Dealer::connect_port(&endpoint(address.init_port), for_init).await.map_err(failed)?;
    let (alloc, alloc_inbox) = Dealer::connect_port(&endpoint(address.alloc_port), for_alloc).await.map_err(failed)?;
    let lmcache_mode = if alloc_inbox.peer_is_rep() { LmcacheMode::Sync } else { LmcacheMode::Async };
    Ok((Links { init, alloc, lmcache_mode }, init_inbox, alloc_inbox))
}

/// A link's end as a request's: `otherwise`, unless it is about who may talk.
fn link_failure(otherwise: FailureKind, error: &SideChannelError) -> Failure {
    let kind = match error {
        SideChannelError::NotAuthenticated { .. } => FailureKind::HandshakeRefused,
        _ => otherwise,
    };
    Failure::new(kind, error.to_string())
}

async fn read<E: From<LinkEvent>>(
    peer: PeerId,
    port: Port,
    mut socket: DealerReceiver,
    rooms: &Rooms,
    events: &Sender<E>,
) -> Failure {
    let mut unreadable = RateLimited::default();
    loop {
        let payload = match socket.recv().await {
            Ok(payload) => payload,
            Err(error) => return link_failure(FailureKind::PeerLost, &error),
        };
        match rooms.decode(&payload).await {
            Ok((message, room)) => {
                let event = LinkEvent::Message { peer, port, message: Box::new(message), room };
                if events.send(event.into()).await.is_err() {
                    return Failure::new(FailureKind::ShuttingDown, "this sender is shutting down");
                }
            }
            Err(error) => {
                if let Some(unsaid) = unreadable.permit(Instant::now()) {
                    let error = truncate(&error.to_string());
                    tracing::warn!(%peer, ?port, unsaid, "a message that cannot be read, ignored: {error}");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn links_that_end_while_the_driver_is_behind_are_all_told() {
        // Broken in production: requests to receivers that were lost together wait for their deadlines.
        const LINKS: u64 = 1_500;
        // Nobody listens here any more.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // As long as the driver's own.
        let (events, mut inbox) = mpsc::channel::<LinkEvent>(1024);
        let mut links = PeerLinks::new(events, None, Duration::from_secs(60));
        for peer in 0..LINKS {
            let address = PeerAddress { host: "127.0.0.1".into(), init_port: port, alloc_port: port };
            links.open(PeerId(peer), address);
        }
        // All of them have ended, or wait to say so.
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut closed = BTreeSet::new();
        while closed.len() < LINKS as usize {
            match tokio::time::timeout(Duration::from_secs(60), inbox.recv()).await {
                Ok(Some(LinkEvent::Closed { peer, .. })) => assert!(closed.insert(peer), "each ends once"),
                other => panic!("{} of {LINKS} ends were told: {other:?}", closed.len()),
            }
        }
    }
}
