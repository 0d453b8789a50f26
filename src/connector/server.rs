//! The daemon's end of the connector API: who is attached, and messages to and from them. What a request means is
//! decided elsewhere.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::message::{CONNECTOR_API_VERSION, Reply, Request};
use crate::ids::truncate;
use crate::ids::{ClientId, FailureKind, Seq};
use crate::side_channel::{
    IpcName, PeerTag, Route, RouterEvent, RouterReceiver, RouterSender, RouterSocket, SideChannelError,
};
use crate::wire::{DecodeError, codec};

/// What the server hears.
#[derive(Debug, Clone, PartialEq)]
pub enum ConnectorEvent {
    /// An attached client asks for something, or asks to be attached: exactly one reply with the request's `id` is
    /// owed. An `attach` that comes this far has a version that is spoken.
    Request {
        /// Who; new with every `attach`.
        client: ClientId,
        /// What.
        request: Request,
    },
    /// A message was refused here; its sender has been told, if the message had an `id` to answer to.
    Refused {
        /// Who, if attached.
        client: Option<ClientId>,
        /// What was seen and what was expected.
        text: String,
    },
    /// A client is gone without `detach`, or has stopped reading. Nothing more is heard from it or sent to it.
    Gone {
        /// Who.
        client: ClientId,
    },
}

/// An attached client, or one that waits for the answer to its `attach`.
#[derive(Debug)]
struct ServedClient {
    route: Route,
    /// The `attach` that has not been answered.
    attaching: Option<Seq>,
}

/// A ROUTER on an ipc name that speaks the connector API.
#[derive(Debug)]
pub struct ConnectorServer {
    sender: RouterSender,
    receiver: RouterReceiver,
    endpoint: String,
    clients: BTreeMap<ClientId, ServedClient>,
    ids: BTreeMap<PeerTag, ClientId>,
    clients_max: usize,
    next_client: u64,
    /// Clients that were given up while sending to them; at most as many as may be attached.
    lost: VecDeque<ClientId>,
}

impl ConnectorServer {
    /// Listens, for at most `clients_max` clients at a time.
    ///
    /// # Errors
    /// Those of [`RouterSocket::bind_ipc`].
    pub async fn bind(name: &IpcName, clients_max: usize) -> Result<Self, SideChannelError> {
        let RouterSocket { sender, receiver, endpoint, .. } = RouterSocket::bind_ipc(name).await?;
        Ok(Self {
            sender,
            receiver,
            endpoint,
            clients: BTreeMap::new(),
            ids: BTreeMap::new(),
            clients_max,
            next_client: 1,
            lost: VecDeque::new(),
        })
    }

    /// Where clients connect to: `ipc://@name` or `ipc:///path`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Clients attached, those included whose `attach` has not been answered.
    pub fn client_count(&self) -> usize {
        self.clients.len()
    }

    /// The next request, refusal or loss. `None`: the socket is closed. Nothing is lost when the future is dropped
    /// before it is ready.
    pub async fn recv(&mut self) -> Option<ConnectorEvent> {
        loop {
            if let Some(client) = self.lost.pop_front() {
                return Some(ConnectorEvent::Gone { client });
            }
            match self.receiver.recv().await? {
                RouterEvent::Message { peer, payload } => {
                    return Some(self.handle_message(peer, &payload));
                }
                RouterEvent::Garbage => {}
                RouterEvent::Gone { peer } => {
                    if let Some(client) = self.ids.remove(&peer) {
                        self.clients.remove(&client);
                        return Some(ConnectorEvent::Gone { client });
                    }
                }
            }
        }
    }

    /// Sends a reply or an event; never waits. `detached`, and `error` as the answer to an `attach`, end the client's
    /// attachment. A client that does not read what it is sent is given up: [`ConnectorEvent::Gone`] follows.
    ///
    /// # Errors
    /// [`SideChannelError::PeerGone`] or [`SideChannelError::QueueFull`]: the reply was dropped, and the client will be
    /// reported as gone if it has not been. Nothing more needs to be done about it.
    pub fn send(&mut self, client: ClientId, reply: &Reply) -> Result<(), SideChannelError> {
        let Some(attached) = self.clients.get_mut(&client) else {
            return Err(SideChannelError::PeerGone {
                peer: format!("client {client}"),
                reason: "it is not attached".to_owned(),
            });
        };
        let sent = self.sender.try_send(&attached.route, Bytes::from(codec::encode(reply)));
        let ends = match reply {
            Reply::Attached { .. } => {
                attached.attaching = None;
                false
            }
            Reply::Detached { .. } => true,
            Reply::Error { id, .. } => attached.attaching == Some(*id),
            _ => false,
        };
        if ends {
            self.forget(client);
        } else if sent.is_err() {
            self.forget(client);
            self.lost.push_back(client);
        }
        sent
    }

    fn handle_message(&mut self, route: Route, payload: &[u8]) -> ConnectorEvent {
        let known = self.ids.get(route.peer()).copied();
        let refused = match codec::decode::<Request>(payload) {
            Err(error) => {
                let kind = match error {
                    DecodeError::Limit { .. } | DecodeError::TooLong { .. } => FailureKind::Limit,
                    _ => FailureKind::BadRequest,
                };
                Err((codec::unsigned_field(payload, "id").map(Seq), kind, truncate(&error.to_string())))
            }
            Ok(request) => match self.admit(&route, known, &request) {
                Ok(client) => Ok(ConnectorEvent::Request { client, request }),
                Err((kind, text)) => Err((Some(request.id()), kind, text)),
            },
        };
        refused.unwrap_or_else(|(id, kind, text)| {
            if let Some(id) = id {
                let reply = Reply::Error { id, kind, text: text.clone(), peer: None };
                // Whoever is not there any more to read a refusal is reported as gone elsewhere.
                let _ = self.sender.try_send(&route, Bytes::from(codec::encode(&reply)));
            }
            ConnectorEvent::Refused { client: known, text }
        })
    }

    /// Who is asking, if whoever it is may ask this.
    fn admit(
        &mut self,
        route: &Route,
        known: Option<ClientId>,
        request: &Request,
    ) -> Result<ClientId, (FailureKind, String)> {
        match (known, request) {
            (Some(client), Request::Attach { .. }) => Err((
                FailureKind::BadRequest,
                format!("already attached as client {client}; send detach first, or use another connection"),
            )),
            (Some(client), _) => Ok(client),
            (None, Request::Attach { version, .. }) if *version != CONNECTOR_API_VERSION => Err((
                FailureKind::HandshakeRefused,
                format!(
                    "client speaks version {version} of the connector API, this daemon version \
                     {CONNECTOR_API_VERSION}; install client and daemon from the same release"
                ),
            )),
            (None, Request::Attach { .. }) if self.clients.len() >= self.clients_max => Err((
                FailureKind::Limit,
                format!("{} clients are attached, the limit; detach one or raise pd_max_clients", self.clients.len()),
            )),
            (None, Request::Attach { id, .. }) => {
                let client = ClientId(self.next_client);
                self.next_client += 1;
                self.clients.insert(client, ServedClient { route: route.clone(), attaching: Some(*id) });
                self.ids.insert(route.peer().clone(), client);
                Ok(client)
            }
            (None, _) => Err((FailureKind::BadRequest, "not attached; the first message must be attach".to_owned())),
        }
    }

    fn forget(&mut self, client: ClientId) {
        if let Some(client) = self.clients.remove(&client) {
            self.ids.remove(client.route.peer());
        }
    }
}
