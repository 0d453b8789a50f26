//! Messages of clients that speak of what a GPU has yet to do: held until it has.

use std::collections::BTreeMap;

use super::engine_thread::{Command, EngineThread};
use super::error::RuntimeError;
use crate::connector::message::Request;
use crate::ids::{ClientId, IpcHandle};

/// Most messages that are held: an engine has as many as it has leases and cancelled requests, not this many.
const HELD_MAX: usize = 16_384;

/// Messages by the ticket that the engine's thread knows them by.
#[derive(Debug, Default)]
pub(super) struct Held {
    tickets: u64,
    messages: BTreeMap<u64, (ClientId, Request)>,
}

impl Held {
    /// Whether nothing more is held.
    pub(super) fn is_full(&self) -> bool {
        self.messages.len() >= HELD_MAX
    }

    /// Keeps a message until the GPU has passed an event, which the engine reports by a ticket.
    pub(super) fn keep<P: Send + 'static>(
        &mut self,
        client: ClientId,
        message: Request,
        after: IpcHandle,
        engine: &EngineThread<P>,
    ) -> Result<(), RuntimeError> {
        self.tickets += 1;
        self.messages.insert(self.tickets, (client, message));
        engine.send(Command::Await { ticket: self.tickets, after })
    }

    /// Its time has come.
    pub(super) fn take(&mut self, ticket: u64) -> Option<(ClientId, Request)> {
        self.messages.remove(&ticket)
    }

    /// What a client that is gone has said counts no more.
    pub(super) fn forget<P: Send + 'static>(
        &mut self,
        client: ClientId,
        engine: &EngineThread<P>,
    ) -> Result<(), RuntimeError> {
        let of_client = self.messages.iter().filter(|(_, (other, _))| *other == client);
        let tickets: Vec<u64> = of_client.map(|(&ticket, _)| ticket).collect();
        self.messages.retain(|_, (other, _)| *other != client);
        tickets.into_iter().try_for_each(|ticket| engine.send(Command::Unawait { ticket }))
    }
}
