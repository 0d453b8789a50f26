//! A daemon: a [`Node`] with its engine, its ports, its connections and its clients.

use std::time::{Duration, Instant};

use tokio::sync::mpsc::{Sender, UnboundedSender};

use super::awaiting_event::CLIENT_WRITES_OVER_AFTER;
use super::clients::Clients;
use super::deferred::{Deferred, no_event_here};
use super::driver::{self, Driven as _, Inbox, OUTPUTS_AT_ONCE};
use super::engine_thread::EngineThread;
use super::engine_work::{EngineCommand, EngineEvent};
use super::health::{HealthResponder, Phase, health_probe};
use super::http::HttpServer;
use super::lifecycle::{self, Stop};
use super::message_budget::MessageBudget;
use super::notes::Notes;
use super::peer_links::{LinkEvent, PeerLinks};
use super::ports::{PortEvent, Ports, RouteKey};
use super::probe::Probe;
use super::proxy::Proxy;
use super::setup::MemoryAndEngine;
use super::watches::Watches;
use super::witness::{HaveEnded, Witness};
use super::{RunOptions, RuntimeError, identity, ready, setup, translate};
use crate::buffer::{Memory, MemoryManager};
use crate::config::Config;
use crate::connector::ReadyLine;
use crate::connector::message::{Reply, Request, Status};
use crate::connector::server::ConnectorEvent;
use crate::ids::{ClientId, ConnectionId, Failure};
use crate::metrics::Snapshot;
use crate::node::incoming::FetchRequest;
use crate::node::incoming::Lookup;
use crate::node::outgoing::{OpenRequest, ParkRequest, Sending};
use crate::node::{Answer, Node, Output, Port, To};

/// The process behind a peer has ended.
pub(super) struct ProcessEnded {
    instance: String,
}

/// What can happen to a daemon.
pub(super) enum DaemonEvent {
    Port(PortEvent),
    Link(LinkEvent),
    Engine(EngineEvent),
    Connector(ConnectorEvent),
    Process(ProcessEnded),
    Looked(HaveEnded),
    /// A client whose connection ended a while ago writes to no slot any more.
    ClientWritesOver(ClientId),
    Stop(Stop),
}

super::event_sources!(
    DaemonEvent: Port(PortEvent), Link(LinkEvent), Engine(EngineEvent), Connector(ConnectorEvent), Process(ProcessEnded),
    Looked(HaveEnded), Stop(Stop)
);

struct Daemon {
    config: Config,
    manager: MemoryManager,
    engine_name: &'static str,
    node: Node<RouteKey>,
    engine: EngineThread,
    /// Messages that wait for a GPU.
    deferred: Deferred,
    /// Of the message from a peer whose outputs are being done.
    budget: Option<MessageBudget>,
    ports: Ports,
    links: PeerLinks<DaemonEvent>,
    clients: Clients,
    notes: Notes,
    draining: bool,
    proxy: Option<Proxy>,
    /// Processes of senders.
    watches: Watches,
    /// Processes that receivers ask after.
    witness: Witness,
    events: UnboundedSender<DaemonEvent>,
}

/// Runs a daemon until it is told to stop.
pub(super) async fn run(config: Config, options: RunOptions) -> Result<(), RuntimeError> {
    let (mailbox, mut inbox) = driver::mailbox::<DaemonEvent>();
    lifecycle::watch(&mailbox.events, options.exit_with_parent)?;
    let instance = identity::instance_name(&config);
    // Before the buffer: a port that is taken is found at once, and probes are answered while the buffer is filled.
    let (probe, responder) = health_probe();
    let http = config.metrics.as_ref().map(|metrics| HttpServer::start(metrics, probe)).transpose()?;
    let ports = Ports::bind(&config, &mailbox.messages).await?;
    let parts = setup::start_memory_and_engine(&config, &instance, &mailbox.events, &mut inbox).await?;
    let Some(parts) = parts else {
        tracing::info!("told to stop before it was ready");
        return Ok(());
    };
    serve(config, &instance, (mailbox.messages, mailbox.events, inbox), ports, parts, (http, responder)).await
}

/// Serves with what has been prepared.
pub(super) async fn serve(
    config: Config,
    instance: &str,
    (messages, events, inbox): (Sender<DaemonEvent>, UnboundedSender<DaemonEvent>, Inbox<DaemonEvent>),
    ports: Ports,
    parts: MemoryAndEngine,
    (http, mut responder): (Option<HttpServer>, HealthResponder),
) -> Result<(), RuntimeError> {
    let MemoryAndEngine { manager, engine, started } = parts;
    let clients = Clients::bind(&config).await?;
    let engine_name = started.engine;
    let node = Node::new(Instant::now(), identity::settings(&config, instance, started, manager.addresses(), &ports));
    let proxy = config.proxy.clone().map(|proxy| Proxy::start(proxy, config.deadlines.handshake));
    let ready = ReadyLine {
        role: config.role.as_str().to_owned(),
        pid: std::process::id(),
        connector: clients.endpoint().to_owned(),
        init_port: ports.number(Port::Init),
        alloc_port: ports.number(Port::Alloc),
        query_port: ports.number(Port::Query),
        rendezvous_port: ports.number(Port::Rendezvous),
        metrics: http.as_ref().map(HttpServer::metrics_url),
        engine: engine_name.to_owned(),
        chunk_bytes: config.layout.chunk_bytes(),
        slot_count: config.buffer.slot_count,
    };
    let drain = config.deadlines.shutdown;
    let secret = config.shared_secret.as_ref().map(|file| file.secret.clone());
    let links = PeerLinks::new(messages, secret, config.deadlines.handshake);
    let mut daemon = Daemon {
        notes: Notes::new(config.role),
        config,
        manager,
        engine_name,
        node,
        engine,
        deferred: Deferred::default(),
        budget: None,
        ports,
        links,
        clients,
        draining: false,
        proxy,
        watches: Watches::default(),
        witness: Witness::default(),
        events,
    };
    tracing::info!(
        %instance, engine = engine_name, connector = %ready.connector,
        init_port = ready.init_port, alloc_port = ready.alloc_port, "ready"
    );
    // First, so that nobody who has read the line is told that there is none yet.
    responder.answer(Phase::Serving, daemon.snapshot(), daemon.probe_engine());
    ready::print(ready)?;
    driver::drive(&mut daemon, inbox, drain, responder).await
}

impl driver::Driven for Daemon {
    type Event = DaemonEvent;

    async fn listen(&mut self) -> DaemonEvent {
        DaemonEvent::Connector(self.clients.listen().await)
    }

    fn handle(&mut self, now: Instant, event: DaemonEvent) -> Option<Stop> {
        match event {
            DaemonEvent::Port(PortEvent::Message { port, from, message, budget }) => {
                self.budget = Some(budget);
                self.node.handle_port_message(now, port, from, *message);
            }
            DaemonEvent::Port(PortEvent::Unreadable) => self.notes.count_unreadable(),
            DaemonEvent::Port(PortEvent::Gone { route }) => self.node.handle_route_gone(now, &route),
            DaemonEvent::Link(LinkEvent::Opened { peer, links }) => {
                let lmcache_mode = links.lmcache_mode;
                if self.links.keep(peer, *links) {
                    self.node.handle_peer_opened(now, peer, lmcache_mode);
                }
            }
            DaemonEvent::Link(LinkEvent::Message { peer, port, message, budget }) => {
                self.budget = Some(budget);
                self.node.handle_connection_message(now, peer, port, *message);
            }
            DaemonEvent::Link(LinkEvent::Closed { peer, failure }) => {
                self.links.close(peer);
                self.node.handle_peer_closed(now, peer, failure);
            }
            DaemonEvent::Engine(event) => self.on_engine_event(now, event),
            DaemonEvent::Process(ProcessEnded { instance }) => {
                self.watches.forget(&instance);
                self.node.handle_process_ended(now, &instance);
            }
            DaemonEvent::Looked(HaveEnded { peer, processes }) => {
                self.witness.forget(peer);
                self.node.handle_processes_ended(now, peer, processes);
            }
            DaemonEvent::Connector(ConnectorEvent::Request { client, request }) => {
                self.on_message(now, client, request)
            }
            DaemonEvent::Connector(ConnectorEvent::Gone { client }) => self.on_client_gone(now, client),
            DaemonEvent::ClientWritesOver(client) => self.forget_client(now, client),
            // Said by whoever refused it.
            DaemonEvent::Connector(ConnectorEvent::Refused { .. }) => {}
            DaemonEvent::Stop(stop) => return Some(stop),
        }
        None
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.node.handle_timeout(now);
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.node.poll_timeout()
    }

    fn perform(&mut self) -> Result<bool, RuntimeError> {
        for _ in 0..OUTPUTS_AT_ONCE {
            let Some(output) = self.node.poll_output() else {
                self.budget = None;
                return Ok(false);
            };
            self.do_output(output)?;
        }
        Ok(true)
    }

    fn log_notes(&mut self) {
        self.notes.log();
    }

    fn snapshot(&mut self) -> Snapshot {
        Snapshot { status: self.status(), counts: self.node.counts(), tally: self.notes.tally().clone() }
    }

    fn probe_engine(&mut self) -> Probe {
        self.engine.probe()
    }

    fn begin_shutdown(&mut self, now: Instant) {
        self.draining = true;
        self.node.handle_shutdown(now);
    }

    fn is_drained(&self) -> bool {
        self.node.is_drained()
    }

    fn abort(&mut self) {
        self.node.handle_abort(Instant::now());
    }
}

impl Daemon {
    fn do_output(&mut self, output: Output<RouteKey>) -> Result<(), RuntimeError> {
        match output {
            Output::OpenPeer { peer, address } => self.links.open(peer, &address),
            Output::OpenSource { peer, address } => self.links.open_source(peer, &address),
            Output::ClosePeer(peer) => self.links.close(peer),
            Output::Send { to: To::Peer(peer), port, message } => {
                if let Err(failure) = self.links.send(peer, port, &message) {
                    self.links.close(peer);
                    self.node.handle_peer_closed(Instant::now(), peer, failure);
                }
            }
            Output::Send { to: To::Route(route), port, message } => {
                self.ports.send(port, &route, &message);
            }
            Output::LoadPeer { remote, agent_name, metadata } => {
                self.engine.send_with(EngineCommand::LoadPeer { remote, agent_name, metadata }, self.budget.take())?;
            }
            Output::ConnectPeer { peer, connection, memory } => {
                self.engine.send_with(EngineCommand::Connect { peer, connection, memory }, self.budget.take())?;
            }
            Output::UpdatePeer { peer, connection, metadata, descriptors } => {
                let command = EngineCommand::UpdatePeer { peer, connection, metadata, descriptors };
                self.engine.send_with(command, self.budget.take())?;
            }
            Output::ForgetPeer(connection) => self.engine.send(EngineCommand::Forget(connection))?,
            Output::GrowBuffer => self.engine.grow()?,
            Output::CheckProcesses { peer, processes } => {
                let events = self.events.clone();
                self.witness.look(peer, processes, move |ended| drop(events.send(ended.into())));
            }
            Output::WatchProcess { instance, process } => {
                let (events, ended) = (self.events.clone(), ProcessEnded { instance: instance.clone() });
                self.watches.watch(&instance, &process, move || drop(events.send(ended.into())));
            }
            Output::UnwatchProcess { instance } => self.watches.forget(&instance),
            Output::Post { transfer, connection, copies, summed, after } => {
                self.engine.send(EngineCommand::Post { transfer, connection, copies, summed, after })?;
            }
            Output::Await { transfer, after } => {
                let (connection, after) = (ConnectionId(0), Some(after));
                self.engine.send(EngineCommand::Post {
                    transfer,
                    connection,
                    copies: Vec::new(),
                    summed: Vec::new(),
                    after,
                })?;
            }
            Output::Abandon { transfer, client_gone } => {
                self.engine.send(EngineCommand::Abandon { transfer, client_gone })?;
            }
            Output::Verify { request, grant, chunks } => {
                self.engine.send(EngineCommand::Verify { request, grant, chunks })?;
            }
            Output::AbandonVerification(grant) => self.engine.send(EngineCommand::AbandonVerification(grant))?,
            Output::NotifyProxy { request } => {
                if let Some(proxy) = &self.proxy {
                    proxy.notify(request);
                }
            }
            Output::Answer { client, id, answer } => {
                if let Answer::Failed { failure, .. } = &answer {
                    self.notes.count_connector_error(failure.kind);
                }
                self.clients.reply(client, &translate::answer(id, answer));
            }
            Output::Event { client, event } => self.clients.reply(client, &translate::event(event)),
            Output::Note(note) => self.notes.push(note),
        }
        Ok(())
    }

    fn on_engine_event(&mut self, now: Instant, event: EngineEvent) {
        match event {
            EngineEvent::PeerLoaded { remote, result } => self.node.handle_loaded(now, &remote, result),
            EngineEvent::Connected { peer, result } => self.node.handle_peer_connected(now, peer, result),
            EngineEvent::Updated { peer, connection, result } => {
                self.node.handle_peer_updated(now, peer, connection, result);
            }
            EngineEvent::Grown { result } => self.node.handle_grown(now, result),
            EngineEvent::EventSignalled { ticket, result } => self.on_event_signalled(now, ticket, result),
            EngineEvent::Done { transfer, result } => self.node.handle_transfer_done(now, transfer, result),
            EngineEvent::Verified { request, grant, corrupted } => {
                self.node.handle_verified(now, &request, grant, &corrupted);
            }
            EngineEvent::Summing => self.node.handle_verifying(now),
        }
    }

    /// Takes a message in, or keeps it until the GPU has done what it speaks of.
    fn on_message(&mut self, now: Instant, client: ClientId, request: Request) {
        match self.deferred.admit(client, request, self.manager.memory(), &self.engine) {
            Ok(Some(request)) => self.on_request(now, client, request),
            Ok(None) => {}
            Err((id, failure)) => self.clients.reply(client, &translate::error(id, failure, None)),
        }
    }

    fn on_event_signalled(&mut self, now: Instant, ticket: u64, result: Result<(), Failure>) {
        let Some((client, request)) = self.deferred.take(ticket) else { return };
        match result {
            Ok(()) => self.on_request(now, client, request),
            Err(failure) => self.clients.reply(client, &translate::error(request.id(), failure, None)),
        }
    }

    /// Of a process that dies the socket closes before its GPU context is torn down: what it had put on its streams may
    /// be written to its slots until then, so that nobody else gets them.
    fn on_client_gone(&mut self, now: Instant, client: ClientId) {
        match &**self.manager.memory() {
            Memory::Cuda(_) if self.config.role.sends() => {
                let events = self.events.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(CLIENT_WRITES_OVER_AFTER).await;
                    // A daemon that has stopped meanwhile has no slots to give to anybody.
                    drop(events.send(DaemonEvent::ClientWritesOver(client)));
                });
            }
            Memory::Cuda(_) | Memory::Host(_) => self.forget_client(now, client),
        }
    }

    fn forget_client(&mut self, now: Instant, client: ClientId) {
        self.deferred.forget(client, &self.engine);
        self.node.handle_client_gone(now, client);
    }

    fn on_request(&mut self, now: Instant, client: ClientId, request: Request) {
        match request {
            Request::Attach { id, client: name, .. } => {
                self.clients.attach(client, id, &name, &self.config, &self.manager);
            }
            Request::Detach { id } => {
                self.forget_client(now, client);
                self.clients.reply(client, &Reply::Detached { id });
            }
            Request::Status { id } => {
                let status = self.status();
                self.clients.reply(client, &Reply::Status { id, status });
            }
            Request::Open { id, req_id, keys, last_chunk_tokens, receiver, wait_ms, groups, stage } => {
                let wait = translate::wait(wait_ms);
                let open = OpenRequest { id: req_id, keys, groups, last_chunk_tokens, receiver, wait, stage };
                self.node.handle_open(now, client, id, open);
            }
            Request::Park { id, req_id, ids, keys, last_chunk_tokens, groups, wait_ms, unsolicited, stays } => {
                let wait = translate::wait(wait_ms);
                let park = ParkRequest { id: req_id, ids, keys, groups, last_chunk_tokens, wait, unsolicited, stays };
                self.node.handle_park(now, client, id, park);
            }
            Request::Stage { id, req_id, chunks, wait_ms } => {
                let wait = translate::wait(wait_ms);
                self.node.handle_stage(now, client, id, &req_id, chunks, wait);
            }
            Request::Send { id, after: Some(_), .. } if matches!(**self.manager.memory(), Memory::Host(_)) => {
                self.clients.reply(client, &translate::error(id, no_event_here(), None));
            }
            Request::Send { id, req_id, parts, last, after } => {
                let sending = Sending { parts: &parts, last, after };
                self.node.handle_send(now, client, id, &req_id, sending);
            }
            Request::Lookup { id, keys, uncommitted, fetch } => {
                let lookup = Lookup { keys, uncommitted, fetches: fetch };
                self.node.handle_lookup(now, client, id, &lookup);
            }
            Request::Wait { id, req_id, wait_ms, uncommitted } => {
                let wait = translate::wait(wait_ms);
                self.node.handle_wait(now, client, id, req_id, wait, uncommitted);
            }
            Request::Fetch { id, req_id, source, ids, keys, wait_ms, register_wait_ms, hold } => {
                let register_wait = Duration::from_millis(register_wait_ms);
                let fetch = FetchRequest { id: req_id, source, ids, keys, register_wait };
                if hold {
                    self.node.handle_hold(now, client, id, fetch);
                } else {
                    self.node.handle_fetch(now, client, id, fetch, translate::wait(wait_ms));
                }
            }
            Request::ReleaseParked { id, req_id, source, ids } => {
                let fetch = FetchRequest { id: req_id, source, ids, keys: Vec::new(), register_wait: Duration::ZERO };
                self.node.handle_release_parked(now, client, id, fetch);
            }
            Request::Release { id, lease, .. } => self.node.handle_release(now, client, id, lease),
            Request::Cancel { id, req_id, acknowledges: true, .. } => {
                self.node.handle_acknowledge(now, client, id, &req_id);
            }
            Request::Cancel { id, req_id, .. } => self.node.handle_cancel(now, client, id, &req_id),
            Request::Reset { id } => self.node.handle_reset(now, client, id),
        }
    }

    fn status(&mut self) -> Status {
        let engine_silent_ms = self.engine.probe().silence().as_millis() as u64;
        let counts = self.node.counts();
        let (outgoing, incoming) = (counts.outgoing.unwrap_or_default(), counts.incoming.unwrap_or_default());
        let slots = counts.slots;
        Status {
            role: self.config.role.as_str().into(),
            engine: self.engine_name.into(),
            slot_count: self.config.buffer.slot_count,
            slots_free: (counts.available_bytes / self.config.layout.chunk_bytes()) as u32,
            slots_reserved: slots.staged + slots.reserved,
            slots_ready: slots.ready_pinned + slots.ready_idle,
            slots_quarantined: slots.quarantined,
            slots_parked: slots.parked,
            requests_active: (outgoing.requests_active + incoming.requests_active) as u32,
            requests_done: outgoing.requests_sent + incoming.requests_ready,
            requests_failed: outgoing.requests_failed + incoming.requests_failed,
            bytes: outgoing.bytes + incoming.bytes,
            peers: (outgoing.peers + incoming.peers) as u32,
            clients: self.clients.count(),
            buffer: translate::buffer_usage(&self.config, &self.manager),
            slots_held: slots.ready_pinned,
            requests_waiting: (outgoing.requests_waiting + incoming.requests_waiting) as u32,
            waits: (outgoing.stages_waiting + incoming.readers_waiting) as u32,
            leases: incoming.leases as u32,
            transfers_in_flight: outgoing.transfers_in_flight as u32,
            chunks_expired: incoming.chunks_expired,
            draining: self.draining,
            failures: self.notes.tally().failures(),
            engine_silent_ms,
            receivers: self.node.configured_receivers().map(translate::receiver).collect(),
            sources: self.node.sources().cloned().collect(),
        }
    }
}
