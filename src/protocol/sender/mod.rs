//! The sender's session: shakes hands with receivers, opens requests, stages local slots, has chunks written,
//! commits them.
//!
//! | file | what is in it |
//! |---|---|
//! | `io` | what goes in and comes out: requests, outputs, answers, notes |
//! | `peers` | handshakes with receivers, and losing them |
//! | `requests` | a request from `open` to its one end |
//! | `staging` | who waits for local slots, and who gets them |
//! | `transfers`, `coverage` | `send`: parts into copies, and which bytes were given to the engine |

mod coverage;
mod io;
mod peers;
mod requests;
mod staging;
mod transfers;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

pub use io::{Answer, Event, Note, OpenRequest, Output, Part, Phases, SenderCounts, StagedSlot};

use self::peers::Peer;
use self::requests::{Request, Uid, WRITE_DEADLINE_PASSED};
use self::staging::Staging;
use self::transfers::Transfer;
use super::timers::Timers;
use super::{ChunkShape, Port};
use crate::ids::{
    ClientId, ConnectionId, Failure, FailureKind, PeerAddress, PeerId, RequestId, Seq, SlotIndex, TransferId,
};
use crate::slot::SlotPool;
use crate::wire::Message;
use crate::wire::message::Hello;

/// What a sender session is told at start.
#[derive(Debug, Clone)]
pub struct SenderSettings {
    /// Who this daemon is.
    pub hello: Hello,
    /// Name of its engine's agent.
    pub agent_name: String,
    /// Its engine's metadata.
    pub metadata: Vec<u8>,
    /// What a chunk is.
    pub chunk: ChunkShape,
    /// Slots in the buffer.
    pub slot_count: u32,
    /// How long a request waits for slots, here and at its receiver, unless it says.
    pub allocation_timeout: Duration,
    /// How long connecting to a receiver and shaking hands may take.
    pub handshake_timeout: Duration,
    /// How long a receiver may take to answer beyond what it was told to wait.
    pub commit_timeout: Duration,
    /// Most requests that have not ended.
    pub requests_max: usize,
    /// Most chunks of one request.
    pub request_chunks_max: usize,
    /// Most receivers.
    pub peers_max: usize,
    /// Whether a proxy wants to know.
    pub notify_proxy: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// A receiver has not shaken hands in time.
    Handshake(PeerId),
    /// A request has waited long enough for its grant.
    Allocation(Uid),
    /// A grant must not be written to any more.
    Write(Uid),
    /// A commit has not been acknowledged in time.
    Commit(Uid),
    /// A cancelled request's transfers have not ended in time.
    Cancel(Uid),
    /// A client has waited long enough for local slots.
    Stage(ClientId, Seq),
}

/// The sender as a value.
#[derive(Debug)]
pub struct SenderSession {
    settings: SenderSettings,
    slots: SlotPool,
    peers: BTreeMap<PeerId, Peer>,
    peer_by_address: BTreeMap<PeerAddress, PeerId>,
    requests: BTreeMap<Uid, Request>,
    /// Requests that have not ended as far as their clients know.
    request_by_name: BTreeMap<RequestId, Uid>,
    /// Which request a receiver's answer is about.
    awaited: BTreeMap<Seq, Uid>,
    transfers: BTreeMap<TransferId, Transfer>,
    /// Slots of failed requests that their clients may be filling, until these say that they know.
    unacknowledged: BTreeMap<(ClientId, RequestId), Vec<SlotIndex>>,
    /// Clients that wait for local slots, in the order of their arrival.
    staging: VecDeque<Staging>,
    timers: Timers<Timer>,
    outputs: VecDeque<Output>,
    counts: SenderCounts,
    next_id: u64,
    draining: bool,
}

impl SenderSession {
    /// A session that knows nobody.
    pub fn new(settings: SenderSettings) -> Self {
        let slots = SlotPool::new(settings.slot_count, settings.chunk.chunk_bytes);
        Self {
            settings,
            slots,
            peers: BTreeMap::new(),
            peer_by_address: BTreeMap::new(),
            requests: BTreeMap::new(),
            request_by_name: BTreeMap::new(),
            awaited: BTreeMap::new(),
            transfers: BTreeMap::new(),
            unacknowledged: BTreeMap::new(),
            staging: VecDeque::new(),
            timers: Timers::new(),
            outputs: VecDeque::new(),
            counts: SenderCounts::default(),
            next_id: 1,
            draining: false,
        }
    }

    /// A message arrived from a receiver.
    pub fn handle_message(&mut self, now: Instant, peer: PeerId, port: Port, message: Message) {
        match (port, message) {
            (Port::Init, Message::NixlInitResponse(response)) => self.on_init_response(peer, response),
            (Port::Init, Message::NixlMemRegResponse(response)) => self.on_mem_reg_response(now, peer, response),
            (Port::Alloc, Message::AllocResponse(response)) => self.on_alloc_response(now, peer, response),
            (Port::Alloc, Message::PdCommitAck(ack)) => self.on_commit_ack(now, peer, ack),
            (Port::Alloc, Message::PdRevoke(revoke)) => self.on_revoke(peer, revoke),
            (_, message) => self.note_unexpected(peer, message.type_name()),
        }
    }

    /// Deadlines may have passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some(timer) = self.timers.pop_due(now) {
            match timer {
                Timer::Handshake(peer) => {
                    let text = format!(
                        "no handshake within {} ms (pd_handshake_timeout_sec)",
                        self.settings.handshake_timeout.as_millis()
                    );
                    self.peer_failed(peer, Failure::new(FailureKind::PeerUnreachable, text));
                }
                Timer::Allocation(uid) => self.allocation_timed_out(uid),
                Timer::Write(uid) => {
                    self.fail(uid, Failure::new(FailureKind::Deadline, WRITE_DEADLINE_PASSED));
                }
                Timer::Commit(uid) => {
                    let text = format!(
                        "the commit was not acknowledged within {} ms (pd_commit_timeout_sec)",
                        self.settings.commit_timeout.as_millis()
                    );
                    self.fail(uid, Failure::new(FailureKind::Deadline, text));
                }
                Timer::Cancel(uid) => self.cancel_timed_out(uid),
                Timer::Stage(client, id) => self.staging_timed_out(client, id),
            }
        }
    }

    /// A client is gone: its requests end.
    pub fn handle_client_gone(&mut self, client: ClientId) {
        self.staging_client_gone(client);
        let gone: Vec<Uid> =
            self.requests.iter().filter(|(_, request)| request.client == Some(client)).map(|(&uid, _)| uid).collect();
        for uid in gone {
            if let Some(request) = self.requests.get_mut(&uid) {
                request.client = None;
            }
            self.fail(uid, Failure::new(FailureKind::Cancelled, "its connector is gone"));
        }
        self.acknowledge_all(client);
    }

    /// Takes no new requests from now on; what has begun goes on.
    pub fn handle_shutdown(&mut self) {
        self.draining = true;
    }

    /// Ends everything that has not ended.
    pub fn handle_abort(&mut self) {
        self.draining = true;
        let open: Vec<Uid> = self.request_by_name.values().copied().collect();
        for uid in open {
            self.fail(uid, Failure::new(FailureKind::ShuttingDown, "this sender is shutting down"));
        }
    }

    /// Whether everything that had begun has ended.
    pub fn is_drained(&self) -> bool {
        self.requests.is_empty()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Counters and slots, all of one moment.
    pub fn counts(&self) -> SenderCounts {
        SenderCounts {
            slots_free: self.slots.free_count(),
            slots_staged: self.slots.slot_count() - self.slots.free_count(),
            requests_active: self.requests.len(),
            peers: self.peers.values().filter(|peer| peer.connection().is_some()).count(),
            transfers_in_flight: self.transfers.len(),
            ..self.counts
        }
    }

    /// Checks that slots, requests and transfers agree.
    ///
    /// # Errors
    /// What does not.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.slots.check()?;
        let unacknowledged: usize = self.unacknowledged.values().map(Vec::len).sum();
        let staged = unacknowledged + self.requests.values().map(Request::staged_slots).sum::<usize>();
        let taken = self.slots.slot_count() - self.slots.free_count();
        if staged != taken as usize {
            return Err(format!("{taken} slots are taken, requests hold {staged}"));
        }
        for (transfer, record) in &self.transfers {
            if !self.requests.contains_key(&record.uid) {
                return Err(format!("transfer {transfer} belongs to no request"));
            }
        }
        for (name, uid) in &self.request_by_name {
            if self.requests.get(uid).is_none_or(|request| request.id != *name) {
                return Err(format!("{name} names a request that is not there"));
            }
        }
        Ok(())
    }

    fn fresh(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn send(&mut self, peer: PeerId, port: Port, message: Message) {
        self.outputs.push_back(Output::Send { peer, port, message });
    }

    fn answer(&mut self, client: ClientId, id: Seq, answer: Answer) {
        self.outputs.push_back(Output::Answer { client, id, answer });
    }

    fn refuse(&mut self, client: ClientId, id: Seq, failure: Failure, peer: Option<String>) {
        self.answer(client, id, Answer::Failed { failure, peer });
    }

    fn note(&mut self, note: Note) {
        self.outputs.push_back(Output::Note(note));
    }

    fn note_unexpected(&mut self, peer: PeerId, message: &'static str) {
        if let Some(address) = self.peers.get(&peer).map(|peer| peer.address.clone()) {
            self.note(Note::Unexpected { address, message });
        }
    }

    fn connection_of(&self, peer: PeerId) -> Option<ConnectionId> {
        self.peers.get(&peer)?.connection()
    }
}
