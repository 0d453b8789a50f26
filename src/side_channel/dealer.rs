//! A DEALER: connected to one peer, with the framing of LMCache's senders.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::channel::mpsc;
use zeromq::{DealerRecvHalf, DealerSendHalf, DealerSocket, Socket, SocketEvent, SocketRecv, ZmqMessage};

use super::{SideChannelError, connect_error, library_endpoint, options, send_error};

/// Connects.
#[derive(Debug)]
pub struct Dealer;

impl Dealer {
    /// Connects to `tcp://host:port`, `ipc://@name` or `ipc:///path`. A refusal is returned at once, so that whoever
    /// waits for a peer to start chooses how often to ask; `timeout` is for connecting and handshake together.
    ///
    /// # Errors
    /// [`SideChannelError::Unreachable`], [`SideChannelError::ConnectTimeout`] or
    /// [`SideChannelError::InvalidAddress`].
    pub async fn connect(
        endpoint: &str,
        timeout: Duration,
    ) -> Result<(DealerSender, DealerReceiver), SideChannelError> {
        let mut options = options();
        options.connect_timeout(timeout);
        let mut socket = DealerSocket::with_options(options);
        let monitor = socket.monitor();
        socket.connect(&library_endpoint(endpoint)).await.map_err(|error| connect_error(endpoint, timeout, error))?;
        let (send_half, receive_half) = socket.split();
        Ok((
            DealerSender { half: send_half, endpoint: endpoint.to_owned() },
            DealerReceiver {
                half: receive_half,
                monitor,
                endpoint: endpoint.to_owned(),
                malformed_count: 0,
                gone_reason: None,
            },
        ))
    }
}

/// The sending half of a DEALER.
pub struct DealerSender {
    half: DealerSendHalf,
    endpoint: String,
}

impl DealerSender {
    /// Queues a message, behind an empty frame as REQ sockets send it; never waits.
    ///
    /// # Errors
    /// [`SideChannelError::PeerGone`], or [`SideChannelError::QueueFull`] when the peer does not read. The message is
    /// dropped then.
    pub fn try_send(&self, payload: Bytes) -> Result<(), SideChannelError> {
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
    endpoint: String,
    malformed_count: u64,
    gone_reason: Option<String>,
}

impl DealerReceiver {
    /// The next message, without the empty frame in front. Messages with other frames are dropped and counted.
    /// Nothing is lost when the future is dropped before it is ready.
    ///
    /// # Errors
    /// [`SideChannelError::PeerGone`], from then on always: connect anew.
    pub async fn recv(&mut self) -> Result<Bytes, SideChannelError> {
        let reason = match &self.gone_reason {
            Some(reason) => reason.clone(),
            None => match self.recv_connected().await {
                Ok(payload) => return Ok(payload),
                Err(reason) => self.gone_reason.insert(reason).clone(),
            },
        };
        Err(SideChannelError::PeerGone { peer: self.endpoint.clone(), reason })
    }

    /// Messages dropped for their frames.
    pub fn malformed_count(&self) -> u64 {
        self.malformed_count
    }

    async fn recv_connected(&mut self) -> Result<Bytes, String> {
        loop {
            // What was said before the connection ended is heard first. The library's receiving half stays silent
            // about the end; its monitor tells.
            let message = tokio::select! {
                biased;
                message = self.half.recv() => message.map_err(|error| error.to_string())?,
                event = self.monitor.next() => match event {
                    None | Some(SocketEvent::Disconnected(_)) => return Err("it closed the connection".to_owned()),
                    Some(_) => continue,
                },
            };
            let mut frames = message.into_vecdeque();
            if frames.len() == 2 && frames.front().is_some_and(Bytes::is_empty) {
                frames.pop_front();
            }
            match frames.pop_front() {
                Some(payload) if frames.is_empty() && !payload.is_empty() => return Ok(payload),
                _ => self.malformed_count += 1,
            }
        }
    }
}

impl fmt::Debug for DealerReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DealerReceiver").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}
