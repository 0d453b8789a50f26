//! A PUSH: connected to one PULL, which never answers.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::channel::mpsc;
use zeromq::{PushSocket, Socket, SocketEvent, ZmqMessage};

use super::{SideChannelError, bind, connect_error, options, send_error};

/// A PUSH connected to one PULL.
pub struct PushSender {
    socket: PushSocket,
    monitor: mpsc::Receiver<SocketEvent>,
    is_closed: bool,
    address: String,
}

impl PushSender {
    /// Connects; a refusal is returned at once.
    ///
    /// # Errors
    /// [`SideChannelError::Unreachable`], [`SideChannelError::ConnectTimeout`] or
    /// [`SideChannelError::InvalidAddress`].
    pub async fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self, SideChannelError> {
        let address = bind::tcp_address(host, port);
        let mut options = options();
        options.connect_timeout(timeout);
        let mut socket = PushSocket::with_options(options);
        let monitor = socket.monitor();
        socket.connect(&address).await.map_err(|error| connect_error(&address, timeout, error))?;
        Ok(Self { socket, monitor, is_closed: false, address })
    }

    /// Queues a message of one frame; never waits.
    ///
    /// # Errors
    /// [`SideChannelError::PeerGone`]: connect anew and send again. [`SideChannelError::QueueFull`] when the peer does
    /// not read. Either way the message is dropped.
    pub fn try_send(&self, payload: Bytes) -> Result<(), SideChannelError> {
        self.socket.try_send(ZmqMessage::from(payload)).map_err(|error| send_error(&self.address, error))
    }

    /// Returns when the peer has closed the connection; what is sent from then on is refused.
    pub async fn closed(&mut self) {
        while !self.is_closed {
            let event = self.monitor.next().await;
            self.is_closed = matches!(event, None | Some(SocketEvent::Disconnected(..)));
        }
    }
}

impl fmt::Debug for PushSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PushSender").field("address", &self.address).finish_non_exhaustive()
    }
}
