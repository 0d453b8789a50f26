//! Messages of clients that speak of what a GPU has yet to do: deferred until it has.

use std::collections::BTreeMap;

use super::engine_thread::EngineThread;
use super::engine_work::EngineCommand;
use super::error::RuntimeError;
use crate::buffer::Memory;
use crate::connector::message::Request;
use crate::ids::{ClientId, Failure, FailureKind, Seq};

/// Most messages that are deferred: an engine has as many as it has leases and cancelled requests, not this many.
const DEFERRED_MAX: usize = 16_384;

/// Messages by the ticket that the engine's thread knows them by.
#[derive(Debug, Default)]
pub(super) struct Deferred {
    tickets: u64,
    messages: BTreeMap<u64, (ClientId, Request)>,
}

impl Deferred {
    /// Gives the message back if it need not wait; none when it is deferred until the engine reports its ticket.
    ///
    /// # Errors
    /// Which cannot be deferred, and why.
    pub(super) fn admit(
        &mut self,
        client: ClientId,
        mut message: Request,
        memory: &Memory,
        engine: &EngineThread,
    ) -> Result<Option<Request>, (Seq, Failure)> {
        let Some(after) = message.take_after() else { return Ok(Some(message)) };
        if matches!(memory, Memory::Host(_)) {
            return Err((message.id(), no_event_here()));
        }
        if self.messages.len() >= DEFERRED_MAX {
            let text =
                "too many messages wait for events that no GPU has passed; let the engine's streams get on first";
            return Err((message.id(), Failure::new(FailureKind::Limit, text)));
        }
        self.tickets += 1;
        self.messages.insert(self.tickets, (client, message));
        note_end(engine.send(EngineCommand::AwaitForMessage { ticket: self.tickets, after }));
        Ok(None)
    }

    /// The message of a ticket that the engine has reported.
    pub(super) fn take(&mut self, ticket: u64) -> Option<(ClientId, Request)> {
        self.messages.remove(&ticket)
    }

    /// What a client that is gone has said counts no more.
    pub(super) fn forget(&mut self, client: ClientId, engine: &EngineThread) {
        let of_client = self.messages.iter().filter(|(_, (other, _))| *other == client);
        let tickets: Vec<u64> = of_client.map(|(&ticket, _)| ticket).collect();
        self.messages.retain(|_, (other, _)| *other != client);
        note_end(tickets.into_iter().try_for_each(|ticket| engine.send(EngineCommand::Unawait { ticket })));
    }
}

/// Why an event is refused where there is no GPU.
pub(super) fn no_event_here() -> Failure {
    let text = "`after` names an event of a GPU, but this pd_buffer is host memory, which no GPU writes; leave it out";
    Failure::new(FailureKind::BadRequest, text)
}

/// An engine's thread that has ended is the daemon's end, as soon as the node asks for something.
fn note_end(told: Result<(), RuntimeError>) {
    if let Err(error) = told {
        tracing::error!(%error, "a message about GPU memory is lost");
    }
}
