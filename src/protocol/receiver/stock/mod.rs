//! Senders of another make: LMCache's PD backend, unmodified.
//!
//! What differs from our own. Its allocations carry no name of their sender, so a sender is the connection that they come
//! through. Its grants are whole pages of the buffer as it was at the handshake. It says nothing when it has written, and
//! tells its proxy instead: what it was granted is *granted* here until a reader, which has heard from the proxy, vouches
//! for it. And it never says that it has stopped: what nobody vouches for in time is quarantined until its connection is
//! gone. A refusal is page index -1 for every chunk.
//!
//! | file | what is in it |
//! |---|---|
//! | `agents` | handshakes |
//! | `requests` | grants, in batches of pages; refusals, cancels, the end of a connection |
//! | `vouching` | what is granted, until a reader says that it is written |

mod agents;
mod requests;
mod vouching;

use std::collections::BTreeMap;

use crate::ids::{ChunkKey, ConnectionId, RequestId, SlotIndex};

/// How their names here begin. No sender of ours has such a name: a handshake with one is refused.
pub(super) const STOCK_PREFIX: &str = "lmcache-";

/// What is known of senders of another make.
#[derive(Debug)]
pub(super) struct Stock<R> {
    /// Engines that have shaken hands, by the name that they were given here.
    agents: BTreeMap<String, Agent<R>>,
    /// Connections that allocations come through, and what their senders are called here.
    routes: Vec<(R, String)>,
    /// Chunks that are granted and not vouched for, and for which requests: each has a copy of its own.
    granted: BTreeMap<ChunkKey, Vec<RequestId>>,
    /// How much of the buffer all of them know, in bytes.
    known_len_bytes: Option<u64>,
    names: u64,
}

#[derive(Debug)]
struct Agent<R> {
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
    Met(ConnectionId),
    /// It has been told where the pages are.
    Told(ConnectionId),
}

/// A request of such a sender, which may come in several batches.
#[derive(Debug)]
pub(super) struct Batches {
    /// Chunks that it has announced in all.
    total: usize,
    /// Pages reserved for batches that are to come. Their sender does not know of them.
    pub(super) spare: Vec<SlotIndex>,
    /// No further batch comes.
    complete: bool,
    /// Its sender has not named it: readers find its chunks by their keys alone.
    unnamed: bool,
}

impl Batches {
    pub(super) const fn is_complete(&self) -> bool {
        self.complete
    }
}

impl<R> Default for Stock<R> {
    fn default() -> Self {
        Self { agents: BTreeMap::new(), routes: Vec::new(), granted: BTreeMap::new(), known_len_bytes: None, names: 0 }
    }
}

impl<R: PartialEq> Stock<R> {
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

    /// How many senders are connected or have shaken hands.
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
