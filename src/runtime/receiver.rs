//! The pd-receiver: a [`ReceiverSession`] with its engine, its ports and its readers.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::clients::Clients;
use super::deferred::Deferred;
use super::driver::{self, Daemon, Inbox, OUTPUTS_AT_ONCE};
use super::engine_thread::EngineThread;
use super::engine_work::{Command, EngineEvent};
use super::health::{HealthResponder, health_probe};
use super::http::HttpServer;
use super::lifecycle::{self, Stop};
use super::notes::SessionLog;
use super::ports::{PortEvent, Ports, RouteKey};
use super::probe::Probe;
use super::ready;
use super::room::Room;
use super::setup::MemoryAndEngine;
use super::watches::Watches;
use super::{RunOptions, RuntimeError, identity, setup, translate};
use crate::buffer::MemoryManager;
use crate::config::Config;
use crate::connector::ReadyLine;
use crate::connector::message::{Reply, Request, Status};
use crate::connector::server::ConnectorEvent;
use crate::ids::{ClientId, Failure};
use crate::metrics::{Snapshot, Tally};
use crate::protocol::receiver::{Answer, Lookup, Note, Output, ReceiverSettings};
use crate::protocol::{ReceiverSession, Safeguards};

/// The process behind a peer has ended.
pub(super) struct ProcessEnded {
    instance: String,
}

/// What can happen to a receiver.
pub(super) enum Event {
    Port(PortEvent),
    Engine(EngineEvent<String>),
    Process(ProcessEnded),
    Connector(ConnectorEvent),
    Stop(Stop),
}

super::event_sources!(
    Event: Port(PortEvent), Engine(EngineEvent<String>), Process(ProcessEnded), Connector(ConnectorEvent), Stop(Stop)
);

struct ReceiverDaemon {
    config: Config,
    manager: MemoryManager,
    engine_name: &'static str,
    session: ReceiverSession<RouteKey>,
    engine: EngineThread<String>,
    /// Messages that wait for a GPU.
    deferred: Deferred,
    /// Of the message from a peer whose outputs are being done.
    room: Option<Room>,
    ports: Ports,
    clients: Clients,
    notes: Vec<Note<RouteKey>>,
    log: SessionLog,
    tally: Tally,
    draining: bool,
    /// Peers' processes.
    watches: Watches,
    events: UnboundedSender<Event>,
}

/// Runs a receiver until it is told to stop.
pub(super) async fn run(config: Config, options: RunOptions) -> Result<(), RuntimeError> {
    let (mailbox, mut inbox) = driver::mailbox::<Event>();
    lifecycle::watch(&mailbox.events, options.exit_with_parent)?;
    let instance = identity::instance_name(&config);
    // Before the buffer: a port that is taken is found at once, and probes are answered while the buffer is filled.
    let (probe, responder) = health_probe();
    let http = config.metrics.as_ref().map(|metrics| HttpServer::start(metrics, probe)).transpose()?;
    // Ports first: a port that is taken is found before gigabytes are allocated.
    let ports = Ports::bind(&config, &mailbox.messages).await?;
    let parts = setup::start_memory_and_engine(&config, &instance, &mailbox.events, &mut inbox).await?;
    let Some(parts) = parts else {
        tracing::info!("told to stop before it was ready");
        return Ok(());
    };
    serve(config, &instance, (mailbox.events, inbox), ports, parts, (http, responder)).await
}

/// Serves with what has been prepared.
pub(super) async fn serve(
    config: Config,
    instance: &str,
    (events, inbox): (UnboundedSender<Event>, Inbox<Event>),
    ports: Ports,
    parts: MemoryAndEngine<String>,
    (http, responder): (Option<HttpServer>, HealthResponder),
) -> Result<(), RuntimeError> {
    let MemoryAndEngine { manager, engine, started } = parts;
    let clients = Clients::bind(&config).await?;
    let session = ReceiverSession::new(ReceiverSettings {
        hello: identity::hello(&config, instance, started.engine),
        agent_name: started.export.agent_name,
        metadata: started.export.metadata,
        descriptors: started.export.descriptors,
        chunk: identity::chunk_shape(&config),
        addresses: manager.addresses().clone(),
        len_max_bytes: config.buffer_len_bytes(),
        allocation_timeout: config.deadlines.allocation,
        write_timeout: config.deadlines.write,
        wait_timeout: config.deadlines.wait,
        retention: config.deadlines.retention,
        checksum: config.engine.checksum,
        requests_max: config.limits.requests_max as usize,
        peer_requests_max: config.limits.peer_requests_max as usize,
        request_chunks_max: config.limits.request_chunks_max as usize,
        peers_max: config.limits.peers_max as usize,
        heartbeat_interval: config.deadlines.heartbeat,
        peer_timeout: config.deadlines.peer,
        linger: started.linger,
        pages: started.pages,
        safeguards: Safeguards::default(),
    });
    let ready = ReadyLine {
        role: config.role.as_str().to_owned(),
        pid: std::process::id(),
        connector: clients.endpoint().to_owned(),
        init_port: Some(ports.init_port()),
        alloc_port: Some(ports.alloc_port()),
        query_port: ports.query_port(),
        metrics: http.as_ref().map(HttpServer::metrics_url),
        engine: started.engine.to_owned(),
        chunk_bytes: config.layout.chunk_bytes(),
        slot_count: config.buffer.slot_count,
    };
    let drain = config.deadlines.shutdown;
    let mut daemon = ReceiverDaemon {
        config,
        manager,
        engine_name: started.engine,
        session,
        engine,
        deferred: Deferred::default(),
        room: None,
        ports,
        clients,
        notes: Vec::new(),
        log: SessionLog::default(),
        tally: Tally::receiver(),
        draining: false,
        watches: Watches::default(),
        events,
    };
    tracing::info!(
        %instance, engine = started.engine, connector = %ready.connector,
        init_port = ready.init_port, alloc_port = ready.alloc_port, "ready"
    );
    ready::print(ready)?;
    driver::drive(&mut daemon, inbox, drain, responder).await
}

impl Daemon for ReceiverDaemon {
    type Event = Event;

    async fn listen(&mut self) -> Event {
        Event::Connector(self.clients.listen().await)
    }

    fn handle(&mut self, now: Instant, event: Event) -> Option<Stop> {
        match event {
            Event::Port(PortEvent::Message { port, from, message, room }) => {
                self.room = Some(room);
                self.session.handle_message(now, port, from, *message);
            }
            Event::Port(PortEvent::Unreadable) => self.tally.count_unreadable(),
            Event::Port(PortEvent::Gone { route }) => self.session.handle_route_gone(now, &route),
            Event::Engine(EngineEvent::Grown { result }) => {
                self.session.handle_grown(now, result);
            }
            Event::Engine(EngineEvent::EventSignalled { ticket, result }) => {
                self.on_event_signalled(now, ticket, result)
            }
            Event::Engine(EngineEvent::PeerLoaded { peer, result }) => {
                self.session.handle_peer_loaded(now, &peer, result);
            }
            Event::Engine(EngineEvent::Verified { request, grant, corrupted }) => {
                self.session.handle_verified(now, &request, grant, &corrupted);
            }
            Event::Engine(EngineEvent::Summing) => self.session.handle_verifying(now),
            // A receiver neither connects nor posts.
            Event::Engine(EngineEvent::Connected { .. } | EngineEvent::Updated { .. } | EngineEvent::Done { .. }) => {}
            Event::Process(ProcessEnded { instance }) => {
                self.watches.forget(&instance);
                self.session.handle_process_ended(now, &instance);
            }
            Event::Connector(ConnectorEvent::Request { client, request }) => self.on_message(now, client, request),
            Event::Connector(ConnectorEvent::Gone { client }) => {
                self.forget_client(now, client);
            }
            // Said by whoever refused it.
            Event::Connector(ConnectorEvent::Refused { .. }) => {}
            Event::Stop(stop) => return Some(stop),
        }
        None
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.session.handle_timeout(now);
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.session.poll_timeout()
    }

    fn perform(&mut self) -> Result<bool, RuntimeError> {
        for _ in 0..OUTPUTS_AT_ONCE {
            let Some(output) = self.session.poll_output() else {
                self.room = None;
                return Ok(false);
            };
            match output {
                Output::Send { to, port, message } => self.ports.send(port, &to, &message),
                Output::LoadPeer { instance, agent_name, metadata } => {
                    let command = Command::LoadPeer { peer: instance, agent_name, metadata };
                    self.engine.send_with(command, self.room.take())?;
                }
                Output::Verify { request, grant, chunks } => {
                    self.engine.send(Command::Verify { request, grant, chunks })?;
                }
                Output::AbandonVerification(grant) => self.engine.send(Command::AbandonVerification(grant))?,
                Output::GrowBuffer => self.engine.grow()?,
                Output::ForgetPeer(connection) => self.engine.send(Command::Forget(connection))?,
                Output::WatchProcess { instance, process } => {
                    let (events, ended) = (self.events.clone(), ProcessEnded { instance: instance.clone() });
                    self.watches.watch(&instance, &process, move || drop(events.send(ended.into())));
                }
                Output::UnwatchProcess { instance } => self.watches.forget(&instance),
                Output::Answer { client, id, answer } => {
                    if let Answer::Failed { failure, .. } = &answer {
                        self.tally.count_connector_error(failure.kind);
                    }
                    self.clients.reply(client, &translate::receiver_answer(id, answer));
                }
                Output::Note(note) => self.notes.push(note),
            }
        }
        Ok(true)
    }

    fn log_notes(&mut self) {
        for note in self.notes.drain(..) {
            self.tally.count_receiver(&note);
            self.log.receiver(note);
        }
    }

    fn snapshot(&mut self) -> Snapshot {
        Snapshot { status: self.status(), tally: self.tally.clone() }
    }

    fn probe_engine(&mut self) -> Probe {
        self.engine.probe()
    }

    fn begin_shutdown(&mut self, now: Instant) {
        self.draining = true;
        self.session.handle_shutdown(now);
    }

    fn is_drained(&self) -> bool {
        self.session.is_drained()
    }

    fn abort(&mut self) {
        self.session.handle_abort(Instant::now());
    }
}

impl ReceiverDaemon {
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

    fn forget_client(&mut self, now: Instant, client: ClientId) {
        self.deferred.forget(client, &self.engine);
        self.session.handle_client_gone(now, client);
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
            Request::Lookup { id, keys, uncommitted, fetch } => {
                let lookup = Lookup { keys, uncommitted, fetches: fetch };
                self.session.handle_lookup(now, client, id, &lookup);
            }
            Request::Wait { id, req_id, wait_ms, uncommitted } => {
                let wait = translate::wait(wait_ms);
                self.session.handle_wait(now, client, id, req_id, wait, uncommitted);
            }
            Request::Release { id, lease, .. } => self.session.handle_release(now, client, id, lease),
            Request::Cancel { id, req_id, .. } => self.session.handle_cancel(now, client, id, &req_id),
            Request::Reset { id } => self.session.handle_reset(now, client, id),
            Request::Open { id, .. } | Request::Stage { id, .. } | Request::Send { id, .. } => {
                self.clients.reply(client, &translate::wrong_daemon(id, "receiver"));
            }
        }
    }

    fn status(&mut self) -> Status {
        let engine_silent_ms = self.engine.probe().silence().as_millis() as u64;
        let counts = self.session.counts();
        let slots = counts.slots;
        Status {
            role: "receiver".into(),
            engine: self.engine_name.into(),
            slot_count: self.config.buffer.slot_count,
            slots_free: (counts.available_bytes / self.config.layout.chunk_bytes()) as u32,
            slots_reserved: slots.reserved,
            slots_ready: slots.ready_pinned + slots.ready_idle,
            slots_quarantined: slots.quarantined,
            requests_active: counts.requests_active as u32,
            requests_done: counts.requests_ready,
            requests_failed: counts.requests_failed,
            bytes: counts.bytes,
            peers: counts.peers as u32,
            clients: self.clients.count(),
            buffer: translate::buffer_usage(&self.config, &self.manager),
            slots_held: slots.ready_pinned,
            requests_waiting: counts.requests_waiting as u32,
            waits: counts.readers_waiting as u32,
            leases: counts.leases as u32,
            transfers_in_flight: 0,
            chunks_expired: counts.chunks_expired,
            draining: self.draining,
            failures: self.tally.failures(),
            engine_silent_ms,
            receivers: Vec::new(),
        }
    }
}
