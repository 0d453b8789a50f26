//! The pd-sender: a [`SenderSession`] with its engine, its receivers and its connectors.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::awaiting_event::WRITER_GONE_AFTER;
use super::clients::Clients;
use super::deferred::{Deferred, no_event_here};
use super::driver::{self, Daemon, OUTPUTS_AT_ONCE};
use super::engine_thread::EngineThread;
use super::engine_work::{Command, EngineEvent};
use super::health::health_probe;
use super::http::HttpServer;
use super::lifecycle::{self, Stop};
use super::notes::SessionLog;
use super::peer_links::{LinkEvent, PeerLinks};
use super::probe::Probe;
use super::proxy::Proxy;
use super::ready;
use super::room::Room;
use super::setup::MemoryAndEngine;
use super::witness::{HaveEnded, Witness};
use super::{RunOptions, RuntimeError, identity, setup, translate};
use crate::buffer::{Memory, MemoryManager};
use crate::config::Config;
use crate::connector::ReadyLine;
use crate::connector::message::{Reply, Request, Status};
use crate::connector::server::ConnectorEvent;
use crate::ids::{ClientId, Failure, PeerId};
use crate::metrics::{Snapshot, Tally};
use crate::protocol::sender::{Answer, Note, OpenRequest, Output, SenderSettings, Sending};
use crate::protocol::{Safeguards, SenderSession};

/// What can happen to a sender.
enum Event {
    Link(LinkEvent),
    Engine(EngineEvent<PeerId>),
    Connector(ConnectorEvent),
    Looked(HaveEnded),
    /// A client whose connection ended a while ago writes to no slot any more.
    WriterGone(ClientId),
    Stop(Stop),
}

super::event_sources!(
    Event: Link(LinkEvent), Engine(EngineEvent<PeerId>), Connector(ConnectorEvent), Looked(HaveEnded), Stop(Stop)
);

struct SenderDaemon {
    config: Config,
    manager: MemoryManager,
    engine_name: &'static str,
    session: SenderSession,
    engine: EngineThread<PeerId>,
    /// Messages that wait for a GPU.
    deferred: Deferred,
    /// Of the message from a peer whose outputs are being done.
    room: Option<Room>,
    links: PeerLinks<Event>,
    clients: Clients,
    notes: Vec<Note>,
    log: SessionLog,
    tally: Tally,
    draining: bool,
    proxy: Option<Proxy>,
    witness: Witness,
    events: UnboundedSender<Event>,
}

/// Runs a sender until it is told to stop.
pub(super) async fn run(config: Config, options: RunOptions) -> Result<(), RuntimeError> {
    let (mailbox, mut inbox) = driver::mailbox::<Event>();
    lifecycle::watch(&mailbox.events, options.exit_with_parent)?;
    let instance = identity::instance_name(&config);
    // Before the buffer: a port that is taken is found at once, and probes are answered while the buffer is filled.
    let (probe, responder) = health_probe();
    let http = config.metrics.as_ref().map(|metrics| HttpServer::start(metrics, probe)).transpose()?;
    let parts = setup::start_memory_and_engine(&config, &instance, &mailbox.events, &mut inbox).await?;
    let Some(MemoryAndEngine { manager, engine, started }) = parts else {
        tracing::info!("told to stop before it was ready");
        return Ok(());
    };
    let clients = Clients::bind(&config).await?;
    let session = SenderSession::new(
        Instant::now(),
        SenderSettings {
            hello: identity::hello(&config, &instance, started.engine),
            agent_name: started.export.agent_name,
            metadata: started.export.metadata,
            pages: started.pages,
            chunk: identity::chunk_shape(&config),
            addresses: manager.addresses().clone(),
            len_max_bytes: config.buffer_len_bytes(),
            allocation_timeout: config.deadlines.allocation,
            handshake_timeout: config.deadlines.handshake,
            commit_timeout: config.deadlines.commit,
            write_timeout: config.deadlines.write,
            checksum: config.engine.checksum,
            requests_max: config.limits.requests_max as usize,
            request_chunks_max: config.limits.request_chunks_max as usize,
            peers_max: config.limits.peers_max as usize,
            receivers: config.receivers.clone(),
            notify_proxy: config.proxy.is_some(),
            heartbeat_interval: config.deadlines.heartbeat,
            peer_timeout: config.deadlines.peer,
            safeguards: Safeguards::default(),
        },
    );
    let proxy = config.proxy.clone().map(|proxy| Proxy::start(proxy, config.deadlines.handshake));
    let ready = ReadyLine {
        role: config.role.as_str().to_owned(),
        pid: std::process::id(),
        connector: clients.endpoint().to_owned(),
        init_port: None,
        alloc_port: None,
        query_port: None,
        metrics: http.as_ref().map(HttpServer::metrics_url),
        engine: started.engine.to_owned(),
        chunk_bytes: config.layout.chunk_bytes(),
        slot_count: config.buffer.slot_count,
    };
    let drain = config.deadlines.shutdown;
    let secret = config.shared_secret.as_ref().map(|file| file.secret.clone());
    let links = PeerLinks::new(mailbox.messages.clone(), secret, config.deadlines.handshake);
    let mut daemon = SenderDaemon {
        config,
        manager,
        engine_name: started.engine,
        session,
        engine,
        deferred: Deferred::default(),
        room: None,
        links,
        clients,
        notes: Vec::new(),
        log: SessionLog::default(),
        tally: Tally::sender(),
        draining: false,
        proxy,
        witness: Witness::default(),
        events: mailbox.events.clone(),
    };
    tracing::info!(%instance, engine = started.engine, connector = %ready.connector, "ready");
    ready::print(ready)?;
    driver::drive(&mut daemon, inbox, drain, responder).await
}

impl Daemon for SenderDaemon {
    type Event = Event;

    async fn listen(&mut self) -> Event {
        Event::Connector(self.clients.listen().await)
    }

    fn handle(&mut self, now: Instant, event: Event) -> Option<Stop> {
        match event {
            Event::Link(LinkEvent::Opened { peer, links }) => {
                let lmcache_mode = links.lmcache_mode;
                if self.links.keep(peer, *links) {
                    self.session.handle_peer_opened(now, peer, lmcache_mode);
                }
            }
            Event::Link(LinkEvent::Message { peer, port, message, room }) => {
                self.room = Some(room);
                self.session.handle_message(now, peer, port, *message);
            }
            Event::Link(LinkEvent::Closed { peer, failure }) => {
                self.links.close(peer);
                self.session.handle_peer_closed(now, peer, failure);
            }
            Event::Engine(EngineEvent::Grown { result }) => {
                self.session.handle_grown(now, result);
            }
            Event::Engine(EngineEvent::Updated { peer, connection, result }) => {
                self.session.handle_peer_updated(now, peer, connection, result);
            }
            Event::Engine(EngineEvent::EventSignalled { ticket, result }) => {
                self.on_event_signalled(now, ticket, result)
            }
            Event::Engine(EngineEvent::PeerLoaded { peer, result }) => {
                self.session.handle_peer_loaded(now, peer, result);
            }
            Event::Engine(EngineEvent::Connected { peer, result }) => {
                self.session.handle_peer_connected(now, peer, result);
            }
            // A sender checks nothing.
            Event::Engine(EngineEvent::Verified { .. } | EngineEvent::Summing) => {}
            Event::Engine(EngineEvent::Done { transfer, result }) => {
                self.session.handle_transfer_done(now, transfer, result);
            }
            Event::Connector(ConnectorEvent::Request { client, request }) => self.on_message(now, client, request),
            Event::Connector(ConnectorEvent::Gone { client }) => self.on_client_gone(now, client),
            Event::Looked(HaveEnded { peer, processes }) => {
                self.witness.forget(peer);
                self.session.handle_processes_ended(now, peer, processes);
            }
            Event::WriterGone(client) => self.forget_client(now, client),
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
                Output::OpenPeer { peer, address } => self.links.open(peer, address),
                Output::ClosePeer(peer) => self.links.close(peer),
                Output::Send { peer, port, message } => {
                    if let Err(failure) = self.links.send(peer, port, &message) {
                        self.links.close(peer);
                        self.session.handle_peer_closed(Instant::now(), peer, failure);
                    }
                }
                Output::LoadPeer { peer, agent_name, metadata } => {
                    self.engine.send_with(Command::LoadPeer { peer, agent_name, metadata }, self.room.take())?;
                }
                Output::ConnectPeer { peer, connection, memory } => {
                    self.engine.send_with(Command::Connect { peer, connection, memory }, self.room.take())?;
                }
                Output::UpdatePeer { peer, connection, metadata, descriptors } => {
                    let command = Command::UpdatePeer { peer, connection, metadata, descriptors };
                    self.engine.send_with(command, self.room.take())?;
                }
                Output::GrowBuffer => self.engine.grow()?,
                Output::CheckProcesses { peer, processes } => {
                    let events = self.events.clone();
                    self.witness.look(peer, processes, move |ended| drop(events.send(ended.into())));
                }
                Output::ForgetPeer(connection) => self.engine.send(Command::Forget(connection))?,
                Output::Post { transfer, connection, copies, summed, after } => {
                    self.engine.send(Command::Post { transfer, connection, copies, summed, after })?;
                }
                Output::Abandon { transfer, writer_gone } => {
                    self.engine.send(Command::Abandon { transfer, writer_gone })?;
                }
                Output::NotifyProxy { request } => {
                    if let Some(proxy) = &self.proxy {
                        proxy.notify(request);
                    }
                }
                Output::Answer { client, id, answer } => {
                    if let Answer::Failed { failure, .. } = &answer {
                        self.tally.count_connector_error(failure.kind);
                    }
                    self.clients.reply(client, &translate::sender_answer(id, answer));
                }
                Output::Event { client, event } => self.clients.reply(client, &translate::sender_event(event)),
                Output::Note(note) => self.notes.push(note),
            }
        }
        Ok(true)
    }

    fn log_notes(&mut self) {
        for note in self.notes.drain(..) {
            self.tally.count_sender(&note);
            self.log.sender(note);
        }
    }

    fn snapshot(&mut self) -> Snapshot {
        Snapshot { status: self.status(), tally: self.tally.clone() }
    }

    fn probe_engine(&mut self) -> Probe {
        self.engine.probe()
    }

    fn begin_shutdown(&mut self, _now: Instant) {
        self.draining = true;
        self.session.handle_shutdown();
    }

    fn is_drained(&self) -> bool {
        self.session.is_drained()
    }

    fn abort(&mut self) {
        self.session.handle_abort(Instant::now());
    }
}

impl SenderDaemon {
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
            Memory::Host(_) => self.forget_client(now, client),
            Memory::Cuda(_) => {
                let events = self.events.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(WRITER_GONE_AFTER).await;
                    // A daemon that has stopped meanwhile has no slots to give to anybody.
                    drop(events.send(Event::WriterGone(client)));
                });
            }
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
            Request::Open { id, req_id, keys, last_chunk_tokens, receiver, wait_ms, groups, stage } => {
                let wait = translate::wait(wait_ms);
                let open = OpenRequest { id: req_id, keys, groups, last_chunk_tokens, receiver, wait, stage };
                self.session.handle_open(now, client, id, open);
            }
            Request::Stage { id, req_id, chunks, wait_ms } => {
                let wait = translate::wait(wait_ms);
                self.session.handle_stage(now, client, id, &req_id, chunks, wait);
            }
            Request::Send { id, after: Some(_), .. } if matches!(**self.manager.memory(), Memory::Host(_)) => {
                self.clients.reply(client, &translate::error(id, no_event_here(), None));
            }
            Request::Send { id, req_id, parts, last, after } => {
                let sending = Sending { parts: &parts, last, after };
                self.session.handle_send(now, client, id, &req_id, sending);
            }
            Request::Cancel { id, req_id, .. } => self.session.handle_cancel(now, client, id, &req_id),
            Request::Reset { id } => self.session.handle_reset(now, client, id),
            Request::Lookup { id, .. } | Request::Wait { id, .. } | Request::Release { id, .. } => {
                self.clients.reply(client, &translate::wrong_daemon(id, "sender"));
            }
        }
    }

    fn status(&mut self) -> Status {
        let engine_silent_ms = self.engine.probe().silence().as_millis() as u64;
        let counts = self.session.counts();
        Status {
            role: "sender".into(),
            engine: self.engine_name.into(),
            slot_count: self.config.buffer.slot_count,
            slots_free: (counts.available_bytes / self.config.layout.chunk_bytes()) as u32,
            slots_reserved: counts.slots_staged,
            slots_ready: 0,
            slots_quarantined: 0,
            requests_active: counts.requests_active as u32,
            requests_done: counts.requests_sent,
            requests_failed: counts.requests_failed,
            bytes: counts.bytes,
            peers: counts.peers as u32,
            clients: self.clients.count(),
            buffer: translate::buffer_usage(&self.config, &self.manager),
            slots_held: 0,
            requests_waiting: counts.requests_waiting as u32,
            waits: counts.stages_waiting as u32,
            leases: 0,
            transfers_in_flight: counts.transfers_in_flight as u32,
            chunks_expired: 0,
            draining: self.draining,
            failures: self.tally.failures(),
            engine_silent_ms,
            receivers: self.session.receivers().map(translate::receiver).collect(),
        }
    }
}
