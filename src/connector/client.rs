//! The other end of the connector API, for pd-bench and tests; engines use the Python client.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use super::message::{Reply, Request};
use crate::ids::Seq;
use crate::side_channel::{Dealer, DealerReceiver, DealerSender, SideChannelError};
use crate::wire::{DecodeError, codec};

/// Most replies and events that wait for [`Client::recv`] while [`Client::request`] waits for another.
pub const PENDING_MAX: usize = 65_536;

/// Why a daemon could not be asked, or its answer not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The daemon cannot be reached or is gone.
    #[error(transparent)]
    SideChannel(#[from] SideChannelError),
    /// The daemon said something that is not of this API.
    #[error("{endpoint} sent what is no reply of the connector API: {source}")]
    Reply {
        /// Where the daemon listens.
        endpoint: String,
        /// What was seen.
        source: DecodeError,
    },
    /// Nobody calls [`Client::recv`].
    #[error("{PENDING_MAX} replies and events of {endpoint} have not been received; call recv")]
    Pending {
        /// Where the daemon listens.
        endpoint: String,
    },
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    sender: DealerSender,
    receiver: DealerReceiver,
    endpoint: String,
    pending: VecDeque<Reply>,
    next_id: u64,
}

impl Client {
    /// Connects to the `connector` endpoint of a daemon's ready line. Attaching is the caller's first request.
    ///
    /// # Errors
    /// Those of [`Dealer::connect`].
    pub async fn connect(endpoint: &str, timeout: Duration) -> Result<Self, ClientError> {
        let (sender, receiver) = Dealer::connect(endpoint, timeout).await?;
        Ok(Self { sender, receiver, endpoint: endpoint.to_owned(), pending: VecDeque::new(), next_id: 1 })
    }

    /// An `id` that this client has not used.
    pub fn next_id(&mut self) -> Seq {
        let id = Seq(self.next_id);
        self.next_id += 1;
        id
    }

    /// Sends a request; its reply comes through [`recv`](Self::recv).
    ///
    /// # Errors
    /// The daemon is gone or does not read.
    pub fn send(&self, request: &Request) -> Result<(), ClientError> {
        Ok(self.sender.try_send(Bytes::from(codec::encode(request)))?)
    }

    /// The next reply or event, in the order in which they came. Nothing is lost when the future is dropped before it
    /// is ready.
    ///
    /// # Errors
    /// The daemon is gone, or what it sent is no reply.
    pub async fn recv(&mut self) -> Result<Reply, ClientError> {
        match self.pending.pop_front() {
            Some(reply) => Ok(reply),
            None => self.next().await,
        }
    }

    /// Sends a request and waits for its reply, [`Reply::Error`] included; whatever comes before that is kept for
    /// [`recv`](Self::recv). Dropped before it is ready, the reply goes to `recv` as well.
    ///
    /// # Errors
    /// The daemon is gone, what it sent is no reply, or too much waits for `recv`.
    pub async fn request(&mut self, request: &Request) -> Result<Reply, ClientError> {
        self.send(request)?;
        loop {
            let reply = self.next().await?;
            if reply.id() == Some(request.id()) {
                return Ok(reply);
            }
            if self.pending.len() >= PENDING_MAX {
                return Err(ClientError::Pending { endpoint: self.endpoint.clone() });
            }
            self.pending.push_back(reply);
        }
    }

    async fn next(&mut self) -> Result<Reply, ClientError> {
        let payload = self.receiver.recv().await?;
        codec::decode(&payload).map_err(|source| ClientError::Reply { endpoint: self.endpoint.clone(), source })
    }
}
