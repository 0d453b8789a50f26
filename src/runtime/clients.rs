//! The clients of the connector API: attaching them, hearing them, answering them.

use std::time::Instant;

use super::error::RuntimeError;
use super::translate;
use crate::buffer::MemoryManager;
use crate::config::Config;
use crate::connector::message::Reply;
use crate::connector::server::{ConnectorEvent, ConnectorServer};
use crate::ids::{ClientId, Seq, truncate};
use crate::side_channel::{IpcName, RateLimited};

/// The daemon's end of the connector API.
pub(super) struct Clients {
    server: ConnectorServer,
    warnings: RateLimited,
}

impl Clients {
    /// Binds the API, under a name of its own unless the configuration has one.
    pub(super) async fn bind(config: &Config) -> Result<Self, RuntimeError> {
        let name = match &config.connector_endpoint {
            Some(endpoint) => IpcName::parse(endpoint)?,
            None => IpcName::new_abstract(config.role.as_str()),
        };
        let server = ConnectorServer::bind(&name, config.limits.clients_max as usize).await?;
        Ok(Self { server, warnings: RateLimited::default() })
    }

    /// Where clients connect to.
    pub(super) fn endpoint(&self) -> &str {
        self.server.endpoint()
    }

    /// Clients attached.
    pub(super) fn count(&self) -> u32 {
        self.server.client_count() as u32
    }

    /// The next word from a client. Cancel-safe.
    pub(super) async fn listen(&mut self) -> ConnectorEvent {
        loop {
            match self.server.recv().await {
                Some(ConnectorEvent::Refused { client, text }) => {
                    if let Some(unsaid) = self.warnings.permit(Instant::now()) {
                        tracing::warn!(client = client.map(|client| client.0), unsaid, "connector refused: {text}");
                    }
                }
                Some(event) => return event,
                None => std::future::pending().await,
            }
        }
    }

    /// Answers a client. One that is gone, or does not read, is reported by the server itself.
    pub(super) fn reply(&mut self, client: ClientId, reply: &Reply) {
        if let Err(error) = self.server.send(client, reply) {
            tracing::debug!(%client, %error, "a reply could not be sent");
        }
    }

    /// Tells a new client how to map the buffer, and what is in it.
    pub(super) fn attach(&mut self, client: ClientId, id: Seq, name: &str, config: &Config, manager: &MemoryManager) {
        tracing::info!(%client, name = truncate(name), "connector attached");
        self.reply(client, &translate::attached(id, config, manager));
    }
}
