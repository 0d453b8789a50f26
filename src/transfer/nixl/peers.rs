//! Connections to the agents that NIXL knows.

use std::collections::BTreeMap;

use nixl_sys::XferDlistHandle;

use super::agent::{OwnedAgent, Side};
use super::descriptors::NixlBuffer;
use super::errors::bad_descriptors;
use crate::ids::ConnectionId;
use crate::transfer::TransferError;

/// A connection to an agent that NIXL knows.
pub(super) struct NixlPeer {
    pub(super) agent_name: String,
    /// Where its memory is, while the connection is being warmed.
    pub(super) connecting: Option<NixlBuffer>,
    /// From then on.
    pub(super) buffer: Option<RemoteBuffer>,
    /// Requests of this connection that NIXL has not ended.
    pub(super) requests_in_progress: usize,
    /// To be forgotten when the last of those has ended.
    pub(super) leaving: bool,
    /// NIXL knew the agent before this connection, which uses the same way to it.
    pub(super) reused: bool,
}

/// Where a peer's memory is.
pub(super) struct RemoteBuffer {
    /// Its units, if they are as long as ours. Dropped before the agent, as all of [`Peers`] is.
    pub(super) units: Option<XferDlistHandle>,
    pub(super) descriptor: NixlBuffer,
}

impl RemoteBuffer {
    /// The agent has to be known, with that memory.
    pub(super) fn prepare(agent: &OwnedAgent, agent_name: &str, descriptor: NixlBuffer) -> Result<Self, TransferError> {
        let units = if descriptor.unit_bytes == agent.buffer()?.unit_bytes {
            let prepared = agent.prepare_units(Side::Of(agent_name), &descriptor);
            prepared.map_err(|error| bad_descriptors(agent_name, format!("prepare_xfer_dlist: {error}")))?
        } else {
            None
        };
        Ok(Self { units, descriptor })
    }
}

/// All connections, several of which may name one agent.
#[derive(Default)]
pub(super) struct Peers {
    known: BTreeMap<ConnectionId, NixlPeer>,
    connections_made: u64,
}

// SAFETY: as for `OwnedAgent`: the raw pointers in `XferDlistHandle` are not tied to a thread, what they point to
// outlives it, and they are used through the engine alone, which one thread has at a time.
#[allow(unsafe_code)]
unsafe impl Send for Peers {}

impl Peers {
    pub(super) fn insert(&mut self, agent_name: String, reused: bool) -> ConnectionId {
        self.connections_made += 1;
        let connection = ConnectionId(self.connections_made);
        let peer =
            NixlPeer { agent_name, connecting: None, buffer: None, requests_in_progress: 0, leaving: false, reused };
        self.known.insert(connection, peer);
        connection
    }

    /// A peer that is not leaving.
    pub(super) fn present(&self, connection: ConnectionId) -> Option<&NixlPeer> {
        self.known.get(&connection).filter(|peer| !peer.leaving)
    }

    /// Any peer, leaving or not.
    pub(super) fn any_mut(&mut self, connection: ConnectionId) -> Option<&mut NixlPeer> {
        self.known.get_mut(&connection)
    }

    pub(super) fn remove(&mut self, connection: ConnectionId) -> Option<NixlPeer> {
        self.known.remove(&connection)
    }

    /// Requests to an agent that NIXL has not ended: of connections that are leaving, and of the others.
    pub(super) fn requests_to(&self, agent_name: &str) -> (usize, usize) {
        let of_agent = || self.known.values().filter(|peer| peer.agent_name == agent_name);
        let count =
            |leaving| of_agent().filter(|peer| peer.leaving == leaving).map(|peer| peer.requests_in_progress).sum();
        (count(true), count(false))
    }

    /// Drops what was prepared from an agent's metadata, which NIXL forgets now. Ranges can be written without it.
    pub(super) fn drop_prepared(&mut self, agent_name: &str) {
        for buffer in self.buffers_of(agent_name) {
            buffer.units = None;
        }
    }

    /// Where an agent's memory is, for each connection that has connected to it.
    pub(super) fn buffers_of(&mut self, agent_name: &str) -> impl Iterator<Item = &mut RemoteBuffer> {
        self.known
            .values_mut()
            .filter(move |peer| peer.agent_name == agent_name)
            .filter_map(|peer| peer.buffer.as_mut())
    }
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.known.values().map(|peer| &peer.agent_name)).finish()
    }
}
