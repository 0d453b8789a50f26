//! LMCache's senders: its PD backend, unmodified.
//!
//! What differs from a pd-sender:
//!
//! - An allocation does not name its sender. A sender is the connection that its allocations come through.
//! - A grant is whole pages of the buffer, as long as the buffer was at the handshake.
//! - A sender does not commit. When it has written a request it tells its proxy, and the reader hears so from the proxy. So
//!   what a sender was granted is *uncommitted* here until a reader takes it.
//! - A sender never says that it has stopped writing. What no reader takes in time is quarantined until the sender's
//!   connection is gone.
//! - A refusal is page index -1 for every chunk.
//!
//! | file | what is in it |
//! |---|---|
//! | `agents` | handshakes |
//! | `requests` | grants, in batches of pages; refusals, cancels, the end of a connection |
//! | `uncommitted` | what is granted, until a reader says that it is written |
//! | `queries` | LMCache's questions which chunks are ready, by page |

mod agents;
mod queries;
mod requests;
mod uncommitted;

use std::collections::BTreeMap;

use super::{Incoming, Port};
use crate::ids::{ChunkKey, ConnectionId, RequestId, SlotIndex};
use crate::node::core::Core;
use crate::wire::Message;

/// How their names here begin. No sender of ours has such a name: a handshake with one is refused.
pub(super) const NAME_PREFIX: &str = "lmcache-";

/// What is known of LMCache senders.
#[derive(Debug)]
pub(super) struct Senders<R> {
    /// Engines that have made a handshake, by the name that they were given here.
    agents: BTreeMap<String, LmcacheAgent<R>>,
    /// Connections that allocations come through, and what their senders are called here.
    routes: Vec<(R, String)>,
    /// Chunks that are granted and that no reader has taken, and for which requests: each has a copy of its own.
    granted: BTreeMap<ChunkKey, Vec<RequestId>>,
    /// How much of the buffer all of them know, in bytes.
    known_len_bytes: Option<u64>,
    names: u64,
}

#[derive(Debug)]
struct LmcacheAgent<R> {
    /// In the order of their handshakes.
    number: u64,
    state: AgentState<R>,
}

#[derive(Debug)]
enum AgentState<R> {
    /// The engine reads its metadata; then it is answered.
    Loading {
        reply_to: R,
    },
    Connected(ConnectionId),
    /// It has been told where the pages are.
    Told(ConnectionId),
}

/// A request of such a sender, which may come in several batches.
#[derive(Debug)]
pub(super) struct Batches {
    /// Chunks that it has announced in all.
    total: usize,
    /// Pages reserved for batches that are to come. Their sender does not know of them.
    spare: Vec<SlotIndex>,
    /// No further batch comes.
    complete: bool,
    /// Its sender has not named it: readers find its chunks by their keys alone.
    unnamed: bool,
}

impl Batches {
    /// Whether every batch has come.
    pub(super) const fn is_complete(&self) -> bool {
        self.complete
    }

    /// Pages reserved for batches that are to come.
    pub(super) fn spare_slots(&self) -> &[SlotIndex] {
        &self.spare
    }
}

impl<R> Default for Senders<R> {
    fn default() -> Self {
        Self { agents: BTreeMap::new(), routes: Vec::new(), granted: BTreeMap::new(), known_len_bytes: None, names: 0 }
    }
}

impl<R: PartialEq> Senders<R> {
    fn fresh(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    fn route_of(&self, route: &R) -> Option<&String> {
        self.routes.iter().find(|(known, _)| known == route).map(|(_, instance)| instance)
    }

    /// Whether allocations of this sender can still come.
    pub(super) fn is_connected(&self, instance: &str) -> bool {
        self.routes.iter().any(|(_, known)| known == instance)
    }

    /// How many senders are connected, or have made a handshake.
    pub(super) fn len(&self) -> usize {
        self.agents.len().max(self.routes.len())
    }

    pub(super) fn forget_granted(&mut self, keys: &[ChunkKey], id: &RequestId) {
        for key in keys {
            let Some(ids) = self.granted.get_mut(key) else { continue };
            ids.retain(|other| other != id);
            if ids.is_empty() {
                self.granted.remove(key);
            }
        }
    }
}

impl<R: Clone + PartialEq> Incoming<R> {
    /// A message without our part.
    pub(super) fn on_lmcache_message(&mut self, core: &mut Core<R>, port: Port, from: R, message: Message) {
        match (port, message) {
            (Port::Init, Message::NixlInitRequest(request)) => {
                self.on_lmcache_init(core, from, request.local_meta_bytes)
            }
            (Port::Init, Message::NixlMemRegRequest(request)) => self.on_lmcache_mem_reg(core, from, &request),
            (Port::Alloc, Message::AllocRequest(request)) => self.on_lmcache_alloc(core, from, request),
            (Port::Alloc, Message::CancelNotif(cancel)) => self.on_lmcache_cancel(core, from, &cancel),
            (Port::Query, Message::CacheQueryRequest(query)) => self.on_query(core, from, query),
            (port, message) => self.refuse_misdirected(core, port, from, &message),
        }
    }
}
