//! Telling the proxy: a task of its own, so that a proxy that is away delays nobody.

use std::time::Duration;

use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::time::sleep;

use crate::config::ProxyConfig;
use crate::ids::{Failure, RequestId};
use crate::side_channel::PushSender;
use crate::wire::message::{NotifExtension, ProxyNotif};
use crate::wire::{Message, encode};

/// Notifications that may wait for a proxy that is away; more are dropped with a log line.
const QUEUED_MAX: usize = 65_536;
/// Pause before connecting again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

/// The way to the proxy.
#[derive(Debug)]
pub(super) struct Proxy {
    queue: Sender<ProxyNotif>,
}

impl Proxy {
    /// Starts the task. `connect_timeout` bounds each attempt to connect.
    pub(super) fn start(config: ProxyConfig, connect_timeout: Duration) -> Self {
        let (queue, inbox) = mpsc::channel(QUEUED_MAX);
        tokio::spawn(run(config, connect_timeout, inbox));
        Self { queue }
    }

    /// Queues a notification: the request is ready at its receiver, or has failed. Never waits.
    pub(super) fn notify(&self, req_id: RequestId, failure: Option<Failure>) {
        let pd = failure.map(|failure| NotifExtension { failure });
        if let Err(error) = self.queue.try_send(ProxyNotif { req_id, pd }) {
            tracing::error!(%error, "the proxy is away and {QUEUED_MAX} notifications wait for it; one more is dropped");
        }
    }
}

async fn run(config: ProxyConfig, connect_timeout: Duration, mut inbox: Receiver<ProxyNotif>) {
    let mut socket: Option<PushSender> = None;
    let mut complained = false;
    while let Some(notification) = inbox.recv().await {
        let request = notification.req_id.clone();
        let payload = encode(&Message::ProxyNotif(notification));
        loop {
            let failed = match &mut socket {
                Some(connected) => connected.try_send(payload.clone().into()).err(),
                None => match PushSender::connect(&config.host, config.port, connect_timeout).await {
                    Ok(connected) => {
                        complained = false;
                        socket = Some(connected);
                        continue;
                    }
                    Err(error) => Some(error),
                },
            };
            let Some(error) = failed else { break };
            socket = None;
            if !complained {
                tracing::warn!(proxy = %format_args!("{}:{}", config.host, config.port), %request, %error,
                    "the proxy cannot be told; trying again until it can");
                complained = true;
            }
            sleep(RECONNECT_PAUSE).await;
        }
    }
}
