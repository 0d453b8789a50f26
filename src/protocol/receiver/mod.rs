//! The receiver's session: handshakes, grants of slots, commits, ready chunks for readers.
//!
//! | file | what is in it |
//! |---|---|
//! | `io` | what comes out: outputs, answers, notes |
//! | `peers`, `lost` | handshakes with senders, and losing them |
//! | `admission` | who gets slots, and when (`piecemeal`: how it must not be done) |
//! | `request`, `requests` | a request, and its way from the grant to its end: commit, cancel, quarantine |
//! | `lmcache` | LMCache's senders, which commit nothing |
//! | `origin`, `dialect` | what differs with the dialect of a request's sender: ours, or LMCache's |
//! | `verification` | commits whose chunks are summed before they are taken |
//! | `readers`, `waiters`, `leases` | waits, look-ups and leases |
//! | `ended` | how attempts ended, and who has yet to be told |
//! | `reset` | everything that was computed before now is void |

mod admission;
mod dialect;
mod ended;
mod io;
mod leases;
#[cfg(feature = "lmcache")]
mod lmcache;
#[cfg(not(feature = "lmcache"))]
#[path = "lmcache/absent.rs"]
mod lmcache;
mod lost;
mod origin;
mod peers;
mod piecemeal;
mod readers;
mod request;
mod requests;
mod reset;
mod verification;
mod waiters;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

pub use io::{Answer, ExpectedChunk, Lookup, Note, Output, ReceiverCounts};

use self::ended::Ended;
use self::leases::Leases;
use self::lmcache::Senders;
use self::lost::LostPeers;
use self::peers::Peer;
use self::request::{Closing, Request};
use self::waiters::Waiters;
use super::growth::{GROW_AGAIN_AFTER, Growth};
use super::timers::Timers;
use super::{ChunkShape, Grown, Port, Safeguards};
use crate::address::AddressManager;
use crate::ids::{ChecksumMode, ClientId, ConnectionId, Failure, FailureKind, GrantId, LeaseId, Pages, RequestId, Seq};
use crate::slot::SlotTable;
use crate::wire::Message;
use crate::wire::message::{AllocRequest, CancelNotif, Hello, InitRequest, MemRegRequest};

/// What a receiver session is told at start.
#[derive(Debug, Clone)]
pub struct ReceiverSettings {
    /// Who this daemon is.
    pub hello: Hello,
    /// Name of its engine's agent.
    pub agent_name: String,
    /// Its engine's metadata.
    pub metadata: Vec<u8>,
    /// Its engine's descriptors.
    pub descriptors: Vec<u8>,
    /// What a chunk is.
    pub chunk: ChunkShape,
    /// The buffer's addresses. Whoever grows the buffer adds to them.
    pub addresses: AddressManager,
    /// How long the buffer can become, in bytes.
    pub len_max_bytes: u64,
    /// Longest that a request waits for slots.
    pub allocation_timeout: Duration,
    /// How long granted slots may be written to.
    pub write_timeout: Duration,
    /// How long `wait` waits unless it says.
    pub wait_timeout: Duration,
    /// How long ready chunks are kept that nobody fetches or holds.
    pub retention: Duration,
    /// Whether every chunk must come with a checksum (`full`). Those that do are checked in any case.
    pub checksum: ChecksumMode,
    /// Most requests that have not ended.
    pub requests_max: usize,
    /// Most requests of one sender that have not ended.
    pub peer_requests_max: usize,
    /// Most chunks of one request.
    pub request_chunks_max: usize,
    /// Most peers.
    pub peers_max: usize,
    /// How far pings are apart.
    pub heartbeat_interval: Duration,
    /// How long a peer may be silent.
    pub peer_timeout: Duration,
    /// How long the writes of a process that has ended may still arrive.
    pub linger: Duration,
    /// The buffer as pages, for LMCache's senders; none where they cannot write to it. How many there are is not used.
    pub pages: Option<Pages>,
    #[doc(hidden)]
    pub safeguards: Safeguards,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// A request has waited long enough for slots.
    Allocation(RequestId),
    /// A grant has not been committed in time.
    Write(RequestId),
    /// A ready request has not been fetched in time.
    Retention(RequestId),
    /// A reader has waited long enough.
    Wait(ClientId, Seq),
    /// The buffer may grow again after a step that failed.
    Grow,
    /// A peer may have been silent for too long.
    Silence(String),
    /// Nothing of a process that has ended is under way any more.
    Linger(String),
    /// A lease that nobody gives back is over.
    Lease(ClientId, LeaseId),
    /// A writer has not acknowledged yet that it has stopped: it is asked again.
    Revoke(GrantId),
}

/// The receiver as a value. `R` is how a message's sender is answered: opaque, and compared for equality alone.
#[derive(Debug)]
pub struct ReceiverSession<R> {
    settings: ReceiverSettings,
    slots: SlotTable,
    growth: Growth,
    /// How much of the buffer senders can be told of, in bytes. The addresses may be ahead of it for a moment.
    described_len_bytes: u64,
    /// By [`Hello::instance`].
    peers: BTreeMap<String, Peer<R>>,
    /// LMCache's senders.
    lmcache: Senders<R>,
    lost: LostPeers,
    requests: BTreeMap<RequestId, Request<R>>,
    /// Requests that wait for slots, in the order of their arrival.
    waiting: VecDeque<RequestId>,
    /// Grants that were given up while a write may be in flight: their slots are quarantined.
    closing: BTreeMap<GrantId, Closing>,
    /// The latest grants that were committed, and whose they were: what is said twice is answered alike.
    committed: BTreeMap<GrantId, (String, RequestId)>,
    /// When checksums were last known to be getting on; none before that.
    summed_at: Option<Instant>,
    /// How requests ended lately, for readers that ask after them.
    ended: Ended,
    waiters: Waiters,
    leases: Leases,
    timers: Timers<Timer>,
    outputs: VecDeque<Output<R>>,
    counts: ReceiverCounts,
    next_grant: u64,
    draining: bool,
}

impl<R: Clone + PartialEq> ReceiverSession<R> {
    /// A session with an empty buffer.
    pub fn new(settings: ReceiverSettings) -> Self {
        let slots = SlotTable::new(settings.addresses.clone());
        let growth = Growth::new(settings.len_max_bytes);
        Self {
            described_len_bytes: settings.addresses.len_bytes(),
            settings,
            slots,
            growth,
            peers: BTreeMap::new(),
            lmcache: Senders::default(),
            lost: LostPeers::default(),
            requests: BTreeMap::new(),
            waiting: VecDeque::new(),
            closing: BTreeMap::new(),
            committed: BTreeMap::new(),
            summed_at: None,
            ended: Ended::default(),
            waiters: Waiters::default(),
            leases: Leases::default(),
            timers: Timers::new(),
            outputs: VecDeque::new(),
            counts: ReceiverCounts::default(),
            next_grant: 1,
            draining: false,
        }
    }

    /// A message arrived at one of our ports.
    pub fn handle_message(&mut self, now: Instant, port: Port, from: R, message: Message) {
        match (port, message) {
            (Port::Init, Message::NixlInitRequest(InitRequest { pd: Some(extension), local_meta_bytes })) => {
                self.on_init(now, from, extension, local_meta_bytes);
            }
            (Port::Init, Message::NixlMemRegRequest(MemRegRequest { pd: Some(extension), .. })) => {
                self.on_mem_reg(now, from, &extension);
            }
            (port, Message::NixlInitRequest(InitRequest { pd: Some(extension), .. })) => {
                self.on_misdirected_init(port, from, extension);
            }
            (Port::Alloc, Message::AllocRequest(request @ AllocRequest { pd: Some(_), .. })) => {
                self.on_alloc(now, from, request);
            }
            (Port::Alloc, Message::PdCommit(commit)) => self.on_commit(now, from, commit),
            (Port::Alloc, Message::CancelNotif(CancelNotif { req_id, pd: Some(extension), .. })) => {
                self.on_cancel(now, from, &req_id, extension);
            }
            (Port::Alloc, Message::PdPing(ping)) => self.on_ping(now, from, ping),
            (port, Message::PdPing(ping)) => self.on_misdirected_ping(port, from, &ping),
            // Nothing of ours leaves `pd` out.
            (port, message) => self.on_lmcache_message(now, port, from, message),
        }
    }

    /// The connection that messages from `route` came through is gone.
    pub fn handle_route_gone(&mut self, now: Instant, route: &R) {
        if self.on_lmcache_route_gone(now, route) {
            return;
        }
        let lost = self.peers.iter().find(|(_, peer)| peer.alloc_route.as_ref() == Some(route));
        if let Some(instance) = lost.map(|(instance, _)| instance.clone()) {
            self.lose_peer(now, &instance, "closed its connection");
        }
    }

    /// The engine has loaded the metadata of the peer `instance`, or could not.
    pub fn handle_peer_loaded(&mut self, now: Instant, instance: &str, result: Result<ConnectionId, String>) {
        self.on_peer_loaded(now, instance, result);
    }

    /// The process behind `instance` has ended: whatever it was writing, it writes no more.
    pub fn handle_process_ended(&mut self, now: Instant, instance: &str) {
        self.process_ended(now, instance);
        self.handle_timeout(now);
    }

    /// Deadlines may have passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        while let Some((due, timer)) = self.timers.pop_due(now) {
            match timer {
                Timer::Allocation(id) => self.allocation_timed_out(now, &id),
                Timer::Write(id) => self.write_timed_out(now, &id),
                Timer::Retention(id) => self.retention_passed(now, &id),
                Timer::Wait(client, seq) => self.wait_timed_out(client, seq),
                Timer::Grow => {
                    self.growth.end_pause();
                    if !self.waiting.is_empty() {
                        self.ask_to_grow();
                    }
                }
                Timer::Silence(instance) => self.check_silence(now, due, &instance),
                Timer::Lease(client, lease) => drop(self.end_lease(now, client, lease)),
                Timer::Linger(instance) => self.free_closing_of(now, &instance, Seq(u64::MAX)),
                Timer::Revoke(grant) => self.revoke_again(now, grant),
            }
        }
        if let Some(before) = now.checked_sub(self.settings.retention) {
            let expired = self.slots.expire_idle(before);
            self.counts.chunks_expired += u64::from(expired);
        }
        self.admit(now);
    }

    /// The buffer has another step, which its addresses know already; or it could not get it.
    ///
    /// A step that failed ends only the requests that cannot do without it. Others go on waiting for slots that come
    /// back, and are told of it if none do.
    pub fn handle_grown(&mut self, now: Instant, result: Result<Grown, String>) {
        self.note(Note::Grown { result: result.as_ref().map(|grown| grown.len_bytes).map_err(Clone::clone) });
        match result {
            Ok(grown) => {
                self.growth.end(None);
                self.described_len_bytes = grown.len_bytes;
                self.settings.metadata = grown.metadata;
                self.settings.descriptors = grown.descriptors;
            }
            Err(text) => {
                self.growth.end(Some(text));
                self.timers.set(Timer::Grow, now + GROW_AGAIN_AFTER);
                self.fail_those_that_need_growth(now);
            }
        }
        self.admit(now);
    }

    /// Takes no new requests from now on; what has begun goes on.
    pub fn handle_shutdown(&mut self, now: Instant) {
        self.draining = true;
        let failure = Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down; use another");
        for id in self.waiting.clone() {
            self.fail(now, &id, failure.clone());
        }
        self.fail_waiters_for_nothing(&failure);
    }

    /// Ends everything that has not ended.
    pub fn handle_abort(&mut self, now: Instant) {
        self.draining = true;
        let open: Vec<RequestId> = self.requests.keys().cloned().collect();
        for id in open {
            self.fail(now, &id, Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down"));
        }
        self.fail_waiters_for_nothing(&Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down"));
    }

    /// Whether everything that had begun has ended.
    pub fn is_drained(&self) -> bool {
        self.requests.is_empty() && self.leases.is_empty()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output<R>> {
        self.outputs.pop_front()
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    pub fn poll_timeout(&self) -> Option<Instant> {
        let idle = self.slots.oldest_idle().map(|since| since + self.settings.retention);
        [self.timers.next(), idle].into_iter().flatten().min()
    }

    /// Counters and slots, all of one moment.
    pub fn counts(&self) -> ReceiverCounts {
        ReceiverCounts {
            slots: self.slots.counts(),
            available_bytes: self.slots.available_bytes(),
            requests_active: self.requests.len(),
            requests_waiting: self.waiting.len(),
            readers_waiting: self.waiters.len(),
            peers: self.peers.len() + self.lmcache.len(),
            leases: self.leases.len(),
            ..self.counts
        }
    }

    /// Checks that slots, requests, leases and grants agree.
    ///
    /// # Errors
    /// What does not.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.slots.check_invariants()?;
        let counts = self.slots.counts();
        let granted: usize = self.requests.values().map(Request::written_slots).sum();
        let closing: usize = self.closing.values().map(|closing| closing.slots.len()).sum();
        if (granted, closing) != (counts.reserved as usize, counts.quarantined as usize) {
            return Err(format!("{granted} slots are granted and {closing} closing, the table says {counts:?}"));
        }
        if self.waiting.len() > self.requests.len() {
            return Err(format!("{} of {} requests wait", self.waiting.len(), self.requests.len()));
        }
        self.leases.check_invariants()
    }

    /// Asks for the buffer's next step, if it can grow and none is under way.
    fn ask_to_grow(&mut self) {
        if self.growth.try_begin(self.slots.addresses().len_bytes()) {
            self.outputs.push_back(Output::GrowBuffer);
        }
    }

    fn send(&mut self, to: R, port: Port, message: Message) {
        self.outputs.push_back(Output::Send { to, port, message });
    }

    fn answer(&mut self, client: ClientId, id: Seq, answer: Answer) {
        self.outputs.push_back(Output::Answer { client, id, answer });
    }

    fn note(&mut self, note: Note<R>) {
        self.outputs.push_back(Output::Note(note));
    }
}
