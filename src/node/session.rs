//! The node as a value.

use std::time::{Duration, Instant};

use super::Port;
use super::answer::Answer;
use super::core::{Core, Timer};
use super::growth::Grown;
use super::incoming::{FetchRequest, Incoming, IncomingCounts, Lookup};
use super::outgoing::{ConnectState, OpenRequest, Outgoing, OutgoingCounts, ParkRequest, Sending};
use super::output::{Output, Remote};
use super::safeguards::Safeguard;
use super::settings::NodeSettings;
use crate::ids::{
    Checksum, ClientId, ConnectionId, Failure, FailureKind, GrantId, LeaseId, PeerId, ReceiverAddress, RequestId, Seq,
    SourceAddress, TransferId,
};
use crate::slot::SlotCounts;
use crate::wire::message::ProcessIdentity;
use crate::wire::{LmcacheMode, Message};

/// A node with the halves that its settings give. `R` is how a message's sender is answered: opaque, and compared for
/// equality alone.
#[derive(Debug)]
pub struct Node<R> {
    core: Core<R>,
    outgoing: Option<Outgoing<R>>,
    incoming: Option<Incoming<R>>,
    /// [`SlotTable::version`](crate::slot::SlotTable::version) when both halves were last asked whether they can go on.
    settled_version: u64,
}

/// What a node counts, all of one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeCounts {
    /// Slots by state.
    pub slots: SlotCounts,
    /// Bytes that are free, or hold a chunk that nobody needs.
    pub available_bytes: u64,
    /// Of the half that sends, if there is one.
    pub outgoing: Option<OutgoingCounts>,
    /// Of the half that receives, if there is one.
    pub incoming: Option<IncomingCounts>,
}

impl<R: Clone + PartialEq> Node<R> {
    /// A node without peers, with an empty buffer.
    pub fn new(now: Instant, mut settings: NodeSettings) -> Self {
        let (outgoing, incoming) = (settings.outgoing.take(), settings.incoming.take());
        let is_shared = outgoing.is_some() && incoming.is_some();
        let parks = outgoing.as_ref().is_some_and(|outgoing| outgoing.parks);
        let mut core = Core::new(now, settings, is_shared, parks);
        let outgoing = outgoing.map(|settings| Outgoing::new(&mut core, settings));
        Self { outgoing, incoming: incoming.map(Incoming::new), settled_version: core.slots.version(), core }
    }

    /// A message arrived at one of our ports. At the rendezvous port receivers ask the outgoing half; at all others senders ask the
    /// incoming one.
    pub fn handle_port_message(&mut self, now: Instant, port: Port, from: R, message: Message) {
        if port == Port::Rendezvous {
            return self.in_outgoing(now, |half, core| half.handle_rendezvous(core, from, message));
        }
        self.in_incoming(now, |half, core| half.handle_port_message(core, port, from, message));
    }

    /// The connection that messages from `route` came through is gone.
    pub fn handle_route_gone(&mut self, now: Instant, route: &R) {
        self.in_incoming(now, |half, core| half.handle_route_gone(core, route));
    }

    /// The sockets to a receiver, or to a source, are connected. If it turns out to be LMCache's, it runs in this mode.
    pub fn handle_peer_opened(&mut self, now: Instant, peer: PeerId, lmcache_mode: LmcacheMode) {
        if self.is_source(peer) {
            return self.in_incoming(now, |half, core| half.handle_source_opened(core, peer));
        }
        self.in_outgoing(now, |half, core| half.handle_peer_opened(core, peer, lmcache_mode));
    }

    /// A message arrived through a connection that we made, from a receiver, or from a source at its rendezvous port.
    pub fn handle_connection_message(&mut self, now: Instant, peer: PeerId, port: Port, message: Message) {
        if port == Port::Rendezvous {
            return self.in_incoming(now, |half, core| half.handle_source_message(core, peer, message));
        }
        self.in_outgoing(now, |half, core| half.handle_connection_message(core, peer, port, message));
    }

    /// The connections to a receiver, or to a source, are gone, or could not be made.
    pub fn handle_peer_closed(&mut self, now: Instant, peer: PeerId, failure: Failure) {
        if self.is_source(peer) {
            return self.in_incoming(now, |half, core| half.handle_source_closed(core, peer, &failure));
        }
        self.in_outgoing(now, |half, core| half.handle_peer_closed(core, peer, failure));
    }

    /// The engine has loaded a peer's metadata, or could not.
    pub fn handle_loaded(&mut self, now: Instant, remote: &Remote, result: Result<ConnectionId, Failure>) {
        match remote {
            Remote::Receiver(peer) => self.in_outgoing(now, |half, core| half.handle_peer_loaded(core, *peer, result)),
            Remote::Sender(instance) => {
                self.in_incoming(now, |half, core| half.on_peer_loaded(core, instance, result));
            }
        }
    }

    /// The engine is connected to a receiver's memory, or could not.
    pub fn handle_peer_connected(&mut self, now: Instant, peer: PeerId, result: Result<(), String>) {
        self.in_outgoing(now, |half, core| half.handle_peer_connected(core, peer, result));
    }

    /// The engine knows a receiver's buffer as it is now, or could not learn it: then the receiver is connected to again.
    pub fn handle_peer_updated(
        &mut self,
        now: Instant,
        peer: PeerId,
        connection: ConnectionId,
        result: Result<(), String>,
    ) {
        self.in_outgoing(now, |half, core| half.handle_peer_updated(core, peer, connection, result));
    }

    /// The engine has written a transfer, or has given it up. The checksums are those that were asked for, in that order.
    ///
    /// A failure of kind [`FailureKind::PeerLost`] is one of the connection: every request to that receiver fails with it,
    /// and the next one connects to the receiver again.
    pub fn handle_transfer_done(&mut self, now: Instant, transfer: TransferId, result: Result<Vec<Checksum>, Failure>) {
        self.in_outgoing(now, |half, core| half.handle_transfer_done(core, transfer, result));
    }

    /// Of the processes that a receiver asked after, these have ended.
    pub fn handle_processes_ended(&mut self, now: Instant, peer: PeerId, ended: Vec<ProcessIdentity>) {
        self.in_outgoing(now, |half, core| half.handle_processes_ended(core, peer, ended));
    }

    /// The process behind the sender `instance` has ended: whatever it was writing, it writes no more.
    pub fn handle_process_ended(&mut self, now: Instant, instance: &str) {
        self.in_incoming(now, |half, core| half.process_ended(core, instance));
        // With an engine that leaves nothing under way, the time for it has passed already.
        self.handle_timeout(now);
    }

    /// Checksums of what was received are being summed.
    pub fn handle_verifying(&mut self, now: Instant) {
        self.in_incoming(now, |half, _| half.handle_verifying(now));
    }

    /// The chunks of a commit were summed; those at `corrupted` are not as they were sent.
    pub fn handle_verified(&mut self, now: Instant, id: &RequestId, grant: GrantId, corrupted: &[u32]) {
        self.in_incoming(now, |half, core| half.handle_verified(core, id, grant, corrupted));
    }

    /// The buffer has another step, which its addresses know already; or it could not get it.
    pub fn handle_grown(&mut self, now: Instant, result: Result<Grown, String>) {
        self.core.now = now;
        let has_failed = result.is_err();
        self.core.grown(result);
        self.in_outgoing(now, |half, core| half.handle_grown(core, has_failed));
        self.in_incoming(now, |half, core| half.handle_grown(core, has_failed));
    }

    /// Deadlines may have passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.core.now = now;
        while let Some((due, timer)) = self.core.timers.pop_due(now) {
            match timer {
                Timer::Outgoing(timer) => self.in_outgoing(now, |half, core| half.handle_timer(core, due, timer)),
                Timer::Incoming(timer) => self.in_incoming(now, |half, core| half.handle_timer(core, due, timer)),
                Timer::Grow => {
                    self.core.growth.end_pause();
                    self.in_outgoing(now, |half, core| half.want_growth(core));
                    self.in_incoming(now, |half, core| half.want_growth(core));
                }
            }
        }
        if self.incoming.is_some() {
            self.in_incoming(now, |half, core| half.handle_time(core));
        } else {
            self.in_outgoing(now, |half, core| half.handle_time(core));
        }
    }

    /// When to call [`handle_timeout`](Self::handle_timeout).
    pub fn poll_timeout(&self) -> Option<Instant> {
        let idle = match (&self.incoming, &self.outgoing) {
            (Some(half), _) => half.idle_until(&self.core),
            (None, Some(half)) => half.idle_until(&self.core),
            (None, None) => None,
        };
        [self.core.timers.next(), idle].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output<R>> {
        self.core.outputs.pop_front()
    }

    /// A client announces a request.
    pub fn handle_open(&mut self, now: Instant, client: ClientId, id: Seq, open: OpenRequest) {
        self.ask_outgoing(now, client, id, |half, core| half.handle_open(core, client, id, open));
    }

    /// A client announces a request whose chunks are to be kept for whoever registers for them.
    pub fn handle_park(&mut self, now: Instant, client: ClientId, id: Seq, park: ParkRequest) {
        self.ask_outgoing(now, client, id, |half, core| half.handle_park(core, client, id, park));
    }

    /// A client wants slots for these chunks of an opened request.
    pub fn handle_stage(
        &mut self,
        now: Instant,
        client: ClientId,
        id: Seq,
        request: &RequestId,
        chunks: Vec<u32>,
        wait: Option<Duration>,
    ) {
        self.ask_outgoing(now, client, id, |half, core| {
            half.handle_stage(core, client, id, request, chunks, wait);
        });
    }

    /// A client says that these parts of its staged slots are final, and perhaps that they are the last.
    pub fn handle_send(&mut self, now: Instant, client: ClientId, id: Seq, request: &RequestId, sending: Sending<'_>) {
        self.ask_outgoing(now, client, id, |half, core| half.handle_send(core, client, id, request, sending));
    }

    /// A reader wants to know when `request` is ready, which no sender need have announced yet. With `uncommitted` it has
    /// heard from the proxy that the request is written: that makes ready what an LMCache sender was granted.
    pub fn handle_wait(
        &mut self,
        now: Instant,
        client: ClientId,
        id: Seq,
        request: RequestId,
        wait: Option<Duration>,
        uncommitted: bool,
    ) {
        self.ask_incoming(now, client, id, |half, core| {
            half.handle_wait(core, client, id, request, wait, uncommitted);
        });
    }

    /// A reader wants chunks that a sender has parked, and waits for them as for any request.
    pub fn handle_fetch(
        &mut self,
        now: Instant,
        client: ClientId,
        id: Seq,
        fetch: FetchRequest,
        wait: Option<Duration>,
    ) {
        self.ask_incoming(now, client, id, |half, core| half.handle_fetch(core, client, id, fetch, wait));
    }

    /// A reader will want chunks that a sender has parked: they are to be kept.
    pub fn handle_hold(&mut self, now: Instant, client: ClientId, id: Seq, fetch: FetchRequest) {
        self.ask_incoming(now, client, id, |half, core| half.handle_hold(core, client, id, fetch));
    }

    /// A reader does not want what a sender has parked; of `fetch` its keys and its wait do not matter.
    pub fn handle_release_parked(&mut self, now: Instant, client: ClientId, id: Seq, fetch: FetchRequest) {
        self.ask_incoming(now, client, id, |half, core| half.handle_release_parked(core, client, id, fetch));
    }

    /// A reader wants those chunks that are ready.
    pub fn handle_lookup(&mut self, now: Instant, client: ClientId, id: Seq, lookup: &Lookup) {
        self.ask_incoming(now, client, id, |half, core| half.handle_lookup(core, client, id, lookup));
    }

    /// A reader has copied what it leased.
    pub fn handle_release(&mut self, now: Instant, client: ClientId, id: Seq, lease: LeaseId) {
        self.ask_incoming(now, client, id, |half, core| half.handle_release(core, client, id, lease));
    }

    /// A client gives a request up: one that it has opened under this name, or else the one that is received under it. Answered
    /// once this node writes nothing of it any more; slots that a peer may still write stay quarantined until it has stopped.
    pub fn handle_cancel(&mut self, now: Instant, client: ClientId, id: Seq, request: &RequestId) {
        let sends = self.outgoing.as_ref().is_some_and(|half| half.knows(client, request));
        if sends || self.incoming.is_none() {
            self.ask_outgoing(now, client, id, |half, core| half.handle_cancel(core, client, id, request));
        } else {
            self.ask_incoming(now, client, id, |half, core| half.handle_cancel(core, client, id, request));
        }
    }

    /// A client knows of the failure that it was told of by an event, and fills nothing of that request any more. Ends nothing:
    /// a request that the client has opened under this name meanwhile goes on.
    pub fn handle_acknowledge(&mut self, now: Instant, client: ClientId, id: Seq, request: &RequestId) {
        self.in_outgoing(now, |half, core| {
            half.acknowledge_failure(core, client, request);
        });
        self.core.answer(client, id, Answer::Cancelled { request: request.clone() });
    }

    /// A client's serving engine has reset its cache: nothing that was computed before is sent, or read, any more.
    pub fn handle_reset(&mut self, now: Instant, client: ClientId, id: Seq) {
        self.in_outgoing(now, |half, core| half.handle_reset(core));
        self.in_incoming(now, |half, core| half.handle_reset(core));
        self.core.answer(client, id, Answer::Reset);
    }

    /// A client is gone: its requests, its leases and its waits end.
    pub fn handle_client_gone(&mut self, now: Instant, client: ClientId) {
        self.in_outgoing(now, |half, core| half.handle_client_gone(core, client));
        self.in_incoming(now, |half, core| half.handle_client_gone(core, client));
    }

    /// Takes no new requests from now on; what has begun goes on.
    pub fn handle_shutdown(&mut self, now: Instant) {
        self.core.draining = true;
        self.in_incoming(now, |half, core| half.handle_shutdown(core));
    }

    /// Ends everything that has not ended.
    pub fn handle_abort(&mut self, now: Instant) {
        self.core.draining = true;
        self.in_outgoing(now, |half, core| half.handle_abort(core));
        self.in_incoming(now, |half, core| half.handle_abort(core));
    }

    /// Whether everything that had begun has ended.
    pub fn is_drained(&self) -> bool {
        self.outgoing.as_ref().is_none_or(Outgoing::is_drained)
            && self.incoming.as_ref().is_none_or(Incoming::is_drained)
    }

    /// What it counts.
    pub fn counts(&self) -> NodeCounts {
        NodeCounts {
            slots: self.core.slots.counts(),
            available_bytes: self.core.slots.available_bytes(),
            outgoing: self.outgoing.as_ref().map(Outgoing::counts),
            incoming: self.incoming.as_ref().map(Incoming::counts),
        }
    }

    /// The receivers that the configuration names, in that order, and how far the node has come with each.
    pub fn configured_receivers(&self) -> impl Iterator<Item = (&ReceiverAddress, &ConnectState)> {
        self.outgoing.iter().flat_map(Outgoing::configured_receivers)
    }

    /// Where the receivers that are connected may be asked for what they have parked themselves.
    pub fn sources(&self) -> impl Iterator<Item = &SourceAddress> {
        self.outgoing.iter().flat_map(Outgoing::sources)
    }

    /// Checks that slots, requests, transfers, leases and grants agree.
    ///
    /// # Errors
    /// What does not.
    pub fn check_invariants(&self) -> Result<(), String> {
        self.core.slots.check_invariants()?;
        let is_shared = self.outgoing.is_some() && self.incoming.is_some();
        if is_shared && self.settled_version != self.core.slots.version() {
            return Err("what one half has freed was not offered to the other".to_owned());
        }
        self.outgoing.as_ref().map_or(Ok(()), |half| half.check_invariants(&self.core))?;
        self.incoming.as_ref().map_or(Ok(()), |half| half.check_invariants(&self.core))
    }

    fn is_source(&self, peer: PeerId) -> bool {
        self.incoming.as_ref().is_some_and(|half| half.has_source(peer))
    }

    /// An event of a half that is not there is dropped; none is expected.
    fn in_outgoing(&mut self, now: Instant, act: impl FnOnce(&mut Outgoing<R>, &mut Core<R>)) {
        self.core.now = now;
        if let Some(half) = &mut self.outgoing {
            act(half, &mut self.core);
            self.settle();
        }
    }

    fn in_incoming(&mut self, now: Instant, act: impl FnOnce(&mut Incoming<R>, &mut Core<R>)) {
        self.core.now = now;
        if let Some(half) = &mut self.incoming {
            act(half, &mut self.core);
            self.settle();
        }
    }

    /// What one half has freed may be what the other waits for.
    fn settle(&mut self) {
        let (Some(outgoing), Some(incoming)) = (&mut self.outgoing, &mut self.incoming) else { return };
        if self.settled_version != self.core.slots.version() && self.core.settings.keeps(Safeguard::OtherHalfWoken) {
            outgoing.serve_staging(&mut self.core);
            incoming.admit(&mut self.core);
            self.settled_version = self.core.slots.version();
        }
    }

    /// For a client's request that the half which sends answers.
    fn ask_outgoing(
        &mut self,
        now: Instant,
        client: ClientId,
        id: Seq,
        act: impl FnOnce(&mut Outgoing<R>, &mut Core<R>),
    ) {
        if self.outgoing.is_none() {
            return self.refuse_missing_half(
                client,
                id,
                "receives only; attach to a pd-sender to open, stage and send",
            );
        }
        self.in_outgoing(now, act);
    }

    /// For a client's request that the half which receives answers.
    fn ask_incoming(
        &mut self,
        now: Instant,
        client: ClientId,
        id: Seq,
        act: impl FnOnce(&mut Incoming<R>, &mut Core<R>),
    ) {
        if self.incoming.is_none() {
            return self.refuse_missing_half(
                client,
                id,
                "sends only; attach to a pd-receiver to look up, wait and release",
            );
        }
        self.in_incoming(now, act);
    }

    fn refuse_missing_half(&mut self, client: ClientId, id: Seq, what: &str) {
        let text = format!("this daemon {what}, or give it pd_role: both");
        self.core.refuse(client, id, Failure::new(FailureKind::BadRequest, text), None);
    }
}
