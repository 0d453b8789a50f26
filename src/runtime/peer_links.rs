//! The connections that this daemon makes: a socket for each port of a peer, and the tasks that read them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender;
use tokio::task::JoinHandle;

use super::message_budget::{MessageBudget, MessageBudgets};
use super::ports::channel;
use crate::ids::{Failure, FailureKind, PeerId, ReceiverAddress, SharedSecret, SourceAddress, truncate};
use crate::node::Port;
use crate::side_channel::{Access, Dealer, DealerReceiver, DealerSender, RateLimited, SideChannelError, tcp_address};
use crate::wire::{LmcacheMode, Message, encode};

/// What the links tell the driver.
#[derive(Debug)]
pub(super) enum LinkEvent {
    /// All sockets are connected.
    Opened { peer: PeerId, links: Box<Links> },
    /// A message arrived. It takes its part of the budget until it is dealt with.
    Message { peer: PeerId, port: Port, message: Box<Message>, budget: MessageBudget },
    /// The connections could not be made, or are gone.
    Closed { peer: PeerId, failure: Failure },
}

/// The sending halves of the sockets to one peer.
#[derive(Debug)]
pub(super) struct Links {
    sockets: Vec<(Port, DealerSender)>,
    /// The mode of LMCache, if LMCache runs there.
    pub(super) lmcache_mode: LmcacheMode,
}

/// All peers that are connected or being connected.
#[derive(Debug)]
pub(super) struct PeerLinks<E> {
    links: BTreeMap<PeerId, Links>,
    tasks: BTreeMap<PeerId, JoinHandle<()>>,
    events: Sender<E>,
    /// For the handshakes of all links, and for what else they bring.
    budgets: [MessageBudgets; 2],
    secret: Option<SharedSecret>,
    timeout: Duration,
}

impl<E: From<LinkEvent> + Send + 'static> PeerLinks<E> {
    pub(super) fn new(events: Sender<E>, secret: Option<SharedSecret>, timeout: Duration) -> Self {
        let budgets = [MessageBudgets::for_handshakes(), MessageBudgets::for_messages()];
        Self { links: BTreeMap::new(), tasks: BTreeMap::new(), events, budgets, secret, timeout }
    }

    /// Begins to connect; [`LinkEvent::Opened`] or [`LinkEvent::Closed`] follows.
    pub(super) fn open(&mut self, peer: PeerId, address: &ReceiverAddress) {
        let ports = [(Port::Init, address.init_port), (Port::Alloc, address.alloc_port)];
        self.open_ports(peer, format!("receiver {address}"), &address.host, &ports);
    }

    /// As [`open`](Self::open), to where a sender is asked for what it has parked.
    pub(super) fn open_source(&mut self, peer: PeerId, address: &SourceAddress) {
        self.open_ports(peer, format!("sender {address}"), &address.host, &[(Port::Rendezvous, address.port)]);
    }

    fn open_ports(&mut self, peer: PeerId, name: String, host: &str, ports: &[(Port, u16)]) {
        let access = |port| Access { channel: channel(port), secret: self.secret.clone(), timeout: self.timeout };
        let ends = ports.iter().map(|&(port, number)| (port, tcp_address(host, number), access(port))).collect();
        let task = tokio::spawn(run_links(peer, name, ends, self.budgets.clone(), self.events.clone()));
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
        let sockets = self.links.get_mut(&peer).map(|links| &mut links.sockets);
        let socket = sockets.and_then(|sockets| sockets.iter_mut().find(|(of, _)| *of == port));
        let Some((_, socket)) = socket else {
            return Err(Failure::new(FailureKind::PeerLost, "the connection is gone"));
        };
        socket.try_send(encode(message).into()).map_err(|error| Failure::new(FailureKind::PeerLost, error.to_string()))
    }

    /// Closes its sockets. What was sent before still leaves.
    pub(super) fn close(&mut self, peer: PeerId) {
        self.links.remove(&peer);
        if let Some(task) = self.tasks.remove(&peer) {
            task.abort();
        }
    }
}

/// One socket to be: of which port, where to, and who may talk there.
type End = (Port, String, Access);

/// Connects, then reads all sockets until one of them ends.
async fn run_links<E: From<LinkEvent> + Send + 'static>(
    peer: PeerId,
    name: String,
    ends: Vec<End>,
    budgets: [MessageBudgets; 2],
    events: Sender<E>,
) {
    let failure = match connect(&ends).await {
        Ok((links, inboxes)) => {
            if events.send(LinkEvent::Opened { peer, links: Box::new(links) }.into()).await.is_err() {
                return;
            }
            let [for_handshakes, for_messages] = &budgets;
            let reads = inboxes.into_iter().map(|(port, inbox)| {
                let budgets = if port == Port::Init { for_handshakes } else { for_messages };
                Box::pin(read(peer, port, inbox, budgets, &events))
            });
            // Reading is cancel-safe here: whichever ends, the others are dropped with their connections.
            futures::future::select_all(reads).await.0
        }
        Err(failure) => failure,
    };
    let failure = Failure::new(failure.kind, format!("{name}: {}", failure.text));
    // A driver that has gone does not care.
    drop(events.send(LinkEvent::Closed { peer, failure }.into()).await);
}

async fn connect(ends: &[End]) -> Result<(Links, Vec<(Port, DealerReceiver)>), Failure> {
    let (mut sockets, mut inboxes) = (Vec::new(), Vec::new());
    let mut lmcache_mode = LmcacheMode::Async;
    for (port, endpoint, access) in ends {
        let connected = Dealer::connect_port(endpoint, access).await;
        let (socket, inbox) = connected.map_err(|error| link_failure(FailureKind::PeerUnreachable, &error))?;
        if *port == Port::Alloc && inbox.peer_is_rep() {
            lmcache_mode = LmcacheMode::Sync;
        }
        sockets.push((*port, socket));
        inboxes.push((*port, inbox));
    }
    Ok((Links { sockets, lmcache_mode }, inboxes))
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
    budgets: &MessageBudgets,
    events: &Sender<E>,
) -> Failure {
    let mut unreadable = RateLimited::default();
    loop {
        let payload = match socket.recv().await {
            Ok(payload) => payload,
            Err(error) => return link_failure(FailureKind::PeerLost, &error),
        };
        match budgets.decode(&payload).await {
            Ok((message, budget)) => {
                let event = LinkEvent::Message { peer, port, message: Box::new(message), budget };
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
            let address = ReceiverAddress { host: "127.0.0.1".into(), init_port: port, alloc_port: port };
            links.open(PeerId(peer), &address);
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
