//! The half that receives: handshakes, grants of slots, commits, ready chunks for readers.
//!
//! | file | what is in it |
//! |---|---|
//! | `io` | what goes in and comes out: look-ups, notes, counts |
//! | `senders`, `lost` | handshakes with senders, and losing them |
//! | `admission` | who gets slots, and when (`piecemeal`: how it must not be done) |
//! | `ahead` | what nobody has asked for yet, and who comes before it |
//! | `request`, `requests` | a request, and its way from the grant on to its end: commit, the sender's cancel, quarantine |
//! | `lmcache` | LMCache's senders, which commit nothing |
//! | `origin`, `dialect` | what differs with the dialect of a request's sender: ours, or LMCache's |
//! | `verification` | commits whose chunks are summed before they are taken |
//! | `readers`, `waiters`, `leases` | waits, look-ups, leases, and a reader's cancel |
//! | `sources`, `fetches` | senders that have parked chunks, and what they are asked for |
//! | `ended` | how attempts ended (each use of a request's name is one), and who has yet to be told |
//! | `timer` | its deadlines |
//! | `reset` | everything that was computed before now is void |

mod admission;
mod ahead;
mod dialect;
mod ended;
mod fetches;
pub(super) mod io;
mod leases;
#[cfg(feature = "lmcache")]
mod lmcache;
#[cfg(not(feature = "lmcache"))]
#[path = "lmcache/absent.rs"]
mod lmcache;
mod lost;
mod origin;
#[cfg(feature = "mutants")]
mod piecemeal;
mod readers;
mod request;
mod requests;
mod reset;
mod senders;
mod sources;
pub(super) mod timer;
mod verification;
mod waiters;

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

pub use fetches::FetchRequest;
pub use io::{ExpectedChunk, IncomingCounts, IncomingNote, Lookup};

use self::ahead::Coming;
use self::ended::EndedRequests;
use self::fetches::Fetch;
use self::leases::Leases;
use self::lmcache::Senders;
use self::lost::LostPeers;
use self::request::{Closing, IncomingRequest};
use self::senders::Sender;
use self::sources::{Source, Unreachable};
use self::timer::IncomingTimer;
use self::waiters::Waiters;
use super::Port;
use super::settings::IncomingSettings;
use crate::ids::{Failure, FailureKind, GrantId, PeerId, RequestId, Seq};
use crate::node::core::Core;
use crate::wire::Message;
use crate::wire::message::{AllocRequest, CancelNotif, InitRequest, MemRegRequest};

/// The half that receives. `R` is how a message's sender is answered: opaque, and compared for equality alone.
#[derive(Debug)]
pub(super) struct Incoming<R> {
    settings: IncomingSettings,
    /// By [`Hello::instance`](crate::wire::message::Hello::instance).
    senders: BTreeMap<String, Sender<R>>,
    /// LMCache's senders.
    lmcache: Senders<R>,
    lost: LostPeers,
    requests: BTreeMap<RequestId, IncomingRequest<R>>,
    /// Requests that wait for slots, in the order of their arrival.
    waiting: VecDeque<RequestId>,
    /// Chunks that are being pushed ahead.
    coming: Coming,
    /// Grants that were given up while a write may be in flight: their slots are quarantined.
    closing: BTreeMap<GrantId, Closing>,
    /// The latest grants that were committed, and whose they were: what is said twice is answered alike.
    committed: BTreeMap<GrantId, (String, RequestId)>,
    /// When checksums were last known to be getting on; none before that.
    summed_at: Option<Instant>,
    /// How requests ended lately, for readers that ask after them.
    ended: EndedRequests,
    waiters: Waiters,
    /// Senders that are asked for what they have parked.
    sources: BTreeMap<PeerId, Source>,
    /// Where none has answered lately.
    unreachable: Unreachable,
    /// What they are asked.
    fetches: BTreeMap<RequestId, Fetch>,
    leases: Leases,
    counts: IncomingCounts,
    next_grant: u64,
    #[cfg(feature = "mutants")]
    piecemeal: piecemeal::Piecemeal,
}

impl<R: Clone + PartialEq> Incoming<R> {
    /// With nothing in it.
    pub(super) fn new(settings: IncomingSettings) -> Self {
        Self {
            settings,
            senders: BTreeMap::new(),
            lmcache: Senders::default(),
            lost: LostPeers::default(),
            requests: BTreeMap::new(),
            waiting: VecDeque::new(),
            coming: Coming::default(),
            closing: BTreeMap::new(),
            committed: BTreeMap::new(),
            summed_at: None,
            ended: EndedRequests::default(),
            waiters: Waiters::default(),
            sources: BTreeMap::new(),
            unreachable: Unreachable::default(),
            fetches: BTreeMap::new(),
            leases: Leases::default(),
            counts: IncomingCounts::default(),
            next_grant: 1,
            #[cfg(feature = "mutants")]
            piecemeal: piecemeal::Piecemeal::new(),
        }
    }

    /// A message arrived at one of our ports.
    pub(super) fn handle_port_message(&mut self, core: &mut Core<R>, port: Port, from: R, message: Message) {
        match (port, message) {
            (Port::Init, Message::NixlInitRequest(InitRequest { pd: Some(extension), local_meta_bytes })) => {
                self.on_init(core, from, extension, local_meta_bytes);
            }
            (Port::Init, Message::NixlMemRegRequest(MemRegRequest { pd: Some(extension), .. })) => {
                self.on_mem_reg(core, from, &extension);
            }
            (port, Message::NixlInitRequest(InitRequest { pd: Some(extension), .. })) => {
                self.on_misdirected_init(core, port, from, extension);
            }
            (Port::Alloc, Message::AllocRequest(request @ AllocRequest { pd: Some(_), .. })) => {
                self.on_alloc(core, from, request);
            }
            (Port::Alloc, Message::PdCommit(commit)) => self.on_commit(core, from, commit),
            (Port::Alloc, Message::CancelNotif(CancelNotif { req_id, pd: Some(extension), .. })) => {
                self.on_cancel(core, from, &req_id, extension);
            }
            (Port::Alloc, Message::PdPing(ping)) => self.on_ping(core, from, ping),
            (port, Message::PdPing(ping)) => self.on_misdirected_ping(core, port, from, &ping),
            // Nothing of ours leaves `pd` out.
            (port, message) => self.on_lmcache_message(core, port, from, message),
        }
    }

    /// The connection that messages from `route` came through is gone.
    pub(super) fn handle_route_gone(&mut self, core: &mut Core<R>, route: &R) {
        if self.on_lmcache_route_gone(core, route) {
            return;
        }
        let lost = self.senders.iter().find(|(_, peer)| peer.alloc_route.as_ref() == Some(route));
        if let Some(instance) = lost.map(|(instance, _)| instance.clone()) {
            self.lose_peer(core, &instance, "closed its connection");
        }
    }

    /// A deadline has passed, which was to be at `due`.
    pub(super) fn handle_timer(&mut self, core: &mut Core<R>, due: Instant, timer: IncomingTimer) {
        match timer {
            IncomingTimer::Allocation(id) => self.allocation_timed_out(core, &id),
            IncomingTimer::Write(id) => self.write_timed_out(core, &id),
            IncomingTimer::Retention(id) => self.retention_passed(core, &id),
            IncomingTimer::Wait(client, seq) => self.wait_timed_out(core, client, seq),
            IncomingTimer::Silence(instance) => self.check_silence(core, due, &instance),
            IncomingTimer::Lease(client, lease) => drop(self.end_lease(core, client, lease)),
            IncomingTimer::Linger(instance) => self.free_closing_of(core, &instance, Seq(u64::MAX)),
            IncomingTimer::Revoke(grant) => self.revoke_again(core, grant),
            IncomingTimer::Ask(id) => self.ask_again(core, &id),
        }
    }

    /// Ready chunks that nobody has held for long enough are freed, and whoever may have slots now gets them.
    pub(super) fn handle_time(&mut self, core: &mut Core<R>) {
        if let Some(before) = core.now.checked_sub(self.settings.retention) {
            let expired = core.slots.expire_idle(before);
            self.counts.chunks_expired += u64::from(expired);
        }
        self.admit(core);
    }

    /// When the first ready chunk that nobody holds is freed.
    pub(super) fn idle_until(&self, core: &Core<R>) -> Option<Instant> {
        core.slots.oldest_idle().map(|since| since + self.settings.retention)
    }

    /// The pause after a step of growth that failed is over.
    pub(super) fn want_growth(&self, core: &mut Core<R>) {
        if !self.waiting.is_empty() {
            core.ask_to_grow();
        }
    }

    /// The buffer has another step; or it could not get it, which ends only the requests that cannot do without it. Others
    /// go on waiting for slots that come back, and are told of it if none do.
    pub(super) fn handle_grown(&mut self, core: &mut Core<R>, has_failed: bool) {
        if has_failed {
            self.fail_those_that_need_growth(core);
        }
        self.admit(core);
    }

    /// Takes no new requests from now on; what has begun goes on.
    pub(super) fn handle_shutdown(&mut self, core: &mut Core<R>) {
        let failure = Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down; use another");
        self.withdraw_ahead(core, &failure);
        for id in self.waiting.clone() {
            self.fail(core, &id, failure.clone());
        }
        self.fail_waiters_for_nothing(core, &failure);
    }

    /// Ends everything that has not ended.
    pub(super) fn handle_abort(&mut self, core: &mut Core<R>) {
        let open: Vec<RequestId> = self.requests.keys().cloned().collect();
        for id in open {
            self.fail(core, &id, Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down"));
        }
        self.fail_waiters_for_nothing(core, &Failure::new(FailureKind::ShuttingDown, "this receiver is shutting down"));
    }

    /// Whether everything that had begun has ended.
    pub(super) fn is_drained(&self) -> bool {
        self.requests.is_empty() && self.leases.is_empty()
    }

    /// What it counts, all of one moment.
    pub(super) fn counts(&self) -> IncomingCounts {
        IncomingCounts {
            requests_active: self.requests.len(),
            requests_waiting: self.waiting.len(),
            readers_waiting: self.waiters.len(),
            peers: self.senders.len() + self.lmcache.len(),
            leases: self.leases.len(),
            fetches: self.fetches.len(),
            sources: self.sources_open(),
            ..self.counts
        }
    }

    /// Checks that slots, requests, leases and grants agree.
    ///
    /// # Errors
    /// What does not.
    pub(super) fn check_invariants(&self, core: &Core<R>) -> Result<(), String> {
        let counts = core.slots.counts();
        let granted: usize = self.requests.values().map(IncomingRequest::written_slots).sum();
        #[cfg(feature = "mutants")]
        let granted = granted + self.piecemeal.values().map(|(_, slots)| slots.len()).sum::<usize>();
        let closing: usize = self.closing.values().map(|closing| closing.slots.len()).sum();
        if (granted, closing) != (counts.reserved as usize, counts.quarantined as usize) {
            return Err(format!("{granted} slots are granted and {closing} closing, the table says {counts:?}"));
        }
        if self.waiting.len() > self.requests.len() {
            return Err(format!("{} of {} requests wait", self.waiting.len(), self.requests.len()));
        }
        self.check_fetches(core)?;
        self.check_coming()?;
        self.leases.check_invariants()
    }
}
