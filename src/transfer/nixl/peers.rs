//! The peers that NIXL knows.

use std::collections::{BTreeMap, VecDeque};

use nixl_sys::XferDlistHandle;

use super::descriptors::BufferDescriptor;
use crate::ids::ConnectionId;

/// Agents that NIXL goes on knowing after their connection was given up: as many as there may be peers by default
/// (`pd_max_peers`), so that all of them can be lost at once.
const RETIRED_MAX: usize = 1024;

/// An agent whose metadata is loaded.
pub(super) struct Peer {
    pub(super) agent_name: String,
    /// What NIXL was told of it.
    pub(super) metadata: Vec<u8>,
    /// Where its memory is, while the connection is being warmed.
    pub(super) connecting: Option<BufferDescriptor>,
    /// From then on.
    pub(super) buffer: Option<RemoteBuffer>,
    /// Requests to it that NIXL has not ended.
    pub(super) requests_in_progress: usize,
    /// To be retired or forgotten when the last of those has ended.
    pub(super) leaving: bool,
    /// NIXL knew it from an earlier connection, whose way to it is used again.
    pub(super) reused: bool,
    /// A request to it has failed: the way to it is not to be used again.
    pub(super) broken: bool,
}

/// An agent that NIXL still knows, and no connection names.
#[derive(Debug)]
pub(super) struct Retired {
    pub(super) agent_name: String,
    /// What NIXL was told of it.
    pub(super) metadata: Vec<u8>,
}

/// Where a peer's memory is.
pub(super) struct RemoteBuffer {
    /// Its units, if they are as long as ours. Dropped before the agent, as all of [`Peers`] is.
    pub(super) units: Option<XferDlistHandle>,
    pub(super) descriptor: BufferDescriptor,
}

/// All of them.
#[derive(Default)]
pub(super) struct Peers {
    known: BTreeMap<ConnectionId, Peer>,
    /// The latest last.
    retired: VecDeque<Retired>,
    connections_made: u64,
}

// SAFETY: as for `OwnedAgent`: the raw pointers in `XferDlistHandle` are not tied to a thread, what they point to
// outlives it, and they are used through the engine alone, which one thread has at a time.
#[allow(unsafe_code)]
unsafe impl Send for Peers {}

impl Peers {
    pub(super) fn insert(&mut self, agent_name: String, metadata: Vec<u8>, reused: bool) -> ConnectionId {
        self.connections_made += 1;
        let connection = ConnectionId(self.connections_made);
        let peer = Peer {
            agent_name,
            metadata,
            connecting: None,
            buffer: None,
            requests_in_progress: 0,
            leaving: false,
            reused,
            broken: false,
        };
        self.known.insert(connection, peer);
        connection
    }

    /// A peer that is not leaving.
    pub(super) fn present(&self, connection: ConnectionId) -> Option<&Peer> {
        self.known.get(&connection).filter(|peer| !peer.leaving)
    }

    /// Any peer, leaving or not.
    pub(super) fn any_mut(&mut self, connection: ConnectionId) -> Option<&mut Peer> {
        self.known.get_mut(&connection)
    }

    pub(super) fn remove(&mut self, connection: ConnectionId) -> Option<Peer> {
        self.known.remove(&connection)
    }

    /// Keeps an agent for when it is met again. The one to forget for it, if they have become too many.
    pub(super) fn retire(&mut self, retired: Retired) -> Option<Retired> {
        self.retired.push_back(retired);
        if self.retired.len() > RETIRED_MAX { self.retired.pop_front() } else { None }
    }

    /// An agent that is met again.
    pub(super) fn take_retired(&mut self, agent_name: &str) -> Option<Retired> {
        let at = self.retired.iter().position(|retired| retired.agent_name == agent_name)?;
        self.retired.remove(at)
    }

    /// The connection of an agent, leaving or not.
    pub(super) fn of_agent(&self, agent_name: &str) -> Option<(ConnectionId, &Peer)> {
        self.known.iter().find(|(_, peer)| peer.agent_name == agent_name).map(|(&connection, peer)| (connection, peer))
    }
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.known.values().map(|peer| &peer.agent_name)).finish()
    }
}
