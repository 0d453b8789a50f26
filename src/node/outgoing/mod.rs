//! The half that sends: connects to receivers, opens requests, stages local slots, has chunks written, commits them.
//!
//! | file | what is in it |
//! |---|---|
//! | `io` | what goes in and comes out: requests, events, notes, counts |
//! | `receivers` | handshakes with receivers, and losing them |
//! | `configured` | receivers that the configuration names: connected before any request, and again when they are lost |
//! | `quiesce`, `acknowledging` | what receivers must still be told: that nothing writes to their slots any more |
//! | `requests` | a request from `open` to its acknowledged commit |
//! | `ending` | how a request ends otherwise |
//! | `staging` | who waits for local slots, and who gets them |
//! | `timer`, `uid` | its deadlines; a request's name inside the node |
//! | `transfers`, `coverage` | `send`: parts into copies, and which bytes were given to the engine |
//! | `ahead` | chunks that are pushed to a receiver that is likely to ask for them |
//! | `parking`, `given_up` | chunks that are kept for whoever asks for them, and those that will not come |
//! | `registrations`, `registrants` | what receivers ask for; who has asked, and how that ended |
//! | `link`, `dialect` | what differs with the dialect of a receiver: ours, or LMCache's |
//! | `lmcache` | LMCache's receivers: what they are told and say, which pages of theirs wait for our bytes |

mod acknowledging;
mod ahead;
mod configured;
mod coverage;
mod dialect;
mod ending;
mod given_up;
pub(super) mod io;
mod link;
#[cfg(feature = "lmcache")]
mod lmcache;
#[cfg(not(feature = "lmcache"))]
#[path = "lmcache/absent.rs"]
mod lmcache;
mod parking;
mod quiesce;
mod receivers;
mod registrants;
mod registrations;
mod requests;
mod staging;
pub(super) mod timer;
mod transfers;
mod uid;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

pub use io::{ConnectState, Event, OpenRequest, OutgoingCounts, OutgoingNote, ParkRequest, Phases, Sending};

use self::ahead::{Guess, Guessed};
use self::configured::{AfterLoss, ConfiguredReceivers};
use self::given_up::GivenUp;
use self::lmcache::RememberedReceivers;
use self::parking::ParkLease;
use self::quiesce::Quiesce;
use self::receivers::Receiver;
use self::registrants::Registrants;
use self::requests::{OutgoingRequest, OutgoingStage, WRITE_DEADLINE_PASSED};
use self::staging::Staging;
use self::timer::OutgoingTimer;
use self::transfers::Transfer;
use self::uid::Uid;
use super::Port;
use super::settings::OutgoingSettings;
use crate::ids::{
    ChunkKey, ClientId, ConnectionId, Failure, FailureKind, GrantId, PeerId, ReceiverAddress, RequestId, Seq,
    SlotIndex, SourceAddress, TransferId,
};
use crate::node::core::Core;
use crate::node::tries::PAUSE_MAX;
use crate::wire::Message;
use crate::wire::message::Commit;

/// The half that sends. `R` is how the senders of messages to our ports are answered.
#[derive(Debug)]
pub(super) struct Outgoing<R> {
    settings: OutgoingSettings,
    receivers: BTreeMap<PeerId, Receiver>,
    receiver_by_address: BTreeMap<ReceiverAddress, PeerId>,
    requests: BTreeMap<Uid, OutgoingRequest>,
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
    configured: ConfiguredReceivers,
    /// What LMCache receivers that were lost hold of ours.
    lmcache: RememberedReceivers,
    transfers: BTreeMap<TransferId, Transfer>,
    /// Slots of failed requests that their clients may be filling, until these say that they know.
    unacknowledged: BTreeMap<(ClientId, RequestId), Vec<SlotIndex>>,
    /// Clients that wait for local slots, in the order of their arrival.
    staging: VecDeque<Staging>,
    /// Holds on chunks that are complete, for whoever asks for them.
    park_leases: BTreeMap<Uid, ParkLease>,
    /// Chunks that are being parked and not complete yet, and by which requests.
    coming: BTreeMap<ChunkKey, BTreeSet<Uid>>,
    /// Of those, chunks that are to be sent, and by which requests.
    awaiting: BTreeMap<ChunkKey, BTreeSet<Uid>>,
    registrants: Registrants<R>,
    /// What nobody computes any more.
    given_up: GivenUp,
    guess: Guess,
    guessed: BTreeMap<ChunkKey, Guessed>,
    counts: OutgoingCounts,
}

impl<R: Clone> Outgoing<R> {
    /// Without receivers; those that the configuration names are connected to at once.
    pub(super) fn new(core: &mut Core<R>, mut settings: OutgoingSettings) -> Self {
        let receivers = std::mem::take(&mut settings.receivers);
        for address in &receivers {
            core.timers.set(OutgoingTimer::Connect(address.clone()), core.now);
        }
        Self {
            settings,
            receivers: BTreeMap::new(),
            receiver_by_address: BTreeMap::new(),
            requests: BTreeMap::new(),
            request_by_name: BTreeMap::new(),
            awaited: BTreeMap::new(),
            asked: BTreeMap::new(),
            commits: BTreeMap::new(),
            quiesce: Quiesce::default(),
            configured: ConfiguredReceivers::new(core.now, receivers),
            lmcache: RememberedReceivers::default(),
            transfers: BTreeMap::new(),
            unacknowledged: BTreeMap::new(),
            staging: VecDeque::new(),
            park_leases: BTreeMap::new(),
            coming: BTreeMap::new(),
            awaiting: BTreeMap::new(),
            registrants: Registrants::default(),
            given_up: GivenUp::default(),
            guess: Guess::default(),
            guessed: BTreeMap::new(),
            counts: OutgoingCounts::default(),
        }
    }

    /// A message arrived from a receiver.
    pub(super) fn handle_connection_message(&mut self, core: &mut Core<R>, peer: PeerId, port: Port, message: Message) {
        self.hear_of(core.now, peer);
        match (port, message) {
            (Port::Init, Message::NixlInitResponse(response)) => self.on_init_response(core, peer, response),
            (Port::Init, Message::NixlMemRegResponse(response)) => self.on_mem_reg_response(core, peer, response),
            (Port::Alloc, message) => self.on_alloc_message(core, peer, message),
            (_, message) => self.note_unexpected(core, peer, message.type_name()),
        }
    }

    /// A deadline has passed, which was to be at `due`.
    pub(super) fn handle_timer(&mut self, core: &mut Core<R>, due: Instant, timer: OutgoingTimer) {
        match timer {
            OutgoingTimer::Handshake(peer) => self.handshake_timed_out(core, peer),
            OutgoingTimer::Allocation(uid) => self.allocation_timed_out(core, uid),
            OutgoingTimer::Write(uid) => {
                self.fail(core, uid, Failure::new(FailureKind::Deadline, WRITE_DEADLINE_PASSED));
            }
            OutgoingTimer::Commit(uid) => {
                let text = format!(
                    "nothing was heard of the commit for {} ms (pd_commit_timeout_sec)",
                    self.settings.commit_timeout.as_millis()
                );
                self.fail(core, uid, Failure::new(FailureKind::Deadline, text));
            }
            OutgoingTimer::Cancel(uid) => self.cancel_timed_out(core, uid),
            OutgoingTimer::Stage(client, id) => self.staging_timed_out(core, client, id),
            OutgoingTimer::Ping(peer) => self.ping(core, due, peer),
            OutgoingTimer::Recommit(uid) => self.retransmit_commit(core, uid),
            OutgoingTimer::Retransmit(seq) => self.retransmit_ack(core, seq),
            OutgoingTimer::Seek(address) => self.seek(core, &address),
            OutgoingTimer::Answer(peer) => self.answer_timed_out(core, peer),
            OutgoingTimer::Connect(address) => self.connect_configured(core, &address),
            OutgoingTimer::Lease(lease) => self.park_lease_timed_out(core, lease),
            OutgoingTimer::Registration(id) => self.registration_timed_out(core, &id),
        }
    }

    /// The pause after a step of growth that failed is over.
    pub(super) fn want_growth(&self, core: &mut Core<R>) {
        if !self.staging.is_empty() {
            core.ask_to_grow();
        }
    }

    /// A client is gone: its requests end.
    pub(super) fn handle_client_gone(&mut self, core: &mut Core<R>, client: ClientId) {
        self.staging_client_gone(core, client);
        let gone: Vec<Uid> =
            self.requests.iter().filter(|(_, request)| request.client == Some(client)).map(|(&uid, _)| uid).collect();
        for uid in gone {
            let closing = self.requests.get_mut(&uid).is_some_and(|request| {
                request.client = None;
                matches!(request.stage, OutgoingStage::Closing { .. })
            });
            if closing {
                self.abandon_delayed(core, uid, true);
            }
            self.fail(core, uid, Failure::new(FailureKind::Cancelled, "its connector is gone"));
        }
        self.acknowledge_all(core, client);
    }

    /// The buffer has another step; or it could not get it, which is the answer to those who want more than it has now.
    /// Others go on waiting for slots that come back.
    pub(super) fn handle_grown(&mut self, core: &mut Core<R>, has_failed: bool) {
        if has_failed {
            self.refuse_staging_that_needs_growth(core);
        }
        self.serve_staging(core);
    }

    /// Ends everything that has not ended.
    pub(super) fn handle_abort(&mut self, core: &mut Core<R>) {
        let open: Vec<Uid> = self.requests.keys().copied().collect();
        for uid in open {
            self.fail(core, uid, Failure::new(FailureKind::ShuttingDown, "this sender is shutting down"));
        }
        self.end_park_leases(core);
    }

    /// Whether everything that had begun has ended. What is parked is still waited for.
    pub(super) fn is_drained(&self) -> bool {
        self.requests.is_empty() && self.park_leases.is_empty()
    }

    /// What it counts, all of one moment.
    pub(super) fn counts(&self) -> OutgoingCounts {
        OutgoingCounts {
            requests_active: self.requests.len(),
            requests_waiting: self.requests.values().filter(|request| request.waits()).count(),
            stages_waiting: self.staging.len(),
            peers: self.receivers.values().filter(|peer| peer.connection().is_some()).count(),
            transfers_in_flight: self.transfers.len(),
            park_leases: self.park_leases.len(),
            registrations: self.registrants.len(),
            ..self.counts
        }
    }

    /// Slots that are staged for its requests.
    pub(super) fn staged_slots(&self) -> usize {
        let unacknowledged: usize = self.unacknowledged.values().map(Vec::len).sum();
        unacknowledged + self.requests.values().map(OutgoingRequest::staged_slots).sum::<usize>()
    }

    /// Checks that slots, requests and transfers agree.
    ///
    /// # Errors
    /// What does not.
    pub(super) fn check_invariants(&self, core: &Core<R>) -> Result<(), String> {
        self.check_configured(core)?;
        self.check_parked()?;
        self.check_aheads()?;
        self.registrants.check()?;
        let (held, staged) = (self.staged_slots(), core.slots.counts().staged);
        if held != staged as usize {
            return Err(format!("{staged} slots are staged, requests hold {held}"));
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
        if let Some(peer) = self.quiesce.pending_peers().find(|peer| !self.receivers.contains_key(peer)) {
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
    pub(super) fn configured_receivers(&self) -> impl Iterator<Item = (&ReceiverAddress, &ConnectState)> {
        self.configured.iter()
    }

    /// Where the receivers that are connected may be asked for what they have parked themselves.
    pub(super) fn sources(&self) -> impl Iterator<Item = &SourceAddress> {
        let connected = self.receivers.values().filter(|peer| peer.connection().is_some());
        connected.filter_map(|peer| peer.rendezvous.as_ref())
    }

    /// Tries to connect to a receiver that the configuration names.
    fn connect_configured(&mut self, core: &mut Core<R>, address: &ReceiverAddress) {
        // If it is being connected already, `note_connected` or `note_lost` follows.
        if core.draining || self.receiver_by_address.contains_key(address) {
            return;
        }
        let room = self.receivers.len() < core.settings.peers_max || self.evict_peer(core, false);
        if !room || self.peer_for(core, address).is_err() {
            core.timers.set(OutgoingTimer::Connect(address.clone()), core.now + PAUSE_MAX);
        }
    }

    /// A receiver can be written to.
    fn note_connected(&mut self, core: &mut Core<R>, address: &ReceiverAddress) {
        core.timers.unset(OutgoingTimer::Connect(address.clone()));
        self.configured.connected(core.now, address);
    }

    /// A receiver was lost, or could not be connected. It is tried again later if the configuration names it.
    fn note_lost(&mut self, core: &mut Core<R>, address: &ReceiverAddress, failure: &Failure) {
        let note = match self.configured.lost(core.now, address, failure) {
            None => {
                Some(OutgoingNote::PeerDown { address: address.clone(), configured: false, failure: failure.clone() })
            }
            Some(AfterLoss { pause, note }) => {
                if !core.draining {
                    core.timers.set(OutgoingTimer::Connect(address.clone()), core.now + pause);
                }
                note
            }
        };
        if let Some(note) = note {
            core.note(note);
        }
    }

    /// A receiver had to go, so that another could be connected.
    fn postpone_connecting(&mut self, core: &mut Core<R>, address: &ReceiverAddress) {
        if self.configured.postponed(core.now, address) {
            core.timers.set(OutgoingTimer::Connect(address.clone()), core.now + PAUSE_MAX);
        }
    }

    /// Checks that each receiver of the configuration is connected, connecting, or about to be.
    fn check_configured(&self, core: &Core<R>) -> Result<(), String> {
        for (address, state) in self.configured.iter() {
            let peer = self.receiver_by_address.get(address);
            let connected = peer.is_some_and(|peer| self.connection_of(*peer).is_some());
            if connected != (*state == ConnectState::Connected) {
                return Err(format!("receiver {address} is said to be {state:?}, and connected: {connected}"));
            }
            if peer.is_none() && !core.draining && !core.timers.contains(OutgoingTimer::Connect(address.clone())) {
                return Err(format!("nothing will connect to receiver {address}"));
            }
        }
        Ok(())
    }

    fn note_unexpected(&mut self, core: &mut Core<R>, peer: PeerId, message: &'static str) {
        if let Some(address) = self.receivers.get(&peer).map(|peer| peer.address.clone()) {
            core.note(OutgoingNote::Unexpected { address, message });
        }
    }

    fn connection_of(&self, peer: PeerId) -> Option<ConnectionId> {
        self.receivers.get(&peer)?.connection()
    }
}
