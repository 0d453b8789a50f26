//! The sender's session: connects to receivers, opens requests, stages local slots, has chunks written,
//! commits them.
//!
//! | file | what is in it |
//! |---|---|
//! | `io` | what goes in and comes out: requests, outputs, answers, notes |
//! | `peers` | handshakes with receivers, and losing them |
//! | `reconnects` | receivers that the configuration names: connected before any request, and again when they are lost |
//! | `quiesce`, `acknowledging` | what receivers must still be told: that nothing writes to their slots any more |
//! | `requests` | a request from `open` to its acknowledged commit |
//! | `ending` | how a request ends otherwise |
//! | `staging` | who waits for local slots, and who gets them |
//! | `transfers`, `coverage` | `send`: parts into copies, and which bytes were given to the engine |
//! | `link`, `dialect` | what differs with the dialect of a receiver: ours, or LMCache's |
//! | `lmcache` | LMCache's receivers: what they are told and say, which pages of theirs wait for our bytes |

mod acknowledging;
mod coverage;
mod dialect;
mod ending;
mod io;
mod link;
#[cfg(feature = "lmcache")]
mod lmcache;
#[cfg(not(feature = "lmcache"))]
#[path = "lmcache/absent.rs"]
mod lmcache;
mod peers;
mod quiesce;
mod reconnects;
mod requests;
mod staging;
mod transfers;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

pub use io::{Answer, ConnectState, Event, Note, OpenRequest, Output, PeerMemory, Phases, SenderCounts, Sending};

use self::lmcache::RememberedReceivers;
use self::peers::Peer;
use self::quiesce::Quiesce;
use self::reconnects::{Lost, PAUSE_MAX, Reconnects};
use self::requests::{Request, Stage, Uid, WRITE_DEADLINE_PASSED};
use self::staging::Staging;
use self::transfers::Transfer;
use super::growth::{GROW_AGAIN_AFTER, Growth};
use super::timers::Timers;
use super::{ChunkShape, Grown, Port, Safeguards};
use crate::address::AddressManager;
use crate::ids::{
    ChecksumMode, ClientId, ConnectionId, Failure, FailureKind, GrantId, Pages, PeerAddress, PeerId, RequestId, Seq,
    SlotIndex, TransferId,
};
use crate::slot::SlotPool;
use crate::wire::Message;
use crate::wire::message::{Commit, Hello};

/// What a sender session is told at start.
#[derive(Debug, Clone)]
pub struct SenderSettings {
    /// Who this daemon is.
    pub hello: Hello,
    /// Name of its engine's agent.
    pub agent_name: String,
    /// Its engine's metadata.
    pub metadata: Vec<u8>,
    /// The buffer as LMCache's receivers are told of it; none where the engine cannot reach them.
    pub pages: Option<Pages>,
    /// What a chunk is.
    pub chunk: ChunkShape,
    /// The buffer's addresses. Whoever grows the buffer adds to them.
    pub addresses: AddressManager,
    /// How long the buffer can become, in bytes.
    pub len_max_bytes: u64,
    /// How long a request waits for slots, here and at its receiver, unless it says.
    pub allocation_timeout: Duration,
    /// How long connecting to a receiver may take, the handshake included.
    pub handshake_timeout: Duration,
    /// How long a receiver may take to answer beyond what it was told to wait. One that is still checking a commit says
    /// so, and has as long again from then on.
    pub commit_timeout: Duration,
    /// How long a grant may be written to whose receiver does not say: LMCache's.
    pub write_timeout: Duration,
    /// Which chunks are summed for their receiver to check.
    pub checksum: ChecksumMode,
    /// Most requests that have not ended.
    pub requests_max: usize,
    /// Most chunks of one request.
    pub request_chunks_max: usize,
    /// Most receivers.
    pub peers_max: usize,
    /// Receivers to connect to at start, and to keep; no two are the same.
    pub receivers: Vec<PeerAddress>,
    /// Whether a proxy wants to know.
    pub notify_proxy: bool,
    /// How far pings to a receiver are apart.
    pub heartbeat_interval: Duration,
    /// How long a receiver may be silent; above `heartbeat_interval`.
    pub peer_timeout: Duration,
    #[doc(hidden)]
    pub safeguards: Safeguards,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// A receiver has not answered the handshake in time.
    Handshake(PeerId),
    /// A request has waited long enough for its grant.
    Allocation(Uid),
    /// A grant must not be written to any more.
    Write(Uid),
    /// Nothing was heard of a commit for too long.
    Commit(Uid),
    /// A cancelled request's transfers have not ended in time.
    Cancel(Uid),
    /// A client has waited long enough for local slots.
    Stage(ClientId, Seq),
    /// The buffer may grow again after a step that failed.
    Grow,
    /// A receiver is pinged, or has been silent for too long.
    Ping(PeerId),
    /// A commit is sent again.
    Recommit(Uid),
    /// A quiesce acknowledgement is sent again.
    Retransmit(Seq),
    /// A lost receiver that is owed a quiesce acknowledgement is connected to again.
    Seek(PeerAddress),
    /// An LMCache receiver has not answered for too long.
    Answer(PeerId),
    /// A receiver of the configuration is connected to, or connected to again.
    Connect(PeerAddress),
}

/// The sender as a value.
#[derive(Debug)]
pub struct SenderSession {
    settings: SenderSettings,
    slots: SlotPool,
    growth: Growth,
    peers: BTreeMap<PeerId, Peer>,
    peer_by_address: BTreeMap<PeerAddress, PeerId>,
    requests: BTreeMap<Uid, Request>,
    /// Requests that have not ended as far as their clients know.
    request_by_name: BTreeMap<RequestId, Uid>,
    /// Which request a receiver's answer is about.
    awaited: BTreeMap<Seq, Uid>,
    /// The latest allocations asked for, and what was taken of what they were granted.
    asked: BTreeMap<Seq, (RequestId, Option<GrantId>)>,
    /// Commits that were not answered yet.
    commits: BTreeMap<Uid, Commit>,
    quiesce: Quiesce,
    /// The receivers that the configuration names.
    reconnects: Reconnects,
    /// What LMCache receivers that were lost hold of ours.
    lmcache: RememberedReceivers,
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
    /// The latest time that was heard of.
    now: Instant,
}

impl SenderSession {
    /// A session without receivers.
    pub fn new(now: Instant, mut settings: SenderSettings) -> Self {
        let slots = SlotPool::new(settings.addresses.clone());
        let growth = Growth::new(settings.len_max_bytes);
        let mut timers = Timers::new();
        let receivers = std::mem::take(&mut settings.receivers);
        for address in &receivers {
            timers.set(Timer::Connect(address.clone()), now);
        }
        let reconnects = Reconnects::new(now, receivers);
        Self {
            settings,
            slots,
            growth,
            peers: BTreeMap::new(),
            peer_by_address: BTreeMap::new(),
            requests: BTreeMap::new(),
            request_by_name: BTreeMap::new(),
            awaited: BTreeMap::new(),
            asked: BTreeMap::new(),
            commits: BTreeMap::new(),
            quiesce: Quiesce::default(),
            reconnects,
            lmcache: RememberedReceivers::default(),
            transfers: BTreeMap::new(),
            unacknowledged: BTreeMap::new(),
            staging: VecDeque::new(),
            timers,
            outputs: VecDeque::new(),
            counts: SenderCounts::default(),
            next_id: 1,
            draining: false,
            now,
        }
    }

    /// A message arrived from a receiver.
    pub fn handle_message(&mut self, now: Instant, peer: PeerId, port: Port, message: Message) {
        self.now = now;
        self.hear_of(now, peer);
        match (port, message) {
            (Port::Init, Message::NixlInitResponse(response)) => self.on_init_response(peer, response),
            (Port::Init, Message::NixlMemRegResponse(response)) => self.on_mem_reg_response(now, peer, response),
            (Port::Alloc, message) => self.on_alloc_message(now, peer, message),
            (_, message) => self.note_unexpected(peer, message.type_name()),
        }
    }

    /// Deadlines may have passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.now = now;
        while let Some((due, timer)) = self.timers.pop_due(now) {
            match timer {
                Timer::Handshake(peer) => self.handshake_timed_out(peer),
                Timer::Allocation(uid) => self.allocation_timed_out(uid),
                Timer::Write(uid) => {
                    self.fail(uid, Failure::new(FailureKind::Deadline, WRITE_DEADLINE_PASSED));
                }
                Timer::Commit(uid) => {
                    let text = format!(
                        "nothing was heard of the commit for {} ms (pd_commit_timeout_sec)",
                        self.settings.commit_timeout.as_millis()
                    );
                    self.fail(uid, Failure::new(FailureKind::Deadline, text));
                }
                Timer::Cancel(uid) => self.cancel_timed_out(uid),
                Timer::Stage(client, id) => self.staging_timed_out(client, id),
                Timer::Grow => {
                    self.growth.end_pause();
                    if !self.staging.is_empty() {
                        self.ask_to_grow();
                    }
                }
                Timer::Ping(peer) => self.ping(now, due, peer),
                Timer::Recommit(uid) => self.retransmit_commit(now, uid),
                Timer::Retransmit(seq) => self.retransmit_ack(now, seq),
                Timer::Seek(address) => self.seek(now, &address),
                Timer::Answer(peer) => self.answer_timed_out(now, peer),
                Timer::Connect(address) => self.connect_configured(now, &address),
            }
        }
    }

    /// A client is gone: its requests end.
    pub fn handle_client_gone(&mut self, now: Instant, client: ClientId) {
        self.now = now;
        self.staging_client_gone(client);
        let gone: Vec<Uid> =
            self.requests.iter().filter(|(_, request)| request.client == Some(client)).map(|(&uid, _)| uid).collect();
        for uid in gone {
            let closing = self.requests.get_mut(&uid).is_some_and(|request| {
                request.client = None;
                matches!(request.stage, Stage::Closing { .. })
            });
            if closing {
                self.abandon_delayed(uid, true);
            }
            self.fail(uid, Failure::new(FailureKind::Cancelled, "its connector is gone"));
        }
        self.acknowledge_all(client);
    }

    /// Our buffer has another step, which its addresses know already; or it could not get it.
    ///
    /// A step that failed is the answer to those who want more than the buffer has now. Others go on waiting for slots
    /// that come back.
    pub fn handle_grown(&mut self, now: Instant, result: Result<Grown, String>) {
        self.now = now;
        self.note(Note::Grown { result: result.as_ref().map(|grown| grown.len_bytes).map_err(Clone::clone) });
        match result {
            Ok(grown) => {
                self.growth.end(None);
                self.settings.metadata = grown.metadata;
            }
            Err(text) => {
                self.growth.end(Some(text));
                self.timers.set(Timer::Grow, now + GROW_AGAIN_AFTER);
                self.refuse_staging_that_needs_growth();
            }
        }
        self.serve_staging();
    }

    /// Takes no new requests from now on; what has begun goes on.
    pub fn handle_shutdown(&mut self) {
        self.draining = true;
    }

    /// Ends everything that has not ended.
    pub fn handle_abort(&mut self, now: Instant) {
        self.now = now;
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
            available_bytes: self.slots.addresses().free_bytes(),
            slots_staged: self.slots.taken_count() as u32,
            requests_active: self.requests.len(),
            requests_waiting: self.requests.values().filter(|request| request.waits()).count(),
            stages_waiting: self.staging.len(),
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
        self.check_reconnects()?;
        let unacknowledged: usize = self.unacknowledged.values().map(Vec::len).sum();
        let staged = unacknowledged + self.requests.values().map(Request::staged_slots).sum::<usize>();
        let taken = self.slots.taken_count();
        if staged != taken {
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
        if let Some(peer) = self.quiesce.pending_peers().find(|peer| !self.peers.contains_key(peer)) {
            return Err(format!("a quiesce acknowledgement goes to peer {peer}, which is not there"));
        }
        if let Some(uid) = self.commits.keys().find(|uid| !self.requests.contains_key(uid)) {
            return Err(format!("a commit is kept for request {uid}, which is not there"));
        }
        let most = self.requests.len();
        if self.awaited.len() > most || self.request_by_name.len() > most {
            let (awaited, names) = (self.awaited.len(), self.request_by_name.len());
            return Err(format!("{awaited} answers are awaited and {names} names kept for {most} requests"));
        }
        Ok(())
    }

    /// The receivers that the configuration names, in that order, and how far the sender has come with each.
    pub fn receivers(&self) -> impl Iterator<Item = (&PeerAddress, &ConnectState)> {
        self.reconnects.iter()
    }

    /// Tries to connect to a receiver that the configuration names.
    fn connect_configured(&mut self, now: Instant, address: &PeerAddress) {
        // If it is being connected already, `note_connected` or `note_lost` follows.
        if self.draining || self.peer_by_address.contains_key(address) {
            return;
        }
        let room = self.peers.len() < self.settings.peers_max || self.evict_peer(false);
        if !room || self.peer_for(now, address).is_err() {
            self.timers.set(Timer::Connect(address.clone()), now + PAUSE_MAX);
        }
    }

    /// A receiver can be written to.
    fn note_connected(&mut self, now: Instant, address: &PeerAddress) {
        self.timers.cancel(&Timer::Connect(address.clone()));
        self.reconnects.connected(now, address);
    }

    /// A receiver was lost, or could not be connected. It is tried again later if the configuration names it.
    fn note_lost(&mut self, address: &PeerAddress, failure: &Failure) {
        let note = match self.reconnects.lost(self.now, address, failure) {
            None => Some(Note::PeerDown { address: address.clone(), failure: failure.clone() }),
            Some(Lost { pause, note }) => {
                if !self.draining {
                    self.timers.set(Timer::Connect(address.clone()), self.now + pause);
                }
                note
            }
        };
        self.outputs.extend(note.map(Output::Note));
    }

    /// A receiver had to go, so that another could be connected.
    fn postpone_connecting(&mut self, address: &PeerAddress) {
        if self.reconnects.postponed(self.now, address) {
            self.timers.set(Timer::Connect(address.clone()), self.now + PAUSE_MAX);
        }
    }

    /// Checks that each receiver of the configuration is connected, connecting, or about to be.
    fn check_reconnects(&self) -> Result<(), String> {
        for (address, state) in self.reconnects.iter() {
            let peer = self.peer_by_address.get(address);
            let connected = peer.is_some_and(|peer| self.connection_of(*peer).is_some());
            if connected != (*state == ConnectState::Connected) {
                return Err(format!("receiver {address} is said to be {state:?}, and connected: {connected}"));
            }
            if peer.is_none() && !self.draining && !self.timers.contains(&Timer::Connect(address.clone())) {
                return Err(format!("nothing will connect to receiver {address}"));
            }
        }
        Ok(())
    }

    fn fresh(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// Asks for the buffer's next step, if it can grow and none is under way.
    fn ask_to_grow(&mut self) {
        if self.growth.try_begin(self.slots.addresses().len_bytes()) {
            self.outputs.push_back(Output::GrowBuffer);
        }
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
