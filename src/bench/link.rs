//! One connection to a daemon's connector API: requests can be under way side by side, every wait is bounded.

use std::collections::VecDeque;
use std::time::Duration;

use crate::config::Role;
use crate::connector::client::Client;
use crate::connector::message::{CONNECTOR_API_VERSION, Reply, Request};
use crate::ids::Seq;

use super::error::BenchError;

/// An attached client.
#[derive(Debug)]
pub(super) struct ConnectorLink {
    role: Role,
    client: Client,
    /// Arrived while something else was waited for; no longer than what is under way.
    early: VecDeque<Reply>,
    patience: Duration,
}

impl ConnectorLink {
    /// Connects and attaches; also returns the answer to `attach`.
    ///
    /// # Errors
    /// When nobody answers, or somebody else than a daemon of that role and version.
    pub(super) async fn attach(role: Role, endpoint: &str, patience: Duration) -> Result<(Self, Reply), BenchError> {
        let client = Client::connect(endpoint, patience)
            .await
            .map_err(|error| BenchError::Connector { role: role.as_str(), reason: error.to_string() })?;
        let mut link = Self { role, client, early: VecDeque::new(), patience };
        let attached = link
            .request(|id| Request::Attach { id, version: CONNECTOR_API_VERSION, client: "pd-bench".to_owned() })
            .await?;
        match &attached {
            Reply::Attached { version, role: seen, .. }
                if *version == CONNECTOR_API_VERSION && (seen == role.as_str() || seen == "both") =>
            {
                Ok((link, attached))
            }
            other => Err(link.unexpected("attached, with our role and version", other)),
        }
    }

    /// Whose.
    pub(super) const fn role(&self) -> Role {
        self.role
    }

    /// Queues a message; `reply` gets its answer by the returned id.
    ///
    /// # Errors
    /// When the daemon takes no messages.
    pub(super) fn start(&mut self, request: impl FnOnce(Seq) -> Request) -> Result<Seq, BenchError> {
        let id = self.client.next_id();
        self.client.send(&request(id)).map_err(|error| self.connector(error.to_string()))?;
        Ok(id)
    }

    /// The answer to the message with this id.
    ///
    /// # Errors
    /// [`BenchError::Refused`] when it is an error.
    pub(super) async fn reply(&mut self, id: Seq) -> Result<Reply, BenchError> {
        let reply = match self.early.iter().position(|reply| reply.id() == Some(id)) {
            Some(index) => self.early.remove(index).expect("it was found there"),
            None => loop {
                let reply = self.receive("a reply").await?;
                if reply.id() == Some(id) {
                    break reply;
                }
                self.early.push_back(reply);
            },
        };
        match reply {
            Reply::Error { kind, text, .. } => Err(BenchError::Refused { role: self.role.as_str(), kind, text }),
            reply => Ok(reply),
        }
    }

    /// Sends a message and waits for its answer.
    ///
    /// # Errors
    /// As `start` and `reply`.
    pub(super) async fn request(&mut self, request: impl FnOnce(Seq) -> Request) -> Result<Reply, BenchError> {
        let id = self.start(request)?;
        self.reply(id).await
    }

    /// The next `sent`.
    ///
    /// # Errors
    /// [`BenchError::Refused`] when a request failed.
    pub(super) async fn sent(&mut self) -> Result<Reply, BenchError> {
        let event = match self.early.iter().position(|reply| reply.id().is_none()) {
            Some(index) => self.early.remove(index).expect("it was found there"),
            None => loop {
                let reply = self.receive("`sent` or `failed`").await?;
                match &reply {
                    // What was refused has no event: waiting on would be in vain.
                    Reply::Error { kind, text, .. } => {
                        return Err(BenchError::Refused { role: self.role.as_str(), kind: *kind, text: text.clone() });
                    }
                    reply_or_event if reply_or_event.id().is_none() => break reply,
                    _ => self.early.push_back(reply),
                }
            },
        };
        match event {
            Reply::Failed { req_id, kind, text, peer, .. } => Err(BenchError::Refused {
                role: self.role.as_str(),
                kind,
                text: format!("request {req_id} to {peer}: {text}"),
            }),
            event => Ok(event),
        }
    }

    /// The error for an answer of the wrong type.
    pub(super) fn unexpected(&self, expected: &str, seen: &Reply) -> BenchError {
        self.connector(format!("expected {expected}, saw {seen:?}"))
    }

    fn connector(&self, reason: String) -> BenchError {
        BenchError::Connector { role: self.role.as_str(), reason }
    }

    fn silent(&self, expected: &'static str) -> BenchError {
        BenchError::Silent { role: self.role.as_str(), expected, waited: self.patience }
    }

    async fn receive(&mut self, expected: &'static str) -> Result<Reply, BenchError> {
        match tokio::time::timeout(self.patience, self.client.recv()).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => Err(self.connector(error.to_string())),
            Err(_) => Err(self.silent(expected)),
        }
    }
}
